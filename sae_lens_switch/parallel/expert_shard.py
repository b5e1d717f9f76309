"""The experts of one process: a Switch SAE over its own latents, with the whole router and the whole batch's loss."""

from dataclasses import replace

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens_switch_kernels import Reconstruction
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_switch.common.seeds import mixed_seed
from sae_lens_switch.parallel.exchange import RoutedBatch, send_to_owners
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.saes.config import SwitchTrainingSAEConfig
from sae_lens_switch.saes.expert_layout import ExpertLayout
from sae_lens_switch.saes.router import Assignment, RoutingStatistics, router_dtype
from sae_lens_switch.saes.sparse_codes import SparseCodes
from sae_lens_switch.saes.step import DeadLatents, SparseStepInput, SparseStepOutput
from sae_lens_switch.saes.switch_training_sae import SwitchTrainingSAE

# On every process alike; all other parameters have a row or column per latent.
SHARED = ("b_dec", "W_router", "b_router")
LATENT_DIM = {"W_enc": 1, "W_dec": 0}
# What is not divided over processes yet.
_ONLY = {
    "n_active_experts": 1,
    "n_shared_experts": 0,
    "load_balancing": "loss",
    "router_z_loss_coefficient": 0,
    "expert_overlap_coefficient": 0,
    "activation": "topk",
    "matryoshka_widths": None,
}


