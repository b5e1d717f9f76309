"""examples/minimal_switch.py computes what the package computes, and trains."""

import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, D, E, F, K, random_input, randomize, training_sae
from sae_lens.saes.sae import TrainStepInput

exactly = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def both(monkeypatch):
    """The example's SAE and the package's, with the same weights."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import minimal_switch

    real = randomize(training_sae(load_balance_coefficient=0.3))
    minimal = minimal_switch.SwitchSAE(d_in=D, d_sae=F, n_experts=E, k=K, balance=0.3).double()
    minimal.load_state_dict(dict(real.named_parameters()))
    return minimal, real


def test_outputs_loss_and_gradients_are_those_of_the_package(both):
    minimal, real = both
    x = random_input(200, D)
    torch.testing.assert_close(minimal(x), real(x), **exactly)
    loss, load_E = minimal.loss(x)
    loss.backward()
    step = real.training_forward_pass(
        TrainStepInput(
            x, coefficients={"load_balance": 0.3}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
        )
    )
    step.loss.backward()
    assert load_E.min() > 0, "every expert has tokens"
    torch.testing.assert_close(loss, step.loss, **exactly)
    torch.testing.assert_close(load_E.double(), step.routing.load_E, **exactly)
    for name, parameter in real.named_parameters():
        torch.testing.assert_close(getattr(minimal, name).grad, parameter.grad, **exactly)


def test_what_happens_around_a_step_is_what_the_package_does(both):
    minimal, real = both
    grad = random_input(F, D, seed=5)
    for sae in both:
        sae.W_dec.grad = grad.clone()
    minimal.normalize_decoder()
    real.after_optimizer_step()
    torch.testing.assert_close(minimal.W_dec, real.W_dec, **exactly)
    minimal.project_decoder_gradient()
    real.before_optimizer_step()
    torch.testing.assert_close(minimal.W_dec.grad, real.W_dec.grad, **exactly)


def test_it_trains():
    command = [sys.executable, str(ROOT / "examples" / "minimal_switch.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    explained = [float(number) for number in re.findall(r"explained variance (\S+)", printed)]
    assert explained[-1] > 0.8 > explained[0]
    found, there = map(int, re.findall(r"(\d+) of the (\d+) true directions", printed)[0])
    assert found > 0.8 * there


def test_it_imports_nothing_but_torch():
    text = (ROOT / "examples" / "minimal_switch.py").read_text()
    modules = re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE)
    assert set(modules) == {"torch"}
