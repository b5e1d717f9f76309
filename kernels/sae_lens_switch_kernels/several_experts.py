"""Several experts per token: its codes are the k largest latents of all A of them, and of the shared ones.

A token and one of its experts are a pair. Pairs, sorted by expert, are the rows of the encoder's grouped product, which
costs A times that of one expert. Of the k largest pre-activations of each pair, the k of a token that are largest
after the gate of their expert are kept. From there on codes may belong to any expert, and are decoded as those of a
single dictionary, each scaled by its own gate.

Shared latents belong to no expert. Every token may choose them, so their encoder is a plain product, and their gate is
1. The k largest of them are ranked with those of the pairs: the k of a token are among them.

Codes over the batch, [S], are each a row of their own here, with the experts and gates of their token.

Letters: A is the number of active experts per token here, R = B * A the number of pairs.
"""

from types import ModuleType
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from sae_lens_switch_kernels import torch_codes
from sae_lens_switch_kernels.backend import SelfChecked
from sae_lens_switch_kernels.indexing import CodeRows, ExpertBlocks, ExpertGroups, segment_sums


class Pairs(NamedTuple):
    """Every token with each of its experts.

    Attributes:
        groups: The pairs of each expert.
        n_active: A.
    """

    groups: ExpertGroups
    n_active: int

    def rows(self, t_BD: Tensor) -> Tensor:
        """The token of every pair, sorted by expert."""
        order_R = self.groups.order_B
        if order_R is None:  # tokens with one expert each, sorted already
            return t_BD
        token_R = order_R if self.n_active == 1 else torch.div(order_R, self.n_active, rounding_mode="floor")
        return t_BD.index_select(0, token_R)

    def by_token(self, t_RK: Tensor) -> Tensor:
        """What was found for each pair, [B, A * K], in the order of a token's experts."""
        return self.groups.unsorted(t_RK).view(-1, self.n_active * t_RK.shape[1])

    def any_of_token(self, is_true_R: Tensor) -> Tensor:
        """Whether it is true of any of a token's pairs; empty if it is."""
        return is_true_R if is_true_R.numel() == 0 else self.by_token(is_true_R.unsqueeze(1)).any(1)


def are_several(expert_B: Tensor | None) -> TypeGuard[Tensor]:
    """Whether it has the form [B, A]."""
    return expert_B is not None and expert_B.ndim == 2


def times_gates(values_BN: Tensor, gates_BA: Tensor | None) -> Tensor:
    """values, in the order of a token's experts, times the gate of their own."""
    if gates_BA is None:
        return values_BN
    values_BAK = values_BN.unflatten(1, (gates_BA.shape[1], -1))
    return (values_BAK * gates_BA.to(values_BN.dtype).unsqueeze(-1)).flatten(1)


def code_gates(gates_BA: Tensor, expert_BA: Tensor, expert_BK: Tensor) -> Tensor:
    """The gate of each code's expert, [..., K]; any leading dimensions in place of B.

    Args:
        gates_BA: A gate per token and expert.
        expert_BA: The experts of each token.
        expert_BK: The expert that each code belongs to, one of the token's own; negative for a shared latent, whose
            gate is 1.
    """
    # A sum, of one number: unlike gather, its gradient is summed in a fixed order on a GPU.
    return (_is_own(expert_BA, expert_BK) * gates_BA.unsqueeze(-2)).sum(-1) + (expert_BK < 0)


