"""Activation normalisation, and what is folded into the weights."""

import copy

import pytest
import torch
from helpers import D, E, F, M, random_input
from helpers.contract import (
    ROUTER,
    RUN_TIME_NORMALISATIONS,
    both_kinds,
    exactly,
    make,
    same_weights,
    step_input,
    tightly,
    with_norms,
)
from torch import Tensor


def normalised(x: Tensor, normalize_activations: str) -> tuple[Tensor, Tensor, Tensor]:
    """z, scale and shift with x = z * scale + shift."""
    if normalize_activations == "layer_norm":
        shift = x.mean(-1, keepdim=True)
        scale = (x - shift).std(-1, keepdim=True)
        return (x - shift) / (scale + 1e-5), scale, shift
    scale = x.norm(dim=-1, keepdim=True) / D**0.5
    return x / scale, scale, torch.zeros_like(scale)


@both_kinds
@pytest.mark.parametrize("normalize_activations", RUN_TIME_NORMALISATIONS)
def test_run_time_normalisation_is_seen_by_router_encoder_and_decoder(kind, normalize_activations):
    sae = make(kind, normalize_activations=normalize_activations)
    bare = make(kind)
    x = random_input(2, 6, D) * 30 + 4
    z, scale, shift = normalised(x, normalize_activations)
    torch.testing.assert_close(sae.encode(x), bare.encode(z), **tightly)
    torch.testing.assert_close(sae(x), bare(z) * scale + shift, **tightly)
    torch.testing.assert_close(sae.decode(sae.encode_sparse(x)), bare(z) * scale + shift, **tightly)
    if kind == "training":
        flat = x.reshape(-1, D)
        output = sae.training_forward_pass(step_input=step_input(flat))
        torch.testing.assert_close(output.sae_out, sae(flat), **tightly)
        torch.testing.assert_close(output.losses["mse_loss"], (sae(flat) - flat).square().sum(-1).mean(), **tightly)


@both_kinds
@pytest.mark.parametrize("normalize_activations", ["none", "expected_average_only_in", "covariance_whitening"])
def test_normalisation_by_the_trainer_is_no_business_of_the_sae(kind, normalize_activations):
    x = random_input(6, D)
    sae, bare = make(kind, normalize_activations=normalize_activations), make(kind)
    torch.testing.assert_close(sae(x), bare(x), **exactly)


@both_kinds
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("gate", ["probability", "one"])
@pytest.mark.parametrize("scale", [0.01, 3.7])
def test_folding_the_scaling_factor_equals_scaling_the_activations(kind, apply_b_dec_to_input, gate, scale):
    sae = make(
        kind, normalize_activations="expected_average_only_in", apply_b_dec_to_input=apply_b_dec_to_input, gate=gate
    )
    folded = copy.deepcopy(sae)
    folded.fold_activation_norm_scaling_factor(scale)
    x = random_input(80, D) / scale
    torch.testing.assert_close(folded.encode(x), sae.encode(x * scale), **tightly)
    torch.testing.assert_close(folded(x) * scale, sae(x * scale), **tightly)
    assert len({int(e) for e in folded.encode(x).view(-1, E, M).any(2).int().argmax(1)}) > 1
    torch.testing.assert_close(folded.W_enc, sae.W_enc * scale, **tightly)
    assert folded.cfg.normalize_activations == "none"
    assert sae.cfg.normalize_activations == "expected_average_only_in"


def whitening(condition: float = 10.0) -> tuple[Tensor, Tensor, Tensor]:
    """A mean, a matrix and its inverse; far from symmetric."""
    left = torch.linalg.qr(random_input(D, D, seed=21)).Q
    right = torch.linalg.qr(random_input(D, D, seed=22)).Q
    spectrum = torch.logspace(0, -1, D, base=condition, dtype=torch.float64)
    return random_input(D, seed=20) * 5, (left * spectrum) @ right, right.T @ (left / spectrum).T


