"""The Switch SAE in training: its loss, its first batch, and the decoder's constraint."""

from typing import Any

import torch
from numpy.typing import NDArray
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput
from sae_lens_switch_kernels import (
    EncoderPrecision,
    Reconstruction,
    RowGrads,
    biased_probs,
    router_logits,
    sparse_autoencode,
    switch_encode,
    update_expert_bias,
)
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.common.printable import logger
from sae_lens_switch.common.torch_private import has_hooks
from sae_lens_switch.common.types import Metrics, StateDict
from sae_lens_switch.saes.config import SwitchTrainingSAEConfig
from sae_lens_switch.saes.data_dependent_init import FirstBatchStart, Start, start_from_batch
from sae_lens_switch.saes.decoder_constraint import (
    DecoderConstraint,
    constrain_optimizer_steps,
    normalize_rows_,
    project_out_rows_,
)
from sae_lens_switch.saes.expert_layout import ExpertLayout
from sae_lens_switch.saes.expert_overlap import STRONGEST, TOKENS_PER_SAMPLE, overlap_penalty
from sae_lens_switch.saes.losses import Balance, losses_of_router, scale_of
from sae_lens_switch.saes.router import (
    Assignment,
    RoutingStatistics,
    assign_batch,
    expert_load,
    load_balance_loss,
    router_z_loss,
)
from sae_lens_switch.saes.serialization import FRESH
from sae_lens_switch.saes.step import DeadLatents, LatentParameters, activation_rows, why_not_finite
from sae_lens_switch.saes.switch_matryoshka import MatryoshkaSwitch


