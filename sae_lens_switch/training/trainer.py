"""SparseSAETrainer: what a training step does around forward and backward, and what keeps a long run safe."""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import wandb
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import T_TRAINING_SAE, T_TRAINING_SAE_CONFIG, TrainStepInput, TrainStepOutput
from sae_lens.training import activation_scaler as activation_scaler_module
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import Evaluator, SAETrainer, SaveCheckpointFn
from sae_lens.util import path_or_tmp_dir
from sae_lens_switch_kernels import RowGrads
from sae_lens_switch_kernels.huge_pages import to_huge_pages
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from sae_lens_switch.common.machine import check_device, check_writable
from sae_lens_switch.common.printable import logger
from sae_lens_switch.common.progress import progress, track
from sae_lens_switch.common.substitution import constructing
from sae_lens_switch.saes.serialization import fold_activation_scaler
from sae_lens_switch.saes.sparse_sae import SparseStepOutput, activation_rows
from sae_lens_switch.saes.switch_sae import SwitchTrainingSAE
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.accumulation import RowGradsSum, merged, release, without_graph
from sae_lens_switch.training.activations import ActivationSource, activation_batches
from sae_lens_switch.training.checkpoints import TRAINING_FOLDER
from sae_lens_switch.training.config import SparseSAETrainerConfig, check_trainable
from sae_lens_switch.training.history import History
from sae_lens_switch.training.interruption import INTERRUPTIONS, Interruption
from sae_lens_switch.training.optim.constrained_adam import ConstrainedAdam, gradients, total_norm
from sae_lens_switch.training.optim.row_sparse_adam import RowSparseAdam
from sae_lens_switch.training.routing_monitor import REMEDY, Collapse, RoutingMonitor, reseed
from sae_lens_switch.training.step_graph import StepGraph

STATE_FILENAME = "sparse_trainer_state.pt"
# A host reads back what the device has found, such as skipped steps, this often; on a CPU it costs nothing.
_LOOK_EVERY = {"cpu": 1}
_LOOK_EVERY_ON_GPU = 100
# Plain numbers of the trainer that a checkpoint holds.
_REMEMBERED = (
    *("n_batches_drawn", "n_interventions"),
    *("_reported_skips", "_reported_collapse", "_watched_at"),
)
# What says, in an SAE's metadata, which activations a run trains on.
_SOURCE = (
    *("model_name", "hook_name", "hook_head_index", "context_size", "prepend_bos", "seqpos_slice"),
    *("exclude_special_tokens", "model_from_pretrained_kwargs"),
)
# What may differ between a run and the checkpoint it goes on from.
_NOT_IN_CHECKPOINT = {
    *("device", "checkpoint_path", "n_checkpoints", "save_final_checkpoint", "logger", "resume"),
    *("keep_checkpoints", "max_skipped_steps", "gradient_accumulation_steps", "cuda_graph"),
}