@both_kinds
@pytest.mark.parametrize("gate", ["probability", "one"])
def test_folding_the_whitening_equals_whitening_the_activations(kind, gate):
    sae = make(kind, normalize_activations="covariance_whitening", gate=gate)
    folded = copy.deepcopy(sae)
    mean, matrix, inverse = whitening()
    folded.fold_activation_whitening(mean=mean, whitening_matrix=matrix, unwhitening_matrix=inverse)
    z = random_input(80, D)
    x = z @ inverse + mean
    torch.testing.assert_close(folded.encode(x), sae.encode(z), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(folded(x), sae(z) @ inverse + mean, rtol=1e-8, atol=1e-8)
    assert len({int(e) for e in folded.encode(x).view(-1, E, M).any(2).int().argmax(1)}) > 1
    assert folded.cfg.normalize_activations == "none"


def test_the_router_is_folded_in_the_precision_of_the_whitening_statistics():
    # as SAELens folds the rest: products in the statistics' float64, one rounding at the end
    sae = make("training", normalize_activations="covariance_whitening", dtype="float32")
    mean, matrix, inverse = whitening(condition=1000.0)
    W, b = sae.W_router.double(), sae.b_router.double()
    sae.fold_activation_whitening(mean=mean, whitening_matrix=matrix, unwhitening_matrix=inverse)
    one_rounding = {"rtol": torch.finfo(torch.float32).eps, "atol": 0}
    torch.testing.assert_close(sae.W_router, (matrix @ W).float(), **one_rounding)
    torch.testing.assert_close(sae.b_router, (b @ inverse + mean).float(), **one_rounding)


def test_an_sae_made_in_inference_mode_can_be_folded():
    with torch.inference_mode():
        sae = make("inference", normalize_activations="expected_average_only_in")
        before = sae.W_enc.clone()
        sae.fold_activation_norm_scaling_factor(2.0)
    assert torch.equal(sae.W_enc, 2 * before)


@both_kinds
def test_a_low_precision_sae_keeps_its_float32_router_through_the_folds(kind):
    sae = make(kind, dtype="bfloat16", normalize_activations="covariance_whitening")
    mean, matrix, inverse = whitening(condition=2.0)
    expected = sae.W_router.detach().double()
    sae.fold_activation_whitening(mean=mean, whitening_matrix=matrix, unwhitening_matrix=inverse)
    sae.fold_activation_norm_scaling_factor(3.0)
    assert sae.W_router.dtype == sae.b_router.dtype == torch.float32
    torch.testing.assert_close(sae.W_router.double(), 3 * (matrix @ expected), rtol=1e-5, atol=1e-6)


@both_kinds
@pytest.mark.parametrize("norm", [torch.ones(E), torch.tensor([0.2, 1.0, 3.0, 50.0])], ids=["unit", "per expert"])
def test_fold_w_dec_norm_is_exact_where_the_norms_of_an_expert_are_equal(kind, norm):
    sae = with_norms(norm.repeat_interleave(M), kind)
    folded = copy.deepcopy(sae)
    folded.fold_W_dec_norm()
    x = random_input(80, D)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(F, dtype=torch.float64), **tightly)
    torch.testing.assert_close(folded(x), sae(x), **tightly)
    scaled = sae.encode(x) * sae.W_dec.norm(dim=1)
    torch.testing.assert_close(folded.encode(x), scaled, **tightly)
    for name in ROUTER:
        torch.testing.assert_close(getattr(folded, name), getattr(sae, name), **exactly)


@both_kinds
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("ratio", [1.1, 2.0])
def test_fold_w_dec_norm_refuses_where_it_would_select_other_latents(kind, dtype, ratio):
    norms = torch.ones(F)
    norms[M + 2] = ratio
    sae = with_norms(norms, kind, dtype=dtype)
    before = copy.deepcopy(sae)
    with pytest.raises(NotImplementedError, match="norm"):
        sae.fold_W_dec_norm()
    assert same_weights(sae, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fold_w_dec_norm_accepts_unit_rows_as_rounded_to_the_dtype(dtype):
    sae = with_norms(torch.ones(F), dtype=dtype)
    before = copy.deepcopy(sae)
    sae.fold_W_dec_norm()
    eps = torch.finfo(sae.dtype).eps
    torch.testing.assert_close(sae.W_dec, before.W_dec, rtol=2 * eps, atol=0)
    torch.testing.assert_close(sae.W_enc, before.W_enc, rtol=2 * eps, atol=0)


def test_fold_w_dec_norm_of_zero_rows_leaves_everything_finite():
    norms = torch.ones(F)
    norms[:M] = 0
    sae = with_norms(norms)
    x = random_input(80, D)
    before = sae(x)
    sae.fold_W_dec_norm()
    assert all(torch.isfinite(p).all() for p in sae.parameters())
    torch.testing.assert_close(sae(x), before, **tightly)
