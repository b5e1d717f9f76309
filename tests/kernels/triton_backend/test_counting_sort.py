"""Sorting by counting on Triton against torch's stable sort: the same order, exactly."""

import pytest
import torch
from helpers.triton_checks import DEVICE, small
from hypothesis import given
from hypothesis import strategies as st
from sae_lens_switch_kernels import indexing
from sae_lens_switch_kernels.triton_backend import counting_sort
from sae_lens_switch_kernels.triton_backend.counting_sort import expert_groups, latent_index, sorted_places
from torch import Tensor


def keys_of(N: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, n, (N,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def check(keys: Tensor, n: int) -> None:
    order, starts = sorted_places(keys, n, torch.int64)
    expected = indexing.expert_groups(keys.long(), n)
    assert torch.equal(order, expected.order_B)
    assert torch.equal(starts, expected.offsets_E1)


@pytest.mark.parametrize("n", [1, 2, 3, 32, 63, 64, 65, 128, 129, 1000, 24576, 70000])
def test_any_number_of_different_keys(n):
    check(keys_of(777, n).int(), n)


@pytest.mark.parametrize("n", [63, 1000])
def test_keys_of_64_bits(n):
    check(keys_of(777, n).long(), n)


@pytest.mark.slow
def test_a_million_different_keys():
    check(keys_of(777, 1 << 20), 1 << 20)


@pytest.mark.parametrize("N", [0, 1, 7, 31, 32, 33, 1000, 2053])
@pytest.mark.parametrize("n", [5, 300])
def test_any_number_of_keys(N, n):
    check(keys_of(N, n), n)


@pytest.mark.parametrize("n", [40, 4000])
@pytest.mark.parametrize("case", ["one key", "last key", "descending", "every other", "skewed"])
def test_keys_of_every_kind(case, n):
    keys = keys_of(500, n)
    if case == "one key":
        keys[:] = n // 2
    elif case == "last key":
        keys[:] = n - 1
    elif case == "descending":
        keys = keys.sort(descending=True).values
    elif case == "every other":  # the others have none
        keys = keys // 2 * 2
    else:
        keys[: len(keys) // 2] = 3
    check(keys, n)


def test_keys_spread_over_many_programs(monkeypatch):
    """As at real sizes, where each program has several blocks of keys, and reads the counts in several pieces."""
    monkeypatch.setattr(counting_sort, "_FEWEST", 5)
    monkeypatch.setattr(counting_sort, "_MOST", 5)
    monkeypatch.setattr(counting_sort, "_TILE", 64)
    for n in (8, 50, 3000):
        check(keys_of(1001, n), n)


def test_programs_grow_with_the_root_of_the_number_of_keys():
    numbers = [1, 8192, 100_000, 262_144, 3_000_000, 2**31 - 1]
    assert [counting_sort._programs(N) for N in numbers] == [256, 256, 316, 512, 512, 512]


def test_a_key_that_is_none_of_them_is_left_out_of_the_count():
    keys = keys_of(100, 7)
    keys[3], keys[50] = 7, -1
    _, starts = sorted_places(keys, 7, torch.int64)
    valid = torch.cat([keys[:3], keys[4:50], keys[51:]])
    assert torch.equal(starts, indexing.expert_groups(valid, 7).offsets_E1)


def test_experts_and_latents_are_indexed_as_by_torch():
    expert, indices = keys_of(60, 5), keys_of(60 * 3, 200, seed=1).view(60, 3)
    for ours, theirs in zip(expert_groups(expert, 5), indexing.expert_groups(expert, 5), strict=True):
        assert ours is not None
        assert torch.equal(ours, theirs)
        assert ours.dtype == torch.int64
    for ours, theirs in zip(latent_index(indices, 200), indexing.latent_index(indices, 200), strict=True):
        assert torch.equal(ours.long(), theirs)
        assert ours.dtype == torch.int32


def test_one_digit_takes_two_launches_and_a_latent_index_seven():
    from sae_lens_switch_kernels.triton_backend.blocks import Arch
    from sae_lens_switch_kernels.triton_backend.launch import recording

    def launches(N: int, n: int) -> int:
        with recording(Arch(lanes=32, shared=1 << 16)) as found:
            sorted_places(torch.empty(N, dtype=torch.int64, device="meta"), n, torch.int32)
        return len(found)

    assert [launches(8192, 32), launches(8192, 128), launches(262144, 24576)] == [2, 2, 7]


@small
@given(st.integers(0, 300), st.integers(1, 5000), st.integers(0, 99))
def test_any_small_keys(N, n, seed):
    check(keys_of(N, n, seed), n)
