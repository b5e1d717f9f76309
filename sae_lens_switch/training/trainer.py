"""SparseSAETrainer: what a training step does around forward and backward, and the loop that keeps a long run safe."""

from pathlib import Path
from typing import Any, cast

import torch
import wandb
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import T_TRAINING_SAE, T_TRAINING_SAE_CONFIG, TrainStepOutput
from sae_lens.training.sae_trainer import Evaluator, SaveCheckpointFn
from sae_lens_switch_kernels import RowGrads
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.common.machine import check_device, check_writable
from sae_lens_switch.common.types import Metrics, StateDict
from sae_lens_switch.saes.config import check_trainable
from sae_lens_switch.saes.sparse_sae import SparseTrainingSAE
from sae_lens_switch.saes.step import SparseStepInput, SparseStepOutput, activation_rows
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.accumulation import RowGradsSum, Shares, merged, release, without_graph
from sae_lens_switch.training.activations import ActivationSource, activation_batches
from sae_lens_switch.training.collapse_response import CollapseResponse
from sae_lens_switch.training.config import SparseSAETrainerConfig, refuse_several_processes
from sae_lens_switch.training.firing import FiringCounter, Firings, firings_of
from sae_lens_switch.training.history import History
from sae_lens_switch.training.interruption import Interruption
from sae_lens_switch.training.loop import LoopingTrainer
from sae_lens_switch.training.optim.constrained_adam import ConstrainedAdam
from sae_lens_switch.training.optim.row_sparse_adam import RowSparseAdam
from sae_lens_switch.training.optim.selection import optimizer_for
from sae_lens_switch.training.routing_monitor import RoutingMonitor
from sae_lens_switch.training.skipped_steps import SkippedSteps
from sae_lens_switch.training.step_graph import StepGraph, check_capturable

# The host reads back what the device has found, such as skipped steps, this often; on a CPU it costs nothing.
_LOOK_EVERY = {"cpu": 1}
_LOOK_EVERY_ON_GPU = 100


