"""Elementwise work on tokens and codes around the products, in plain torch: primitives like those of torch_backend."""

import torch
from torch import Tensor

from sae_lens_switch_kernels.indexing import ExpertGroups, latent_index
from sae_lens_switch_kernels.torch_batch_topk import above

# Of a tile that are searched at a time: on a CPU to stay in cache, on a GPU for few waits and little more memory.
SEARCH_ELEMENTS = {"cpu": 1 << 21}
_SEARCH_ELEMENTS_ON_GPU = 1 << 25


def sorted_rows(t_BD: Tensor, bias_D: Tensor | None, groups: ExpertGroups, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    """t - bias, rows sorted by expert, contiguous; t itself where that changes nothing.

    A GPU's form writes them in ``dtype``, that of the products which read them. Here they keep their own: each product
    casts its own tile.
    """
    if bias_D is None:
        return groups.sorted(t_BD).contiguous()
    if groups.order_B is None:
        return (t_BD - bias_D).contiguous()
    return groups.sorted(t_BD).sub_(bias_D)


def sorted_codes(
    values_BK: Tensor, indices_BK: Tensor, gates_B: Tensor | None, groups: ExpertGroups
) -> tuple[Tensor, Tensor, Tensor]:
    """values * gate, values and indices, rows sorted by expert; gates in the order of the tokens."""
    values_BK = groups.sorted(values_BK)
    return gated(values_BK, gates_B, groups), values_BK, groups.sorted(indices_BK)


def unsorted_codes(
    values_BK: Tensor, indices_BK: Tensor, gates_B: Tensor | None, groups: ExpertGroups
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows sorted by expert: values * gate, still sorted; them, values and indices in the order of the tokens."""
    sorted_acts_BK, values_BK = gated(values_BK, gates_B, groups), groups.unsorted(values_BK)
    acts_BK = values_BK if gates_B is None else values_BK * gates_B.unsqueeze(1).to(values_BK.dtype)
    return sorted_acts_BK, acts_BK, values_BK, groups.unsorted(indices_BK)


def gated(values_BK: Tensor, gates_B: Tensor | None, groups: ExpertGroups) -> Tensor:
    """Rows sorted by expert, times the gate of their token."""
    return values_BK if gates_B is None else values_BK * groups.sorted(gates_B).unsqueeze(1).to(values_BK.dtype)


def code_grads(
    values_BK: Tensor,
    d_acts_BK: Tensor,
    gates_B: Tensor | None,
    grad_values_BK: Tensor | None,
    groups: ExpertGroups,
) -> tuple[Tensor, Tensor | None]:
    """What follows from the gradient of values * gate, rows sorted by expert.

    Args:
        values_BK: After ReLU and before the gate, sorted.
        d_acts_BK: The gradient of values * gate, sorted.
        gates_B: In the order of the tokens.
        grad_values_BK: An upstream gradient of the values themselves, in the order of the tokens.
        groups: The tokens of each expert.

    Returns:
        The gradients of the pre-activations [B, K], sorted, and of the gates [B], in the order of the tokens.
    """
    d_values_BK, d_gates_B = gated(d_acts_BK, gates_B, groups), None
    if gates_B is not None:
        d_gates_B = groups.unsorted((d_acts_BK * values_BK).sum(1).to(gates_B.dtype))
    if grad_values_BK is not None:
        d_values_BK = d_values_BK + groups.sorted(grad_values_BK)
    # ReLU comes before top-k: a token with fewer than k positive latents carries zeros, and no gradient.
    return d_values_BK * (values_BK != 0), d_gates_B


def count_codes(
    values_BK: Tensor,
    indices_BK: Tensor,
    is_finite: Tensor,
    number: int | Tensor,
    last_F: Tensor,
    total_F: Tensor,
) -> None:
    """Note which latents are active, in place; nothing unless ``is_finite``.

    Args:
        values_BK: Latents are active where these are neither 0 nor NaN.
        indices_BK: Which latents.
        is_finite: Whether there is anything to note.
        number: What ``last_F`` becomes where a latent is active: larger than all that it holds.
        last_F: int32.
        total_F: int64; to it are added the tokens that each latent is active on.
    """
    active_S, indices_S = (values_BK.flatten().abs() > 0) & is_finite, indices_BK.flatten().long()
    never = last_F.new_full((), torch.iinfo(last_F.dtype).min)
    number = number if isinstance(number, Tensor) else last_F.new_full((), number)
    last_F.scatter_reduce_(0, indices_S, torch.where(active_S, number, never), "amax")
    total_F.scatter_add_(0, indices_S, active_S.to(total_F.dtype))


def latent_sums(t_BK: Tensor, indices_BK: Tensor, n_latents: int) -> Tensor:
    """The sum of each latent's entries, [F], in a fixed order, which index_add_ has on a CPU alone."""
    if t_BK.device.type == "cpu":
        wide_BK = t_BK.to(torch.promote_types(t_BK.dtype, torch.float32))  # torch would add in their own dtype
        sums_F = wide_BK.new_zeros(n_latents).index_add_(0, indices_BK.flatten(), wide_BK.flatten())
        return sums_F.to(t_BK.dtype)
    index = latent_index(indices_BK, n_latents)
    return index.sums(t_BK.flatten()[index.order_S])


def codes_above(
    pre_RP: Tensor, threshold_P: Tensor, bias_P: Tensor | None, gates_R1: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What exceeds its threshold in a tile of R rows and P latents. May overwrite pre.

    NaN exceeds everything, as in SAELens, so that a token that is NaN does not become one without latents.

    Args:
        pre_RP: The tile.
        threshold_P: Thresholds, in whose dtype everything is compared.
        bias_P: Added to every row.
        gates_R1: Multiplies a row before it is compared.

    Returns:
        Row, latent and value (with the bias, without the gate) of each, [S], by row and within a row by latent.
    """
    R, P = pre_RP.shape
    rows = max(1, SEARCH_ELEMENTS.get(pre_RP.device.type, _SEARCH_ELEMENTS_ON_GPU) // max(P, 1))
    scratch = threshold_P.new_empty(min(R, rows), P)
    none = threshold_P.new_empty(0, dtype=torch.long)
    found = [(none, none, threshold_P.new_empty(0))]
    for start in range(0, R, rows):
        part = pre_RP[start : start + rows].to(threshold_P.dtype)
        part = part if bias_P is None else part.add_(bias_P)
        gates = None if gates_R1 is None else gates_R1[start : start + rows].to(part.dtype)
        gated = part if gates is None else torch.mul(part, gates, out=scratch[: len(part)])
        # A difference is positive exactly where the first number is larger; torch subtracts faster than it compares.
        place_S = above(torch.sub(gated, threshold_P, out=scratch[: len(part)]), 0.0).sort().values
        row_S = torch.div(place_S, max(P, 1), rounding_mode="floor")
        latent_S, values_S = place_S - row_S * P, part.take(place_S)
        gated_S = values_S if gates is None else values_S * gates.flatten()[row_S]
        # The difference of equal infinities is NaN too.
        is_above_S = ~(gated_S <= threshold_P[latent_S])
        found.append((row_S[is_above_S] + start, latent_S[is_above_S], values_S[is_above_S]))
    row_S, latent_S, values_S = (torch.cat(t) for t in zip(*found, strict=True))
    return row_S, latent_S, values_S
