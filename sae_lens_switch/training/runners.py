"""SAELens's runners on our trainer, with what can be known before a long run checked before it."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import sae_lens
import wandb
from sae_lens import llm_sae_training_runner as llm_module
from sae_lens import multi_sae_training_runner as multi_module
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.training import activation_scaler as activation_scaler_module
from sae_lens.training import multi_sae_trainer as multi_trainer_module
from sae_lens.training.types import MultiHookDataProvider
from typing_extensions import override

from sae_lens_switch.common.atomic import replace_files
from sae_lens_switch.common.machine import check_run_fits
from sae_lens_switch.common.printable import logger
from sae_lens_switch.common.progress import Bar, Sentences, progress, track
from sae_lens_switch.common.substitution import constructing
from sae_lens_switch.training import checkpoints, field_rules
from sae_lens_switch.training.config import SparseSAETrainerConfig, TrainerOptions
from sae_lens_switch.training.hooks import check_hook, check_hook_name
from sae_lens_switch.training.interruption import INTERRUPTIONS, Interruption
from sae_lens_switch.training.runner_config import check_language_model_run
from sae_lens_switch.training.trainer import SparseSAETrainer, TrainingDivergedError


class LanguageModelSAETrainingRunner(sae_lens.LanguageModelSAETrainingRunner):
    """As SAELens's ``LanguageModelSAETrainingRunner``, on ``SparseSAETrainer``, for any architecture.

    The trainer's options are fields of our ``LanguageModelSAERunnerConfig``; with SAELens's config they are the
    defaults. ``run`` raises ValueError if ``d_in`` is not the width of the model's activations at ``hook_name``, and
    CheckpointError for a checkpoint that it cannot go on from.
    """

    def __init__(
        self, cfg: Any, override_dataset: Any = None, override_model: Any = None, override_sae: Any = None
    ) -> None:
        check_language_model_run(
            cfg, field_rules.RUNNER, cfg.sae
        )  # before the model is loaded; fields may have been set since
        check_run_fits(cfg, cfg.sae)
        _check_dataset(cfg, override_dataset)
        if (
            override_sae is None
            and cfg.from_pretrained_path is not None
            and not Path(cfg.from_pretrained_path).is_dir()
        ):
            raise ValueError(f"from_pretrained_path must be a folder with an SAE; got {cfg.from_pretrained_path!r}")
        if override_model is None and cfg.model_class_name == "HookedTransformer" and not cfg.use_cached_activations:
            check_hook_name(cfg.hook_name)
        super().__init__(cfg, override_dataset, override_model, override_sae)

    @override
    def run(self) -> Any:
        if not self.cfg.use_cached_activations:
            check_hook(self.model, self.cfg, self.cfg.hook_name, self.cfg.hook_head_index, self.cfg.sae.d_in)
        _find_checkpoint(self.cfg, getattr(self.cfg, "resume", None))
        if hasattr(self.cfg, "resume"):
            cast(Any, self.cfg).resume = None  # the trainer is told by SAELens's own field
        with constructing(llm_module, "SAETrainer", SparseSAETrainer):
            return super().run()

    @override
    def run_trainer_with_interruption_handling(self, trainer: Any) -> Any:
        self._history = trainer.history
        return trainer.fit()  # which handles interruptions itself

    @override
    def save_final_sae(self, sae: Any, output_path: str, log_feature_sparsity: Any = None) -> None:
        """As SAELens's, with the run's ``history.jsonl``; in place of an SAE that is there, all files at once."""
        save_into = super().save_final_sae

        def save(folder: Path) -> tuple[Path, Path]:
            save_into(sae, str(folder), log_feature_sparsity)
            self._history.save(folder)
            return folder / SAE_WEIGHTS_FILENAME, folder / SAE_CFG_FILENAME

        replace_files(output_path, save)


class MultiSAETrainingRunner(sae_lens.MultiSAETrainingRunner):
    """As SAELens's ``MultiSAETrainingRunner``: many SAEs on one stream of activations, each on ``SparseSAETrainer``."""

    def __init__(self, cfg: Any, *args: Any, options: TrainerOptions | None = None, **kwargs: Any) -> None:
        check_language_model_run(cfg, field_rules.MULTI_RUNNER, *cfg.saes.values())
        check_run_fits(cfg, *cfg.saes.values())
        _check_dataset(cfg, args[0] if args else kwargs.get("override_dataset"))
        super().__init__(cfg, *args, **kwargs)
        self.options = options or TrainerOptions()

    @override
    def run(self) -> Any:
        for name, hook_name in self.cfg.hook_names_per_sae.items():
            head = self.cfg.hook_head_indices_per_sae[name]
            check_hook(self.model, self.cfg, hook_name, head, self.cfg.saes[name].d_in)
        _find_checkpoint(self.cfg, self.options.resume)
        make = with_options(self.options)
        with (
            constructing(multi_module, "MultiSAETrainer", _MultiSAETrainer),
            constructing(multi_trainer_module, "SAETrainer", make),
        ):
            return super().run()

    @override
    def _run_with_interruption_handling(self, trainer: Any) -> Any:
        return trainer.fit()

    @override
    def _save_final_outputs(self, saes: Any, trainer: Any) -> None:
        """As SAELens's, with each SAE's ``history.jsonl``."""
        super()._save_final_outputs(saes, trainer)
        for name, of_one in trainer.trainers.items():
            of_one.history.save(Path(cast(str, self.cfg.output_path)) / name)


