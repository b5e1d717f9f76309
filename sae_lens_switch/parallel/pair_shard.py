"""The experts of one process, where a token's home must hear of all its experts, or knows more of the router."""

from dataclasses import replace

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens_switch_kernels import Reconstruction, RowGrads, switch_encode
from sae_lens_switch_kernels.chosen import Candidates, Codes, Dead, dead_candidates, decode_chosen
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.parallel.exchange import with_facts
from sae_lens_switch.parallel.expert_shard import ExpertShard, check_divisible
from sae_lens_switch.parallel.pairs import SentPairs
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.saes.config import SwitchTrainingSAEConfig
from sae_lens_switch.saes.router import Assignment, assign
from sae_lens_switch.saes.step import DeadLatents, SparseStepOutput
from sae_lens_switch.saes.switch_training_sae import SwitchTrainingSAE


class PairShard(ExpertShard):
    """Experts of a Switch SAE of any number of active experts, under either way to balance their load.

    Every token goes to the owners of all its experts. They send home the pre-activations of their best latents; the
    home finds the k best of all, times the gates, and says which. These are decoded by the owners and summed at home,
    where loss and error are, and with them the gradients of gates and router. AuxK's dead latents travel in the same
    messages.
    """

    def __init__(self, whole: SwitchTrainingSAEConfig, ranks: Ranks) -> None:
        self._n_dead_E: Tensor | None = None  # of the step, of all experts
        self._most_dead_of_one = 0
        super().__init__(whole, ranks)

    @classmethod
    @override
    def _part_of(cls, whole: SwitchTrainingSAEConfig, P: int) -> SwitchTrainingSAEConfig:
        check_divisible(whole, P)
        if whole.matryoshka_widths is not None:
            raise ValueError(
                "matryoshka_widths must be None with experts on several processes, if a token has several, "
                f"load_balancing is 'bias' or there is a router_z_loss_coefficient; got {whole.matryoshka_widths}"
            )
        local = whole.n_experts // P
        A = min(whole.n_active_experts, local)
        k = min(whole.k, A * whole.layout.expert_width)
        return replace(whole, d_sae=whole.d_sae // P, n_experts=local, n_active_experts=A, k=k)

    # The step

    @override
    def receive(self, x_BD: Tensor) -> Tensor:
        """Route this process's share of the batch, which stays here; tells all how many tokens each expert has."""
        inputs_BD, target_BD = self._inputs_and_targets(x_BD)
        logits_BE = self._router_logits(self.normalized_input(inputs_BD))
        probs_BE = logits_BE.softmax(dim=-1)
        found = assign(logits_BE, probs_BE, self.whole.n_active_experts, self.expert_bias)
        with torch.no_grad():
            self.batch = batch = with_facts(x_BD, target_BD, found.experts_BA, self.whole.n_experts, self.ranks)
        load_E = batch.load_E.to(probs_BE.dtype)
        balance = len(load_E) * torch.dot(load_E, probs_BE.sum(dim=0) / batch.n_tokens)
        self._assignment = replace(found, load_E=load_E, balance=balance)
        return x_BD

    @override
    def _route_batch(self, inputs_BD: Tensor) -> Assignment:
        """As ``receive`` has routed them."""
        return self._assignment

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The step of the tokens at home here. Its codes are of pairs of this process's experts, without gates."""
        if self.has_dense_hooks:
            raise ValueError(
                "hook_sae_acts_pre and hook_sae_acts_post must have no hooks with experts on several processes"
            )
        output = SwitchTrainingSAE.training_forward_pass(self, step_input)
        assert isinstance(output, SparseStepOutput)
        assert output.codes.offsets is not None
        output.codes = output.codes.view(len(output.codes.offsets) - 1)
        return output

    @override
    def _autoencode(
        self, inputs_BD: Tensor, assignment: Assignment | None, dead: DeadLatents, row_grads: RowGrads | None
    ) -> tuple[Reconstruction, Tensor]:
        assert assignment is not None
        gates_BA = self._gates(assignment)
        pairs = SentPairs.of(self.batch, assignment.experts_BA, self.whole.n_experts, self.ranks)
        with torch.no_grad():
            x_RD = pairs.tokens_to_owners(inputs_BD, "tokens")
            expert_R = pairs.to_owners(assignment.experts_BA.unsqueeze(2), "experts").flatten() - self.first
            codes, dead_codes = self._choose(pairs, x_RD, expert_R, gates_BA, dead)
        parts = [self.W_dec.new_zeros(0, self.W_dec.shape[1])] * (1 if dead_codes is None else 2)
        if len(x_RD):
            found = decode_chosen(
                x_RD,
                self.W_enc.T,
                self.W_dec,
                codes,
                pre_bias_D=self.pre_bias,
                dead=dead_codes,
                row_grads=row_grads,
            )
            parts = [part_RD for part_RD in found if part_RD is not None]
        else:  # gradients are 0
            parts = [part_RD + self._nothing(row_grads).to(part_RD.dtype) for part_RD in parts]
        gates = [gates_BA, None if gates_BA is None else gates_BA.detach()]
        out_BD, *aux_out_BD = pairs.sums_at_home(parts, gates[: len(parts)])
        aux = aux_out_BD[0] if aux_out_BD else None
        return Reconstruction(out_BD, codes.values_S, codes.indices_S, aux, None, codes.offsets_B1), codes.values_S

    def _choose(
        self, pairs: SentPairs, x_RD: Tensor, expert_R: Tensor, gates_BA: Tensor | None, dead: DeadLatents
    ) -> tuple[Codes, Dead | None]:
        """Which of this process's latents are among the k best of their token, and which among its best dead ones."""
        best = self._best(x_RD, expert_R)
        if dead.indices_N is None:
            (is_chosen_RC,) = pairs.choose([best.ranked_BC], [self.whole.k], gates_BA)
            return best.chosen(is_chosen_RC), None
        best_dead = dead_candidates(
            x_RD,
            self.W_enc.detach().T,
            dead.indices_N,
            min(dead.aux_k, self._most_dead_of_one),
            expert_B=expert_R,
            n_experts=self.cfg.n_experts,
            pre_bias_D=self.pre_bias,
        )
        ranked = [best.ranked_BC, best_dead.ranked_BC.to(best.ranked_BC.dtype)]
        of_best, of_dead = pairs.choose(ranked, [self.whole.k, dead.aux_k], gates_BA)
        return best.chosen(of_best), Dead(dead.indices_N, best_dead.chosen(of_dead))

    def _best(self, x_RD: Tensor, expert_R: Tensor) -> Candidates:
        C = min(self.whole.k, self.whole.layout.expert_width)
        if len(x_RD):
            values_RC, indices_RC = switch_encode(
                x_RD,
                expert_R,
                self.W_enc.detach().T,
                C,
                self.cfg.n_experts,
                pre_bias_D=self.pre_bias,
                encoder_precision=self.encoder_precision,
            )
        else:
            values_RC, indices_RC = x_RD.new_empty(0, C, dtype=self.W_enc.dtype), expert_R.new_empty(0, C)
        return Candidates(values_RC, indices_RC, values_RC)

    # AuxK: of the dead latents of all of a token's experts

    @override
    def _most_dead(self, dead_F: Tensor, n_dead: int) -> int:
        """Of a token's experts together; every process takes part, dead latents or not. Waits for the device."""
        n_dead_E = self.ranks.gather_row(self.cfg.layout.by_expert(dead_F).sum(dim=1), "dead latents").flatten()
        ranked_E = n_dead_E.sort(descending=True).values
        most, self._most_dead_of_one = torch.stack(
            [ranked_E[: self.whole.n_active_experts].sum(), ranked_E[0]]
        ).tolist()
        self._n_dead_E = n_dead_E
        return most

    @override
    def _n_dead(self, dead_N: Tensor, dead_F: Tensor | None, assignment: Assignment | None) -> Tensor:
        assert assignment is not None
        assert self._n_dead_E is not None
        return self._n_dead_E[assignment.experts_BA].sum(dim=-1)

    @override
    def _count(self, load_E: Tensor, n_choices: int) -> None:
        """Of the whole batch."""
        super()._count(load_E, self.n_tokens * self.whole.n_active_experts)

    @override
    def _other_losses(self, given: Tensor, assignment: Assignment) -> dict[str, Tensor]:
        share = len(assignment.logits_BE) / self.n_tokens
        return {name: share * loss for name, loss in super()._other_losses(given, assignment).items()}
