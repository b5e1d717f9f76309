"""The encoder's arguments as one tuple, and the flat schema under which torch registers an operator that takes it."""

from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from sae_lens_switch_kernels.backend import primitives
from sae_lens_switch_kernels.indexing import ExpertBlocks, ExpertGroups, one_group
from sae_lens_switch_kernels.several_experts import Pairs, are_several
from sae_lens_switch_kernels.torch_private import assert_on_device


class EncoderInputs(NamedTuple):
    """Arguments of ``encode`` and the first arguments of ``autoencode``, in the order of their schemas.

    Attributes:
        x_BD: Tokens.
        W_enc_FD: Encoder weights, latent-major.
        pre_bias_D: Subtracted from every token.
        bias_F: Added to the pre-activations.
        scale_F: Multiplies the pre-activations during selection only.
        expert_B: The expert of each token, or its experts [B, A]; None: one expert owns all latents.
        gates_B: Multiplies the values of each token, or of each of its experts [B, A], before decoding; of several
            experts, also before the k largest are selected.
        k: Active latents per token.
        n_experts: Number of experts.
        dtype: Dtype of the matrix products.
        candidate_dtype: Dtype of the product that selects candidates (see candidates.py); None: there are none.
        n_candidates: How many per token.
        n_shared: The first so many latents belong to no expert: every token may choose them, with a gate of 1. Experts
            are then given as [B, A], also one; likewise with ``over_batch``.
        by_magnitude: Whether the k farthest from 0 are active, with their signs, instead of the k largest after ReLU.
        over_batch: Whether ``k``, and ``n_candidates``, count over the whole batch, so that tokens differ in number;
            gates then take part in the selection.
        sorted_B: The token in each row of the batch sorted by expert, where that is known.
        ends_E1: Where the rows of each expert begin, and all end, likewise.
    """

    x_BD: Tensor
    W_enc_FD: Tensor
    pre_bias_D: Tensor | None
    bias_F: Tensor | None
    scale_F: Tensor | None
    expert_B: Tensor | None
    gates_B: Tensor | None
    k: int
    n_experts: int
    dtype: torch.dtype
    candidate_dtype: torch.dtype | None = None
    n_candidates: int = 0
    n_shared: int = 0
    by_magnitude: bool = False
    over_batch: bool = False
    sorted_B: Tensor | None = None
    ends_E1: Tensor | None = None

    @property
    def blocks(self) -> ExpertBlocks:
        return ExpertBlocks(len(self.W_enc_FD), self.n_experts, self.n_shared)

    def by_pairs(self) -> "EncoderInputs":
        """The same with experts, if there are any, as [B, A], so that codes are in the order of the tokens."""
        if self.expert_B is None or are_several(self.expert_B):
            return self
        gates_B = None if self.gates_B is None else self.gates_B.unsqueeze(1)
        return self._replace(expert_B=self.expert_B.unsqueeze(1), gates_B=gates_B)

    @property
    def choices(self) -> int:
        """How many latents a token may choose from: those of all its experts, and the shared ones."""
        n_active = self.expert_B.shape[1] if are_several(self.expert_B) else 1
        return n_active * self.blocks.width + self.n_shared

    def of_shared(self) -> "EncoderInputs":
        """For the rows of the shared latents alone, as those of one expert."""
        return self._of(slice(self.n_shared), self.n_shared)

    def of_experts(self) -> "EncoderInputs":
        """For a row per token and expert."""
        return self._of(slice(self.n_shared, None), self.blocks.width)

    def _of(self, latents: slice, width: int) -> "EncoderInputs":
        bias_F, scale_F = (None if t_F is None else t_F[latents] for t_F in (self.bias_F, self.scale_F))
        part = self._replace(W_enc_FD=self.W_enc_FD[latents], bias_F=bias_F, scale_F=scale_F, k=min(self.k, width))
        # Candidates that are all of the latents would save nothing.
        return part if self.n_candidates < width else part._replace(candidate_dtype=None)

    @property
    def given_groups(self) -> ExpertGroups | None:
        """``groups``, where the tokens were sorted before."""
        if self.ends_E1 is None or are_several(self.expert_B):
            return None
        return ExpertGroups(self.sorted_B, self.ends_E1)

    def groups(self) -> ExpertGroups:
        """Of the tokens as their codes are decoded: one group where a token has several experts."""
        return self.given_groups or token_groups(self.x_BD, self.expert_B, self.n_experts)

    def pairs(self) -> Pairs | None:
        """Of the tokens as they are encoded, where they have several experts."""
        if not are_several(self.expert_B):
            return None
        if self.ends_E1 is not None:
            return Pairs(ExpertGroups(self.sorted_B, self.ends_E1), 1)
        _check_distinct(self.expert_B)
        return Pairs(token_groups(self.x_BD, self.expert_B.flatten(), self.n_experts), self.expert_B.shape[1])

    def centered(self, groups: ExpertGroups, dtype: torch.dtype | None = None) -> Tensor:
        """x - pre_bias, rows sorted by expert; x itself where that changes nothing. On a GPU in ``dtype``, if given."""
        return primitives(self.x_BD).sorted_rows(self.x_BD, self.pre_bias_D, groups, dtype or self.x_BD.dtype)


