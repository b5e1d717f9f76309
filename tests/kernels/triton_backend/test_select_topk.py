"""The exact top-k on Triton, in rows of every kind."""

import sys

import pytest
import torch
from helpers.triton_checks import DEVICE, check_select, dtypes, random, small
from hypothesis import given
from hypothesis import strategies as st
from sae_lens_switch_kernels.triton_backend.blocks import candidate_block
from sae_lens_switch_kernels.triton_backend.select_topk import select_topk
from torch import Tensor


@pytest.mark.parametrize(
    ("R", "F", "k"),
    [(5, 1000, 3), (2, 4096, 32), (9, 65, 1), (3, 5000, 1), (2, 300, 300), (4, 37, 5), (3, 1, 1), (2, 700, 128)],
    ids=str,
)
@dtypes
def test_select_topk(R, F, k, dtype):
    pre, bias, scale = (random(n, F, dtype=dtype, seed=seed) for seed, n in enumerate((R, 1, 1)))
    check_select(pre, k)
    check_select(pre, k, bias=bias[0])
    check_select(pre, k, scale=scale[0].abs())
    check_select(pre, k, bias[0], scale[0].abs())
    check_select(pre, k, by_magnitude=True)
    check_select(pre, k, bias[0], scale[0].abs(), by_magnitude=True)


WIDTHS = [1, 3, 7, 192, 768, 1000, 4096]


@pytest.mark.parametrize("F", WIDTHS)
@dtypes
def test_narrow_rows_of_every_width(F, dtype):
    pre, bias, scale = (random(n, F, dtype=dtype, seed=seed) for seed, n in enumerate((3, 1, 1)))
    for k in {1, min(F, 32), F}:
        check_select(pre, k)
        check_select(pre, k, bias[0], scale[0])


@pytest.mark.parametrize("F", [7, 768])
@dtypes
def test_narrow_rows_of_every_kind(F, dtype):
    """Ties, constants, both zeros, infinities, NaN, neighbours in the last bit, outliers and denormals."""
    pre = random(12, F, dtype=dtype)
    pre[0] = pre[0].round()
    pre[1] = 3.0
    pre[2] = 0.0
    pre[3, ::2] = -0.0
    pre[4] = -pre[4].abs()
    pre[5] = -float("inf")
    pre[6, 3:] = -float("inf")
    pre[7, 2] = 1e38
    pre[8] = pre[8].sign() * 3e38
    pre[9] = (1 + torch.arange(F, device=DEVICE) % 5 * torch.finfo(dtype).eps).to(dtype)
    pre[10] *= 1e-38 if dtype == torch.float32 else 1.0  # the interpreter reads no denormal bf16
    pre[11, :3] = float("inf")
    for k in (1, 4, F):
        check_select(pre, k)
        check_select(pre, k, by_magnitude=True)
    pre[0, 5], pre[1, 3:], pre[5, 0], pre[11, 4] = float("nan"), float("nan"), float("nan"), -float("nan")
    values, indices = select_topk(pre, 4)
    chosen = pre.gather(1, indices)
    assert torch.equal(chosen.isnan().sum(1), pre.isnan().sum(1).clamp(max=4))
    assert torch.equal(values.nan_to_num(9.0), chosen.nan_to_num(9.0))
    expected = pre.topk(4).values.sort(1).values
    assert torch.equal(values.sort(1).values.nan_to_num(9.0), expected.nan_to_num(9.0))


def test_the_first_of_equals_are_chosen_in_narrow_rows():
    pre = torch.zeros(2, 100, device=DEVICE)
    pre[1, 50] = 1.0
    assert select_topk(pre, 4)[1].tolist() == [[0, 1, 2, 3], [0, 1, 2, 50]]


def test_narrow_rows_take_one_launch_and_wide_ones_three():
    from sae_lens_switch_kernels.triton_backend.blocks import Arch
    from sae_lens_switch_kernels.triton_backend.launch import recording

    def launches(F: int, k: int) -> int:
        with recording(Arch(lanes=32, shared=1 << 16)) as found:
            select_topk(torch.empty(8, F, device="meta"), k)
        return len(found)

    assert [launches(F, k) for F, k in ((192, 32), (2048, 32), (16384, 9000), (24576, 32), (1 << 20, 64))] == [
        1,
        1,
        1,
        3,
        3,
    ]
    assert launches(1 << 17, 1 << 16) == 0  # torch.topk


