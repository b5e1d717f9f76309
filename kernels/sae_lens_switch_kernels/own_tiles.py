"""Pre-activations of every token with all latents that it may choose from, tile by tile, and where they belong.

Without experts that is the product x W^T. With experts, a token is multiplied by the latents of each of its own, as one
row per pair (several_experts.py), and by the shared ones.

Letters: R rows of P latents, a tile.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lens_switch_kernels.backend import SelfChecked
from sae_lens_switch_kernels.indexing import ExpertGroups, one_group
from sae_lens_switch_kernels.inputs import EncoderInputs
from sae_lens_switch_kernels.torch_tiles import pre_activation_tiles


class OwnTile(NamedTuple):
    """A tile of the matrix of pre-activations [B, F], which as a whole is nowhere.

    Attributes:
        pre_RP: The product, with the bias and without the gate. The next tile overwrites it.
        first_R: The place of each row's first number in the flattened matrix; the others follow it.
        latents: The latents; None where rows may have others than the first, those of their own expert.
        gates_R1: The gate of each row; None: all are 1.
    """

    pre_RP: Tensor
    first_R: Tensor
    latents: slice | None
    gates_R1: Tensor | None


def own_tiles(
    p: ModuleType | SelfChecked, inputs: EncoderInputs, centered_BD: Tensor, dtype: torch.dtype, alone: bool
) -> Iterator[OwnTile]:
    """All that the tokens may choose from, in no particular order.

    Args:
        p: The primitives of a backend.
        inputs: Weights, experts and gates.
        centered_BD: The encoder's input, in the order of the tokens.
        dtype: Of the products.
        alone: Whether each tile is of one expert, so that it has ``latents``. A GPU is then waited for, to learn how
            many tokens each expert has; otherwise it computes all of its experts as one tile.
    """
    W_FD, S, device = inputs.W_enc_FD, inputs.n_shared, centered_BD.device
    first_B = torch.arange(len(centered_BD), device=device) * len(W_FD)
    everyone, pairs = one_group(len(centered_BD), device), inputs.pairs()
    if pairs is None:
        yield from _tiles(centered_BD, W_FD, everyone, dtype, first_B, bias_F=inputs.bias_F, narrow=not alone)
        return
    if S:
        yield from _tiles(centered_BD, W_FD[:S], everyone, dtype, first_B)
    groups, W_FD = pairs.groups, W_FD[S:]
    x_RD = pairs.rows(centered_BD)
    first_R = pairs.rows(first_B) + groups.first_latents(len(x_RD), len(W_FD)).squeeze(1) + S
    gates_R1 = None if inputs.gates_B is None else groups.sorted(inputs.gates_B.reshape(-1, 1))
    if not alone and isinstance(p, SelfChecked):
        yield OwnTile(p.grouped_encode(x_RD, W_FD, groups, dtype), first_R, None, gates_R1)
    else:
        yield from _tiles(x_RD, W_FD, groups, dtype, first_R, S, gates_R1, alone)


def _tiles(
    x_RD: Tensor,
    W_FD: Tensor,
    groups: ExpertGroups,
    dtype: torch.dtype,
    first_R: Tensor,
    n_before: int = 0,
    gates_R1: Tensor | None = None,
    alone: bool = True,
    bias_F: Tensor | None = None,
    narrow: bool = False,
) -> Iterator[OwnTile]:
    """Of weights that ``n_before`` latents come before; ``first_R`` are the places of each row's first latent."""
    M = len(W_FD) // (len(groups.offsets_E1) - 1)
    for tile in pre_activation_tiles(x_RD, W_FD, groups, dtype, alone, bias_F, narrow):
        within = tile.latents.start - tile.expert * M
        latents = slice(n_before + tile.latents.start, n_before + tile.latents.stop)
        gates = None if gates_R1 is None else gates_R1[tile.rows]
        yield OwnTile(tile.pre_RP, first_R[tile.rows] + within, latents if alone else None, gates)