def token_groups(x_BD: Tensor, expert_B: Tensor | None, n_experts: int) -> ExpertGroups:
    if expert_B is None or are_several(expert_B):
        return one_group(len(x_BD), x_BD.device)
    if _is_readable(expert_B):
        check_range("expert_B", expert_B, n_experts)
    groups = primitives(x_BD).expert_groups(expert_B, n_experts)
    if not _is_readable(expert_B):  # a token whose expert is none of these belongs to no group
        assert_on_device(groups.offsets_E1[-1] == len(expert_B), f"expert_B must lie in [0, {n_experts})")
    return groups


def check_range(name: str, t: Tensor, end: int) -> None:
    """Require 0 <= t < end.

    Raises:
        ValueError: On a CPU. On a GPU, where reading a value back would stall every call, the device asserts it.
    """
    if not _is_readable(t):
        assert_on_device(((t >= 0) & (t < end)).all(), f"{name} must lie in [0, {end})")
        return
    if t.numel() == 0:
        return
    low, high = (int(v) for v in t.aminmax())
    if low < 0 or high >= end:
        raise ValueError(f"{name} must lie in [0, {end}); got values from {low} to {high}")


def check_offsets(offsets_B1: Tensor | None, n_codes: int) -> None:
    """Require that offsets ascend from 0 to the number of codes. Raises ValueError on a CPU, as ``check_range``."""
    if offsets_B1 is None:
        return
    ascends = (offsets_B1[0] == 0) & (offsets_B1[-1] == n_codes) & (offsets_B1.diff() >= 0).all()
    if not _is_readable(offsets_B1):
        assert_on_device(ascends, f"offsets_B1 must ascend from 0 to {n_codes}")
    elif not ascends:
        raise ValueError(f"offsets_B1 must ascend from 0 to the number of codes, {n_codes}; got {offsets_B1.tolist()}")


def check_ends(ends_L: Tensor, n_latents: int) -> None:
    """Require that levels end at ascending latents, the last at M. Raises ValueError on a CPU, as ``check_range``."""
    ascends = (ends_L[0] > 0) & (ends_L[-1] == n_latents) & (ends_L.diff() > 0).all()
    if not _is_readable(ends_L):
        assert_on_device(ascends, f"ends_L must ascend to {n_latents}")
    elif not ascends:
        raise ValueError(f"ends_L must ascend to the number of latents, {n_latents}; got {ends_L.tolist()}")


def _check_distinct(expert_BA: Tensor) -> None:
    """Require that no token has an expert twice. Raises ValueError on a CPU, as ``check_range``."""
    if expert_BA.shape[1] == 1:
        return
    is_distinct = (expert_BA.sort(dim=1).values.diff(dim=1) > 0).all()
    if not _is_readable(expert_BA):
        assert_on_device(is_distinct, "the experts of a token must be distinct")
    elif not is_distinct:
        twice = (expert_BA.sort(dim=1).values.diff(dim=1) == 0).any(1).nonzero().flatten()[0]
        raise ValueError(f"expert_B must hold distinct experts per token; got {expert_BA[twice].tolist()}")


def _is_readable(t: Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return t.device.type == "cpu"


_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    bool: "bool",
    torch.dtype: "ScalarType",
    torch.dtype | None: "ScalarType?",
    list[int]: "SymInt[]",
}


def flat_schema(*parts: type, n_outputs: int) -> str:
    """Schema of an operator that takes the fields of these NamedTuples one by one: torch knows no tuples of them."""
    fields = [(name, kind) for part in parts for name, kind in get_type_hints(part).items()]
    arguments = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in fields)
    return f"({arguments}) -> ({', '.join(['Tensor'] * n_outputs)})"
