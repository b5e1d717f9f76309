"""Grouped products on Triton against float64, for every routing."""

import pytest
import torch
from helpers.triton_checks import DEVICE, check_grouped, dtypes, random, small
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from sae_lens_switch_kernels.triton_backend.grouped_matmul import grouped_weight_grad  # noqa: E402


@pytest.mark.parametrize("routing", ["even", "uneven", "one expert has all", "an expert without rows", "tiny"])
@pytest.mark.parametrize(
    ("B", "D", "M", "E"), [(70, 48, 40, 4), (33, 100, 17, 7), (9, 17, 1, 3), (40, 1, 9, 2)], ids=str
)
@dtypes
def test_grouped(B, D, M, E, routing, dtype):
    if routing == "one expert has all":
        counts = torch.zeros(E).long()
        counts[E // 2] = B
    else:
        experts = torch.randint(0, E, (B,), generator=torch.Generator().manual_seed(1))
        if routing == "uneven":
            experts = experts // 2 * 2
        elif routing == "an expert without rows":
            experts = experts.clamp(max=E - 2)
        elif routing == "tiny":
            B = 1
            experts = experts[:1]
        elif routing == "even":
            experts = torch.arange(B) % E
        counts = experts.bincount(minlength=E)
    offsets = torch.cat([torch.zeros(1).long(), counts.cumsum(0)]).to(DEVICE)
    x, a, W = (random(n, m, dtype=dtype, seed=s) for s, (n, m) in enumerate(((B, D), (B, M), (E * M, D))))
    check_grouped(x, a, W, offsets.int() if routing == "even" else offsets)


def test_a_single_expert_is_a_plain_matrix_product():
    x, a, W = random(20, 30), random(20, 50), random(50, 30)
    check_grouped(x, a, W, torch.tensor([0, 20], device=DEVICE))


@pytest.mark.parametrize("setting", ["allow_tf32", "fp32_precision", "default"])
def test_precision_follows_torch(setting):
    from sae_lens_switch_kernels.triton_backend.grouped_matmul import _precision

    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        if setting == "allow_tf32":
            matmul.allow_tf32 = True
        elif setting == "fp32_precision":
            if not hasattr(matmul, "fp32_precision"):
                pytest.skip("older torch")
            matmul.fp32_precision = "tf32"
        expected = "ieee" if setting == "default" else "tf32"
        assert _precision(torch.zeros(1)) == expected
        assert _precision(torch.zeros(1, dtype=torch.bfloat16)) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@small
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_any_small_experts(counts, D, M, seed):
    offsets = torch.tensor([0, *counts]).cumsum(0).to(DEVICE)
    B, E = sum(counts), len(counts)
    check_grouped(random(B, D, seed=seed), random(B, M, seed=seed + 1), random(E * M, D, seed=seed + 2), offsets)


def test_a_weight_gradient_of_low_precision_products_is_written_in_float32():
    a, g = random(9, 5, dtype=torch.bfloat16), random(9, 24, seed=1, dtype=torch.bfloat16)
    offsets = torch.tensor([0, 4, 4, 9], device=DEVICE)
    grad = grouped_weight_grad(a, g, offsets, torch.float32)
    assert grad.dtype == torch.float32
    rows = (slice(0, 4), slice(4, 4), slice(4, 9))
    exact = torch.cat([a[part].double().T @ g[part].double() for part in rows])
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-5)  # rounded to bf16 it would be off by 4e-3
