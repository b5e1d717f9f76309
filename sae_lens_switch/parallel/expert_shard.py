"""The experts of one process: a Switch SAE over its own latents, with the whole router and the whole batch's loss."""

from dataclasses import replace

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens_switch_kernels import RowGrads
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_switch.common.types import AnyTrainingSAE
from sae_lens_switch.parallel.exchange import RoutedBatch, send_to_owners
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.parallel.shard import Shard
from sae_lens_switch.saes.config import SwitchTrainingSAEConfig
from sae_lens_switch.saes.expert_layout import ExpertLayout
from sae_lens_switch.saes.levels import names_of_losses
from sae_lens_switch.saes.router import Assignment, RoutingStatistics, router_dtype
from sae_lens_switch.saes.sparse_codes import SparseCodes
from sae_lens_switch.saes.step import SparseStepInput, SparseStepOutput
from sae_lens_switch.saes.switch_training_sae import SwitchTrainingSAE

# What is not divided over processes yet.
_ONLY = {
    "n_shared_experts": 0,
    "expert_overlap_coefficient": 0,
    "activation": "topk",
}


def check_divisible(whole: SwitchTrainingSAEConfig, P: int) -> None:
    """Raises ValueError for an SAE whose experts P processes cannot have."""
    if whole.n_experts % P:
        raise ValueError(f"expert_parallel must divide n_experts; got {P} and {whole.n_experts}")
    for name, only in _ONLY.items():
        if vars(whole)[name] != only:
            raise ValueError(f"{name} must be {only!r} with experts on several processes; got {vars(whole)[name]!r}")


class ExpertShard(Shard, SwitchTrainingSAE):
    """Experts ``first`` to ``first + E / P`` of a Switch SAE, as trained by one process of P.

    With one expert per token and squared error, the owner of a token's expert needs only the token: it computes the
    reconstruction, the error, its gradient, and the token's part of the router's gradient.
    """

    whole: SwitchTrainingSAEConfig
    batch: RoutedBatch

    def __init__(self, whole: SwitchTrainingSAEConfig, ranks: Ranks) -> None:
        self.first = ranks.row_rank * (whole.n_experts // ranks.row_size)
        super().__init__(whole, ranks)

    @classmethod
    @override
    def _part_of(cls, whole: SwitchTrainingSAEConfig, P: int) -> SwitchTrainingSAEConfig:
        check_divisible(whole, P)
        return replace(whole, d_sae=whole.d_sae // P, n_experts=whole.n_experts // P)

    @property
    @override
    def _block_width(self) -> int:
        return self.whole.layout.expert_width

    @override
    def _new_block(self) -> SwitchTrainingSAE:
        made = self._new_of(d_sae=self._block_width, n_experts=1, n_active_experts=1, k=1)
        assert isinstance(made, SwitchTrainingSAE)
        return made

    @override
    def _set_fresh(self, value: bool) -> None:
        self.is_fresh = value

    @override
    def gathered_into(self, sae: AnyTrainingSAE) -> AnyTrainingSAE:
        super().gathered_into(sae)
        assert isinstance(sae, SwitchTrainingSAE)
        sae.is_fresh = self.is_fresh
        return sae

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        E, D, dtype = self.whole.n_experts, self.whole.d_in, router_dtype(self.dtype)
        self.W_router = nn.Parameter(torch.empty(D, E, dtype=dtype, device=self.device))
        self._draw_shared()
        if self.expert_bias is not None:
            self.expert_bias = self.W_router.new_zeros(E)

    @override
    @torch.no_grad()
    def _draw_shared(self) -> None:
        W_router_DE = torch.empty(self.W_router.shape, dtype=self.W_router.dtype).uniform_(-1, 1)
        self.W_router.copy_(W_router_DE / self.whole.d_in**0.5)

    @property
    @override
    def expert_layout(self) -> ExpertLayout:
        return self.whole.layout

    # The step

    @torch.no_grad()
    def start(self, batch_BD: Tensor) -> None:
        """Initialise biases and router from the whole batch, as the SAE would, on every process alike."""
        super()._before_forward(*self._inputs_and_targets(batch_BD))
        self.copy_shared_from_first()

    @override
    def _before_forward(self, x_BD: Tensor, target_BD: Tensor) -> None:
        """Of the whole batch, not of the tokens received: see ``start``."""

    @torch.no_grad()
    def receive(self, x_BD: Tensor) -> Tensor:
        """Send this process's share of the batch to the experts' owners; returns the tokens of its own experts."""
        inputs_BD, target_BD = self._inputs_and_targets(x_BD)
        expert_B = self._router_logits(self.normalized_input(inputs_BD)).argmax(dim=-1)
        self.batch = send_to_owners(x_BD, target_BD, expert_B, self.whole.n_experts, self.ranks)
        return self.batch.x_BD

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if len(step_input.sae_in):
            return super().training_forward_pass(step_input)
        return self._without_tokens(step_input)

    def _without_tokens(self, step_input: TrainStepInput) -> SparseStepOutput:
        """A step in which this process's experts have nothing to do: gradients are 0."""
        target_0D = step_input.sae_in[:, self.batch_width - self.W_dec.shape[1] :]
        nothing = self._nothing(step_input.row_grads if isinstance(step_input, SparseStepInput) else None)
        losses = {"mse_loss": nothing, "load_balance_loss": torch.zeros_like(nothing)}
        if self._reports_aux_loss:
            losses["auxiliary_reconstruction_loss"] = torch.zeros_like(nothing)
        losses |= {name: torch.zeros_like(nothing) for name in names_of_losses(self.cfg.matryoshka_widths or ())}
        codes_0K = target_0D.new_zeros(0, self.cfg.k, dtype=self.dtype)
        return SparseStepOutput(
            codes=SparseCodes(codes_0K, codes_0K.long(), self.cfg.d_sae),
            routing=RoutingStatistics(
                self.batch.load_E, nothing.new_zeros(0), self.cfg.layout, step_input.dead_neuron_mask
            ),
            sae_in=target_0D,
            sae_out=target_0D,
            hidden_pre=codes_0K,
            loss=nothing,
            losses=losses,
            metrics={"load_balance": torch.zeros_like(nothing)},
        )

    def _nothing(self, row_grads: RowGrads | None) -> Tensor:
        """0, whose gradient is 0 for every parameter that is to have one."""
        rows_only = row_grads is not None and row_grads.active_only
        parameters = self.shared_parameters() if rows_only else list(self.parameters())
        unused = self.b_router if self._is_tied else None
        trained = [p for p in parameters if p.requires_grad and p is not unused]
        return torch.stack([(0 * p).sum().float() for p in trained]).sum()

    @override
    def _route_batch(self, inputs_BD: Tensor) -> Assignment:
        """Among this process's own experts, where the most probable one is: rounding may differ from the sender's."""
        batch = self.batch
        logits_BE = self._router_logits(inputs_BD)
        probs_BE = logits_BE.softmax(dim=-1)
        own_BE = probs_BE[:, self.first : self.first + self.cfg.n_experts]
        experts_B1 = own_BE.argmax(dim=-1, keepdim=True)
        load_E = batch.load_E.to(probs_BE.dtype)
        balance = len(load_E) * torch.dot(load_E, probs_BE.sum(dim=0) / batch.n_tokens)
        return Assignment(logits_BE, probs_BE, experts_B1, own_BE.gather(-1, experts_B1), load_E, balance)

    @property
    @override
    def _load_balance_scale(self) -> float | Tensor | None:
        scale = super()._load_balance_scale
        return self.batch.variance if scale is None else scale