class ExpertShard(SwitchTrainingSAE):
    """Experts ``first`` to ``first + E / P`` of a Switch SAE, as trained by one process of P.

    With one expert per token and squared error, the owner of a token's expert needs only the token: it computes the
    reconstruction, the error, its gradient, and the token's part of the router's gradient. Losses are this process's
    part of the whole batch's; their sum over the processes is the loss. So are the gradients of ``b_dec`` and of the
    router. ``cfg`` is that of the part, ``whole`` that of the SAE.

    Args:
        whole: The config of the SAE.
        ranks: Who owns which experts.
    """

    def __init__(self, whole: SwitchTrainingSAEConfig, ranks: Ranks) -> None:
        P = ranks.expert_parallel
        if whole.n_experts % P:
            raise ValueError(f"expert_parallel must divide n_experts; got {P} and {whole.n_experts}")
        for name, only in _ONLY.items():
            if vars(whole)[name] != only:
                raise ValueError(
                    f"{name} must be {only!r} with experts on several processes; got {vars(whole)[name]!r}"
                )
        self.whole, self.ranks = whole, ranks
        self.first = ranks.expert_rank * (whole.n_experts // P)
        self.batch: RoutedBatch | None = None
        super().__init__(replace(whole, d_sae=whole.d_sae // P, n_experts=whole.n_experts // P))

    @classmethod
    def of(cls, sae: SwitchTrainingSAE, ranks: Ranks) -> "ExpertShard":
        """This process's part of an SAE that all processes have; what they share is taken from the first of them."""
        shard = cls(sae.cfg, ranks)
        with torch.no_grad():
            for name, p in shard.named_parameters():
                whole = sae.get_parameter(name)
                p.copy_(shard.part(name, whole))
                p.requires_grad = whole.requires_grad
        shard.is_fresh = sae.is_fresh
        shard.copy_shared_from_first()
        return shard

    @classmethod
    @torch.no_grad()
    def fresh(cls, whole: SwitchTrainingSAEConfig, ranks: Ranks) -> "ExpertShard":
        """This process's part of a new SAE, initialised expert by expert: the same for any number of processes."""
        seed = ranks.first_says(int(torch.randint(2**62, ())))
        shard, M = cls(whole, ranks), whole.layout.expert_width
        alone = replace(whole, d_sae=M, n_experts=1, device="cpu")
        for e in range(shard.cfg.n_experts):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(mixed_seed(seed, shard.first + e))
                expert = SwitchTrainingSAE(alone)
            for name, dim in LATENT_DIM.items():
                shard.get_parameter(name).narrow(dim, e * M, M).copy_(expert.get_parameter(name))
        shard.is_fresh = True
        shard.copy_shared_from_first()
        return shard

    @torch.no_grad()
    def gathered(self) -> SwitchTrainingSAE:
        """The whole SAE, in the memory of every process."""
        sae = SwitchTrainingSAE(replace(self.whole))
        for name, p in self.named_parameters():
            whole = p if name in SHARED else self.gathered_latents(p.movedim(LATENT_DIM[name], 0))
            sae.get_parameter(name).copy_(whole if name in SHARED else whole.movedim(0, LATENT_DIM[name]))
        sae.is_fresh = self.is_fresh
        return sae

    def gathered_latents(self, t: Tensor) -> Tensor:
        """What this process has of its latents, [F / P, ...], for all latents [F, ...], on every process."""
        return self.ranks.gather_row(t, "latents").flatten(0, 1)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of the parameter ``name``."""
        if name not in LATENT_DIM:
            return whole
        M = self.whole.layout.expert_width
        return whole.narrow(LATENT_DIM[name], self.first * M, self.cfg.d_sae)

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.get_parameter(name) for name in SHARED]

    def copy_shared_from_first(self) -> None:
        for p in self.shared_parameters():
            self.ranks.broadcast_(p.data, "the router")

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        E, D, dtype = self.whole.n_experts, self.whole.d_in, router_dtype(self.dtype)
        W_router_DE = torch.empty(D, E, dtype=dtype, device=self.device)
        self.W_router = nn.Parameter(W_router_DE.uniform_(-1, 1) / D**0.5)

    @property
    @override
    def expert_layout(self) -> ExpertLayout:
        return self.whole.layout

    # The step

    @torch.no_grad()
    def start(self, batch_BD: Tensor) -> None:
        """Initialise biases and router from the whole batch, as the SAE would, on every process alike."""
        super()._before_forward(batch_BD, batch_BD)
        self.copy_shared_from_first()

    @override
    def _before_forward(self, x_BD: Tensor, target_BD: Tensor) -> None:
        """Of the whole batch, not of the tokens received: see ``start``."""

    @torch.no_grad()
    def receive(self, x_BD: Tensor) -> Tensor:
        """Send this process's share of the batch to the experts' owners; returns the tokens of its own experts."""
        logits_BE = self._router_logits(self.normalized_input(x_BD))
        self.batch = send_to_owners(x_BD, logits_BE.argmax(dim=-1), self.whole.n_experts, self.ranks)
        return self.batch.x_BD

    @property
    def received(self) -> RoutedBatch:
        assert self.batch is not None, "a step begins with receive()"
        return self.batch

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if len(step_input.sae_in):
            return super().training_forward_pass(step_input)
        return self._without_tokens(step_input)

    def _without_tokens(self, step_input: TrainStepInput) -> SparseStepOutput:
        """A step in which this process's experts have nothing to do: gradients are 0."""
        x_BD = step_input.sae_in
        rows_only = isinstance(step_input, SparseStepInput) and step_input.row_grads is not None
        rows_only = rows_only and step_input.row_grads.active_only  # type: ignore[union-attr]
        parameters = self.shared_parameters() if rows_only else list(self.parameters())
        nothing = torch.stack([(0 * p).sum().float() for p in parameters if p.requires_grad]).sum()
        losses = {"mse_loss": nothing, "load_balance_loss": torch.zeros_like(nothing)}
        if self._reports_aux_loss:
            losses["auxiliary_reconstruction_loss"] = torch.zeros_like(nothing)
        codes_0K = x_BD.new_zeros(0, self.cfg.k, dtype=self.dtype)
        return SparseStepOutput(
            codes=SparseCodes(codes_0K, codes_0K.long(), self.cfg.d_sae),
            routing=RoutingStatistics(
                self.received.load_E, nothing.new_zeros(0), self.cfg.layout, step_input.dead_neuron_mask
            ),
            sae_in=x_BD,
            sae_out=x_BD,
            hidden_pre=codes_0K,
            loss=nothing,
            losses=losses,
            metrics={},
        )

    @override
    def _route_batch(self, inputs_BD: Tensor) -> Assignment:
        """Among this process's own experts, where the most probable one is: rounding may differ from the sender's."""
        batch = self.received
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
        return self.received.variance if scale is None else scale

    @override
    def _aux_loss(
        self, x_BD: Tensor, sae_out_BD: Tensor, result: Reconstruction, dead: DeadLatents, n_dead: Tensor | int
    ) -> Tensor:
        return super()._aux_loss(x_BD, sae_out_BD, result, dead, n_dead) * self._batch_share(x_BD)

    @override
    def _batch_share(self, x_BD: Tensor) -> float:
        """What the mean of these tokens counts for in that of the whole batch."""
        return len(x_BD) / self.received.n_tokens
