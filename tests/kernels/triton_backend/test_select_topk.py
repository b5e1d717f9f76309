"""The exact top-k on Triton, in rows of every kind."""

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


@pytest.mark.parametrize("case", ["all equal", "few values", "all negative", "minus infinity", "sorted", "one block"])
def test_select_topk_in_awkward_rows(case):
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


def test_padding_is_never_chosen_whichever_of_equals_torch_prefers(monkeypatch):
    def last_of_equals(t: Tensor, k: int, sorted: bool = True):  # noqa: A002, ARG001
        order = t.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :k]
        indices = (t.shape[1] - 1 - order).sort(1).values
        return torch.return_types.topk((t.gather(1, indices), indices))

    pre = torch.full((2, 1003), -float("inf"), device=DEVICE)
    pre[1, -2:] = 1.0
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "topk", last_of_equals)
        _, indices = select_topk(pre, 4)
    assert indices.max() < 1003
    assert {1001, 1002} < set(indices[1].tolist())


@pytest.mark.parametrize("F", [40, 1003])
def test_select_topk_takes_nan_for_the_largest_as_torch_does(F):
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