class _MultiSAETrainer(multi_trainer_module.MultiSAETrainer):
    """Interrupted between steps only, when all SAEs have had the same batches; checkpoints are whole or not there."""

    _bar: Bar | Sentences | None = None

    @cached_property
    def _session(self) -> checkpoints.Session:
        return checkpoints.Session()

    @override
    def fit(self) -> Any:
        self._stream = self.data_provider
        with (
            Interruption() as interruption,
            constructing(multi_trainer_module, "tqdm", self._progress),
            constructing(activation_scaler_module, "tqdm", track),
        ):
            self.data_provider = _interruptible(self._stream, interruption)
            try:
                return super().fit()
            except INTERRUPTIONS:
                if self.cfg.checkpoint_path is not None and self.n_training_steps > 0:
                    logger.warning(f"interrupted at {self.n_training_samples} samples, saving")
                    self.save_checkpoint(str(self.n_training_samples))
                raise
            except TrainingDivergedError:
                if self.cfg.checkpoint_path is not None:
                    self.save_checkpoint(f"diverged_{self.n_training_samples}")
                raise
            finally:
                self.data_provider = self._stream
                if self._bar is not None:
                    self._bar.close()

    def _progress(self, total: int, desc: str) -> Bar | Sentences:
        self._bar = progress(total, self.n_training_samples, desc, "trained on")
        return self._bar

    @override
    def _update_pbar(self, step_outputs: dict[str, Any], pbar: Any, update_interval: int = 100) -> None:
        done = self.n_training_samples - pbar.n
        pbar.update(done, lambda: {name: out.loss.item() for name, out in step_outputs.items()})

    @override
    def _run_and_log_evals(self) -> None:
        # The evaluator knows SAELens's prefetching iterator by its type, and has it wait.
        wrapped, self.data_provider = self.data_provider, self._stream
        try:
            super()._run_and_log_evals()
        finally:
            self.data_provider = wrapped
        every = self.cfg.logger.wandb_log_frequency * self.cfg.logger.eval_every_n_wandb_logs
        if (self.n_training_steps + 1) % every == 0:
            trainers: dict[str, Any] = self.trainers
            of_all = {
                f"{name}/{key}": histogram
                for name, trainer in trainers.items()
                for key, histogram in trainer.routing_histograms().items()
            }
            wandb.log(of_all, step=self.n_training_steps)

    @override
    def _checkpoint_if_needed(self) -> None:
        """Scheduled checkpoints: one that cannot be written is reported, and training goes on."""
        try:
            super()._checkpoint_if_needed()
        except OSError as error:
            self.checkpoint_thresholds.pop(0)
            logger.error(f"checkpoint at {self.n_training_samples} samples could not be saved: {error}")

    @override
    def save_checkpoint(self, checkpoint_name: str, wandb_aliases: list[str] | None = None) -> None:
        if checkpoint_name.startswith("final_"):  # what was trained is still to be written
            with checkpoints.failure_is_logged("the final checkpoint"):
                self._save_whole_checkpoint(checkpoint_name, wandb_aliases)
        else:
            self._save_whole_checkpoint(checkpoint_name, wandb_aliases)

    def _save_whole_checkpoint(self, checkpoint_name: str, wandb_aliases: list[str] | None) -> None:
        base = self.cfg.checkpoint_path
        if base is None:
            super().save_checkpoint(checkpoint_name, wandb_aliases)
            return
        trainers: dict[str, Any] = self.trainers
        facts = {
            "n_training_samples": self.n_training_samples,
            "n_training_steps": self.n_training_steps,
            "folded": any(trainer.is_folded for trainer in trainers.values()),
            "config": {name: trainer.config_of_record() for name, trainer in trainers.items()},
            **self._session.facts(Path(base)),
        }
        with checkpoints.whole_folder(Path(base) / checkpoint_name, facts) as folder:
            for name, trainer in trainers.items():
                (folder / name).mkdir()
                trainer.write_checkpoint(folder / name)
            if self.save_checkpoint_fn is not None:
                self.save_checkpoint_fn(checkpoint_path=folder)
        for name, trainer in trainers.items():
            trainer.log_artifacts(Path(base) / checkpoint_name / name, wandb_aliases)
        (keep,) = {trainer.cfg.keep_checkpoints for trainer in trainers.values()}
        if keep is not None:
            checkpoints.prune(Path(base), keep, Path(base) / checkpoint_name)

    @override
    def load_checkpoint(self, path: str | Path) -> None:
        trainers: dict[str, Any] = self.trainers
        checkpoints.verify(path, {name: trainer.config_of_record() for name, trainer in trainers.items()})
        super().load_checkpoint(path)
        for trainer in trainers.values():
            trainer.restore_training_weights()
        self._session.go_on_from(Path(path))


