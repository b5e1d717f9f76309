"""Rows and codes sorted by expert on Triton against plain torch in float64."""

import pytest
import torch
from helpers.triton_checks import DEVICE, assert_as_good_as_torch, dtypes, random
from sae_lens_switch_kernels import torch_codes
from sae_lens_switch_kernels.indexing import ExpertGroups, expert_groups, one_group
from sae_lens_switch_kernels.triton_backend import code_rows
from torch import Tensor

# B, D, E, M, K: odd sizes, one token, empty experts, every latent active
SHAPES = [(33, 48, 4, 16, 5), (7, 1000, 2, 9, 1), (20, 17, 7, 32, 32), (1, 5, 3, 4, 2), (64, 3, 1, 1, 1)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def groups_of(B: int, E: int) -> ExpertGroups:
    """The last of several experts has no token."""
    expert = torch.randint(0, max(1, E - 1), (B,), generator=torch.Generator().manual_seed(4))
    return expert_groups(expert.to(DEVICE), E)


def indices_of(B: int, E: int, M: int, K: int, groups: ExpertGroups) -> Tensor:
    """Sorted rows, latents of their own expert, distinct."""
    local = torch.rand(B, M, generator=torch.Generator().manual_seed(5)).topk(K).indices.to(DEVICE)
    return local + groups.first_latents(B, E * M)


def double(*given: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in given]


@shapes
@dtypes
@pytest.mark.parametrize("has_bias", [True, False])
def test_sorted_rows(shape, dtype, has_bias):
    B, D, E, *_ = shape
    t, bias, groups = random(B, D, dtype=dtype), random(D, dtype=dtype, seed=1) if has_bias else None, groups_of(B, E)
    for out_dtype in (dtype, torch.float32):
        ours = code_rows.sorted_rows(t, bias, groups, out_dtype)
        exact = torch_codes.sorted_rows(*double(t, bias), groups, torch.float64)
        assert_as_good_as_torch("rows", ours, exact, exact.to(out_dtype))
        one = code_rows.sorted_rows(t, bias, one_group(B, t.device), out_dtype)
        assert torch.equal(one[groups.order_B], ours)


@shapes
@dtypes
@pytest.mark.parametrize("has_gates", [True, False])
def test_codes_are_sorted_gated_and_put_back(shape, dtype, has_gates):
    B, _, E, M, K = shape
    groups = groups_of(B, E)
    indices, values = indices_of(B, E, M, K, groups), random(B, K, dtype=dtype)
    gates = random(B, seed=1).sigmoid() if has_gates else None
    ours = code_rows.unsorted_codes(values, indices, gates, groups)
    theirs = torch_codes.unsorted_codes(values, indices, gates, groups)
    back = code_rows.sorted_codes(*ours[2:], gates, groups)
    assert torch.equal(ours[0], back[0])
    assert torch.equal(ours[1], groups.unsorted(ours[0]))
    exact = torch_codes.unsorted_codes(*double(values, indices, gates), groups)[0]
    assert_as_good_as_torch("acts", ours[0], exact, theirs[0])
    for a, b in zip((*ours[2:], *back[1:]), (*theirs[2:], values, indices), strict=True):
        assert torch.equal(a, b)


@shapes
@dtypes
@pytest.mark.parametrize(
    ("has_gates", "has_upstream", "is_sorted"), [(True, False, False), (True, True, False), (False, True, True)]
)
def test_code_grads(shape, dtype, has_gates, has_upstream, is_sorted):
    B, _, E, _, K = shape
    groups = one_group(B, torch.device(DEVICE)) if is_sorted else groups_of(B, E)
    values, d_acts = random(B, K, dtype=dtype).relu(), random(B, K, dtype=dtype, seed=1)
    gates = random(B, seed=2).sigmoid() if has_gates else None
    upstream = random(B, K, dtype=dtype, seed=3) if has_upstream else None
    ours = code_rows.code_grads(values, d_acts, gates, upstream, groups)
    plain = torch_codes.code_grads(values, d_acts, gates, upstream, groups)
    exact = torch_codes.code_grads(*double(values, d_acts, gates, upstream), groups)
    for name, a, b, c in zip(("d_pre", "d_gates"), ours, exact, plain, strict=True):
        assert (a is None) == (c is None)
        if a is not None:
            assert_as_good_as_torch(name, a, b, c)


def test_a_gradient_that_is_not_finite_is_seen_even_where_the_latent_is_off():
    values, d_acts = torch.zeros(3, 2, device=DEVICE), torch.ones(3, 2, device=DEVICE)
    d_acts[1, 0], d_acts[2, 1] = float("nan"), float("inf")
    d_pre, _ = code_rows.code_grads(values, d_acts, None, None, one_group(3, values.device))
    assert d_pre.isnan().tolist() == [[False, False], [True, False], [False, True]]


@shapes
@dtypes
def test_dense_rows_and_what_is_taken_from_them(shape, dtype):
    B, _, E, M, K = shape
    groups = groups_of(B, E)
    indices, values, more = indices_of(B, E, M, K, groups), random(B, K), random(B, K, seed=1)
    local = indices - groups.first_latents(B, E * M)
    found = code_rows.dense_rows(values, indices, E * M, groups.offsets_E1, dtype, more)
    (alone,) = code_rows.dense_rows(values, indices, E * M, groups.offsets_E1, dtype)
    assert torch.equal(alone, found[0])
    for dense, t in zip(found, (values, more), strict=True):
        exact = torch.zeros(B, M, device=DEVICE).scatter(1, local, t)
        assert_as_good_as_torch("dense", dense, exact.double(), exact.to(dtype))
        assert torch.equal(dense == 0, exact == 0)
        taken = code_rows.take_in_rows(dense, indices, groups.offsets_E1, torch.float32)
        assert torch.equal(taken, dense.gather(1, local).float())


def test_no_tokens():
    groups = expert_groups(torch.zeros(0, dtype=torch.long, device=DEVICE), 3)
    rows, codes, indices = random(0, 5), random(0, 2), torch.zeros(0, 2, dtype=torch.long, device=DEVICE)
    assert code_rows.sorted_rows(rows, random(5), groups, torch.float32).shape == (0, 5)
    assert [t.shape for t in code_rows.sorted_codes(codes, indices, random(0), groups)] == [(0, 2)] * 3
    d_pre, d_gates = code_rows.code_grads(codes, codes, random(0), None, groups)
    assert d_pre.shape == (0, 2)
    assert d_gates is not None
    assert d_gates.shape == (0,)
    assert code_rows.dense_rows(codes, indices, 12, groups.offsets_E1, torch.float32)[0].shape == (0, 4)
    assert code_rows.take_in_rows(random(0, 4), indices, groups.offsets_E1, torch.float32).shape == (0, 2)
