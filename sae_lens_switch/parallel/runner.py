"""The language-model runner on several processes, each with its own model and its own share of the dataset."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import sae_lens
from sae_lens.config import HfDataset
from sae_lens.constants import RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens import HookedRootModule
from typing_extensions import override

from sae_lens_switch.common.atomic import replace_files, scratch
from sae_lens_switch.common.types import AnyTrainingSAE
from sae_lens_switch.parallel.agreement import first_does
from sae_lens_switch.parallel.checkpoints import all_do, weight_parts
from sae_lens_switch.parallel.consolidate import write_whole
from sae_lens_switch.parallel.data_parallel import DataParallelSAETrainer
from sae_lens_switch.parallel.latent_trainer import LatentParallelSAETrainer
from sae_lens_switch.parallel.ranked_trainer import RankedTrainer
from sae_lens_switch.parallel.ranks import Ranks, local_device, start_process_group
from sae_lens_switch.parallel.shard import Shard
from sae_lens_switch.parallel.shard_classes import LATENT_SHARDS, OVER_BATCH, expert_shard_class
from sae_lens_switch.parallel.sharded_files import Whole, write_parts
from sae_lens_switch.parallel.share import return_to_place, take_share_of_store
from sae_lens_switch.parallel.trainer import ParallelSparseSAETrainer
from sae_lens_switch.saes.weight_files import sharded_safetensors
from sae_lens_switch.training.config import TrainerOptions
from sae_lens_switch.training.runner_config import LanguageModelRun, LanguageModelSAERunnerConfig
from sae_lens_switch.training.runners import LanguageModelSAETrainingRunner

AnyRankedTrainer = RankedTrainer[Any, Any]


class _Division(NamedTuple):
    """How SAEs are divided: the field that says over how many processes, what trains their parts, and these."""

    field: str
    trainer_class: type[AnyRankedTrainer]
    shard_classes: Mapping[str, Callable[[Any], type[Shard]]]  # by architecture, and by config


_EXPERTS = _Division(
    "expert_parallel", ParallelSparseSAETrainer, dict.fromkeys(("switch", "switch_transcoder"), expert_shard_class)
)
_LATENTS = _Division(
    "latent_parallel", LatentParallelSAETrainer, {name: lambda _, c=c: c for name, c in LATENT_SHARDS.items()}
)


class ParallelLanguageModelSAETrainingRunner(LanguageModelSAETrainingRunner):
    """As ``LanguageModelSAETrainingRunner``, one for each process that torchrun has started.

    Counts in the config are of all processes together; ``n_batches_in_buffer`` is each one's. ``device="cuda"`` is the
    process's own GPU. Each process reads its own part of the dataset, or of cached activations, and evaluates on it.

    Raises:
        ValueError: As the runner of one process; also outside torchrun.
        RankLostError: By ``run``, once another process has died or does not answer.
    """

    _is_parallel = True

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_sae: AnyTrainingSAE | None = None,
    ) -> None:
        division = _division_of(cfg)
        use_local_devices(cfg)
        start_process_group(cfg.device, cfg.rank_timeout)
        row_size, field = (1, "expert_parallel") if division is None else (vars(cfg)[division.field], division.field)
        self.ranks = Ranks(row_size, cfg.device, cfg.rank_timeout, field)
        if not self.ranks.is_first:
            os.environ["WANDB_MODE"] = "disabled"  # the first process logs for all
        # Both hold names that SAELens has drawn at random.
        cfg.checkpoint_path, cfg.logger = self.ranks.first_says((cfg.checkpoint_path, cfg.logger))
        if division is not None:
            shard_class = division.shard_classes[cfg.sae.architecture()](cfg.sae)
            override_sae = self._own_part(cfg, shard_class, override_sae)
        self._trainer_class = DataParallelSAETrainer if division is None else division.trainer_class
        super().__init__(cfg, override_dataset, override_model, override_sae)
        take_share_of_store(self.activations_store, self.cfg.train_batch_size_tokens, self.ranks)

    def _own_part(
        self, cfg: LanguageModelSAERunnerConfig[Any], shard_class: type[Shard], given: AnyTrainingSAE | None
    ) -> Shard:
        if given is None and cfg.from_pretrained_path is None:
            return shard_class.fresh(cfg.sae, self.ranks)
        whole = given or TrainingSAE.load_from_disk(cfg.from_pretrained_path or "", converter=sharded_safetensors)
        wanted, found = cfg.sae.architecture(), whole.cfg.architecture()
        if found != wanted:
            raise ValueError(f"the SAE to train must be a {wanted} SAE, as the config's; got {found}")
        return shard_class.of(whole, self.ranks)

    @override
    def _trainer(self) -> Callable[..., AnyRankedTrainer]:
        return self._trainer_class

    @override
    def _find_checkpoint(self) -> None:
        """The first process looks; the trainer resumes by itself, since SAELens knows of files of one process only."""
        self._resume_from = find_together(self.ranks, self.cfg, super()._find_checkpoint)
        if isinstance(self.cfg, TrainerOptions):
            self.cfg.resume = None

    @override
    def _return_to_place(self) -> None:
        if self._resume_from is not None:
            return_to_place(self.activations_store, Path(self._resume_from), self.ranks)

    @override
    def run_trainer_with_interruption_handling(self, trainer: Any) -> AnyTrainingSAE:
        if self._resume_from is not None:
            trainer.load_trainer_state(Path(self._resume_from))
            trainer.load_weights(Path(self._resume_from))
            self._return_to_place()
        return super().run_trainer_with_interruption_handling(trainer)

    @override
    def save_final_sae(self, sae: AnyTrainingSAE, output_path: str, log_feature_sparsity: Tensor | None = None) -> None:
        """The whole SAE in the ordinary format; the first process has a block of it in memory at a time."""
        if not isinstance(sae, Shard):
            if self.ranks.is_first:
                super().save_final_sae(sae, output_path, log_feature_sparsity)
            return
        Path(output_path).mkdir(parents=True, exist_ok=True)
        weights = self.ranks.first_says(scratch(Path(output_path), "saving", "weights"))
        try:
            parts = all_do(self.ranks, output_path, lambda: weight_parts(sae, for_inference=True))
            write_parts(weights, parts, self.ranks)
            if self.ranks.is_first:
                self._save_whole(sae, weights, Path(output_path), log_feature_sparsity)
        finally:
            if self.ranks.is_first:
                shutil.rmtree(weights, ignore_errors=True)

    def _save_whole(self, sae: Shard, weights: Path, output: Path, sparsity_F: Tensor | None) -> None:
        cfg = sae.config_of_whole().get_inference_sae_cfg_dict()

        def save(folder: Path) -> tuple[Path, Path]:
            if sparsity_F is not None:
                save_file({"sparsity": sparsity_F}, folder / SPARSITY_FILENAME)
            (folder / RUNNER_CFG_FILENAME).write_text(json.dumps(self.cfg.to_dict()), encoding="utf-8")
            self._history.save(folder)
            return write_whole(Whole(weights), folder, cfg, for_training=False)

        replace_files(output, save)


def find_together(ranks: Ranks, cfg: LanguageModelRun, find: Callable[[], None]) -> str | None:
    """The checkpoint that ``find`` leaves in the config on the first process, for all; in no config afterwards.

    Raises:
        ValueError: On every process, if ``find`` does on the first.
    """

    def found() -> tuple[str | None, str | None]:
        find()
        return cfg.resume_from_checkpoint, cfg.checkpoint_path

    checkpoint, cfg.checkpoint_path = first_does(ranks, found)
    cfg.resume_from_checkpoint = None
    return checkpoint


def use_local_devices(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Make "cuda" in a config the GPU of this process."""
    cfg.device = cfg.sae.device = local_device(cfg.device)
    cfg.llm_device = local_device(cfg.llm_device or cfg.device)
    cfg.act_store_device = local_device(cfg.act_store_device or cfg.device)


def is_parallel(cfg: sae_lens.LanguageModelSAERunnerConfig[Any]) -> bool:
    """Whether torchrun has started this process, or the config asks for several."""
    wants = isinstance(cfg, LanguageModelSAERunnerConfig) and (cfg.expert_parallel > 1 or cfg.latent_parallel > 1)
    return wants or {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def _division_of(cfg: LanguageModelSAERunnerConfig[Any]) -> _Division | None:
    """None: each process has the whole SAE. Raises ValueError for a field that divides SAEs of another architecture."""
    architecture = cfg.sae.architecture()
    for division in (_EXPERTS, _LATENTS):
        n, divided = vars(cfg)[division.field], division.shard_classes
        if architecture not in divided and n > 1:
            raise ValueError(
                f"{division.field} must be 1 for a {architecture} SAE, as it divides {' and '.join(divided)}; got {n}"
            )
    if architecture in _EXPERTS.shard_classes:
        return _EXPERTS
    return _LATENTS if cfg.latent_parallel > 1 or architecture in OVER_BATCH else None
