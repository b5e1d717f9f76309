"""The training pass, as the trainer sees it."""

import pytest
import torch
from helpers import D, E, F, K, M, random_input, training_config
from helpers.contract import make, step_input, tightly
from sae_lens.config import LoggingConfig

import sae_lens_switch


@pytest.mark.parametrize("k", [K, M])
def test_the_training_pass_returns_what_the_trainer_needs(k):
    sae, x = make("training", k=k), random_input(30, D)
    output = sae.training_forward_pass(step_input=step_input(x))
    assert output.sae_in is x
    assert output.feature_acts.is_sparse
    assert output.feature_acts.shape == (30, F)
    assert not output.feature_acts.requires_grad
    assert not output.hidden_pre.requires_grad
    torch.testing.assert_close(output.feature_acts.to_dense(), sae.encode(x), **tightly)
    torch.testing.assert_close(output.sae_out, sae(x), **tightly)
    assert output.losses.keys() == {"mse_loss", "load_balance_loss"}
    torch.testing.assert_close(output.loss, sum(output.losses.values()), **tightly)
    torch.testing.assert_close(output.losses["mse_loss"], (sae(x) - x).square().sum(-1).mean(), **tightly)
    assert sae.get_coefficients().keys() == {"load_balance"}


def test_the_training_pass_uses_the_loss_function_a_user_swapped_in():
    sae, x = make("training"), random_input(30, D)
    sae.mse_loss_fn = lambda out, target: (out - target).abs()
    output = sae.training_forward_pass(step_input=step_input(x))
    torch.testing.assert_close(output.losses["mse_loss"], (sae(x) - x).abs().sum(-1).mean(), **tightly)


def test_calculate_aux_loss_is_the_load_balance_loss_of_the_training_pass():
    sae, x = make("training"), random_input(30, D)
    output = sae.training_forward_pass(step_input=step_input(x))
    acts, pre = sae.encode_with_hidden_pre(x)
    aux = sae.calculate_aux_loss(step_input=step_input(x), feature_acts=acts, hidden_pre=pre, sae_out=sae.decode(acts))
    assert aux.keys() == {"load_balance_loss"}
    torch.testing.assert_close(aux["load_balance_loss"], output.losses["load_balance_loss"], **tightly)


def test_log_histograms_are_numpy_arrays_of_decoder_and_router_norms():
    sae = make("training", dtype="bfloat16")
    histograms = sae.log_histograms()
    assert {name: h.shape for name, h in histograms.items()} == {
        "weights/W_dec_norms": (F,),
        "weights/W_router_norms": (E,),
    }


def test_runner_logging_names_the_architecture():
    cfg = sae_lens_switch.LanguageModelSAERunnerConfig(sae=training_config(), logger=LoggingConfig(), verbose=False)
    assert cfg.logger.run_name.startswith(f"switch-{F}-")