class SwitchTrainingSAE(MatryoshkaSwitch):
    """A Switch SAE in training: reconstruction plus load balance, under SAELens's trainer or any loop.

    Loss: ``mean_B ||x - x_hat||^2 + c * L_balance``, ``c = load_balance_coefficient * load_balance_scale``; the router
    z-loss with ``router_z_loss_coefficient``; and AuxK (Gao et al. 2024, A.2) with ``aux_loss_coefficient``: the dead
    latents of a token's own experts, weighted by their gates, and of shared ones, reconstruct the token's residual; and
    the penalty of ``saes/expert_overlap.py`` with ``expert_overlap_coefficient``; and, with ``matryoshka_widths``, the
    squared error of the reconstruction at each width.
    Load balance concerns routed experts alone. With ``load_balancing="bias"`` each optimiser step also moves
    ``expert_bias``.
    A step makes no tensor of size B x F, unless a hook on the dense latents asks for one; AuxK and the penalty on
    overlap are then left out.
    """

    def __init__(self, cfg: SwitchTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        cfg.resolve()
        self._start = FirstBatchStart(self.named_parameters() if self.device.type != "meta" else None)
        self._overlap: Tensor | None = None  # the penalty, between two parts of a step
        self._counts_E: Tensor | None = None  # tokens of each expert since the last optimiser step

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        coefficient = self.cfg.load_balance_coefficient
        assert coefficient is not None  # it is resolved
        return {"load_balance": TrainCoefficientConfig(coefficient, self.cfg.load_balance_warm_up_steps)}

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Dense latents [..., F], and the [..., K] pre-activations that were selected."""
        acts, pre, _ = self._encode_dense(self.normalized_input(x))
        return acts, pre

    @property
    @override
    def encoder_precision(self) -> EncoderPrecision:
        return self.cfg.encoder_precision

    @property
    @override
    def effective_router_bias(self) -> Tensor:
        return self._input_bias.to(self.W_router.dtype) if self._is_tied else self.b_router

    @property
    def _input_bias(self) -> Tensor:
        """What the encoder subtracts, and a tied router too."""
        return self.b_dec

    @property
    def _is_tied(self) -> bool:
        """A frozen ``b_router`` follows nothing, and is the one that routes."""
        return self.cfg.tie_router_bias and self.b_router.requires_grad

    # What the trainer asks

    @property
    @override
    def expert_layout(self) -> ExpertLayout:
        return self.cfg.layout

    @override
    def latent_parameters(self) -> LatentParameters:
        return LatentParameters(self.W_enc, self.W_dec, None)

    @property
    @override
    def decoder_constraint(self) -> DecoderConstraint | None:
        return DecoderConstraint(self.W_dec, self.cfg.project_decoder_grad) if self.cfg.normalize_decoder else None

    @override
    @torch.no_grad()
    def after_own_step(self) -> None:
        if self._is_tied:
            self.b_router.copy_(self._input_bias)

    @property
    @override
    def is_fresh(self) -> bool:
        """Whether weights are as initialised; kept in files.

        The biases and the router's sharpness are then taken from the first batch whose step is finite. False from then
        on, and once weights are loaded or written to.
        """
        return self._start.is_due(self.named_parameters())

    @is_fresh.setter
    def is_fresh(self, value: bool) -> None:
        self._start = FirstBatchStart(self.named_parameters() if value else None)

    @override
    def settle_step(self, is_finite: Tensor) -> None:
        super().settle_step(is_finite)
        self._start.settle(self.named_parameters(), is_finite)
        self._move_bias(is_finite)

    @torch.no_grad()
    def _move_bias(self, is_finite: Tensor) -> None:
        """Move ``expert_bias`` against the load of the step."""
        counts_E, self._counts_E = self._counts_E, None
        if counts_E is not None and self.expert_bias is not None:
            update_expert_bias(self.expert_bias, counts_E, is_finite, self.cfg.load_balance_bias_rate)

    @override
    def _has_loaded(self, is_fresh: bool) -> None:
        self.is_fresh = is_fresh

    # The step

    @override
    @torch.no_grad()
    def _before_forward(self, x_BD: Tensor, target_BD: Tensor) -> None:
        if self.is_fresh:
            found = self._start_of(self.run_time_activation_norm_fn_in(x_BD.to(self.dtype)), target_BD)
            if found is not None and self._start.begin(self.named_parameters(), found.values):
                logger.log(found.level, found.description)
        if self.cfg.normalize_decoder or self.cfg.tie_router_bias or self.expert_bias is not None:
            constrain_optimizer_steps(self)

    def _start_of(self, inputs_BD: Tensor, target_BD: Tensor) -> Start | None:  # noqa: ARG002, the same in an SAE
        return start_from_batch(inputs_BD, self.W_router, self.cfg.bias_start, self.cfg.router_start_std)

    @override
    def _route_batch(self, inputs_BD: Tensor) -> Assignment:
        if has_hooks(self.hook_sae_router_probs) or self.cfg.n_active_experts > 1:
            return self._route(inputs_BD)
        logits_BE = router_logits(inputs_BD, self.W_router, self.effective_router_bias)
        return assign_batch(self.hook_sae_router_logits(logits_BE), self.expert_bias)

    @override
    def _autoencode(
        self, inputs_BD: Tensor, assignment: Assignment | None, dead: DeadLatents, row_grads: RowGrads | None
    ) -> tuple[Reconstruction, Tensor]:
        assert assignment is not None
        experts_BA, gates_BA = self._chosen(assignment)
        if self.cfg.expert_overlap_coefficient:
            row_grads = None  # it would hold products of W_dec and its gradient that lack the penalty's
        result = sparse_autoencode(
            inputs_BD,
            self.W_enc.T,
            self.W_dec,
            self._selection.n_active(len(inputs_BD)),
            expert_B=experts_BA,
            groups=assignment.groups,
            n_experts=self.cfg.n_experts,
            n_shared=self.cfg.layout.shared_width,
            gates_B=gates_BA,
            pre_bias_D=self.pre_bias,
            dead_N=dead.indices_N,
            aux_k=dead.aux_k,
            row_grads=row_grads,
            encoder_precision=self.encoder_precision,
            over_batch=self._selection.ranks_over_tokens,
            ends_L=self._ends_L,
        )
        assert result.acts_BK is not None
        values_BK = result.acts_BK.detach()
        if self.cfg.expert_overlap_coefficient:
            self._overlap = self._expert_overlap(inputs_BD, assignment, values_BK, result.indices_BK)
        return result, values_BK

    def _expert_overlap(
        self, inputs_BD: Tensor, assignment: Assignment, values_BK: Tensor, indices_BK: Tensor
    ) -> Tensor:
        """``overlap_penalty`` of the batch's first tokens, between their own latents and those of their next expert."""
        E, A = self.cfg.n_experts, self.cfg.n_active_experts
        S = -(-len(inputs_BD) // TOKENS_PER_SAMPLE)
        n = min(STRONGEST, self.cfg.k, self.cfg.d_sae // E)
        with torch.no_grad():
            ranked_SE = biased_probs(assignment.probs_BE[:S], self.expert_bias)
            next_S = ranked_SE.topk(A + 1, dim=-1).indices[:, A]
            other = switch_encode(inputs_BD[:S], next_S, self.W_enc.T, n, E, pre_bias_D=self.pre_bias)
            own_SN, place_SN = values_BK[:S].topk(n, dim=1)
            fires_SNN = (own_SN > 0).unsqueeze(2) & (other[0] > 0).unsqueeze(1)
        return overlap_penalty(self.W_dec, indices_BK[:S].gather(1, place_SN), other[1], fires_SNN)

    @override
    def _balance(
        self, step_input: TrainStepInput, metrics: Metrics, assignment: Assignment | None
    ) -> tuple[Balance, RoutingStatistics]:
        assert assignment is not None
        load_E = expert_load(assignment)
        value = load_balance_loss(assignment, load_E)
        if self.expert_bias is not None and torch.is_grad_enabled():
            self._count(load_E, assignment.experts_BA.numel())
        gates_B = assignment.gates_BA.detach().flatten()
        statistics = RoutingStatistics(load_E, gates_B, self.cfg.layout, step_input.dead_neuron_mask)
        metrics.update(load_balance=value.detach(), **statistics.metrics())
        others = self._other_losses(step_input.sae_in, assignment)
        return Balance(value, step_input.coefficients["load_balance"], self._load_balance_scale, others), statistics

    @property
    def _load_balance_scale(self) -> float | Tensor | None:
        return float(self.cfg.d_in) if self.cfg.load_balance_scale == "d_in" else None

    def _other_losses(self, given: Tensor, assignment: Assignment) -> dict[str, Tensor]:
        """The router's z-loss and the penalty on overlap, each if it has a coefficient."""
        losses: dict[str, Tensor] = {}
        z_coefficient = self.cfg.router_z_loss_coefficient
        overlap, self._overlap = self._overlap, None
        if z_coefficient or overlap is not None:
            scale = scale_of(self._load_balance_scale, self._inputs_and_targets(given)[1])
            if z_coefficient:
                losses["router_z_loss"] = z_coefficient * scale * router_z_loss(assignment.logits_BE)
            if overlap is not None:
                losses["expert_overlap_loss"] = self.cfg.expert_overlap_coefficient * scale * overlap
        return losses

    def _count(self, load_E: Tensor, n_choices: int) -> None:
        counts_E = (load_E * n_choices).round()  # whole numbers, so that an even load is found to be even
        self._counts_E = counts_E if self._counts_E is None else self._counts_E + counts_E

    @override
    def _check_loss(self, loss: Tensor, step_input: TrainStepInput) -> None:
        is_finite = bool(torch.isfinite(loss))
        self._start.settle(self.named_parameters(), is_finite)
        if not is_finite:
            self._counts_E = None
            rows = activation_rows(step_input.sae_in, self.batch_width)
            raise ValueError(why_not_finite(rows, step_input.n_training_steps))

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """The load-balance loss alone; ``training_forward_pass`` has it already and does not call this."""
        x_BD, target_BD = self._inputs_and_targets(step_input.sae_in)
        balance, _ = self._balance(step_input, {}, self._route(self.normalized_input(x_BD)))
        return losses_of_router(balance, target_BD)

    # Dead latents: those of a token's own expert

    @property
    @override
    def aux_k(self) -> int:
        assert self.cfg.aux_k is not None  # it is resolved
        return self.cfg.aux_k

    @property
    @override
    def _reports_aux_loss(self) -> bool:
        return self.cfg.aux_loss_coefficient != 0

    @override
    def _most_dead(self, dead_F: Tensor, n_dead: int) -> int:
        layout = self.cfg.layout
        if layout.n_experts == 1:
            return n_dead
        of_experts = layout.by_expert(dead_F).sum(1).topk(self.cfg.n_active_experts).values.sum()
        return int(of_experts + layout.shared(dead_F).sum())

    @override
    def _n_dead(self, dead_N: Tensor, dead_F: Tensor | None, assignment: Assignment | None) -> Tensor:
        assert dead_F is not None
        assert assignment is not None
        layout = self.cfg.layout
        of_experts_B = layout.by_expert(dead_F).sum(1)[assignment.experts_BA.flatten(0, -2)].sum(-1)
        return of_experts_B + layout.shared(dead_F).sum()

    # Around the step of an optimiser that knows nothing of the constraint

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        """Called after clipping, before the step (see decoder_constraint.constrain_optimizer_steps)."""
        if self.cfg.normalize_decoder and self.cfg.project_decoder_grad and self.W_dec.grad is not None:
            project_out_rows_(self.W_dec.grad, self.W_dec)

    @torch.no_grad()
    def after_optimizer_step(self, steps_decoder: bool = True) -> None:
        """``steps_decoder``: whether that optimiser holds W_dec, as one of several may not."""
        if steps_decoder and self.cfg.normalize_decoder and self.W_dec.requires_grad:
            normalize_rows_(self.W_dec)
        self.after_own_step()
        if self.expert_bias is not None:
            self._move_bias(torch.ones((), dtype=torch.bool, device=self.expert_bias.device))

    # Files and logs

    @override
    def process_state_dict_for_saving(self, state_dict: StateDict) -> None:
        super().process_state_dict_for_saving(state_dict)
        if self.is_fresh:
            state_dict[FRESH] = torch.ones(1)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: StateDict) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict.pop(FRESH, None)

    @override
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        norms_E = self.W_router.detach().norm(dim=0).cpu().numpy()
        histograms = {**super().log_histograms(), "weights/W_router_norms": norms_E}
        if self.expert_bias is not None:
            histograms["weights/expert_bias"] = self.expert_bias.cpu().numpy()
        # In float64: between float32 numbers as close as the norms of unit rows numpy finds no room for bins.
        return {name: values.astype("float64") for name, values in histograms.items()}
