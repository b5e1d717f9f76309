"""SAELens runners that use SparseSAETrainer and validate the configuration before training starts."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import sae_lens
from sae_lens import llm_sae_training_runner as llm_module
from sae_lens import multi_sae_training_runner as multi_module
from sae_lens.config import HfDataset, SAETrainerConfig
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.training import multi_sae_trainer as multi_trainer_module
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from transformer_lens import HookedRootModule
from typing_extensions import override

from sae_lens_switch.common.atomic import replace_files
from sae_lens_switch.common.machine import check_run_fits
from sae_lens_switch.common.substitution import constructing
from sae_lens_switch.common.types import AnyTrainingSAE
from sae_lens_switch.saes.init_from import saved_for
from sae_lens_switch.saes.transcoder_fields import refuse_transcoders
from sae_lens_switch.training import checkpoints, field_rules
from sae_lens_switch.training.activation_pairs import (
    PairedActivationsStore,
    check_hook_out,
    hook_out_of,
    loading_also,
)
from sae_lens_switch.training.config import SparseSAETrainerConfig, TrainerOptions, refuse_several_processes
from sae_lens_switch.training.hooks import check_hook, check_hook_name
from sae_lens_switch.training.multi_sae_trainer import MultiSAETrainer
from sae_lens_switch.training.runner_config import LanguageModelRun, check_language_model_run
from sae_lens_switch.training.trainer import SparseSAETrainer
from sae_lens_switch.training.transcoder_evals import TranscoderEvaluator


class LanguageModelSAETrainingRunner(sae_lens.LanguageModelSAETrainingRunner):
    """As SAELens's ``LanguageModelSAETrainingRunner``, on ``SparseSAETrainer``, for any architecture.

    The trainer's options are fields of our ``LanguageModelSAERunnerConfig``; with SAELens's config they have their
    defaults.

    Raises:
        ValueError: For a setting that no run can have; by ``run``, if ``d_in`` is not the width of the model's
            activations at ``hook_name``.
        CheckpointError: By ``run``, for a checkpoint that it cannot resume from.
    """

    _is_parallel = False

    def __init__(
        self,
        cfg: sae_lens.LanguageModelSAERunnerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_sae: AnyTrainingSAE | None = None,
    ) -> None:
        check_language_model_run(
            cfg, field_rules.RUNNER, cfg.sae
        )  # before the model is loaded; fields may have been set since
        if isinstance(cfg, TrainerOptions) and not self._is_parallel:
            refuse_several_processes(cfg)
        check_run_fits(cfg, cfg.sae)
        _check_dataset(cfg, override_dataset)
        if override_sae is None and cfg.from_pretrained_path is not None:
            if not Path(cfg.from_pretrained_path).is_dir():
                raise ValueError(f"from_pretrained_path must be a folder with an SAE; got {cfg.from_pretrained_path!r}")
            override_sae = saved_for(cfg.sae, Path(cfg.from_pretrained_path))
        hook_out = hook_out_of(cfg, has_model=override_model is not None)
        if override_model is None and cfg.model_class_name == "HookedTransformer" and not cfg.use_cached_activations:
            check_hook_name(cfg.hook_name)
        with nullcontext() if hook_out is None else constructing(llm_module, "load_model", loading_also(hook_out)):
            super().__init__(cfg, override_dataset, override_model, override_sae)
        if hook_out is not None:
            self.activations_store = PairedActivationsStore.of(self.activations_store, cfg, hook_out)
            self.evaluator = TranscoderEvaluator(
                **{**vars(self.evaluator), "activations_store": self.activations_store}
            )

    @override
    def run(self) -> AnyTrainingSAE:
        if not self.cfg.use_cached_activations:
            check_hook(self.model, self.cfg, self.cfg.hook_name, self.cfg.hook_head_index, self.cfg.sae.d_in)
            check_hook_out(self.model, self.cfg)
        self._find_checkpoint()
        if self.cfg.prefetch_llm_batches:
            self._return_to_place()
        with constructing(llm_module, "SAETrainer", self._trainer()):
            return super().run()

    def _return_to_place(self) -> None:
        """Before a thread begins to read ahead, which would do so from the start, or while SAELens skips texts."""
        _return_to_place(self.activations_store, self.cfg.resume_from_checkpoint)

    def _find_checkpoint(self) -> None:
        options = self.cfg if isinstance(self.cfg, TrainerOptions) else None
        _find_checkpoint(self.cfg, None if options is None else options.resume)
        if options is not None:
            options.resume = None  # SAELens's own field tells the trainer

    def _trainer(self) -> Callable[..., SparseSAETrainer[Any, Any]]:
        """What makes the trainer."""
        return SparseSAETrainer

    @override
    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        hook_out = hook_out_of(self.cfg, has_model=True)
        if hook_out is not None:
            self.sae.cfg.metadata.hook_name_out = hook_out

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> AnyTrainingSAE:
        assert isinstance(trainer, SparseSAETrainer)
        self._history = trainer.history
        return trainer.fit()  # which handles interruptions itself

    @override
    def save_final_sae(self, sae: AnyTrainingSAE, output_path: str, log_feature_sparsity: Tensor | None = None) -> None:
        """As SAELens's, with the run's ``history.jsonl``; in place of an SAE that is there, all files at once."""
        save_into = super().save_final_sae

        def save(folder: Path) -> tuple[Path, Path]:
            save_into(sae, str(folder), log_feature_sparsity)
            self._history.save(folder)
            return folder / SAE_WEIGHTS_FILENAME, folder / SAE_CFG_FILENAME

        replace_files(output_path, save)


class MultiSAETrainingRunner(sae_lens.MultiSAETrainingRunner):
    """As SAELens's ``MultiSAETrainingRunner``: many SAEs on one stream of activations, each on ``SparseSAETrainer``."""

    def __init__(
        self,
        cfg: MultiSAETrainingRunnerConfig,
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_saes: dict[str, AnyTrainingSAE] | None = None,
        *,
        options: TrainerOptions | None = None,
    ) -> None:
        check_language_model_run(cfg, field_rules.MULTI_RUNNER, *cfg.saes.values())
        refuse_transcoders("an SAE of a run of many SAEs", *cfg.saes.values())
        check_run_fits(cfg, *(cfg.saes[name] for name in self._trained_here(cfg)))
        _check_dataset(cfg, override_dataset)
        super().__init__(cfg, override_dataset, override_model, override_saes)
        self.options = options or TrainerOptions()

    def _trained_here(self, cfg: MultiSAETrainingRunnerConfig) -> Iterable[str]:
        """Names of the SAEs that this process trains."""
        return cfg.saes

    @override
    def run(self) -> dict[str, AnyTrainingSAE]:
        for name, hook_name in self.cfg.hook_names_per_sae.items():
            head = self.cfg.hook_head_indices_per_sae[name]
            check_hook(self.model, self.cfg, hook_name, head, self.cfg.saes[name].d_in)
        self._find_checkpoint()
        found = self.cfg.resume_from_checkpoint
        if found is not None and Path(found).is_dir() and not (Path(found) / ACTIVATIONS_STORE_STATE_FILENAME).exists():
            raise checkpoints.CheckpointError(
                f"checkpoint {found} is not of a run of many SAEs on one process: one on several resumes under "
                "torchrun, if need be with --nproc-per-node 1, by parallel.ParallelMultiSAETrainingRunner"
            )
        if self.cfg.prefetch_llm_batches:
            self._return_to_place()
        make = with_options(self.options)
        with (
            constructing(multi_module, "MultiSAETrainer", self._trainer()),
            constructing(multi_trainer_module, "SAETrainer", make),
        ):
            return super().run()

    def _find_checkpoint(self) -> None:
        _find_checkpoint(self.cfg, self.options.resume)

    def _return_to_place(self) -> None:
        """As in ``LanguageModelSAETrainingRunner``."""
        _return_to_place(self.activations_store, self.cfg.resume_from_checkpoint)

    def _trainer(self) -> Callable[..., MultiSAETrainer]:
        """What makes the trainer."""
        return MultiSAETrainer

    @override
    def _run_with_interruption_handling(
        self, trainer: multi_trainer_module.MultiSAETrainer
    ) -> dict[str, AnyTrainingSAE]:
        return trainer.fit()

    @override
    def _save_final_outputs(
        self, saes: dict[str, AnyTrainingSAE], trainer: multi_trainer_module.MultiSAETrainer
    ) -> None:
        """As SAELens's, with each SAE's ``history.jsonl``."""
        super()._save_final_outputs(saes, trainer)
        assert isinstance(trainer, MultiSAETrainer)
        assert self.cfg.output_path is not None
        for name, of_one in trainer.own_trainers().items():
            of_one.history.save(Path(self.cfg.output_path) / name)


