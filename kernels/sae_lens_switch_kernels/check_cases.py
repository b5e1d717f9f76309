"""What the self-check of a primitive runs it on: experts of uneven load, numbers of every kind that a step has."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sae_lens_switch_kernels.indexing import ExpertGroups, expert_groups, latent_index


class Shape(NamedTuple):
    """The shape of a self-check, by the package's letters."""

    B: int
    D: int
    M: int
    E: int
    K: int


def cases_of(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Arguments of a primitive, once or several times."""
    if "adam" in name:
        return _adam_cases(shape, device)[name]
    # Also those that are called "name, ...".
    return [given for key, given in _cases(shape, device, dtype).items() if key.split(",")[0] == name]


def _cases(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments of every primitive: experts with uneven loads, and one latent of each active on all of its tokens."""
    B, D, M, E, K = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def high(*shape: int) -> Tensor:
        """Of the router, which is float32 in every precision."""
        return torch.randn(*shape, generator=generator).to(device)

    expert_B = torch.randint(0, E, (B,), generator=generator).clamp(max=E - 2)  # the last has no token
    order_B, offsets_E1 = expert_groups(expert_B.to(device), E)
    groups, mixed = ExpertGroups(None, offsets_E1), ExpertGroups(order_B, offsets_E1)
    first_B1 = expert_B.to(device)[order_B].unsqueeze(1) * M  # type: ignore[index]
    indices_BK = torch.rand(B, M - 1, generator=generator).topk(K, dim=1).indices.to(device) + 1
    indices_BK[:, 0] = 0
    indices_BK += first_B1
    values_BK, x_BD, g_BD, W_FD = normal(B, K), normal(B, D), normal(B, D), normal(E * M, D)
    d_pre_BK, gates_B = normal(B, K), normal(B)
    index, probs_BE, more_BK = latent_index(indices_BK, E * M), high(B, E).softmax(1), normal(B, K)
    counts = index.starts_F1[:-1].int() % 5, index.starts_F1[:-1].clone()
    shares = high(B, E), high(B), high(E), high(1)[0], high(E)  # gradients of what the router returns, and loads
    # In the order of the tokens.
    unsorted_BK = mixed.unsorted(values_BK), mixed.unsorted(indices_BK)
    return {
        "sparse_decode": (values_BK, indices_BK, W_FD),
        "matmul_at_indices": (g_BD, W_FD, indices_BK),
        "latent_weight_grads": (index, values_BK, g_BD, d_pre_BK, x_BD),
        "topk_encode": (x_BD, W_FD, K, groups, None, None, dtype),
        "topk_encode, by magnitude": (x_BD, W_FD, K, groups, None, None, dtype, False, True),
        "grouped_encode": (x_BD, W_FD, groups, dtype),
        "grouped_decode": (values_BK, indices_BK, W_FD, mixed, dtype),
        "grouped_matmul_at_indices": (g_BD, W_FD, indices_BK, groups, dtype),
        "grouped_weight_grads": (values_BK, indices_BK, g_BD, d_pre_BK, x_BD, E * M, groups, dtype),
        "gated_decode": (values_BK, indices_BK, gates_B, W_FD, mixed, dtype),
        "gated_grads": (*unsorted_BK, gates_B, more_BK, g_BD, x_BD, normal(D), W_FD, mixed, dtype),
        "expert_groups": (expert_B.to(device), E),
        "latent_index": (indices_BK, E * M),
        "sorted_rows": (x_BD, normal(D), mixed, dtype),
        "sorted_codes": (values_BK, indices_BK, gates_B, mixed),
        "unsorted_codes": (values_BK, indices_BK, gates_B, mixed),
        "loss": (g_BD, normal(D), x_BD, gates_B[0], 3.0, None),
        "loss_backward": (g_BD, x_BD, gates_B[1], _parts(g_BD - x_BD), None, gates_B[0], None, None),
        "route": (high(B, E), None),
        "route, biased": (high(B, E), high(E)),
        # Numbers of tokens that low precision cannot count.
        "route, to one expert": (high(1501, 2), torch.tensor([9.0, 0.0], device=device)),
        "route_backward": (probs_BE, expert_B.to(device), *shares),
        "update_loads": (high(E).relu(), high(E), high(E), high(1)[0] + 1, 0.02, -9.0),
        "update_expert_bias": (high(E), high(E).round(), high(1)[0] < 9, 0.1),
        "clip": ([normal(B, D), normal(D, B).T, normal(K)], normal(1)[0], 0.5, indices_BK[0, :2], [gates_B[0]]),
        "codes_above": (normal(B, M)[:, 1:], normal(M - 1), normal(M - 1), None),
        "codes_above, gated": (normal(B, M), normal(M).abs(), None, gates_B.unsqueeze(1)),
        "count_codes": (values_BK, indices_BK, values_BK[0, 0] < 9, 7, *counts),
        "code_grads": (values_BK, d_pre_BK, gates_B, normal(B, K), mixed),
        "topk_encode, biased": (x_BD, W_FD, K, groups, normal(E * M), None, dtype),
    }


def _parts(t_BD: Tensor) -> Tensor:
    """Its columns' sums over thirds of the batch, as a forward pass leaves them."""
    return torch.stack([t.float().sum(0) for t in t_BD.chunk(3)])


def _adam_cases(shape: Shape, device: torch.device) -> dict[str, list[tuple[Any, ...]]]:
    """Rows as they are and as wide as they get, with and without a constraint, with numbers of either side."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(4, shape.E * shape.M, shape.D, generator=generator).to(device)
    W_FD, grad_FD, m_FD, v_FD = functional.normalize(matrices[0], dim=1), matrices[1], matrices[2], matrices[3].square()
    radial_F, (step, lr, scale, found) = (grad_FD * W_FD).sum(1), torch.tensor([3.0, 0.5, 2.0, 0.0]).to(device)
    rows, options = (W_FD, grad_FD, m_FD, v_FD), (0.9, 0.999, 1e-8)
    wide = tuple(t.view(shape.K - 1, -1) for t in rows)
    copy_FD, wide_copy = (t.to(torch.bfloat16) for t in (W_FD, wide[0]))
    low, wide_low = ((*some[:2], *(t.to(torch.bfloat16) for t in some[2:])) for some in (rows, wide))
    dense = [
        (*rows, step, 0.5, *options, None, None, None, False, False, copy_FD),
        (*rows, step, 0.5, *options, scale, found, radial_F, True, True, None),
        (*rows, step, lr, *options, scale, found, None, True, True, copy_FD),
        (*wide, step, 0.5, *options, None, None, None, True, True, wide_copy),
        (*rows, step, 0.5, *options, scale, 1 - found, None, True, True, copy_FD),
        (*low, step, 0.5, *options, scale, found, radial_F, True, True, copy_FD),
        (*wide_low, step, 0.5, *options, None, None, None, True, True, None),
    ]
    sizes = [shape.D, 1, W_FD.numel() - shape.D - 1]
    several = [[part.clone() for part in t.flatten().split(sizes)] for t in rows]
    ages = [step, step + 1, step * 9]
    tensors = [(*several, ages, 0.5, *options), (*several, ages, lr, *options, scale, found)]
    tensors.append((*several, ages, 0.5, *options, scale, 1 - found))
    return {
        "adam_rows": dense,
        "adam_tensors": tensors,
        "lazy_adam_rows": [_of_some_rows(dense[i]) for i in (0, 1, 2, 3, 5)],
    }


def _of_some_rows(case: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a dense case a lazy one: every other row, of either age, with moments side by side."""
    W_FD, grad_FD, m_FD, v_FD, _, lr, *options, _, radial_F, unit_rows, project, copy_FD = case
    rows_R = torch.arange(len(W_FD) // 2, device=W_FD.device).flip(0) * 2
    moments_F2D = torch.stack([m_FD, v_FD], 1)
    step_F = torch.arange(len(W_FD), device=W_FD.device) % 1000 + 1.0
    matrices = W_FD, grad_FD[rows_R], moments_F2D[:, 0], moments_F2D[:, 1], step_F, rows_R
    radial_R = None if radial_F is None else radial_F[rows_R]
    return (*matrices, lr, *options, radial_R, unit_rows, project, copy_FD)
