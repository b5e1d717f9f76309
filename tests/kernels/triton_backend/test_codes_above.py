"""What exceeds its threshold in a tile: Triton and torch against loops over single numbers."""

import sys

import pytest
import torch
from helpers.triton_checks import DEVICE, random
from sae_lens_switch_kernels import torch_codes
from sae_lens_switch_kernels.triton_backend import codes_above as on_triton

IMPLEMENTATIONS = [torch_codes.codes_above, on_triton]


def one_by_one(pre, thresholds, bias, gates):
    """Row, latent and value of each, rounded to the thresholds' dtype after every operation."""
    dtype, found = thresholds.dtype, []
    for row in range(len(pre)):
        for latent in range(pre.shape[1]):
            value = pre[row, latent].to(dtype)
            value = value if bias is None else value + bias[latent]
            gated = value if gates is None else value * gates[row, 0].to(dtype)
            if not gated.item() <= thresholds[latent].item():
                found.append((row, latent, value.item()))
    rows, latents, values = zip(*found, strict=True) if found else ((), (), ())
    numbers = (torch.tensor(t, dtype=torch.int64, device=DEVICE) for t in (rows, latents))
    return *numbers, torch.tensor(values, dtype=dtype, device=DEVICE)


def given(R, P, dtype, names, threshold, of_pre=None):
    pre = random(R, P + 3, seed=1, dtype=of_pre or dtype)[:, 1 : P + 1]  # rows further apart than they are long
    bias = random(P, seed=2, dtype=dtype) if "bias" in names else None
    gates = random(R, 1, seed=3, dtype=torch.float32) if "gates" in names else None
    return pre, threshold * (1 + random(P, seed=4, dtype=dtype).abs()), bias, gates


@pytest.mark.parametrize("codes_above", IMPLEMENTATIONS, ids=["torch", "triton"])
@pytest.mark.parametrize(("R", "P"), [(1, 1), (0, 5), (7, 33), (5, 300)], ids=str)
@pytest.mark.parametrize("names", [(), ("bias",), ("gates",), ("bias", "gates")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_above_their_threshold_are_found_in_order(R, P, names, dtype, codes_above, monkeypatch):
    monkeypatch.setattr(sys.modules[on_triton.__module__], "_PER_LANE", 1)  # 128 numbers at a time
    monkeypatch.setitem(torch_codes.SEARCH_ELEMENTS, "cpu", 2 * P)
    for threshold in (0.5, -9.0, 99.0):
        arguments = given(R, P, dtype, names, threshold)
        expected = one_by_one(*arguments)
        assert len(expected[0]) == {-9.0: R * P, 99.0: 0}.get(threshold, len(expected[0]))
        for found, true in zip(codes_above(arguments[0].clone(), *arguments[1:]), expected, strict=True):
            assert found.dtype == true.dtype
            assert torch.equal(found, true)


@pytest.mark.parametrize("codes_above", IMPLEMENTATIONS, ids=["torch", "triton"])
def test_products_in_low_precision_are_compared_in_that_of_the_thresholds(codes_above):
    arguments = given(9, 70, torch.float32, ("bias", "gates"), 0.3, of_pre=torch.bfloat16)
    expected = one_by_one(*arguments)
    assert len(expected[0]) > 50
    for found, true in zip(codes_above(*arguments), expected, strict=True):
        assert found.dtype == true.dtype
        assert torch.equal(found, true)


@pytest.mark.parametrize("codes_above", IMPLEMENTATIONS, ids=["torch", "triton"])
def test_nan_exceeds_everything_and_what_equals_its_threshold_nothing(codes_above):
    inf, nan = torch.inf, torch.nan
    pre = torch.tensor([[nan, 1.0, -inf], [1.5, nan, inf], [nan, nan, nan]], device=DEVICE)
    thresholds = torch.tensor([1.5, -2.0, 3.0], device=DEVICE)
    row, latent, values = codes_above(pre, thresholds, None, None)
    assert list(zip(row.tolist(), latent.tolist(), strict=True)) == [
        (0, 0),
        (0, 1),
        (1, 1),
        (1, 2),
        *((2, i) for i in range(3)),
    ]
    assert values[1] == 1
    assert values[3] == inf
    assert values[[0, 2, 4, 5, 6]].isnan().all()


@pytest.mark.parametrize("codes_above", IMPLEMENTATIONS, ids=["torch", "triton"])
@pytest.mark.parametrize("gated", [False, True])
def test_an_infinity_does_not_exceed_itself(gated, codes_above):
    inf, nan = torch.inf, torch.nan
    pre = torch.tensor([[inf, -inf, 1.0, inf], [nan, nan, -inf, 2.0]], device=DEVICE)
    thresholds = torch.tensor([inf, -inf, -inf, 1.0], device=DEVICE)
    gates = torch.full((2, 1), 2.0, device=DEVICE) if gated else None
    row, latent, values = codes_above(pre.repeat(1, 9), thresholds.repeat(9), None, gates)
    found = [(0, 2), (0, 3), (1, 0), (1, 1), (1, 3)]
    expected = sorted((row, 4 * part + latent) for row, latent in found for part in range(9))
    assert list(zip(row.tolist(), latent.tolist(), strict=True)) == expected
    assert torch.equal(values.nan_to_num(7.0), pre.repeat(1, 9)[row, latent].nan_to_num(7.0))
