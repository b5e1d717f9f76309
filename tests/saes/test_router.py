"""The router: its bias may be tied, and training keeps its choices balanced at any size of the activations."""

import pytest
import torch
from helpers.token_loop import make_batch, make_sae, reference_loss, step_input, variance
from torch import Tensor

from sae_lens_switch import SwitchTrainingSAE, SwitchTrainingSAEConfig


def test_tied_router_bias_is_one_vector():
    torch.manual_seed(0)
    sae = make_sae(tie_router_bias=True)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for step in range(3):
        sae.training_forward_pass(step_input(make_batch(seed=step), step=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(sae.b_dec, sae.b_router)
    x = make_batch()
    latents, _, _, _ = reference_loss(sae, x, 0, 0)
    assert torch.allclose(sae.encode(x), latents)


def lopsided_batch(n: int, seed: int) -> Tensor:
    """Tokens of 12 clusters, half of them from one: without a balance loss, one expert draws the crowd."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, 16, generator=torch.Generator().manual_seed(99)) * 3
    weights = torch.tensor([12.0] + [1.0] * 11)
    return centres[weights.multinomial(n, replacement=True, generator=generator)] + torch.randn(
        n, 16, generator=generator
    )


def heaviest_share_after_training(scale: float, coefficient: float | None, **fields) -> float:
    """Trains on activations times scale; the heaviest expert's load on fresh ones, in units of an even share."""
    torch.manual_seed(0)
    fields = {"d_sae": 64, "n_experts": 4, **fields}
    cfg = SwitchTrainingSAEConfig(d_in=16, k=3, load_balance_coefficient=coefficient, **fields)
    sae = SwitchTrainingSAE(cfg)
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-3)
    for step in range(300):
        x = lopsided_batch(256, step) * scale
        sae.training_forward_pass(step_input(x, cfg.load_balance_coefficient, step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    experts = sae.encode_routed(lopsided_batch(4000, 1000) * scale)[1].experts_BA
    return (cfg.n_experts * experts.flatten().bincount().max() / experts.numel()).item()


def test_routing_stays_as_balanced_on_activations_ten_times_as_large():
    assert heaviest_share_after_training(1.0, coefficient=0.0) > 1.8
    assert heaviest_share_after_training(10.0, coefficient=0.0) > 1.8
    shares = [heaviest_share_after_training(scale, coefficient=None) for scale in (0.1, 1.0, 10.0)]
    assert max(shares) < 1.3, shares


@pytest.mark.parametrize("n_active", [1, 2])
def test_a_bias_balances_the_routing_without_a_loss_at_any_size_of_the_activations(n_active):
    options = {"coefficient": None, "load_balancing": "bias", "n_active_experts": n_active}
    options |= {"n_experts": 4 * n_active, "d_sae": 64 * n_active}
    assert heaviest_share_after_training(1.0, **options, load_balance_bias_rate=0.0) > 1.8
    shares = [heaviest_share_after_training(s, **options, load_balance_bias_rate=0.02) for s in (0.1, 1.0, 10.0)]
    assert max(shares) < 1.3, shares


def test_the_load_balance_loss_scales_as_the_reconstruction_error_does():
    sae = make_sae()
    x = make_batch()

    def scale_of(sae, x):
        output = sae.training_forward_pass(step_input(x, 3.0))
        return float(output.losses["load_balance_loss"] / (3 * output.metrics["load_balance"]))

    assert scale_of(sae, x) == pytest.approx(variance(x), rel=1e-12)
    assert scale_of(sae, 10 * x) == pytest.approx(variance(10 * x), rel=1e-12)
    assert scale_of(make_sae(load_balance_scale="d_in"), 10 * x) == pytest.approx(10.0)
