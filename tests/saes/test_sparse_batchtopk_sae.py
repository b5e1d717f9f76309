"""``sparse_batchtopk`` and ``sparse_matryoshka_batchtopk`` against SAELens's own: same weights, same numbers."""

import pytest
import torch
from helpers import D, random_input
from helpers.saelens_pairs import (
    KINDS,
    F,
    K,
    assert_same_step,
    both,
    dead_latents,
    options_of,
    pair,
    rescaling,
    step_input,
)
from sae_lens.saes.sae import TrainingSAE

from sae_lens_switch import override


@both
@rescaling
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("n_dead", [None, 0, 1, 20, F])
def test_loss_every_gradient_and_the_threshold_equal_saelens(kind, rescale, apply_b_dec_to_input, n_dead):
    ours, stock = pair(kind, rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=apply_b_dec_to_input)
    dead = None if n_dead is None else dead_latents(n_dead)
    for seed in range(3):
        assert_same_step(ours, stock, random_input(50, D, seed=seed), dead)
    assert ours.topk_threshold > 0


@rescaling
@pytest.mark.parametrize("n_dead", [0, 1, 2, 20, F])
@pytest.mark.parametrize("widths", [[5, 19, F], [F], [1, 2, F - 1, F]], ids=str)
def test_the_auxiliary_loss_of_each_level_apart_equals_saelens(rescale, n_dead, widths):
    options = {"use_matryoshka_aux_loss": True, "matryoshka_widths": widths}
    ours, stock = pair(KINDS[1], rescale_acts_by_decoder_norm=rescale, **options)
    for seed in range(2):
        assert_same_step(ours, stock, random_input(30, D, seed=seed), dead_latents(n_dead, seed))


@both
@pytest.mark.parametrize("k", [0.05, 0.5, 1, 7, F])
def test_any_mean_number_of_latents_down_to_less_than_one_per_token(kind, k):
    for shape in ((1, D), (9, D), (40, D)):
        assert_same_step(*pair(kind, k=k), random_input(*shape), dead_latents(7))


@both
@pytest.mark.parametrize("normalisation", ["expected_average_only_in", "layer_norm", "constant_norm_rescale"])
def test_every_normalisation_equals_saelens(kind, normalisation):
    if kind.options and normalisation != "expected_average_only_in":
        with pytest.raises(ValueError, match="normalize_activations must not be per token with matryoshka_widths"):
            pair(kind, normalize_activations=normalisation)
        stock = kind.stock(kind.stock_config(**options_of(kind, normalize_activations=normalisation)))
        with pytest.raises(AttributeError):  # for SAELens's own
            stock.training_forward_pass(step_input(random_input(30, D)))
        with override(kind.name), pytest.raises(ValueError, match="normalize_activations must not be per token"):
            TrainingSAE.from_dict(stock.cfg.to_dict())
        return
    ours, stock = pair(kind, normalize_activations=normalisation)
    assert_same_step(ours, stock, random_input(30, D))
    if normalisation != "expected_average_only_in":
        for sae in (ours, stock):
            with pytest.raises(ValueError, match=f"normalize_activations='{normalisation}'"):
                sae.training_forward_pass(step_input(random_input(30, D), dead_latents(3)))


@both
def test_tokens_have_as_many_latents_as_the_batch_gives_them(kind):
    ours, _ = pair(kind)
    x = random_input(50, D) * torch.linspace(0.01, 3, 50).double().unsqueeze(1)
    codes = ours.training_forward_pass(step_input(x)).codes
    counts = codes.offsets.diff()
    assert counts.sum() == int(50 * K)
    assert counts.min() == 0
    assert counts.max() > 2 * K
    assert torch.equal((codes.to_dense() > 0).sum(1), torch.bincount(codes.active()[0], minlength=50))


@both
def test_where_nothing_is_positive_the_threshold_stays(kind):
    ours, stock = pair(kind)
    for sae in (ours, stock):
        sae.topk_threshold.fill_(0.25)
        with torch.no_grad():
            sae.b_enc.fill_(-1e3)
    assert_same_step(ours, stock, random_input(8, D))
    assert ours.topk_threshold == 0.25
