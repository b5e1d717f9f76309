"""Sums per latent on Triton against reference.py in float64."""

import sys

import pytest
import torch
from helpers.triton_checks import (
    DEVICE,
    assert_as_good_as_torch,
    check_latent_weight_grads,
    dtypes,
    random,
    random_indices,
    shapes,
)
from sae_lens_switch_kernels import reference
from sae_lens_switch_kernels.indexing import LatentIndex, latent_index
from sae_lens_switch_kernels.triton_backend.latent_weight_grads import latent_weight_grads, reciprocal


@shapes
@dtypes
def test_latent_weight_grads(B, D, F, K, dtype):
    values, d_pre, g, x = (random(B, n, dtype=dtype, seed=seed) for seed, n in enumerate((K, K, D, D)))
    check_latent_weight_grads(values, random_indices(B, F, K), F, g, d_pre, x)


@shapes
@dtypes
def test_latent_weight_grads_of_two_widths(B, D, F, K, dtype):
    values, d_pre, g, x = (random(B, n, dtype=dtype, seed=seed) for seed, n in enumerate((K, K, D + 13, D)))
    check_latent_weight_grads(values, random_indices(B, F, K), F, g, d_pre, x)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("one latent has all", torch.float32),
        ("hot latents", torch.bfloat16),
        ("piece borders", torch.float32),
        ("all negative", torch.float32),
        ("zero values", torch.bfloat16),
    ],
    ids=str,
)
def test_latents_of_every_length(case, dtype):
    """Long segments are cut into pieces; their borders fall anywhere, and latents that never fire are zero."""
    B, D, F, K = 150, 20, 11, 3
    values, d_pre, g, x = (random(B, n, dtype=dtype, seed=seed) for seed, n in enumerate((K, K, D, D)))
    indices = random_indices(B, F, K)
    if case == "one latent has all":
        indices[:] = 4
    elif case == "hot latents":
        indices[:, 0], indices[:, 1] = 0, F - 1
        indices[:, 2] = 5
    elif case == "piece borders":
        lengths = torch.tensor([64, 0, 65, 63, 128, 1, 129])
        indices = torch.arange(7).repeat_interleave(lengths).reshape(B, K).to(DEVICE)
    elif case == "all negative":
        values = -values.abs()
    else:
        values[:, 1:] = 0
    check_latent_weight_grads(values, indices, F, g, d_pre, x)


def test_pieces_are_a_matter_of_speed_only(monkeypatch):
    """Whatever the length of a piece, the sums agree: every piece is found by its owner, none is counted twice."""
    indices = random_indices(60, 5, 4)
    values, g = random(60, 4), random(60, 8, seed=1)
    index, exact = latent_index(indices, 5), reference.latent_weight_grad(values.double(), indices, g.double(), 5)
    module = sys.modules[latent_weight_grads.__module__]  # the package has a function of this name
    for piece in (8, 16):
        monkeypatch.setattr(module, "PIECE", piece)
        assert_as_good_as_torch("dW", latent_weight_grads(index, values, g).dW_dec_FD, exact, exact.float())


@pytest.mark.parametrize("K", [*range(1, 70), 384, 1023, 1025, 65537, 2**30 - 1, 2**31 - 1])
def test_division_by_a_product_is_exact(K):
    multiplier, shift = reciprocal(K)
    assert 2**31 <= multiplier <= 2**32  # so that its dtype is the same for every K, and products have 63 bits
    last = 2**31 - 1
    for quotient in {0, 1, 2, 12345 % (last // K + 1), last // K - 1, last // K}:
        for position in (quotient * K - 1, quotient * K, quotient * K + K - 1):
            if 0 <= position <= last:
                assert position * multiplier >> shift == position // K
    assert last * multiplier >> shift == last // K


def test_an_index_of_int32():
    indices = random_indices(60, 5, 4)
    index = latent_index(indices, 5)
    values, g = random(60, 4), random(60, 8, seed=1)
    narrow = LatentIndex(index.order_S.int(), index.starts_F1.int())
    assert torch.equal(
        latent_weight_grads(narrow, values, g).dW_dec_FD, latent_weight_grads(index, values, g).dW_dec_FD
    )
