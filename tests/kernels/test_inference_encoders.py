"""The encoders of inference, against the dense reference in float64; and the memory order of the weights."""

import pytest
import torch
from helpers import is_that_of_tiles, largest_allocation
from helpers.kernel_cases import assert_close
from sae_lens_switch_kernels import (
    reference,
    sparse_decode,
    threshold_encode,
    topk_encode,
    torch_codes,
    torch_tiles,
    torch_topk,
)
from torch import Tensor

# B, D, F: one token, one latent, widths that are no multiple of a block, more latents and tokens than a tile holds
SHAPES = [(1, 5, 7), (9, 3, 1), (23, 17, 31), (64, 6, 96), (601, 4, 83)]
shapes = pytest.mark.parametrize(("B", "D", "F"), SHAPES, ids=str)
options = pytest.mark.parametrize("names", [(), ("bias_F",)], ids=["bare", "with a bias"])
tiles = pytest.mark.parametrize("small_tiles", [False, True], ids=["as they are", "small tiles"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def use_small_tiles(monkeypatch) -> None:
    monkeypatch.setattr(torch_tiles, "_TILE_LATENTS", 19)
    monkeypatch.setitem(torch_codes.SEARCH_ELEMENTS, "cpu", 60)
    monkeypatch.setattr(torch_topk, "_SEARCH_ELEMENTS", 60)


@shapes
@options
@tiles
@pytest.mark.parametrize("threshold", [1.5, -9.0, 99.0], ids=["some", "all", "none"])
def test_every_latent_above_its_threshold_is_found_in_order(B, D, F, names, small_tiles, threshold, monkeypatch):
    if small_tiles:
        use_small_tiles(monkeypatch)
    x, W = normal(B, D), normal(F, D, seed=1)
    given = {"bias_F": normal(F, seed=2)} if names else {}
    thresholds = threshold * W.norm(dim=1) * (1 + normal(F, seed=3).abs())
    for stored in (W, W.T.contiguous().T):
        values, indices, offsets = threshold_encode(x, stored, thresholds, **given)
        expected = reference.threshold_encode(x, W, thresholds, **given)
        assert torch.equal(indices, expected[1])
        assert torch.equal(offsets, expected[2])
        if len(values):
            assert_close("values", values, expected[0])
        assert {values.dtype, indices.dtype, offsets.dtype} == {torch.float64, torch.int64}
        assert sparse_decode(values, indices, W, offsets).shape == (B, D)


@shapes
@options
@tiles
@pytest.mark.parametrize("scaled", [False, True], ids=["as they are", "scaled"])
def test_the_largest_in_magnitude_keep_their_signs(B, D, F, names, small_tiles, scaled, monkeypatch):
    if small_tiles:
        use_small_tiles(monkeypatch)
    x, W = normal(B, D), normal(F, D, seed=1)
    given = {"bias_F": normal(F, seed=2)} if names else {}
    if scaled:
        given["scale_F"] = normal(F, seed=4).exp()
    for k in {1, min(F, 20), F}:
        expected = reference.dense_codes(*reference.topk_encode(x, W, k, **given, by_magnitude=True), F)
        for stored in (W, W.T.contiguous().T):
            values, indices = topk_encode(x, stored, k, **given, by_magnitude=True)
            assert_close("codes", reference.dense_codes(values, indices, F), expected)
            assert all(len(set(row)) == k for row in indices.tolist())
    assert F < 31 or (expected < 0).any()


def test_a_latent_at_its_threshold_is_not_active_and_nan_always_is():
    x, W = torch.tensor([[1.0], [torch.nan], [torch.inf]]), torch.tensor([[1.0], [2.0], [-1.0]])
    values, indices, offsets = threshold_encode(x, W, torch.tensor([1.0, 1.0, -2.0]))
    assert offsets.tolist() == [0, 2, 5, 7]
    assert indices.tolist() == [1, 2, 0, 1, 2, 0, 1]
    expected = torch.tensor([2, -1, *[torch.nan] * 3, torch.inf, torch.inf])
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


def test_of_equal_infinities_neither_exceeds_the_other():
    x, W, inf = torch.tensor([[torch.inf]]), torch.tensor([[1.0], [-1.0], [1.0]]), torch.inf
    thresholds = torch.tensor([inf, -inf, 0.0])
    found, expected = threshold_encode(x, W, thresholds), reference.threshold_encode(x, W, thresholds)
    assert all(map(torch.equal, found, expected))
    assert found[1].tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions_select_by_their_own_products(dtype):
    x, W, bias = (t.to(dtype) for t in (normal(40, 32), normal(100, 32, seed=1), normal(100, seed=2)))
    threshold = torch.full((100,), 6.0).to(dtype)
    values, indices, offsets = threshold_encode(x, W, threshold, bias_F=bias)
    found = reference.dense_codes(values.double().unsqueeze(1), indices.unsqueeze(1), 100)
    row = torch.repeat_interleave(torch.arange(40), offsets.diff())
    found = torch.zeros(40, 100, dtype=torch.float64).index_add(0, row, found)
    exact = x.double() @ W.double().T + bias.double()
    error = {torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float16: 0.02}[dtype]
    sure = (exact - 6).abs() > error
    assert ((found > 0) == (exact > 6))[sure].all()
    assert ((found - exact).abs() <= error)[found > 0].all()
    assert values.dtype == dtype


def test_under_autocast_the_product_runs_in_its_dtype_and_the_rest_in_that_of_the_weights():
    x, W, threshold = normal(40, 32).float(), normal(100, 32, seed=1).float(), torch.full((100,), 6.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, indices, offsets = threshold_encode(x, W, threshold, bias_F=threshold - 5.99)
        signed, _ = topk_encode(x, W, 5, by_magnitude=True)
    pre = (x.bfloat16() @ W.bfloat16().T).float() + (threshold - 5.99)
    assert values.dtype == signed.dtype == torch.float32
    assert torch.equal(values, pre[pre > 6])
    assert torch.equal(offsets, torch.tensor([0, *(pre > 6).sum(1).cumsum(0)]))
    assert len(indices) == len(values) > 40


def test_there_is_no_tensor_of_tokens_times_latents_beyond_a_tile():
    B, D, F = 2048, 8, 1024
    x, W = normal(B, D).float().requires_grad_(), normal(F, D).float().requires_grad_()
    threshold = torch.full((F,), 9.0)
    for encode in (lambda: threshold_encode(x, W, threshold), lambda: topk_encode(x, W, 4, by_magnitude=True)):
        assert is_that_of_tiles(largest_allocation(encode), F, B)
    assert not threshold_encode(x, W, threshold)[0].requires_grad


def test_no_tokens_and_no_latents_have_no_codes():
    for B, F in ((0, 5), (3, 0), (0, 0)):
        values, indices, offsets = threshold_encode(torch.zeros(B, 4), torch.zeros(F, 4), torch.zeros(F))
        assert len(values) == len(indices) == 0
        assert offsets.tolist() == [0] * (B + 1)


def test_what_does_not_fit_together_is_named():
    x, W, threshold = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5)
    with pytest.raises(ValueError, match=r"threshold_F must have shape \(5,\); got \(4,\)"):
        threshold_encode(x, W, threshold[:4])
    with pytest.raises(ValueError, match="threshold_F and W_enc_FD must share a dtype"):
        threshold_encode(x, W, threshold.double())
    with pytest.raises(ValueError, match=r"W_enc_FD must have shape \(any, 4\); got \(5, 3\)"):
        threshold_encode(x, W[:, :3], threshold)
    with pytest.raises(ValueError, match="bias_F must have shape"):
        threshold_encode(x, W, threshold, bias_F=threshold[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_tile_is_the_product_with_the_bias_however_weights_are_stored(dtype):
    x, W, bias = normal(16, 6).to(dtype), normal(2600, 6, seed=1).to(dtype), normal(2600, seed=2).to(dtype)
    exact = x.double() @ W.double().T + bias.double()
    tolerance = {"rtol": 2**-6, "atol": 2**-5} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for stored in (W, W.T.contiguous().T):
        out = torch.empty(16, 2600, dtype=dtype)
        torch_tiles.product(x, stored, out, bias)
        torch.testing.assert_close(out.double(), exact, **tolerance)
        torch_tiles.product(x, stored, out)
        torch.testing.assert_close(out.double(), exact - bias.double(), **tolerance)
