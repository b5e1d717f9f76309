"""What holds for every Triton primitive: any layout, empty batches, the same bits twice, any small codes."""

import pytest
import torch
from helpers.triton_checks import (
    DEVICE,
    check_decode,
    check_grouped,
    check_latent_weight_grads,
    check_matmul_at_indices,
    check_select,
    random,
    random_indices,
    small,
)
from hypothesis import given
from hypothesis import strategies as st
from sae_lens_switch_kernels import torch_backend, triton_backend
from sae_lens_switch_kernels.indexing import ExpertGroups, latent_index
from sae_lens_switch_kernels.triton_backend.gather import matmul_at_indices, sparse_decode
from sae_lens_switch_kernels.triton_backend.grouped_matmul import grouped_decode, grouped_encode, grouped_weight_grad
from sae_lens_switch_kernels.triton_backend.latent_weight_grads import latent_weight_grads
from sae_lens_switch_kernels.triton_backend.select_topk import select_topk
from torch import Tensor


def test_an_index_twice_in_a_row_counts_twice():
    indices = random_indices(20, 6, 1).expand(20, 4)
    values, d_pre, g, x = (random(20, n, seed=seed) for seed, n in enumerate((4, 4, 16, 16)))
    check_decode(values, indices, random(6, 16))
    check_matmul_at_indices(g, random(6, 16), indices)
    check_latent_weight_grads(values, indices, 6, g, d_pre, x)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "offset"])
def test_inputs_that_are_not_contiguous(layout):
    B, D, F, K, E = 6, 24, 20, 4, 2

    def awkward(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.T.contiguous().T
        if layout == "strided":
            return t.repeat_interleave(2, 1)[:, ::2]
        if layout == "expanded":
            return t[:1].expand_as(t)
        return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)  # not aligned to 16 bytes

    indices = awkward(random_indices(B, F, K))
    values, d_pre, g, x = (awkward(random(B, n, seed=seed)) for seed, n in enumerate((K, K, D, D)))
    a, pre = awkward(random(B, F // E)), awkward(random(B, 500))
    W = random(F, D) if layout == "expanded" else awkward(random(F, D))
    check_decode(values, indices, W)
    check_matmul_at_indices(g, W, indices)
    check_latent_weight_grads(values, indices, F, g, d_pre, x)
    check_grouped(x, a, W, torch.tensor([0, 2, B], device=DEVICE))
    check_select(pre, 3)


def test_an_empty_batch():
    no_indices = torch.zeros(0, 3, dtype=torch.long, device=DEVICE)
    W, none, rows = random(12, 8), random(0, 3), random(0, 8)
    assert sparse_decode(none, no_indices, W).shape == (0, 8)
    no_slots = torch.zeros(3, 0, dtype=torch.long, device=DEVICE)
    assert torch.equal(sparse_decode(random(3, 0), no_slots, W), torch.zeros(3, 8, device=DEVICE))
    assert matmul_at_indices(random(3, 8), W, no_slots).shape == (3, 0)
    assert latent_weight_grads(latent_index(no_slots, 2), random(3, 0), random(3, 8)).dW_dec_FD.count_nonzero() == 0
    assert matmul_at_indices(rows, W, no_indices).shape == (0, 3)
    grads = latent_weight_grads(latent_index(no_indices, 12), none, rows, none, rows)
    assert all(t is not None and t.count_nonzero() == 0 for t in grads)
    assert [t.shape for t in select_topk(random(0, 500), 3)] == [(0, 3), (0, 3)]
    offsets = torch.zeros(4, dtype=torch.long, device=DEVICE)
    assert grouped_encode(rows, W, offsets).shape == (0, 4)
    assert grouped_decode(random(0, 4), W, offsets).shape == (0, 8)
    assert torch.equal(grouped_weight_grad(random(0, 4), rows, offsets), torch.zeros(12, 8, device=DEVICE))


def test_two_runs_give_the_same_bits():
    B, D, F, K = 60, 24, 3, 4  # some latents long enough for pieces
    indices, W = random_indices(B, F, K), random(F, D)
    values, d_pre, g, x = (random(B, n, seed=seed) for seed, n in enumerate((K, K, D, D)))
    offsets, pre = torch.tensor([0, 30, 30, B], device=DEVICE), random(4, 900).round()

    def run() -> list[Tensor | None]:
        return [
            sparse_decode(values, indices, W),
            matmul_at_indices(g, W, indices),
            *latent_weight_grads(latent_index(indices, F), values, g, d_pre, x),
            *select_topk(pre, 5),
            grouped_weight_grad(x[:, :5], g, offsets),
        ]

    for first, second in zip(run(), run(), strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)


@small
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 12), st.integers(1, 9), st.integers(0, 99))
def test_any_small_codes(B, D, F, K, seed):
    indices = torch.randint(0, F, (B, K), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    values, d_pre, g, x = (random(B, n, seed=seed + i) for i, n in enumerate((K, K, D, D)))
    W = random(F, D, seed=seed + 4)
    check_decode(values, indices, W)
    check_matmul_at_indices(g, W, indices)
    check_latent_weight_grads(values, indices, F, g, d_pre, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bfloat16", "float8"])
@pytest.mark.parametrize("E", [1, 3])
def test_a_selection_in_low_precision_is_that_of_plain_torch(dtype, E):
    B, D, M, K = 40, 32, 48, 6
    x, W = random(B, D), random(E * M, D)
    offsets = torch.tensor([0, B] if E == 1 else [0, 25, 25, B], device=DEVICE)
    arguments = x, W, K, ExpertGroups(None, offsets), None, None, dtype
    (ours, where), (plain, _) = triton_backend.topk_encode(*arguments), torch_backend.topk_encode(*arguments)
    torch.testing.assert_close(ours.sort(1).values, plain.sort(1).values, rtol=2**-6, atol=1e-3)
    exact = torch_backend.matmul_at_indices(x, W, where)
    tolerance = {torch.bfloat16: 2**-5, torch.float8_e4m3fn: 0.5}[dtype]
    torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)
    assert all(len(set(row)) == K for row in where.tolist())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("by_magnitude", [False, True])
@pytest.mark.parametrize("names", [("bias",), ("scale",), ("bias", "scale")], ids=" and ".join)
def test_experts_with_a_bias_or_a_scale_choose_as_in_plain_torch(names, by_magnitude, relu):
    B, D, M, E, K = 40, 32, 48, 3, 6
    x, W = random(B, D), random(E * M, D)
    groups = ExpertGroups(None, torch.tensor([0, 25, 25, B], device=DEVICE))
    bias = 3 * random(E * M, seed=2) if "bias" in names else None
    scale = random(E * M, seed=3).exp() if "scale" in names else None
    if bias is not None and not by_magnitude:
        bias[::2] = -torch.inf  # never chosen, like padding
    arguments = x, W, K, groups, bias, scale, torch.float32, relu, by_magnitude
    dense = []
    for module in (triton_backend, torch_backend):
        values, indices = module.topk_encode(*arguments)
        assert all(len(set(row)) == K for row in indices.tolist())
        dense.append(torch.full((B, E * M), torch.nan, device=DEVICE).scatter_(1, indices, values))
    torch.testing.assert_close(*dense, rtol=1e-5, atol=1e-5, equal_nan=True)