class OwnGates(NamedTuple):
    """The primitives that multiply codes by gates, of tokens with several experts: each code has a gate of its own.

    Rows are in the order of the tokens.

    Attributes:
        expert_BA: The experts of each token; with offsets, of each code's token, [S, A].
        expert_BK: The expert of each code; with offsets [S, 1].
        gates_BK: The gate of each code, in the shape of the codes; None: all are 1.
        offsets_B1: Of codes [S], where each token's begin.
    """

    expert_BA: Tensor
    expert_BK: Tensor
    gates_BK: Tensor | None
    offsets_B1: Tensor | None = None

    def sorted_codes(
        self,
        values_BK: Tensor,
        indices_BK: Tensor,
        gates_BA: Tensor | None,  # noqa: ARG002, each code has its own
        groups: ExpertGroups,  # noqa: ARG002, one group
    ) -> tuple[Tensor, Tensor, Tensor]:
        """values * gate, values and indices."""
        return self._gated(values_BK), values_BK, indices_BK

    def unsorted_codes(
        self, values_BK: Tensor, indices_BK: Tensor, gates_BA: Tensor | None, groups: ExpertGroups
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        acts_BK, values_BK, indices_BK = self.sorted_codes(values_BK, indices_BK, gates_BA, groups)
        return acts_BK, acts_BK, values_BK, indices_BK

    def code_grads(
        self,
        values_BK: Tensor,
        d_acts_BK: Tensor,
        gates_BA: Tensor | None,
        grad_values_BK: Tensor | None,
        groups: ExpertGroups,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of the pre-activations, and of the gates [B, A]."""
        d_values_BK, d_gates_BA = self._gated(d_acts_BK), None
        if gates_BA is not None:
            # Summed over the codes of each expert in a fixed order, which scatter_add_ does not have on a GPU.
            per_code_BK1 = (d_acts_BK * values_BK).view(self.expert_BK.shape).unsqueeze(2)
            d_gates_BA = (per_code_BK1 * _is_own(self.expert_BA, self.expert_BK)).sum(1)
            if self.offsets_B1 is not None:
                d_gates_BA = _sums_of_rows(d_gates_BA, self.offsets_B1)
            d_gates_BA = d_gates_BA.to(gates_BA.dtype)
        if grad_values_BK is not None:
            d_values_BK = d_values_BK + grad_values_BK
        return d_values_BK * (values_BK != 0), d_gates_BA

    def _gated(self, values_BK: Tensor) -> Tensor:
        return values_BK if self.gates_BK is None else values_BK * self.gates_BK.to(values_BK.dtype)


def gating(
    p: ModuleType | SelfChecked,
    expert_B: Tensor | None,
    indices_BK: Tensor,
    gates_B: Tensor | None,
    blocks: ExpertBlocks,
    rows: CodeRows | None = None,
) -> ModuleType | SelfChecked | OwnGates:
    """What multiplies codes by gates. Without experts, codes [S] have none: nothing for a kernel to do."""
    if not are_several(expert_B):
        return p if rows is None else torch_codes
    expert_BK = blocks.expert_of(indices_BK)
    if rows is None:
        return OwnGates(expert_B, expert_BK, None if gates_B is None else code_gates(gates_B, expert_B, expert_BK))
    gates_S = gates_of_codes(gates_B, expert_B, expert_BK, rows.token_S)
    return OwnGates(expert_B[rows.token_S], expert_BK.unsqueeze(1), gates_S, rows.offsets_B1)


def gates_of_codes(gates_BA: Tensor | None, expert_BA: Tensor, expert_S: Tensor, token_S: Tensor) -> Tensor | None:
    """``code_gates`` of codes [S], whose tokens are given; None: all are 1."""
    if gates_BA is None:
        return None
    return code_gates(gates_BA[token_S], expert_BA[token_S], expert_S.unsqueeze(1)).squeeze(1)


def _sums_of_rows(t_SA: Tensor, offsets_B1: Tensor) -> Tensor:
    """[B, A], each in the order of its codes."""

    return torch.stack([segment_sums(t_S.contiguous(), offsets_B1) for t_S in t_SA.unbind(1)], dim=1)


def own_gates(
    gates_B: Tensor | None, expert_B: Tensor | None, indices_BK: Tensor, blocks: ExpertBlocks, groups: ExpertGroups
) -> Tensor | None:
    """What each code is multiplied by, [B, 1] or [B, K], in the order of ``groups``."""
    if gates_B is None:
        return None
    if not are_several(expert_B):
        return groups.sorted(gates_B).unsqueeze(1)
    return code_gates(gates_B, expert_B, blocks.expert_of(indices_BK))


def _is_own(expert_BA: Tensor, expert_BK: Tensor) -> Tensor:
    return expert_BK.unsqueeze(-1) == expert_BA.unsqueeze(-2)