def _check_dataset(cfg: LanguageModelRun, given: HfDataset | None) -> None:
    if given is None and not cfg.dataset_path:
        raise ValueError(f"dataset_path must name a dataset where none is passed in; got {cfg.dataset_path!r}")


def _find_checkpoint(cfg: LanguageModelRun, resume: str | None) -> None:
    """``resume`` as ``resume_from_checkpoint``; further checkpoints go beside the one that is found."""
    if resume == "latest":
        if cfg.checkpoint_path is None:
            raise ValueError("resume='latest' needs a checkpoint_path; it is None")
        # SAELens appends a name for the run to the path that was given.
        base = Path(cfg.checkpoint_path).parent
        found = checkpoints.latest(base, n_samples=cfg.training_tokens)
        resume = None if found is None else str(found)
    if resume is not None:
        cfg.resume_from_checkpoint = resume
        if cfg.checkpoint_path is not None:
            cfg.checkpoint_path = str(Path(resume).parent)


def _return_to_place(store: ActivationsStore, checkpoint: str | None) -> None:
    """In the texts. SAELens does the same later, which then finds nothing to skip."""
    if checkpoint is not None and (Path(checkpoint) / ACTIVATIONS_STORE_STATE_FILENAME).exists():
        with checkpoints.loading(Path(checkpoint)):
            store.load_from_checkpoint(checkpoint)


def with_options(options: TrainerOptions) -> Callable[..., SparseSAETrainer[Any, Any]]:
    def make(cfg: SAETrainerConfig, **kwargs: Any) -> SparseSAETrainer[Any, Any]:
        return SparseSAETrainer(cfg=replace(SparseSAETrainerConfig.of(cfg), **vars(options)), **kwargs)

    return make
