"""AuxK (Gao et al. 2024, A.2): which dead latents a token may choose, and their encoder.

With experts a token chooses among the dead latents of its own expert or experts, so all experts get equally many slots
for them, and the encoder's grouped product applies unchanged.

Letters beside the package's: Z is the number of slots, E times those of one expert.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lens_switch_kernels.backend import SelfChecked
from sae_lens_switch_kernels.indexing import ExpertGroups
from sae_lens_switch_kernels.inputs import EncoderInputs
from sae_lens_switch_kernels.several_experts import times_gates


class DeadLatents(NamedTuple):
    """Dead latents by expert, padded to the same number of slots per expert.

    Attributes:
        latents_Z: The latent in each slot. An expert has as many slots as the one with most dead latents, and at least
            aux_k.
        real_Z: Which slots are not padding; None: all.
        n_slots: Slots per expert.
    """

    latents_Z: Tensor
    real_Z: Tensor | None
    n_slots: int

    def encode(
        self, p: ModuleType | SelfChecked, inputs: EncoderInputs, centered_BD: Tensor, groups: ExpertGroups, aux_k: int
    ) -> tuple[Tensor, Tensor]:
        """Pre-activations of the aux_k best of each token's own experts, without ReLU, and their slots; both [B, A]."""
        pairs = inputs.pairs()
        if pairs is None:
            return self._encode_rows(p, inputs, centered_BD, groups, aux_k)
        found = self._encode_rows(p, inputs, pairs.rows(centered_BD), pairs.groups, aux_k)
        values_BN, slots_BN = (pairs.by_token(t) for t in found)
        ranked_BN = times_gates(values_BN, inputs.gates_B)
        if self.real_Z is not None:
            ranked_BN = ranked_BN.masked_fill(~self.real_Z[slots_BN], -torch.inf)
        place_BA = ranked_BN.topk(aux_k, dim=1, sorted=False).indices
        return values_BN.gather(1, place_BA), slots_BN.gather(1, place_BA)

    def _encode_rows(
        self, p: ModuleType | SelfChecked, inputs: EncoderInputs, centered_BD: Tensor, groups: ExpertGroups, aux_k: int
    ) -> tuple[Tensor, Tensor]:
        W_ZD = inputs.W_enc_FD[self.latents_Z]
        bias_Z, scale_Z = (None if t_F is None else t_F[self.latents_Z] for t_F in (inputs.bias_F, inputs.scale_F))
        if self.real_Z is not None:
            never_Z = W_ZD.new_zeros(len(self.latents_Z)).masked_fill_(~self.real_Z, -torch.inf)
            bias_Z = never_Z if bias_Z is None else bias_Z + never_Z
        values_BA, slots_BA = p.topk_encode(centered_BD, W_ZD, aux_k, groups, bias_Z, scale_Z, inputs.dtype)
        return self.without_padding(values_BA, slots_BA), slots_BA

    def without_padding(self, values_BA: Tensor, slots_BA: Tensor) -> Tensor:
        """Zero where an expert had fewer than aux_k dead latents, so that padding was chosen."""
        return values_BA if self.real_Z is None else values_BA.masked_fill(~self.real_Z[slots_BA], 0)


def encode_groups(
    p: ModuleType | SelfChecked, inputs: EncoderInputs, centered_BD: Tensor, dead_N: Tensor, aux_k: int, n: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``encode`` of each group of n[i] consecutive dead latents apart: values, slots, and where each row's begin."""
    groups, found, first = inputs.groups(), [], 0
    for size in n:
        dead = DeadLatents(dead_N[first : first + size], None, size)
        values_BA, slots_BA = dead.encode(p, inputs, centered_BD, groups, min(aux_k, size))
        found.append((values_BA, slots_BA + first))
        first += size
    values_BA, slots_BA = (torch.cat(t, dim=1) for t in zip(*found, strict=True))
    ends_L = torch.tensor([t.shape[1] for t, _ in found], device=dead_N.device).cumsum(0)
    first_B = torch.arange(len(values_BA), device=dead_N.device) * values_BA.shape[1]
    offsets_Q1 = torch.nn.functional.pad((first_B.unsqueeze(1) + ends_L).flatten(), (1, 0))
    return values_BA.flatten(), slots_BA.flatten(), offsets_Q1


def dead_latents(dead_N: Tensor, n_experts: int, n_latents: int, aux_k: int) -> DeadLatents:
    E = n_experts
    if E == 1:
        return DeadLatents(dead_N, None, len(dead_N))
    expert_N = torch.div(dead_N, n_latents // E, rounding_mode="floor")
    by_expert_N, order_N = expert_N.sort(stable=True)
    count_E = torch.bincount(expert_N, minlength=E)
    n_slots = max(aux_k, int(count_E.max()))
    first_E = count_E.cumsum(0) - count_E
    slot_N = by_expert_N * n_slots + torch.arange(len(dead_N), device=dead_N.device) - first_E[by_expert_N]
    latents_Z = dead_N[:1].repeat(E * n_slots)
    latents_Z[slot_N] = dead_N[order_N]
    real_Z = torch.zeros(E * n_slots, dtype=torch.bool, device=dead_N.device)
    real_Z[slot_N] = True
    return DeadLatents(latents_Z, real_Z, n_slots)