def _check_dataset(cfg: Any, given: Any) -> None:
    if given is None and not cfg.dataset_path:
        raise ValueError(f"dataset_path must name a dataset where none is passed in; got {cfg.dataset_path!r}")


def _find_checkpoint(cfg: Any, resume: str | None) -> None:
    """``resume`` as ``resume_from_checkpoint``; further checkpoints go beside the one that is found."""
    if resume == "latest":
        if cfg.checkpoint_path is None:
            raise ValueError("resume='latest' needs a checkpoint_path; it is None")
        # SAELens appends a name for the run to the path that was given.
        base = Path(cfg.checkpoint_path).parent
        n_samples = getattr(cfg, "training_tokens", 0)
        found = checkpoints.latest(base, n_samples=n_samples)
        resume = None if found is None else str(found)
    if resume is not None:
        cfg.resume_from_checkpoint = resume
        if cfg.checkpoint_path is not None:
            cfg.checkpoint_path = str(Path(resume).parent)


def _interruptible(stream: MultiHookDataProvider, interruption: Interruption) -> MultiHookDataProvider:
    while True:
        with interruption.waiting():
            try:
                batch = next(stream)
            except StopIteration:
                return
        yield batch


def with_options(options: TrainerOptions) -> Callable[..., SparseSAETrainer[Any, Any]]:
    def make(cfg: SAETrainerConfig, **kwargs: Any) -> SparseSAETrainer[Any, Any]:
        return SparseSAETrainer(cfg=replace(SparseSAETrainerConfig.of(cfg), **vars(options)), **kwargs)

    return make
