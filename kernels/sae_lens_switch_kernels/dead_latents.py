"""AuxK (Gao et al. 2024, A.2): which dead latents a token may choose, and their encoder.

With experts a token chooses among the dead latents of its own expert or experts, so all experts get equally many slots
for them, and the encoder's grouped product applies unchanged. Dead shared latents, which any token may choose, have the
first slots.

Letters beside the package's: Z is the number of slots.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lens_switch_kernels.backend import SelfChecked
from sae_lens_switch_kernels.indexing import ExpertBlocks, ExpertGroups
from sae_lens_switch_kernels.inputs import EncoderInputs
from sae_lens_switch_kernels.several_experts import times_gates


class DeadLatents(NamedTuple):
    """Dead latents by expert, padded to the same number of slots per expert.

    Attributes:
        latents_Z: The latent in each slot. An expert has as many slots as the one with most dead latents, and at least
            aux_k. None: each latent has a slot.
        real_Z: Which slots are of dead latents, not padding; None: all.
        slots: Which slots belong to which expert.
    """

    latents_Z: Tensor | None
    real_Z: Tensor | None
    slots: ExpertBlocks

    def rows(self, t_FX: Tensor, slots: slice = slice(None)) -> Tensor:
        """What each slot's latent has."""
        if self.latents_Z is None:
            return t_FX if slots == slice(None) else t_FX[slots]
        return t_FX[self.latents_Z[slots]]

    def latents_of(self, slots_R: Tensor | None) -> Tensor | None:
        """The latents in these slots, or in all; None: all latents."""
        if self.latents_Z is None or slots_R is None:
            return slots_R if self.latents_Z is None else self.latents_Z
        return self.latents_Z[slots_R]

    def encode(
        self, p: ModuleType | SelfChecked, inputs: EncoderInputs, centered_BD: Tensor, groups: ExpertGroups, aux_k: int
    ) -> tuple[Tensor, Tensor]:
        """Pre-activations of the aux_k best of each token's own experts, without ReLU, and their slots; both [B, A]."""
        pairs, n_shared = inputs.pairs(), self.slots.n_shared
        if pairs is None:
            return self._encode_rows(p, inputs, centered_BD, groups, aux_k, slice(None))
        found = self._encode_rows(p, inputs, pairs.rows(centered_BD), pairs.groups, aux_k, slice(n_shared, None))
        values_BN, slots_BN = (pairs.by_token(t) for t in found)
        ranked_BN = times_gates(values_BN, inputs.gates_B)
        if n_shared:
            k = min(aux_k, n_shared)
            shared_BA, places_BA = self._encode_rows(p, inputs, centered_BD, groups, k, slice(n_shared))
            values_BN, ranked_BN = (torch.cat([shared_BA, t_BN], dim=1) for t_BN in (values_BN, ranked_BN))
            slots_BN = torch.cat([places_BA, slots_BN + n_shared], dim=1)
        if self.real_Z is not None:
            ranked_BN = ranked_BN.masked_fill(~self.real_Z[slots_BN], -torch.inf)
        place_BA = ranked_BN.topk(aux_k, dim=1, sorted=False).indices
        return values_BN.gather(1, place_BA), slots_BN.gather(1, place_BA)

    def _encode_rows(
        self,
        p: ModuleType | SelfChecked,
        inputs: EncoderInputs,
        centered_BD: Tensor,
        groups: ExpertGroups,
        aux_k: int,
        slots: slice,
    ) -> tuple[Tensor, Tensor]:
        """Of some of the slots, which are counted from the first of them."""
        real_Z, W_ZD = None if self.real_Z is None else self.real_Z[slots], self.rows(inputs.W_enc_FD, slots)
        bias_Z, scale_Z = (None if t_F is None else self.rows(t_F, slots) for t_F in (inputs.bias_F, inputs.scale_F))
        if real_Z is not None and inputs.by_magnitude:  # padding is the least if it is 0
            scale_Z = real_Z.to(W_ZD.dtype) if scale_Z is None else scale_Z * real_Z
        elif real_Z is not None:
            never_Z = W_ZD.new_zeros(len(real_Z)).masked_fill_(~real_Z, -torch.inf)
            bias_Z = never_Z if bias_Z is None else bias_Z + never_Z
        choice = False, inputs.by_magnitude
        values_BA, slots_BA = p.topk_encode(centered_BD, W_ZD, aux_k, groups, bias_Z, scale_Z, inputs.dtype, *choice)
        return values_BA if real_Z is None else values_BA.masked_fill(~real_Z[slots_BA], 0), slots_BA

    def without_padding(self, values_BA: Tensor, slots_BA: Tensor) -> Tensor:
        """Zero where an expert had fewer than aux_k dead latents, so that padding was chosen."""
        return values_BA if self.real_Z is None else values_BA.masked_fill(~self.real_Z[slots_BA], 0)


def encode_groups(
    p: ModuleType | SelfChecked, inputs: EncoderInputs, centered_BD: Tensor, dead_N: Tensor, aux_k: int, n: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``encode`` of each group of n[i] consecutive dead latents apart: values, slots, and where each row's begin."""
    groups, found, first = inputs.groups(), [], 0
    for size in n:
        dead = DeadLatents(dead_N[first : first + size], None, ExpertBlocks(size, 1))
        values_BA, slots_BA = dead.encode(p, inputs, centered_BD, groups, min(aux_k, size))
        found.append((values_BA, slots_BA + first))
        first += size
    values_BA, slots_BA = (torch.cat(t, dim=1) for t in zip(*found, strict=True))
    ends_L = torch.tensor([t.shape[1] for t, _ in found], device=dead_N.device).cumsum(0)
    first_B = torch.arange(len(values_BA), device=dead_N.device) * values_BA.shape[1]
    offsets_Q1 = torch.nn.functional.pad((first_B.unsqueeze(1) + ends_L).flatten(), (1, 0))
    return values_BA.flatten(), slots_BA.flatten(), offsets_Q1


def dead_latents(dead_N: Tensor, blocks: ExpertBlocks, aux_k: int) -> DeadLatents:
    """From their indices, ascending; or from a mask over all latents, of which nothing is read back."""
    if dead_N.dtype == torch.bool:
        return DeadLatents(None, dead_N, blocks)
    E = blocks.n_experts
    if E == 1 and not blocks.n_shared:
        return DeadLatents(dead_N, None, ExpertBlocks(len(dead_N), 1))
    # Owner 0 is the shared part, owner e + 1 is expert e.
    owner_N = (blocks.expert_of(dead_N) + 1).clamp_min(0)
    by_owner_N, order_N = owner_N.sort(stable=True)
    count = torch.bincount(owner_N, minlength=E + 1)
    n_shared, *of_experts = count.tolist()
    n_slots = max(aux_k, *of_experts)
    slots = ExpertBlocks(n_shared + E * n_slots, E, n_shared)
    start = torch.arange(E + 1, device=dead_N.device) * n_slots + (n_shared - n_slots)
    start[0] = 0
    slot_N = (start - (count.cumsum(0) - count))[by_owner_N] + torch.arange(len(dead_N), device=dead_N.device)
    latents_Z = dead_N[:1].repeat(slots.n_latents)
    latents_Z[slot_N] = dead_N[order_N]
    real_Z = torch.zeros(slots.n_latents, dtype=torch.bool, device=dead_N.device)
    real_Z[slot_N] = True
    return DeadLatents(latents_Z, real_Z, slots)