class SparseSAETrainer(LoopingTrainer[T_TRAINING_SAE, T_TRAINING_SAE_CONFIG]):
    """SAELens's trainer for any architecture, leaner and safer; for ours it makes no tensor of size B x F.

    Args:
        cfg: SparseSAETrainerConfig, or SAELens's SAETrainerConfig for the options' defaults.
        sae: Of any architecture; ours give their codes to the statistics, others their dense latents.
        data_provider: Where activations come from: an iterator of batches [n, d_in], a tensor, a folder of
            activations cached by SAELens (see ``activation_batches``). For a transcoder, rows of d_in + d_out numbers.
        evaluator: As in SAELens.
        save_checkpoint_fn: As in SAELens. It is given the checkpoint's folder while that is still being written, to
            add files to it.

    Differences from SAELens: torch's fused Adam in one pass over the weights, or row-sparse Adam; clipping without a
    pass of its own; statistics from codes; no tensor outlives its step; no wait for the device except to log, and
    once per step with AuxK outside a CUDA graph (how many latents are dead) or row-sparse Adam (how many were active).
    A step whose loss or gradient is non-finite changes nothing and is counted. Checkpoints are atomic;
    SIGINT, SIGTERM and SIGHUP write one before they stop ``fit``.

    Raises:
        ValueError: For an impossible setting, and for activations that are not d_in wide.
        CheckpointError: For a checkpoint that the run cannot resume from.
        TrainingDivergedError: After ``max_skipped_steps`` skipped steps in a row, once the weights are saved.
    """

    cfg: SparseSAETrainerConfig
    optimizer: ConstrainedAdam | RowSparseAdam
    _is_parallel = False

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
        if not self._is_parallel:
            refuse_several_processes(cfg)
        check_trainable(sae.cfg)
        check_device("device", cfg.device)
        check_device("device", sae.cfg.device)
        check_writable("checkpoint_path", cfg.checkpoint_path)
        self.firing = FiringCounter(sae.cfg.d_sae, cfg.device)
        self._normalizes = sae.cfg.normalize_activations
        data_provider = activation_batches(data_provider, cfg.train_batch_size_samples)
        super().__init__(cfg, sae, data_provider, evaluator, save_checkpoint_fn, **kwargs)
        self._sparse_sae = sae if isinstance(sae, SparseTrainingSAE) else None
        self.optimizer = optimizer_for(sae, cfg)
        self.lr_scheduler = self._make_schedule(cfg)
        self._graph, self._scalars = self._make_graph()
        self._shares = Shares()
        self.n_batches_drawn = 0
        self.skipped = SkippedSteps(cfg.max_skipped_steps, cfg.device)
        self.collapse = CollapseResponse(cfg.on_collapse)
        self.routing: RoutingMonitor | None = None
        if self._sparse_sae is not None and (layout := self._sparse_sae.expert_layout) is not None:
            self.routing = RoutingMonitor(layout, cfg.collapse_share, cfg.collapse_patience, cfg.device)
        self._last_gates_B: Tensor | None = None
        self._interruption = Interruption()
        self.history = History(cfg.total_training_steps)
        self.session = checkpoints.Session()

    def _make_graph(self) -> tuple[StepGraph[TrainStepOutput] | None, dict[str, Tensor]]:
        """What captures a step, and the numbers on the device that it reads. Raises ValueError if none can be."""
        if not self.cfg.cuda_graph:
            return None, {}
        check_capturable(self.sae, self.cfg.optimizer)
        scalars = {name: torch.zeros((), device=self.cfg.device) for name in self._numbers()}
        return StepGraph(lambda x_BD: self._on_device(x_BD, self._dead_mask(is_captured=True))), scalars

    # What fired, what was skipped

    @property
    def n_forward_passes_since_fired(self) -> Tensor:  # pyright: ignore
        """[F], float32, as in SAELens; computed lazily."""
        return self.firing.passes_since_fired_F

    @n_forward_passes_since_fired.setter
    def n_forward_passes_since_fired(self, value: Tensor) -> None:
        self.firing.passes_since_fired_F = value

    @property
    def act_freq_scores(self) -> Tensor:  # pyright: ignore
        """[F], float32, as in SAELens: how often each latent fired since these counts were last reset."""
        return self.firing.frequencies_F

    @act_freq_scores.setter
    def act_freq_scores(self, value: Tensor) -> None:
        self.firing.frequencies_F = value

    @property
    @override
    def dead_neurons(self) -> Tensor:
        return self.firing.dead_F(self.cfg.dead_feature_window)

    @property
    def n_skipped_steps(self) -> int:
        """Steps whose loss or gradient was non-finite. Waits for the device."""
        return self.skipped.total

    @property
    def n_interventions(self) -> int:
        """How often the router's collapse was countered."""
        return self.collapse.n_interventions

    def _dead_mask(self, is_captured: bool = False) -> Tensor | None:
        """Not built for a sparse SAE that will not read it: it is as long as the dictionary."""
        logs_it = not is_captured and (self._is_logging_step() or self.history.is_due(self.n_training_steps + 1))
        uses_it = self._sparse_sae is None or self._sparse_sae.needs_dead_mask
        is_needed = logs_it or (uses_it and (is_captured or self._graph is None))
        return self.firing.dead_F(self.cfg.dead_feature_window, is_captured) if is_needed else None

    @override
    def _reset_running_sparsity_stats(self) -> None:
        self.firing.counts_F.zero_()  # in place: a captured step keeps writing there
        self.n_frac_active_samples = 0
        self.skipped.begin_window()

    @override
    def full_sparsity_window_log(self) -> Metrics:
        # A run interrupted right after a window was logged resumes where there is nothing to log yet.
        return super().full_sparsity_window_log() if self.n_frac_active_samples else {}

    @property
    @override
    def feature_sparsity(self) -> Tensor:
        """Of the window's samples but for those of skipped steps, whose firings are not counted either."""
        n_skipped = self.skipped.in_window * self.cfg.train_batch_size_samples
        return self.act_freq_scores / (self.n_frac_active_samples - n_skipped).clamp_min(1)

    # The step

    @override
    def step(self, batch: Tensor) -> TrainStepOutput:
        self.n_batches_drawn += 1
        width = self.sae.cfg.d_in if self._sparse_sae is None else self._sparse_sae.batch_width
        output = super().step(activation_rows(batch.detach(), width))
        if self.history.is_due(step := self.n_training_steps + 1):
            self.history.add(step, self.build_train_step_log_dict(output, self.n_training_samples))
        return output

    @override
    def _train_step(self, sae: T_TRAINING_SAE, sae_in: Tensor) -> TrainStepOutput:
        sae.train()
        dead_mask, graph = self._dead_mask(), self._graph
        self.firing.begin_pass(is_captured=graph is not None)
        if graph is not None:
            for name, value in self._numbers().items():
                self._scalars[name].fill_(value)
            if dead_mask is not None or (self._sparse_sae is not None and self._sparse_sae.is_fresh):
                graph = None  # this step is not the one to replay
        with self.optimizer.prepared():
            output = self._on_device(sae_in, dead_mask) if graph is None else graph(sae_in)
        self.n_frac_active_samples += len(sae_in)
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        if (self.n_training_steps + 1) % _LOOK_EVERY.get(sae_in.device.type, _LOOK_EVERY_ON_GPU) == 0:
            self._look(sae_in)
        return output

    def _numbers(self) -> dict[str, float]:
        """What of a step the schedules change."""
        return {"lr": self.optimizer.param_groups[0]["lr"], **self.get_coefficients()}

    def _on_device(self, sae_in: Tensor, dead_mask: Tensor | None) -> TrainStepOutput:
        """Forward, backward, step and statistics: all that the device does, and nothing that the host keeps."""
        parts = self._parts_of(sae_in)
        row_grads = self.optimizer.row_grads
        row_grads_sum = RowGradsSum(row_grads if len(parts) > 1 else None)
        outputs: list[TrainStepOutput] = []
        firings: list[Firings] = []
        shares: list[float] = []
        for part in parts:
            output = self._forward(part, dead_mask, row_grads)
            shares.append(self._share_of(part, sae_in))
            output.loss.backward(self._shares.of(output.loss, shares[-1]))
            row_grads_sum.take()
            firings.append(firings_of(output))
            if outputs:
                release(outputs[-1])
            outputs.append(output if self._graph is None else without_graph(output))
        output = merged(outputs, shares)
        row_grads_sum.put_back()
        with torch.no_grad():
            output, firings = self._over_ranks(output, firings)
            lr, skipped = self._scalars.get("lr"), self.skipped.counts
            is_finite = self.optimizer.clipped_step(output.loss, self.cfg.max_grad_norm, lr, skipped)
            if self._sparse_sae is not None:
                self._sparse_sae.settle_step(is_finite)
            self.firing.count(firings, is_finite)
            if self.routing is not None and isinstance(output, SparseStepOutput) and output.routing is not None:
                self.routing.update(output.routing.load_E)
        self.optimizer.zero_grad()
        return output

    def _parts_of(self, batch: Tensor) -> tuple[Tensor, ...]:
        """What of a batch is computed at a time."""
        return batch.chunk(self.cfg.gradient_accumulation_steps)

    def _share_of(self, part: Tensor, batch: Tensor) -> float:
        """What the means over a part, whose forward pass is over, count for in those over the batch."""
        return len(part) / len(batch)

    def _forward(self, x_BD: Tensor, dead_mask: Tensor | None, row_grads: RowGrads | None) -> TrainStepOutput:
        step_input = SparseStepInput(
            sae_in=x_BD,
            dead_neuron_mask=dead_mask,
            coefficients=self.get_coefficients() if self._graph is None else cast(Any, self._scalars),
            n_training_steps=self.n_training_steps,
            is_logging_step=self._is_logging_step(),
            row_grads=row_grads,
            refuse_non_finite=False,
            is_captured=self._graph is not None,
        )
        with self.autocast_if_enabled:
            return self.sae.training_forward_pass(step_input=step_input)

    def _over_ranks(self, output: TrainStepOutput, firings: list[Firings]) -> tuple[TrainStepOutput, list[Firings]]:
        """Losses, firings and, in place, gradients of all processes together: this one is alone."""
        return output, firings

    def _look(self, x_BD: Tensor) -> None:
        """Report skipped steps and a collapsed router, and stop if training has diverged. Waits for the device."""
        self.stop_if_diverged(x_BD)
        if self.routing is not None:
            step = self.n_training_steps + 1
            inputs_BD = x_BD[:, : self.sae.cfg.d_in]  # of a transcoder's rows, whose targets follow
            self.collapse.watch(self.routing, step, self.sae, self.optimizer, self.coefficient_schedulers, inputs_BD)

    # What is logged and shown

    @override
    def _describe(self, output: TrainStepOutput) -> Metrics:
        """What a look at the progress shows. Waits for the device."""
        facts: Metrics = {"step": self.n_training_steps}
        facts |= {name: torch.as_tensor(value).item() for name, value in output.losses.items()}
        if self.routing is not None:
            facts["busiest expert"] = f"{len(self.routing.load_E) * float(self.routing.load_E.max()):.1f}x"
            facts["dead experts"] = int(self.routing.dead_experts.sum())
        counts = {"dead latents": int(self.dead_neurons.sum()), "skipped": self.n_skipped_steps}
        return facts | {name: n for name, n in counts.items() if n}

    @override
    @torch.no_grad()
    def build_train_step_log_dict(self, output: TrainStepOutput, n_training_samples: int) -> Metrics:
        """SAELens's names; what concerns the router under ``routing/``."""
        log = super().build_train_step_log_dict(output, n_training_samples)
        log["details/skipped_steps"] = self.n_skipped_steps
        if isinstance(output, SparseStepOutput) and output.routing is not None and self.routing is not None:
            for name in ("load_balance", *output.routing.metrics()):
                log[f"routing/{name}"] = log.pop(f"metrics/{name}")
            log |= {**self.routing.metrics(), "routing/interventions": self.n_interventions}
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
        density_F = self.feature_sparsity if self.n_frac_active_samples else None
        return self.routing.histograms(self.dead_neurons, density_F, self._last_gates_B)

    # Checkpoints

    @override
    def _own_state(self) -> StateDict:
        state: StateDict = {
            "skipped": self.skipped.counts,
            "n_interventions": self.collapse.n_interventions,
            "_reported_skips": self.skipped.n_reported,
            "_skipped_before_window": self.skipped.before_window,
            "_reported_collapse": self.collapse.has_reported,
            "_watched_at": self.collapse.watched_at,
        }
        return state if self.routing is None else state | {"routing": self.routing.state_dict()}

    @override
    def _restore_own_state(self, state: StateDict) -> None:
        self.skipped.restore(state["skipped"], state["_reported_skips"], state.get("_skipped_before_window"))
        self.collapse.n_interventions = state["n_interventions"]
        self.collapse.has_reported = state["_reported_collapse"]
        self.collapse.watched_at = state["_watched_at"]
        if self.routing is not None:
            self.routing.load_state_dict(state["routing"])

    @override
    def _load(self, path: Path) -> StateDict:
        if self._graph is not None:
            self._graph.forget()
        return super()._load(path)
