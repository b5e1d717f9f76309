"""The pool that finds the k largest of a batch, tile by tile, against torch.topk over the whole batch."""

import math
from unittest.mock import patch

import pytest
import torch
from helpers import is_that_of_tiles, largest_allocation
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens_switch_kernels import batch_topk_encode, candidates, torch_batch_topk, torch_tiles
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def places(pre: Tensor) -> Tensor:
    """Where each row begins."""
    return torch.arange(len(pre)) * pre.shape[1]


def row_of(offsets: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 30),
    P=st.integers(1, 70),
    share=st.floats(0, 1),
    rounded=st.booleans(),
    rows=st.integers(1, 30),
    on_gpu=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_pool_keeps_the_largest_of_all_tiles_whatever_their_order_and_ties(
    B, P, share, rounded, rows, on_gpu, seed
):
    pre = torch.randn(B, P, generator=torch.Generator().manual_seed(seed)).cumsum(0)  # later rows matter more
    pre = pre.round() if rounded else pre
    k = int(share**2 * B * P)
    best = torch_batch_topk.BatchTopK(k, P)
    with patch.object(torch_batch_topk, "_may_wait_for", lambda _: not on_gpu):
        for start in range(0, B, rows):
            best.add(pre[start : start + rows].clone(), None, places(pre)[start : start + rows])
        values, indices, offsets = best.codes(B, pre.device)
    assert torch.equal(values.sort().values, pre.flatten().topk(k).values.sort().values)
    assert torch.equal(values, pre[row_of(offsets), indices])
    assert len((row_of(offsets) * P + indices).unique()) == k


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    B=st.integers(2, 60),
    P=st.integers(1, 70),
    share=st.floats(0, 1),
    growth=st.sampled_from([0.0, 0.2, -0.2]),
    rounded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_guessed_bound_leaves_the_largest_or_says_that_it_does_not(B, P, share, growth, rounded, seed):
    pre = torch.randn(B, P, generator=torch.Generator().manual_seed(seed)) * (growth * torch.arange(B)[:, None]).exp()
    pre = pre.round() if rounded else pre
    k = int(share * B * P)
    best = torch_batch_topk.BatchTopK(k, P, B * P)
    for start in range(0, B, 3):
        best.add(pre[start : start + 3].clone(), None, places(pre)[start : start + 3])
    values, indices, offsets = best.codes(B, pre.device)
    assert best.is_complete == (len(values) == k)
    if best.is_complete:
        assert torch.equal(values.sort().values, pre.flatten().topk(k).values.sort().values)
    assert torch.equal(values, pre[row_of(offsets), indices])
    assert len((row_of(offsets) * P + indices).unique()) == len(values)


def test_nothing_is_guessed_where_the_first_tile_is_all_there_is():
    pre = normal(20, 64).round()  # many equal the bound
    best = torch_batch_topk.BatchTopK(100, 64, pre.numel())
    best.add(pre.clone(), None, places(pre))
    assert best.is_complete


@pytest.mark.parametrize(("first", "n_products"), [(1.0, 1), (50.0, 2), (0.02, 1)], ids=["alike", "larger", "smaller"])
def test_if_the_first_rows_mislead_every_tile_is_computed_once_more(first, n_products, monkeypatch):
    monkeypatch.setattr(torch_batch_topk, "_SEARCH_ELEMENTS", 1 << 12)
    monkeypatch.setitem(torch_tiles.TILE_ROWS, "cpu", 64)
    B, D, F, k = 512, 6, 128, 512 * 4
    x, W, bias = normal(B, D), normal(F, D, seed=1), normal(F, seed=2)
    x[:32] *= first
    taken, passes = [], []
    guessed = torch_batch_topk.BatchTopK._take
    monkeypatch.setattr(
        torch_batch_topk.BatchTopK, "_take", lambda self, *given: taken.append(len(given[2])) or guessed(self, *given)
    )
    tiles = candidates.own_tiles
    monkeypatch.setattr(candidates, "own_tiles", lambda *given, **more: passes.append(1) or tiles(*given, **more))
    values, indices, offsets = batch_topk_encode(x, W, k, bias_F=bias)
    pre = x @ W.T + bias
    torch.testing.assert_close(values.sort().values, pre.flatten().topk(k).values.sort().values)
    torch.testing.assert_close(values, pre[row_of(offsets), indices])
    assert len(passes) == n_products
    if first == 1:
        assert k <= sum(taken) < 2.5 * k


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("how_many", [1, 40, 4000])
def test_numbers_that_are_not_finite_leave_the_number_of_codes_as_it_is(bad, how_many, monkeypatch):
    monkeypatch.setattr(torch_batch_topk, "_SEARCH_ELEMENTS", 1 << 12)
    pre = normal(100, 256).float()
    pre.flatten()[torch.randperm(pre.numel())[:how_many]] = bad
    best = torch_batch_topk.BatchTopK(900, 256)
    for start in range(0, 100, 10):
        best.add(pre[start : start + 10].clone(), None, places(pre)[start : start + 10])
    values, indices, offsets = best.codes(100, pre.device)
    expected = pre.flatten().topk(900).values
    torch.testing.assert_close(values.sort().values, expected.sort().values, rtol=0, atol=0, equal_nan=True)
    assert len((row_of(offsets) * 256 + indices).unique()) == 900


@pytest.mark.parametrize("k", [64, 700, 5000])
def test_of_a_tile_where_nothing_may_be_waited_for_few_numbers_are_sorted(k, monkeypatch):
    pre = normal(100, 949).float()
    monkeypatch.setattr(torch_batch_topk, "_may_wait_for", lambda _: False)
    best = torch_batch_topk.BatchTopK(k, 949)
    with Sorted() as found:
        best.add(pre.clone(), None, places(pre))
    assert 0 < found.n_numbers < 2.1 * math.sqrt(pre.numel() * k)
    values, indices, offsets = best.codes(100, pre.device)
    assert torch.equal(values.sort().values, pre.flatten().topk(k).values.sort().values)
    assert torch.equal(values, pre[row_of(offsets), indices])


class Sorted(TorchDispatchMode):
    """How many numbers the operators sort or select from."""

    n_numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.topk, torch.ops.aten.sort):
            self.n_numbers += args[0].numel()
        return func(*args, **(kwargs or {}))


def test_other_devices_take_the_same_entries_without_being_asked_how_many(monkeypatch):
    pre = normal(64, 96).float()
    found = []
    for on_gpu in (False, True):
        best = torch_batch_topk.BatchTopK(500, 96)
        monkeypatch.setattr(torch_batch_topk, "_may_wait_for", lambda _, on_gpu=on_gpu: not on_gpu)
        for start in range(0, 64, 16):
            best.add(pre[start : start + 16].clone(), None, places(pre)[start : start + 16])
        found.append(best.codes(64, pre.device))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_no_tensor_of_tokens_times_latents_is_made_beyond_a_tile():
    B, D, F, k = 2048, 8, 1024, 4 * 2048
    x, W = normal(B, D).float(), normal(F, D).float()
    assert is_that_of_tiles(largest_allocation(lambda: batch_topk_encode(x, W, k)), F, B)
