"""SAELens's trainer of many SAEs on one stream of activations, with our trainer for each."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import wandb
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training import activation_scaler as activation_scaler_module
from sae_lens.training import multi_sae_trainer as multi_trainer_module
from sae_lens.training.types import MultiHookDataProvider
from typing_extensions import override

from sae_lens_switch.common.printable import logger
from sae_lens_switch.common.progress import Bar, Sentences, Silent, progress, track
from sae_lens_switch.common.substitution import constructing
from sae_lens_switch.common.types import AnyTrainingSAE, Json
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.interruption import INTERRUPTIONS, Interruption
from sae_lens_switch.training.skipped_steps import TrainingDivergedError
from sae_lens_switch.training.trainer import SparseSAETrainer


class MultiSAETrainer(multi_trainer_module.MultiSAETrainer):
    """SAELens's, interrupted only between steps, when all SAEs have had the same batches; checkpoints are atomic."""

    _bar: Bar | Sentences | Silent | None = None
    _interruption: Interruption

    def own_trainers(self) -> "dict[str, SparseSAETrainer[Any, Any]]":
        return cast("dict[str, SparseSAETrainer[Any, Any]]", self.trainers)

    @cached_property
    def _session(self) -> checkpoints.Session:
        return checkpoints.Session()

    @override
    def fit(self) -> dict[str, AnyTrainingSAE]:
        self._stream = self.data_provider
        with (
            self._new_interruption() as self._interruption,
            constructing(multi_trainer_module, "tqdm", self._progress),
            constructing(activation_scaler_module, "tqdm", track),
        ):
            self.data_provider = self._batches(self._stream, self._interruption)
            try:
                return super().fit()
            except INTERRUPTIONS:
                if self.cfg.checkpoint_path is not None and self.n_training_steps > 0:
                    logger.warning(f"interrupted at {self.n_training_samples} samples, saving")
                    self.save_checkpoint(str(self.n_training_samples))
                raise
            except TrainingDivergedError as error:
                raise TrainingDivergedError(error.what, self._save_diverged()) from error
            finally:
                self.data_provider = self._stream
                if self._bar is not None:
                    self._bar.close()

    def _save_diverged(self) -> str:
        """Returns where the weights of all SAEs are now."""
        where = "nowhere, as checkpoint_path is None"
        if self.cfg.checkpoint_path is not None:
            self.save_checkpoint(f"diverged_{self.n_training_samples}")
            where = f"{self.cfg.checkpoint_path}/diverged_{self.n_training_samples}"
        return f"The last good weights are saved: {where}"

    @override
    def _maybe_log_sparsity(self, final: bool = False) -> None:
        if final:
            self._check_interruption()
            for trainer in self.own_trainers().values():
                trainer.stop_if_diverged()
        super()._maybe_log_sparsity(final)

    def _check_interruption(self) -> None:
        """The last time that a signal makes a run save what it has trained."""
        self._interruption.check()

    def _new_interruption(self) -> Interruption:
        return Interruption()

    def _batches(self, stream: MultiHookDataProvider, interruption: Interruption) -> MultiHookDataProvider:
        """Those of the stream, between which training may be interrupted."""
        while True:
            with interruption.waiting():
                try:
                    batch = next(stream)
                except StopIteration:
                    return
            yield batch

    def _progress(self, total: int, desc: str) -> Bar | Sentences | Silent:
        self._bar = progress(total, self.n_training_samples, desc, "trained on")
        return self._bar

    @override
    def _update_pbar(  # type: ignore[override], a bar of ours stands in for tqdm's
        self, step_outputs: dict[str, TrainStepOutput], pbar: Bar | Sentences | Silent, update_interval: int = 100
    ) -> None:
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
            of_all = {
                f"{name}/{key}": histogram
                for name, trainer in self.own_trainers().items()
                for key, histogram in trainer.routing_histograms().items()
            }
            wandb.log(of_all, step=self.n_training_steps)

    @override
    def _checkpoint_if_needed(self) -> None:
        with checkpoints.scheduled(self.checkpoint_thresholds, self.n_training_samples), self._counting_this_step():
            super()._checkpoint_if_needed()

    @contextmanager
    def _counting_this_step(self) -> Iterator[None]:
        """SAELens counts a step after the checkpoint that holds it, so that a resumed run would count it again."""
        counters = [self, *self.own_trainers().values()]
        for counter in counters:
            counter.n_training_steps += 1
        try:
            yield
        finally:
            for counter in counters:
                counter.n_training_steps -= 1

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
        path, trainers = Path(base) / checkpoint_name, self.own_trainers()
        self._write_checkpoint(path)
        for name, trainer in trainers.items():
            trainer.log_artifacts(path / name, wandb_aliases)
        (keep,) = {trainer.cfg.keep_checkpoints for trainer in trainers.values()}
        if keep is not None:
            self._prune(path, keep)

    def _write_checkpoint(self, path: Path) -> None:
        facts = self._facts() | self._session.facts(path.parent)
        with checkpoints.whole_folder(path, facts) as folder:
            self._write_saes(folder)
            if self.save_checkpoint_fn is not None:
                self.save_checkpoint_fn(checkpoint_path=folder)

    def _facts(self) -> Json:
        return {
            "n_training_samples": self.n_training_samples,
            "n_training_steps": self.n_training_steps,
            "folded": any(trainer.is_folded for trainer in self.own_trainers().values()),
            "config": self._configs(),
        }

    def _configs(self) -> dict[str, Json]:
        return {name: trainer.config_of_record() for name, trainer in self.own_trainers().items()}

    def _write_saes(self, folder: Path) -> None:
        for name, trainer in self.own_trainers().items():
            (folder / name).mkdir()
            trainer.write_checkpoint(folder / name)

    def _prune(self, written: Path, keep: int) -> None:
        checkpoints.prune(written.parent, keep, written)

    def _verify(self, path: Path) -> None:
        checkpoints.verify(path, self._configs())

    @override
    def load_checkpoint(self, path: str | Path) -> None:
        trainers = self.own_trainers()
        self._verify(Path(path))
        super().load_checkpoint(path)
        for trainer in trainers.values():
            trainer.restore_training_weights()
        self._session.go_on_from(Path(path))
        # Thresholds that were passed make no checkpoint again.
        self.checkpoint_thresholds = [t for t in self.checkpoint_thresholds if t >= self.n_training_samples]