Firings = tuple[Tensor | None, Tensor]


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class SparseSAETrainer(SAETrainer[T_TRAINING_SAE, T_TRAINING_SAE_CONFIG]):
    """SAELens's trainer for any architecture, leaner and safer; for ours it makes no tensor of size B x F.

    Args:
        cfg: SparseSAETrainerConfig, or SAELens's SAETrainerConfig for the options' defaults.
        sae: Of any architecture; ours give their codes to the statistics, others their dense latents.
        data_provider: Where activations come from: an iterator of batches [n, d_in], a tensor, a folder of
            activations cached by SAELens (see ``activation_batches``).
        evaluator: As in SAELens.
        save_checkpoint_fn: As in SAELens. It is given the checkpoint's folder while that is still being written, to
            add files to it.

    Differences from SAELens: torch's fused Adam in one pass over the weights, or row-sparse Adam; clipping without a
    pass of its own; statistics from codes; nothing of a step outlives it; no wait for the device except to log, and
    once a step with AuxK (how many latents are dead) or row-sparse Adam (how many were active).
    A step whose loss or gradient is not finite changes nothing and is counted. Checkpoints are whole or not there;
    SIGINT, SIGTERM and SIGHUP write one before they stop ``fit``.

    Raises ValueError for a setting that cannot be, and if activations are not d_in wide; CheckpointError for a
    checkpoint it cannot go on from; TrainingDivergedError after ``max_skipped_steps`` skipped steps in a row, once the
    weights are saved.
    """

    cfg: SparseSAETrainerConfig

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: T_TRAINING_SAE,
        data_provider: ActivationSource,
        evaluator: Evaluator[T_TRAINING_SAE] | None = None,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
        **kwargs: Any,
    ) -> None:
        cfg = SparseSAETrainerConfig.of(cfg).resolved(sae.cfg.d_sae)
        check_trainable(sae.cfg)
        for device in (cfg.device, sae.cfg.device):
            check_device("device", device)
        check_writable("checkpoint_path", cfg.checkpoint_path)
        data_provider = activation_batches(data_provider, cfg.train_batch_size_samples)
        self._n_passes = 0
        self._training_weights: Path | None = None
        self._normalizes = sae.cfg.normalize_activations
        self._last_fired_F = torch.zeros(sae.cfg.d_sae, dtype=torch.int32, device=cfg.device)
        self._pass = torch.zeros((), dtype=torch.int32, device=cfg.device)  # n_passes, where a captured step sees it
        super().__init__(cfg, sae, data_provider, evaluator, save_checkpoint_fn, **kwargs)
        self._use_own_optimizer()
        self._graph, self._scalars = self._make_graph()
        self.n_batches_drawn = 0
        self._skipped = torch.zeros(2, dtype=torch.int64, device=cfg.device)  # in a row, and in all
        self._reported_skips = 0
        self.n_interventions = 0
        self._reported_collapse = False
        self._watched_at = 0
        self.routing: RoutingMonitor | None = None
        if hasattr(sae.cfg, "n_experts"):
            self.routing = RoutingMonitor(sae.cfg.n_experts, cfg.collapse_share, cfg.collapse_patience, cfg.device)
        self._interruption = Interruption()
        self.history = History(cfg.total_training_steps)
        self.session = checkpoints.Session()

    def _make_graph(self) -> tuple[StepGraph[TrainStepOutput] | None, dict[str, Tensor]]:
        """What captures a step, and the numbers on the device that it reads. Raises ValueError if none can be."""
        if not self.cfg.cuda_graph:
            return None, {}
        sae: Any = self.sae
        for name, fits in {
            f"an SAE with sparse codes, not {sae.cfg.architecture()!r}": hasattr(sae, "row_grads"),
            "optimizer='adam'": self.cfg.optimizer == "adam",
            "aux_loss_coefficient=0": not getattr(sae.cfg, "aux_loss_coefficient", 0),
        }.items():
            if not fits:
                raise ValueError(f"cuda_graph must be False without {name}; got True")
        scalars = {name: torch.zeros((), device=self.cfg.device) for name in self._numbers()}
        return StepGraph(lambda x_BD: self._on_device(self.sae, x_BD, None)), scalars

    def _use_own_optimizer(self) -> None:
        """In place of SAELens's Adam, under the same schedule."""
        cfg: Any = self.cfg
        sae: Any = self.sae
        if not any(p.requires_grad for p in sae.parameters()):
            raise ValueError("an SAE to train must have a parameter with requires_grad=True; this one has none")
        sae.to(cfg.device)
        for p in sae.parameters():
            p.data = to_huge_pages(p.data)  # every step goes through all of it
        betas = cfg.adam_beta1, cfg.adam_beta2
        if cfg.optimizer == "row_sparse_adam":
            self.optimizer = RowSparseAdam(sae, cfg.lr, betas)
            sae.row_grads = None  # but in a step: whoever trains the SAE afterwards wants its gradients
        else:
            self.optimizer = ConstrainedAdam(
                sae.parameters(),
                cfg.lr,
                betas,
                unit_rows=sae.W_dec if getattr(sae.cfg, "normalize_decoder", False) else None,
                project=getattr(sae.cfg, "project_decoder_grad", False),
                after_step=getattr(sae, "follow_ties", None),
            )
        self.lr_scheduler = self._schedule(self.cfg)

    def _schedule(self, cfg: Any) -> LRScheduler:
        return get_lr_scheduler(
            cfg.lr_scheduler_name,
            lr=cfg.lr,
            optimizer=self.optimizer,
            warm_up_steps=cfg.lr_warm_up_steps,
            decay_steps=cfg.lr_decay_steps,
            training_steps=cfg.total_training_steps,
            lr_end=cfg.lr_end,
            num_cycles=cfg.n_restart_cycles,
        )

    # Counting what fired

    @property
    def n_forward_passes_since_fired(self) -> Tensor:  # pyright: ignore
        """[F], float32, as in SAELens; computed when asked for."""
        return (self._n_passes - self._last_fired_F).to(torch.float32)

    @n_forward_passes_since_fired.setter
    def n_forward_passes_since_fired(self, value: Tensor) -> None:
        self._last_fired_F.copy_(self._n_passes - value)

    @property
    @override
    def dead_neurons(self) -> Tensor:
        return self._n_passes - self._last_fired_F > self.cfg.dead_feature_window

    @property
    def n_skipped_steps(self) -> int:
        """Steps whose loss or gradient was not finite. Waits for the device."""
        return int(self._skipped[1])

    def _dead_mask(self) -> Tensor | None:
        """None for an SAE of ours that will not look at it: it is as long as the dictionary."""
        logs_it = self._is_logging_step() or self.history.is_due(self.n_training_steps + 1)
        uses_it = getattr(self.sae.cfg, "aux_loss_coefficient", 0) != 0 or logs_it
        ours = hasattr(self.sae, "row_grads")
        return self.dead_neurons if uses_it or not ours else None

    def _count_fired(self, firings: list[Firings], good: Tensor) -> None:
        for indices, counts in firings:
            counts = counts * good
            now = torch.where(counts > 0, self._pass, torch.iinfo(torch.int32).min)
            if indices is None:
                torch.maximum(self._last_fired_F, now, out=self._last_fired_F)
                self.act_freq_scores += counts
            else:
                self._last_fired_F.scatter_reduce_(0, indices, now, "amax")
                self.act_freq_scores.scatter_add_(0, indices, counts.to(self.act_freq_scores.dtype))

    @override
    def _reset_running_sparsity_stats(self) -> None:
        cast(Tensor, self.act_freq_scores).zero_()  # in place: a captured step goes on writing there
        self.n_frac_active_samples = 0

    @override
    def full_sparsity_window_log(self) -> dict[str, Any]:
        # A run interrupted right after a window was logged goes on where there is nothing to log yet.
        return super().full_sparsity_window_log() if self.n_frac_active_samples else {}

    # The step

    @override
    def step(self, batch: Tensor) -> TrainStepOutput:
        self.n_batches_drawn += 1
        output = super().step(activation_rows(batch.detach(), self.sae.cfg.d_in))
        step = self.n_training_steps + 1
        if self.history.is_due(step):
            self.history.add(step, self.build_train_step_log_dict(output, self.n_training_samples))
        return output

    @override
    def _train_step(self, sae: T_TRAINING_SAE, sae_in: Tensor) -> TrainStepOutput:
        sae.train()
        dead_mask = self._dead_mask()
        self._n_passes += 1
        self._pass.fill_(self._n_passes)
        if self._graph is None:
            output = self._on_device(sae, sae_in, dead_mask)
        else:
            for name, value in self._numbers().items():
                self._scalars[name].fill_(value)
            replays = dead_mask is None and not getattr(sae, "is_fresh", False)
            output = self._graph(sae_in) if replays else self._on_device(sae, sae_in, dead_mask)
        self.n_frac_active_samples += len(sae_in)
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        if (self.n_training_steps + 1) % _LOOK_EVERY.get(sae_in.device.type, _LOOK_EVERY_ON_GPU) == 0:
            self._stop_if_diverged(sae_in)
            self._watch_routing(sae_in)
        return output

    def _numbers(self) -> dict[str, float]:
        """What of a step the schedules change."""
        return {"lr": self.optimizer.param_groups[0]["lr"], **self.get_coefficients()}

    def _on_device(self, sae: T_TRAINING_SAE, sae_in: Tensor, dead_mask: Tensor | None) -> TrainStepOutput:
        """Forward, backward, step and statistics: all that the device does, and nothing that the host keeps."""
        parts = sae_in.chunk(self.cfg.gradient_accumulation_steps)
        row_grads = getattr(self.optimizer, "row_grads", None)
        row_grads_sum = RowGradsSum(row_grads if len(parts) > 1 else None)
        outputs, firings = [], []
        for part in parts:
            output = self._forward(sae, part, dead_mask, row_grads)
            (output.loss if len(parts) == 1 else output.loss * (len(part) / len(sae_in))).backward()
            row_grads_sum.take()
            firings.append(_firings(output))
            if outputs:
                release(outputs[-1])
            outputs.append(output if self._graph is None else without_graph(output))
        output = merged(outputs)
        row_grads_sum.put_back()
        with torch.no_grad():
            good = self._clip_and_step(output.loss)
            if isinstance(sae, SwitchTrainingSAE):
                sae.settle_start(good)
            self._count_fired(firings, good)
            if self.routing is not None and isinstance(output, SparseStepOutput) and output.routing is not None:
                self.routing.update(output.routing.load_E)
        self.optimizer.zero_grad()
        return output

    def _forward(
        self, sae: T_TRAINING_SAE, x_BD: Tensor, dead_mask: Tensor | None, row_grads: RowGrads | None
    ) -> TrainStepOutput:
        step_input = TrainStepInput(
            sae_in=x_BD,
            dead_neuron_mask=dead_mask,  # type: ignore[arg-type]
            coefficients=self.get_coefficients() if self._graph is None else cast(Any, self._scalars),
            n_training_steps=self.n_training_steps,
            is_logging_step=self._is_logging_step(),
        )
        with self.autocast_if_enabled, _on_our_terms(sae, row_grads):
            return sae.training_forward_pass(step_input=step_input)

    def _clip_and_step(self, loss: Tensor) -> Tensor:
        """Clip, project, step, renormalise. Returns, still on the device, whether there was a step."""
        optimizer, sae = cast(Any, self.optimizer), cast(Any, self.sae)
        row_sparse = isinstance(optimizer, RowSparseAdam)
        grads = optimizer.grads() if row_sparse else gradients(sae.parameters())
        norm = total_norm(grads)
        good = torch.isfinite(norm) & torch.isfinite(loss.detach())
        max_norm = self.cfg.max_grad_norm
        scale = torch.ones_like(norm) if max_norm is None else ((norm + 1e-6) / max_norm).clamp_min(1)
        self._skipped[0].add_(1).mul_(~good)
        self._skipped[1].add_(~good)
        if row_sparse:
            if good:  # its index has been waited for anyway
                optimizer.step(grad_scale=scale)
                if hasattr(sae, "follow_ties"):
                    sae.follow_ties()
        elif _LOOK_EVERY.get(norm.device.type) == 1 and not good:  # nothing to wait for
            pass
        elif optimizer.is_fused and norm.dtype == torch.float32:
            # The fused step divides by the scale, and leaves everything as it is where something was not finite.
            radial_F = None if optimizer.row_grads is None else optimizer.row_grads.radial_R
            lr = self._scalars.get("lr")
            optimizer.step(grad_scale=scale, found_inf=(~good).to(torch.float32), radial_F=radial_F, lr=lr)
        elif good:
            for grad in grads:
                grad.div_(scale)
            optimizer.step()
        if optimizer.row_grads is not None:
            optimizer.row_grads.clear()
        return good

    def _stop_if_diverged(self, x_BD: Tensor) -> None:
        in_a_row, total = self._skipped.tolist()
        if total > self._reported_skips:
            self._reported_skips = total
            reason = f" ({self._why_not_finite(x_BD)})" if in_a_row else ""
            logger.warning(
                f"step {self.n_training_steps}: {total} steps skipped so far, {in_a_row} in a row, because loss or "
                f"gradient were not finite{reason}"
            )
        if in_a_row >= self.cfg.max_skipped_steps:
            what_happened = (
                f"{in_a_row} steps in a row were skipped because loss or gradient were not finite, the last one step "
                f"{self.n_training_steps}"
            )
            raise TrainingDivergedError(f"{what_happened}. {self._save_because_diverged()}")

    def _why_not_finite(self, x_BD: Tensor) -> str:
        if bad := int((~torch.isfinite(x_BD)).sum()):
            return f"{bad} activations are not finite"
        normalized = self.sae.run_time_activation_norm_fn_in(x_BD)
        if bad := int((~torch.isfinite(normalized)).any(dim=-1).sum()):
            return f"{bad} activations are not finite once normalised: {self.sae.cfg.normalize_activations!r}"
        largest = float(x_BD.abs().max())
        return f"the activations are finite, the largest {largest:.3g}: is that their size, or lr too high?"

    def _save_because_diverged(self) -> str:
        """Skipped steps leave the weights as the last good step left them. Returns where they are now."""
        bad = _not_finite_parameters(self.sae)
        if bad:
            return f"Nothing is saved, since these weights are not finite: {', '.join(bad)}"
        where = "nowhere, as checkpoint_path is None"
        if self.cfg.checkpoint_path is not None:
            self.n_training_steps += 1  # this one is over
            self.save_checkpoint(f"diverged_{self.n_training_samples}")
            where = f"{self.cfg.checkpoint_path}/diverged_{self.n_training_samples}"
        return f"The last good weights are saved: {where}"

    # The loop

    @override
    def fit(self) -> T_TRAINING_SAE:
        """Train until ``total_training_samples``, or until the activations end."""
        self.sae.to(self.cfg.device)
        if self.cfg.resume is not None and self.n_training_steps == 0:
            self.resume(self.cfg.resume)
        self.restore_training_weights()
        if bad := _not_finite_parameters(self.sae):
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
                self._interruption.check()
            except INTERRUPTIONS:
                self._save_because_interrupted()
                raise
            self._finish()
        return self.sae

    def _step_and_log(self, batch: Tensor, progress: Any) -> None:
        """A function, so that nothing of a step is left when the next begins."""
        output = self.step(batch)
        if self.cfg.logger.log_to_wandb:
            self._log_train_step(output)
            self._run_and_log_evals()
        self.n_training_steps += 1
        self._checkpoint_if_needed()
        progress.update(batch[..., 0].numel(), lambda: self._describe(output))

    def _next_batch(self) -> Tensor | None:
        self._interruption.check()
        # What knows its place must not be broken off when it has moved on and not yet given its batch.
        breakable = nullcontext() if _knows_its_place(self.data_provider) else self._interruption.waiting()
        with breakable, torch.enable_grad():  # a generator may yield inside no_grad
            batch = next(self.data_provider, None)
        if batch is None:
            logger.warning(
                f"activations ended after {self.n_training_samples} of {self.cfg.total_training_samples} samples: "
                "training ends here"
            )
        return batch

    def _progress(self) -> Any:
        return progress(self.cfg.total_training_samples, self.n_training_samples, "Training SAE", "trained on")

    def _describe(self, output: TrainStepOutput) -> dict[str, Any]:
        """What a look at the progress shows. Waits for the device."""
        facts: dict[str, Any] = {"step": self.n_training_steps}
        facts |= {name: torch.as_tensor(value).item() for name, value in output.losses.items()}
        if self.routing is not None:
            E = len(self.routing.load_E)
            facts["busiest expert"] = f"{E * float(self.routing.load_E.max()):.1f}x"
            facts["dead experts"] = int(self.routing.dead_experts.sum())
        counts = {"dead latents": int(self.dead_neurons.sum()), "skipped": self.n_skipped_steps}
        return facts | {name: n for name, n in counts.items() if n}

    def _estimate_normalization(self) -> None:
        """As SAELens; statistics that came with a checkpoint are kept."""
        scaler, how = self.activation_scaler, self.sae.cfg.normalize_activations
        options: dict[str, Any] = {
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

    def _finish(self) -> None:
        if 0 < self.n_training_steps <= self.n_skipped_steps:
            raise TrainingDivergedError(
                f"all {self.n_training_steps} steps were skipped because loss or gradient were not finite: the SAE is "
                "as it was"
            )
        self._log(self.full_sparsity_window_log())
        fold_activation_scaler(self.sae, self.activation_scaler)
        self.set_final_sae_metadata()
        if self.cfg.save_final_checkpoint:
            with checkpoints.failure_is_logged("the final checkpoint"):  # what was trained is still to be written
                self.save_checkpoint(f"final_{self.n_training_samples}")

    # What is logged

    def _log(self, metrics: dict[str, Any]) -> None:
        if metrics and self.cfg.logger.log_to_wandb:
            wandb.log(metrics, step=self.n_training_steps)

    @override
    @torch.no_grad()
    def build_train_step_log_dict(self, output: TrainStepOutput, n_training_samples: int) -> dict[str, Any]:
        """SAELens's names; what concerns the router under ``routing/``."""
        log = super().build_train_step_log_dict(output, n_training_samples)
        log["details/skipped_steps"] = self.n_skipped_steps
        if isinstance(output, SparseStepOutput) and output.routing is not None and self.routing is not None:
            for name in output.routing.metrics():
                log[f"routing/{name}"] = log.pop(f"metrics/{name}")
            log["routing/load_balance"] = log.pop("metrics/load_balance")
            log["routing/dead_experts"] = int(self.routing.dead_experts.sum())
            log["routing/interventions"] = self.n_interventions
            log |= {f"routing/load_expert_{e}": load for e, load in enumerate(self.routing.load_E.tolist())}
            self._last_gates_B = output.routing.gates_B.float().cpu()
        return log

    @override
    @torch.no_grad()
    def _run_and_log_evals(self) -> None:
        """SAELens's evaluation, and histograms of the routing."""
        super()._run_and_log_evals()
        every = self.cfg.logger.wandb_log_frequency * self.cfg.logger.eval_every_n_wandb_logs
        if (self.n_training_steps + 1) % every == 0:
            self._log(self.routing_histograms())

    @torch.no_grad()
    def routing_histograms(self) -> dict[str, wandb.Histogram]:
        if self.routing is None:
            return {}
        E = len(self.routing.load_E)
        of_experts = {
            "load": self.routing.load_E,
            "dead_latents": self.dead_neurons.view(E, -1).sum(1),
            "latent_density": self.feature_sparsity.view(E, -1).mean(1) if self.n_frac_active_samples else None,
            "gates": getattr(self, "_last_gates_B", None),
        }
        # numpy makes bins for finite numbers alone, and in float32 not for those that are very close.
        return {
            f"routing/{name}_histogram": wandb.Histogram(values[values.isfinite()].double().cpu().numpy())  # type: ignore[arg-type]
            for name, values in of_experts.items()
            if values is not None
        }

    # Collapse of the router

    def _watch_routing(self, x_BD: Tensor) -> None:
        monitor = self.routing
        if monitor is None or self.n_training_steps + 1 - self._watched_at < monitor.patience // 4:
            return
        self._watched_at = self.n_training_steps + 1
        collapse = monitor.collapse()
        if collapse is None:
            return
        if not self._reported_collapse:
            self._reported_collapse = True
            what = f"To do: {REMEDY}" if self.cfg.on_collapse == "report" else f"on_collapse={self.cfg.on_collapse!r}"
            logger.warning(f"step {self.n_training_steps}: {collapse.describe(monitor.patience)}. {what}")
        if self.cfg.on_collapse != "report":
            self._counter(collapse, x_BD)
            monitor.start_over()

    def _counter(self, collapse: Collapse, x_BD: Tensor) -> None:
        self.n_interventions += 1
        if self.cfg.on_collapse == "raise_coefficient":
            scheduler = self.coefficient_schedulers["load_balance"]
            scheduler.final_value = 2 * scheduler.final_value or 0.1
            scheduler.warm_up_steps = 0
            scheduler.current_value = scheduler.final_value
        else:
            assert self.routing is not None
            least = int(self.routing.load_E.argmin())
            reseed(self.sae, self.optimizer, x_BD, collapse.without_tokens or [least])

    # Checkpoints

    @override
    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """A folder that is whole and on disk when it appears. Raises OSError, e.g. when the disk is full."""
        base = self.cfg.checkpoint_path if base_path is None else base_path
        if base is None and not self.cfg.logger.log_to_wandb:
            if self.save_checkpoint_fn is not None:
                self.save_checkpoint_fn(checkpoint_path=None)
            return
        with path_or_tmp_dir(base) as parent:
            path = Path(parent) / checkpoint_name
            with checkpoints.whole_folder(path, self.checkpoint_facts() | self.session.facts(path.parent)) as folder:
                self.write_checkpoint(folder)
                if self.save_checkpoint_fn is not None:
                    self.save_checkpoint_fn(checkpoint_path=folder if base is not None else None)
            self.log_artifacts(path, wandb_aliases)
            if base is not None and self.cfg.keep_checkpoints is not None:
                checkpoints.prune(Path(parent), self.cfg.keep_checkpoints, path)

    def write_checkpoint(self, folder: Path) -> None:
        """SAELens's files and ours, into a folder that is there."""
        save_file({"sparsity": self.log_feature_sparsity}, folder / SPARSITY_FILENAME)
        self.history.save(folder)
        scaler = self.activation_scaler
        if scaler.scaling_factor is None and scaler.whitening is None:
            self.sae.save_model(str(folder))
            self.save_trainer_state(folder)
            return
        # The SAE is one for activations as they are, as it is at the end of training; training goes on from its own
        # weights, which are for scaled ones.
        folded = copy.deepcopy(self.sae)
        fold_activation_scaler(folded, copy.copy(scaler))
        folded.save_model(str(folder))
        training = folder / TRAINING_FOLDER
        self.save_trainer_state(training)
        weights = self.sae.state_dict()
        self.sae.process_state_dict_for_saving(weights)
        save_file(weights, training / SAE_WEIGHTS_FILENAME)

    def log_artifacts(self, folder: Path, aliases: list[str] | None) -> None:
        if self.cfg.logger.log_to_wandb:
            self.cfg.logger.log(
                self,
                folder / "sae_weights.safetensors",
                folder / "cfg.json",
                sparsity_path=folder / SPARSITY_FILENAME,
                wandb_aliases=aliases,
            )

    def checkpoint_facts(self) -> dict[str, Any]:
        """What ``checkpoint.json`` says of the run."""
        return {
            "n_training_samples": self.n_training_samples,
            "n_training_steps": self.n_training_steps,
            "folded": self.is_folded,
            "config": self.config_of_record(),
        }

    @property
    def is_folded(self) -> bool:
        """Whether what scaled the activations has gone into the weights, as at the end: no place to go on from."""
        return self.sae.cfg.normalize_activations != self._normalizes

    def config_of_record(self) -> dict[str, Any]:
        """The settings that a run and the checkpoint it goes on from must share."""
        sae = {n: v for n, v in self.sae.cfg.to_dict().items() if n not in ("metadata", "device")}
        trainer = {n: v for n, v in vars(self.cfg).items() if n not in _NOT_IN_CHECKPOINT}
        return {"sae": sae, "trainer": trainer}

    @override
    def save_trainer_state(self, checkpoint_path: Path) -> None:
        super().save_trainer_state(checkpoint_path)
        state: dict[str, Any] = {
            "skipped": self._skipped,
            **{name: getattr(self, name) for name in _REMEMBERED},
            "coefficients": {
                name: {k: getattr(s, k) for k in ("final_value", "warm_up_steps")}
                for name, s in self.coefficient_schedulers.items()
            },
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }
        if self.routing is not None:
            state["routing"] = self.routing.state_dict()
        if _knows_its_place(self.data_provider):
            state["data"] = self.data_provider.state_dict()  # type: ignore[attr-defined]
        torch.save(state, checkpoint_path / STATE_FILENAME)

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """State of the optimiser, schedules, statistics and random numbers; weights are loaded by the SAE.

        Raises CheckpointError for a checkpoint that is damaged or of another configuration. One of SAELens's own
        trainer is read as well.
        """
        with checkpoints.loading(Path(checkpoint_path)):
            self._restore_random(self._load(Path(checkpoint_path)))

    def _load(self, path: Path) -> dict[str, Any]:
        """Everything but what concerns the activations and random numbers, which is returned."""
        checkpoints.verify(path, self.config_of_record())
        self._check_source(path)
        if self._graph is not None:
            self._graph.forget()
        self.session.go_on_from(path)
        training = path / TRAINING_FOLDER
        self._training_weights = training / SAE_WEIGHTS_FILENAME if training.is_dir() else None
        training = training if training.is_dir() else path
        state: dict[str, Any] = {}
        plan = {name: getattr(self.cfg, name) for name in checkpoints.MAY_CHANGE}
        plan_before = {n: v for n, v in checkpoints.config_of(path).get("trainer", {}).items() if n in plan}
        if plan | plan_before != plan:
            self.lr_scheduler = self._schedule(replace(self.cfg, **plan_before))  # what is saved is of this one
        super().load_trainer_state(training)
        if plan | plan_before != plan:
            self._follow_new_plan(plan_before)
        self.history.load(path)
        if (training / STATE_FILENAME).exists():
            state = torch.load(training / STATE_FILENAME, map_location="cpu", weights_only=True)
            self._skipped.copy_(state["skipped"])
            if self._skipped[0] >= self.cfg.max_skipped_steps:  # of a run that stopped because of them
                self._skipped[0] = 0
            vars(self).update({name: state[name] for name in _REMEMBERED})
            if self.routing is not None:
                self.routing.load_state_dict(state["routing"])
            for name, values in state["coefficients"].items():
                scheduler = self.coefficient_schedulers[name]
                vars(scheduler).update(values)
                scheduler.load_state_dict(scheduler.state_dict())  # its value follows from these
        else:  # SAELens's trainer counts no batches
            estimated = (
                self.activation_scaler.scaling_factor is not None or self.activation_scaler.whitening is not None
            )
            self.n_batches_drawn = self.n_training_samples // self.cfg.train_batch_size_samples
            self.n_batches_drawn += self.cfg.n_batches_for_norm_estimate if estimated else 0
        # Thresholds that were passed make no checkpoint again.
        self.checkpoint_thresholds = [t for t in self.checkpoint_thresholds if t >= self.n_training_samples]
        return state

    def _follow_new_plan(self, before: dict[str, Any]) -> None:
        """A run that is to be longer than its checkpoint's, or shorter, gets the schedule of its new length."""
        planned, steps = self.cfg.total_training_samples, self.cfg.total_training_steps
        was = before.get("total_training_samples", planned)
        lr_before = self.optimizer.param_groups[0]["lr"]
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.lr
        self.lr_scheduler = self._schedule(self.cfg)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch misses the optimiser's steps in between
            for _ in range(self.n_training_steps):
                self.lr_scheduler.step()
        logger.warning(
            f"the run was planned for {was} samples and goes on to {planned}, from {self.n_training_samples}: the "
            f"learning rate is {self.optimizer.param_groups[0]['lr']:.4g} from here on ({lr_before:.4g} by the plan "
            f"before), and follows lr_scheduler_name={self.cfg.lr_scheduler_name!r} with lr_decay_steps="
            f"{self.cfg.lr_decay_steps} to the end at step {steps}"
        )

    def _check_source(self, path: Path) -> None:
        """Raises CheckpointError if the checkpoint's activations were of another model or place in it."""
        file, now = path / SAE_CFG_FILENAME, self.sae.cfg.metadata
        try:
            before = json.loads(file.read_text(encoding="utf-8")).get("metadata") or {}
        except (OSError, ValueError, AttributeError):  # a checkpoint of several SAEs has none here
            return
        differences = {
            name: f"{name} was {before[name]!r}, is {getattr(now, name)!r}"
            for name in (*_SOURCE, "dataset_path")
            if before.get(name) is not None
            and getattr(now, name, None) is not None
            and before[name] != json.loads(json.dumps(getattr(now, name), default=str))
        }
        moved = differences.pop("dataset_path", None)
        if differences:
            raise checkpoints.CheckpointError(
                f"checkpoint {path} is of other activations: {'; '.join(differences.values())}"
            )
        if moved is not None:
            logger.warning(f"the run goes on from {path} with other data, unless it has only moved: {moved}")

    def restore_training_weights(self) -> None:
        """After the checkpoint's SAE has been loaded: the weights that training goes on from, where they are others."""
        if self._training_weights is not None:
            weights = load_file(self._training_weights)
            self.sae.process_state_dict_for_loading(weights)
            self.sae.load_state_dict(weights)
            self._training_weights = None

    def _restore_random(self, state: dict[str, Any]) -> None:
        if "random" in state:
            torch.set_rng_state(state["random"])
            for i, cuda in enumerate(state["random_cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(cuda, i)

    def resume(self, checkpoint: Path | str = "latest") -> Path | None:
        """Go on from a checkpoint: weights, everything the trainer keeps, and the place in the activations.

        "latest" is the newest whole one below ``checkpoint_path``; None is returned if there is none. An iterator
        with ``load_state_dict`` is told its place; from any other, which must begin where it did the first time,
        the batches that were used are drawn and dropped.
        """
        path: Path | None = Path(checkpoint)
        if checkpoint == "latest":
            if self.cfg.checkpoint_path is None:
                raise ValueError("resume='latest' needs a checkpoint_path; it is None")
            path = checkpoints.latest(
                self.cfg.checkpoint_path, self.config_of_record(), self.cfg.total_training_samples
            )
        if path is None:
            return None
        with checkpoints.loading(path):
            state = self._load(path)
            self.sae.load_weights_from_checkpoint(path)
            self.restore_training_weights()
        if "data" in state and _knows_its_place(self.data_provider):
            self.data_provider.load_state_dict(state["data"])  # type: ignore[attr-defined]
        else:
            for i in track(range(self.n_batches_drawn), desc="Returning to the place in the activations"):
                if next(self.data_provider, None) is None:
                    raise ValueError(
                        f"activations ended after {i} of {self.n_batches_drawn} batches, before the place of "
                        f"checkpoint {path}"
                    )
        self._restore_random(state)  # at last: drawing may have used random numbers
        logger.info(f"resumed from {path} at {self.n_training_samples} samples")
        return path

    @override
    @torch.no_grad()
    def _checkpoint_if_needed(self) -> None:
        """Scheduled checkpoints: one that cannot be written is reported, and training goes on."""
        try:
            super()._checkpoint_if_needed()
        except OSError as error:
            self.checkpoint_thresholds.pop(0)
            logger.error(f"checkpoint at {self.n_training_samples} samples could not be saved: {error}")

    def _save_because_interrupted(self) -> None:
        if self.cfg.checkpoint_path is not None and self.n_training_steps > 0:
            logger.warning(f"interrupted at {self.n_training_samples} samples, saving")
            self.save_checkpoint(str(self.n_training_samples))
            logger.warning(f"saved {self.cfg.checkpoint_path}/{self.n_training_samples}")


def _not_finite_parameters(sae: nn.Module) -> list[str]:
    """By their sums first, which take no memory."""
    return [
        name
        for name, p in sae.named_parameters()
        if not torch.isfinite(p.detach().sum(dtype=torch.promote_types(p.dtype, torch.float32)))
        and not torch.isfinite(p).all()
    ]


def _firings(output: TrainStepOutput) -> Firings:
    """Which latents have fired, and how often: those of the codes one by one, or all of a dense SAE's latents."""
    if isinstance(output, SparseStepOutput):
        return output.codes.indices.flatten(), output.codes.values.flatten() > 0
    acts = output.feature_acts
    counts_F = (acts.bool() if acts.is_sparse else acts.ne(0)).to(torch.float32).sum(0)
    return None, counts_F.to_dense() if counts_F.is_sparse else counts_F


@contextmanager
def _on_our_terms(sae: Any, row_grads: RowGrads | None) -> Iterator[None]:
    """An SAE of ours looks at its loss, and refuses to go on; here it need not, and the device is not waited for. What
    the optimiser wants of the backward pass goes to ``row_grads``."""
    ours = {"refuses_not_finite": False, "row_grads": row_grads}
    before = {name: getattr(sae, name) for name in ours if hasattr(sae, name)}
    for name in before:
        setattr(sae, name, ours[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(sae, name, value)


def _knows_its_place(data_provider: Any) -> bool:
    return callable(getattr(data_provider, "load_state_dict", None))