@pytest.mark.parametrize("vectors", [False, True], ids=["plain", "bias and scale"])
@dtypes
def test_wide_rows(vectors, dtype):
    pre, bias, scale = (random(n, 5003, dtype=dtype, seed=seed) for seed, n in enumerate((3, 1, 1)))
    pre[0] = pre[0].round()
    pre[1, 4:] = -float("inf")
    options = {"bias": bias[0], "scale": scale[0].abs()} if vectors else {}
    check_select(pre, 6, **options)
    check_select(pre, 6, **options, by_magnitude=True)


@pytest.mark.parametrize("case", ["blocks", "torch.topk"])
def test_every_way_chooses_the_same(case, monkeypatch):
    module = sys.modules[select_topk.__module__]  # the package has a function of this name
    monkeypatch.setattr(module, "ONE_PASS", 0)
    monkeypatch.setattr(module, "WIDEST_ROW", 4096 if case == "blocks" else 0)
    bias, scale = random(1, 1003, seed=1)[0], random(1, 1003, seed=2)[0].abs()
    for by_magnitude in (False, True):
        check_select(random(3, 1003), 4, by_magnitude=by_magnitude)
        check_select(random(3, 1003), 4, bias, scale, by_magnitude)


@pytest.mark.parametrize("case", ["all equal", "few values", "all negative", "minus infinity", "sorted", "one block"])
@pytest.mark.parametrize("one_pass", [0, 4096], ids=["in blocks", "one launch"])
def test_select_topk_in_awkward_rows(case, one_pass, monkeypatch):
    monkeypatch.setattr(sys.modules[select_topk.__module__], "ONE_PASS", one_pass)
    monkeypatch.setattr(sys.modules[select_topk.__module__], "WIDEST_ROW", 4096 if one_pass else 999)
    R, F, k = 3, 1003, 4  # the last block is not full
    assert F % candidate_block(F, k)
    pre = random(R, F)
    if case == "all equal":
        pre = torch.zeros_like(pre)
    elif case == "few values":
        pre = pre.round()
    elif case == "all negative":
        pre = -pre.abs() - 1e30
    elif case == "minus infinity":
        pre[:, : F - 2] = -float("inf")
        pre[0] = -float("inf")
    elif case == "sorted":
        pre = pre.sort(1).values
    else:
        pre[:, 64:72] += 100
    check_select(pre, k)
    check_select(pre, k, by_magnitude=True)


def test_padding_is_never_chosen_whichever_of_equals_torch_prefers(monkeypatch):
    def last_of_equals(t: Tensor, k: int, sorted: bool = True):  # noqa: A002, ARG001
        order = t.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :k]
        indices = (t.shape[1] - 1 - order).sort(1).values
        return torch.return_types.topk((t.gather(1, indices), indices))

    pre = torch.full((2, 1003), -float("inf"), device=DEVICE)
    pre[1, -2:] = 1.0
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "topk", last_of_equals)
        patch.setattr(sys.modules[select_topk.__module__], "ONE_PASS", 0)
        _, indices = select_topk(pre, 4)
    assert indices.max() < 1003
    assert {1001, 1002} < set(indices[1].tolist())


@pytest.mark.parametrize("one_pass", [0, 4096], ids=["in blocks", "one launch"])
@pytest.mark.parametrize("F", [40, 1003])
def test_select_topk_takes_nan_for_the_largest_as_torch_does(F, one_pass, monkeypatch):
    monkeypatch.setattr(sys.modules[select_topk.__module__], "ONE_PASS", one_pass)
    pre = random(4, F)
    pre[0, 7], pre[1], pre[2, 3] = float("nan"), float("nan"), float("inf")
    values, indices = select_topk(pre, 4)
    assert all(len(set(row)) == 4 for row in indices.tolist())
    assert values.isnan().sum(1).tolist() == [1, 4, 0, 0]
    assert float("inf") in values[2]


@small
@given(st.integers(1, 5), st.integers(1, 400), st.integers(1, 400), st.integers(0, 99), st.booleans())
def test_any_small_selection(R, F, k, seed, ties):
    pre = random(R, F, seed=seed)
    check_select(pre.round() if ties else pre, min(k, F))
