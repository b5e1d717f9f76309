"""What ``autoencode`` takes and returns, forward and backward, by name."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_lens_switch_kernels.backend import primitives
from sae_lens_switch_kernels.indexing import ExpertBlocks, ExpertGroups


class DecoderInputs(NamedTuple):
    """The arguments of ``autoencode`` that follow the encoder's.

    Attributes:
        W_dec_FD: Decoder weights.
        dead_N: The dead latents, for AuxK.
        aux_k: How many of them are chosen per token.
        dead_counts: How many consecutive ones of ``dead_N`` reconstruct apart from the others; none: all together.
        ends_L: The positions inside an expert at which levels end, each decoded apart; None: there is one.
    """

    W_dec_FD: Tensor
    dead_N: Tensor | None
    aux_k: int
    dead_counts: list[int] = []  # never written to
    ends_L: Tensor | None = None


class Outputs(NamedTuple):
    """What ``autoencode`` computes; empty tensors where there is no AuxK.

    Attributes:
        out_BD: Reconstruction; with levels [B * L, D], each level's part.
        values_BK: Values of the active latents, after ReLU and before the gate.
        indices_BK: The active latents.
        aux_out_BD: Reconstruction from dead latents alone; with ``dead_counts``, a row per token and group of them.
        aux_values_BA: Pre-activations of the chosen dead latents, rows sorted by expert; with ``dead_counts`` [B * A].
        aux_slots_BA: Their slots in ``DeadLatents``, likewise.
        centered_BD: The encoder's input, rows sorted by expert; empty if that is x, which an operator may not
            return, and on a GPU, which makes it anew in less time than it takes to save it.
        order_B: Of the ``ExpertGroups``; empty if there is one group, or if the groups were given.
        offsets_E1: Likewise; empty if they were given.
        doubtful_B: Whether low precision may have missed a latent of the token; empty without candidates.
        offsets_Q1: Of codes over the batch or with levels, which are [S], where those of each token and level begin;
            else empty.
        aux_offsets_Q1: With ``dead_counts``, where those of each token and group begin; else empty.
        acts_BK: Values times gates; empty without gates.
    """

    out_BD: Tensor
    values_BK: Tensor
    indices_BK: Tensor
    aux_out_BD: Tensor
    aux_values_BA: Tensor
    aux_slots_BA: Tensor
    centered_BD: Tensor
    order_B: Tensor
    offsets_E1: Tensor
    doubtful_B: Tensor
    offsets_Q1: Tensor
    aux_offsets_Q1: Tensor
    acts_BK: Tensor


class BackwardInputs(NamedTuple):
    """Arguments of ``autoencode_backward``: upstream gradients, then what forward saved, then what is needed."""

    grad_out_BD: Tensor | None
    grad_values_BK: Tensor | None
    grad_aux_BD: Tensor | None
    x_BD: Tensor
    centered_BD: Tensor
    W_enc_FD: Tensor
    W_dec_FD: Tensor
    pre_bias_D: Tensor | None
    gates_B: Tensor | None
    expert_B: Tensor | None
    dead_N: Tensor | None
    order_B: Tensor
    offsets_E1: Tensor
    values_BK: Tensor
    indices_BK: Tensor
    offsets_Q1: Tensor
    aux_values_BA: Tensor
    aux_slots_BA: Tensor
    aux_offsets_Q1: Tensor
    n_experts: int
    n_shared: int
    dtype: torch.dtype
    needs_x: bool
    needs_pre_bias: bool

    @property
    def blocks(self) -> ExpertBlocks:
        return ExpertBlocks(len(self.W_dec_FD), self.n_experts, self.n_shared)

    def groups(self) -> ExpertGroups:
        return ExpertGroups(self.order_B if self.order_B.numel() else None, self.offsets_E1)

    def centered(self, groups: ExpertGroups, dtype: torch.dtype) -> Tensor:
        if self.centered_BD.numel():
            return self.centered_BD
        return primitives(self.x_BD).sorted_rows(self.x_BD, self.pre_bias_D, groups, dtype)


class InputGrads(NamedTuple):
    """Gradients, under the names of the arguments of ``autoencode``; empty where not needed."""

    x_BD: Tensor
    W_enc_FD: Tensor
    W_dec_FD: Tensor
    gates_B: Tensor
    pre_bias_D: Tensor
    bias_F: Tensor


class Reconstruction(NamedTuple):
    """The result of ``sparse_autoencode``, as its callers see it.

    Attributes:
        out_BD: sum_j gate z_j W_dec[i_j], without any bias.
        values_BK: z, after ReLU and before the gate; zero where fewer than k latents are positive.
        indices_BK: i, int64, distinct within a row.
        aux_out_BD: The same sum over the aux_k chosen dead latents, without ReLU; None without ``dead_N``.
        doubtful_B: Whether the encoder's low precision may have missed a latent of the token; None in full precision.
        offsets_B1: With ``over_batch``, where each token's codes begin, values and indices being [k]; else None.
        acts_BK: gate z, without a gradient.
    """

    out_BD: Tensor
    values_BK: Tensor
    indices_BK: Tensor
    aux_out_BD: Tensor | None
    doubtful_B: Tensor | None = None
    offsets_B1: Tensor | None = None
    acts_BK: Tensor | None = None
