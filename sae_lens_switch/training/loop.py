"""The training loop: interrupted safely, ended where activations end, and saved whatever happens."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import wandb
from sae_lens.saes.sae import T_TRAINING_SAE, T_TRAINING_SAE_CONFIG, TrainStepOutput
from sae_lens.training import activation_scaler as activation_scaler_module
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.common.printable import logger
from sae_lens_switch.common.progress import Bar, Sentences, Silent, progress, track
from sae_lens_switch.common.substitution import constructing
from sae_lens_switch.common.types import Metrics, Options
from sae_lens_switch.saes.serialization import fold_activation_scaler
from sae_lens_switch.saes.step import activation_rows
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.interruption import INTERRUPTIONS, Interruption
from sae_lens_switch.training.resumable_trainer import ResumableData, ResumableTrainer
from sae_lens_switch.training.skipped_steps import SkippedSteps, TrainingDivergedError, non_finite_parameters


class LoopingTrainer(ResumableTrainer[T_TRAINING_SAE, T_TRAINING_SAE_CONFIG]):
    """What of SparseSAETrainer concerns the loop around its steps."""

    _interruption: Interruption

    skipped: SkippedSteps

    @property
    @abstractmethod
    def n_skipped_steps(self) -> int: ...

    @abstractmethod
    def _describe(self, output: TrainStepOutput) -> Metrics:
        """What a look at the progress shows. Waits for the device."""

    @override
    def fit(self) -> T_TRAINING_SAE:
        """Train until ``total_training_samples``, or until the activations end."""
        self.sae.to(self.cfg.device)
        if self.cfg.resume is not None and self.n_training_steps == 0:
            self.resume(self.cfg.resume)
        self.restore_training_weights()
        if bad := self._non_finite_weights():
            raise ValueError(f"weights of the SAE must be finite to train it; those of {', '.join(bad)} are not")
        with self._interruption, self._progress() as progress:
            try:
                self._estimate_normalization()
                while self.n_training_samples < self.cfg.total_training_samples:
                    self._log(self.maybe_reset_sparsity())
                    batch = self._next_batch()
                    if batch is None:
                        break
                    self._step_and_log(batch, progress)
                self._check_interruption()
            except INTERRUPTIONS:
                self._save_because_interrupted()
                raise
            self._finish()
        return self.sae

    def _step_and_log(self, batch: Tensor, progress: Bar | Sentences | Silent) -> None:
        """A function of its own, so that no reference to a step's tensors is alive when the next begins."""
        before = self.n_training_samples
        output = self.step(batch)
        self._log_step(output)
        self.n_training_steps += 1
        self._checkpoint_if_needed()
        progress.update(self.n_training_samples - before, lambda: self._describe(output))

    def _log_step(self, output: TrainStepOutput) -> None:
        if self.cfg.logger.log_to_wandb:
            self._log_train_step(output)
            self._run_and_log_evals()

    def _non_finite_weights(self) -> list[str]:
        return non_finite_parameters(self.sae)

    def _next_batch(self) -> Tensor | None:
        self._interruption.check()
        # What saves its place must not be interrupted when it has moved on and not yet given its batch.
        resumable = isinstance(self.data_provider, ResumableData)
        interruptible: AbstractContextManager[None] = nullcontext() if resumable else self._interruption.waiting()
        with interruptible, torch.enable_grad():  # a generator may yield inside no_grad
            batch = next(self.data_provider, None)
        if batch is None:
            logger.warning(
                f"activations ended after {self.n_training_samples} of {self.cfg.total_training_samples} samples: "
                "training ends here"
            )
        return batch

    def _progress(self) -> Bar | Sentences | Silent:
        return progress(self.cfg.total_training_samples, self.n_training_samples, "Training SAE", "trained on")

    def _estimate_normalization(self) -> None:
        """As SAELens; statistics that came with a checkpoint are kept."""
        scaler, how = self.activation_scaler, self.sae.cfg.normalize_activations
        options: Options = {
            "d_in": self.sae.cfg.d_in,
            "data_provider": self._batches_for_estimate(),
            "n_batches_for_norm_estimate": self.cfg.n_batches_for_norm_estimate,
        }
        if how == "expected_average_only_in" and scaler.scaling_factor is None:
            estimate = scaler.estimate_scaling_factor
        elif how == "covariance_whitening" and scaler.whitening is None:
            estimate = scaler.estimate_whitening
        else:
            return
        with self._interruption.waiting(), constructing(activation_scaler_module, "tqdm", track):
            estimate(**options)
        self.n_batches_drawn += self.cfg.n_batches_for_norm_estimate

    def _batches_for_estimate(self) -> Iterator[Tensor]:
        n = self.cfg.n_batches_for_norm_estimate
        for i in range(n):
            with torch.enable_grad():
                batch = next(self.data_provider, None)
            if batch is None:
                raise ValueError(f"activations ended after {i} batches, before n_batches_for_norm_estimate={n}")
            yield activation_rows(batch.detach(), self.sae.cfg.d_in)

    def _check_interruption(self) -> None:
        """The last time that a signal makes a run save what it has trained."""
        self._interruption.check()

    def stop_if_diverged(self, x_BD: Tensor | None = None) -> None:
        """Report skipped steps; after too many in a row, save and raise. Waits for the device.

        Args:
            x_BD: The batch of the step that is under way; None: none is.
        """
        under_way = x_BD is not None
        step = self.n_training_steps - (not under_way)
        in_a_row = self.skipped.report(self.sae, x_BD, step)
        if in_a_row is not None:
            self.n_training_steps += under_way  # it is over
            why = f"{in_a_row} steps in a row were skipped because loss or gradient were not finite"
            raise TrainingDivergedError(f"{why}, the last one step {step}", self._save_because_diverged())

    def _save_because_diverged(self) -> str:
        """Skipped steps leave the weights as the last finite step left them. Returns where they are now."""
        bad = self._non_finite_weights()
        if bad:
            return f"Nothing is saved, since these weights are not finite: {', '.join(bad)}"
        where = "nowhere, as checkpoint_path is None"
        if self.cfg.checkpoint_path is not None:
            self.save_checkpoint(f"diverged_{self.n_training_samples}")
            where = f"{self.cfg.checkpoint_path}/diverged_{self.n_training_samples}"
        return f"The last good weights are saved: {where}"

    def _finish(self) -> None:
        if 0 < self.n_training_steps <= self.n_skipped_steps:
            raise TrainingDivergedError(
                f"all {self.n_training_steps} steps were skipped because loss or gradient were not finite: the SAE is "
                "as it was"
            )
        self.stop_if_diverged()  # a GPU was last asked up to a hundred steps ago
        self._log(self.full_sparsity_window_log())
        fold_activation_scaler(self.sae, self.activation_scaler)
        self.set_final_sae_metadata()
        if self.cfg.save_final_checkpoint:
            with checkpoints.failure_is_logged("the final checkpoint"):  # what was trained is still to be written
                self.save_checkpoint(f"final_{self.n_training_samples}")

    def _log(self, metrics: Metrics) -> None:
        if metrics and self.cfg.logger.log_to_wandb:
            wandb.log(metrics, step=self.n_training_steps)

    @override
    @torch.no_grad()
    def _checkpoint_if_needed(self) -> None:
        with checkpoints.scheduled(self.checkpoint_thresholds, self.n_training_samples):
            super()._checkpoint_if_needed()

    def _save_because_interrupted(self) -> None:
        if self.cfg.checkpoint_path is not None and self.n_training_steps > 0:
            logger.warning(f"interrupted at {self.n_training_samples} samples, saving")
            self.save_checkpoint(str(self.n_training_samples))
            logger.warning(f"saved {self.cfg.checkpoint_path}/{self.n_training_samples}")
