"""SAELens's runner of many SAEs on several processes: SAEs and texts are divided over them."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sae_lens.config import HfDataset
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training import multi_sae_trainer as multi_trainer_module
from torch import nn
from transformer_lens import HookedRootModule
from typing_extensions import override

from sae_lens_switch.common.types import AnyTrainingSAE, Json
from sae_lens_switch.parallel.agreement import refuse_differences
from sae_lens_switch.parallel.many_saes import ParallelMultiSAETrainer, deal
from sae_lens_switch.parallel.ranks import Ranks, local_device, n_processes, start_process_group
from sae_lens_switch.parallel.runner import find_together
from sae_lens_switch.parallel.share import return_to_place, take_share_of_store
from sae_lens_switch.training.config import TrainerOptions
from sae_lens_switch.training.multi_sae_trainer import MultiSAETrainer
from sae_lens_switch.training.runners import MultiSAETrainingRunner

# What may differ between processes: where each computes.
_DEVICES = ("device", "llm_device", "act_store_device")


class ParallelMultiSAETrainingRunner(MultiSAETrainingRunner):
    """As ``MultiSAETrainingRunner``, one for each process that torchrun has started.

    Each process trains some of the SAEs, on all data, and runs the language model on its own part of it: with N
    processes both the SAEs' work and the model's are divided by N. Counts in the config are of all processes together;
    ``n_batches_in_buffer`` is each one's. ``device="cuda"`` is the process's own GPU. Evaluations are each process's of
    its own SAEs. In W&B each process has a run of its own, all in one group.

    Args:
        cfg: SAELens's config, the same for all processes, with at least as many SAEs as these.
        override_dataset: As SAELens's; each process takes its part.
        override_model: As SAELens's.
        override_saes: As SAELens's, by name; only those that this process trains are used, and needed.
        options: Our trainer's options.

    Attributes:
        owners: Which process trains each SAE.

    Raises:
        ValueError: As the runner of one process; also for settings that differ between processes, for fewer SAEs than
            processes, and outside torchrun.
        RankLostError: By ``run``, once another process has died or does not answer.
    """

    def __init__(
        self,
        cfg: MultiSAETrainingRunnerConfig,
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_saes: Mapping[str, AnyTrainingSAE] | None = None,
        *,
        options: TrainerOptions | None = None,
    ) -> None:
        options = options or TrainerOptions()
        for name in _DEVICES:
            setattr(cfg, name, local_device(vars(cfg)[name] or cfg.device))
        for sae in cfg.saes.values():
            sae.device = local_device(sae.device)
        start_process_group(cfg.device, options.rank_timeout)
        self.ranks = Ranks(n_processes(), cfg.device, options.rank_timeout)
        # Both hold names that SAELens has drawn at random.
        cfg.checkpoint_path, cfg.logger = self.ranks.first_says((cfg.checkpoint_path, cfg.logger))
        refuse_differences(self.ranks, _settings(cfg, options))
        self.owners = deal(cfg.saes, cfg.hook_names_per_sae, self.ranks.size)
        self._resume_from: str | None = None
        self._name_own_run(cfg)
        saes = self._own_saes(cfg, override_saes)
        super().__init__(cfg, override_dataset, override_model, saes, options=options)
        self.saes = {name: self.saes[name] for name in self._trained_here(cfg)}
        take_share_of_store(self.activations_store, cfg.train_batch_size_tokens, self.ranks)

    @override
    def _trained_here(self, cfg: MultiSAETrainingRunnerConfig) -> Iterable[str]:
        return [name for name in cfg.saes if self.owners[name] == self.ranks.rank]

    def _name_own_run(self, cfg: MultiSAETrainingRunnerConfig) -> None:
        """In W&B: a run of each process, named after it, in a group named after the first's."""
        logger, suffix = cfg.logger, f"-rank{self.ranks.rank}"
        os.environ.setdefault("WANDB_RUN_GROUP", str(logger.run_name))
        if not self.ranks.is_first:
            own_id = None if logger.wandb_id is None else logger.wandb_id + suffix
            cfg.logger = replace(logger, run_name=f"{logger.run_name}{suffix}", wandb_id=own_id)

    def _own_saes(
        self, cfg: MultiSAETrainingRunnerConfig, given: Mapping[str, AnyTrainingSAE] | None
    ) -> dict[str, AnyTrainingSAE]:
        """Those that this process trains, and for the others, which SAELens's runner wants too, something empty."""
        own = set(self._trained_here(cfg))
        if given is not None and own - given.keys():
            raise ValueError(
                f"override_saes must have the SAEs that rank {self.ranks.rank} trains, {', '.join(sorted(own))}; got "
                f"{', '.join(sorted(given)) or 'none'}"
            )

        def made(name: str) -> AnyTrainingSAE:
            if given is not None:
                return given[name]
            sae_class, _ = get_sae_training_class(cfg.saes[name].architecture())
            return sae_class(cfg.saes[name])

        empty: Any = nn.Identity()
        return {name: made(name) if name in own else empty for name in cfg.saes}

    @override
    def _find_checkpoint(self) -> None:
        """The first process looks; ``_run_with_interruption_handling`` resumes, with this process's own place."""
        self._resume_from = find_together(self.ranks, self.cfg, super()._find_checkpoint)

    @override
    def _return_to_place(self) -> None:
        if self._resume_from is not None:
            return_to_place(self.activations_store, Path(self._resume_from), self.ranks)

    @override
    def _trainer(self) -> Callable[..., MultiSAETrainer]:
        return partial(ParallelMultiSAETrainer, ranks=self.ranks, owners=self.owners)

    @override
    def _run_with_interruption_handling(
        self, trainer: multi_trainer_module.MultiSAETrainer
    ) -> dict[str, AnyTrainingSAE]:
        if self._resume_from is not None:
            trainer.load_checkpoint(self._resume_from)
            self._return_to_place()
        return super()._run_with_interruption_handling(trainer)

    @override
    def _save_final_outputs(
        self, saes: dict[str, AnyTrainingSAE], trainer: multi_trainer_module.MultiSAETrainer
    ) -> None:
        """Each process its own SAEs; the first comes last, and with it the config that they share."""
        if not self.ranks.is_first:
            super()._save_final_outputs(saes, trainer)
        self.ranks.gather_objects(None)
        if self.ranks.is_first:
            super()._save_final_outputs(saes, trainer)


def _settings(cfg: MultiSAETrainingRunnerConfig, options: TrainerOptions) -> Json:
    """All that must be the same on all processes."""
    of_run = {name: value for name, value in cfg.to_dict().items() if name not in _DEVICES}
    saes = {name: {n: v for n, v in sae.items() if n != "device"} for name, sae in of_run.pop("saes").items()}
    return of_run | {"saes": saes, "options": vars(options)}
