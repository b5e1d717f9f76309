"""The routes of the plain backend: the pruned top-k, tiles of a wide dictionary."""

import pytest
import torch
from helpers.kernel_cases import assert_close, autoencoder_inputs
from sae_lens_switch_kernels import (
    reference,
    sparse_autoencode,
    switch_encode,
    torch_backend,
    torch_tiles,
    torch_topk,
)


@pytest.mark.parametrize(("n_latents", "k"), [(1000, 4), (4099, 3), (9000, 32), (300, 1), (64, 64), (40000, 5)])
@pytest.mark.parametrize("values", ["random", "ties", "negative", "constant"])
def test_the_pruned_top_k_is_exact(n_latents, k, values):
    generator = torch.Generator().manual_seed(n_latents)
    pre = torch.randn(7, n_latents, generator=generator, dtype=torch.float64)
    if values == "ties":
        pre = pre.mul(2).round()
    elif values == "negative":
        pre = -pre.abs() - 1
    elif values == "constant":
        pre = torch.zeros_like(pre)
    scale = torch.randn(n_latents, generator=generator, dtype=torch.float64).abs()
    for options in ({}, {"scale_F": scale}):
        found, indices = torch_backend.select_topk(pre, k, **options)
        ranked = pre * options.get("scale_F", 1)
        assert torch.equal(found, pre.gather(1, indices))
        assert torch.equal(ranked.gather(1, indices).sort(descending=True).values, ranked.topk(k).values)
        assert all(len(set(row)) == k for row in indices.tolist())
        found, indices = torch_backend.select_topk(pre, k, **options, by_magnitude=True)
        assert torch.equal(found, pre.gather(1, indices))
        assert torch.equal(ranked.abs().gather(1, indices).sort(descending=True).values, ranked.abs().topk(k).values)
    if (n_latents, k) == (40000, 5):
        assert torch_topk._block_count(n_latents, k) > 0  # pruning took place


@pytest.mark.parametrize("by_magnitude", [False, True])
def test_a_dictionary_wider_than_a_tile_gives_the_same_codes(by_magnitude, monkeypatch):
    monkeypatch.setattr(torch_tiles, "_TILE_LATENTS", 7)
    monkeypatch.setitem(torch_tiles.TILE_ROWS, "cpu", 5)
    names = {"pre_bias_D", "bias_F", "scale_F", *({"by_magnitude"} if by_magnitude else ())}
    leaves, constants = autoencoder_inputs(33, 6, 1, 40, 9, names)
    ours, truth = sparse_autoencode(**leaves, **constants), reference.sparse_autoencode(**leaves, **constants)
    assert_close("out", ours.out_BD, truth[0])
    assert_close("codes", *(reference.dense_codes(values, i, 40) for values, i in (ours[1:3], truth[1:3])))


@pytest.mark.parametrize("M", [600, 1100])
def test_wide_experts_in_float32(M):
    torch.manual_seed(0)
    E, D, K = 3, 37, 5
    expert_B = torch.tensor([0] * 17 + [1] * 1 + [2] * 140)
    x, W = torch.randn(len(expert_B), D), torch.randn(E * M, D)
    values, indices = switch_encode(x, expert_B, W, K, E)
    pre = torch.einsum("bd,bmd->bm", x.double(), W.double().view(E, M, D)[expert_B])
    expected = pre.topk(K).values.relu()
    assert_close("values", values.double().sort(descending=True).values, expected, 1e-6)
    chosen = pre.gather(1, indices - M * expert_B.unsqueeze(1)).relu()
    assert_close("chosen", chosen, values.double(), 1e-6)
