"""The routing, watched: a collapse is reported, and countered if that is wanted."""

import logging

import pytest
import torch
from helpers import D, E, M, activations, training_sae
from helpers.trainers import our_trainer, run

from sae_lens_switch import SwitchTrainingSAE
from sae_lens_switch.saes.expert_layout import ExpertLayout
from sae_lens_switch.saes.router import router_logits
from sae_lens_switch.training.collapse_response import reseed
from sae_lens_switch.training.routing_monitor import RoutingMonitor


def collapsed_sae(**options) -> SwitchTrainingSAE:
    """A router that sends everything to expert 1."""
    sae = training_sae(dtype="float32", bias_start="mean", router_start_std=None, **options)
    sae.is_fresh = False
    batch = torch.cat(activations(4))
    with torch.no_grad():
        sae.b_dec.copy_(batch.mean(0))
        sae.W_router.zero_()
        sae.W_router[:, 1] = 3 * batch.mean(0) / batch.mean(0).square().sum()
        sae.b_router.zero_()
    return sae


@pytest.mark.parametrize("on_collapse", ["report", "raise_coefficient", "reseed"])
def test_a_collapsed_router_is_reported_once_and_countered_if_wanted(on_collapse, caplog):
    batches = activations(120)
    sae = collapsed_sae(load_balance_coefficient=0.0 if on_collapse != "raise_coefficient" else 0.01)
    # At a learning rate of next to nothing, what changes the routing is the counter-measure.
    lr = 0.02 if on_collapse == "raise_coefficient" else 1e-12
    trainer_ = our_trainer(sae, batches, on_collapse=on_collapse, collapse_patience=8, lr=lr)
    coefficient = trainer_.get_coefficients()["load_balance"]
    with caplog.at_level(logging.WARNING):
        outputs = run(trainer_, batches)
    (report,) = [r.message for r in caplog.records if "collapsed" in r.message]
    assert "expert 1 has taken 100% of the tokens for 8 steps" in report
    assert "3 experts (0, 2, 3) have had no token for 8 steps" in report
    assert ("load_balance_coefficient" in report) == (on_collapse == "report")
    load = outputs[-1].routing.load_E
    if on_collapse == "report":
        assert trainer_.n_interventions == 0
        assert load[1] == 1
        assert trainer_.get_coefficients()["load_balance"] == coefficient
    else:
        assert trainer_.n_interventions > 0
        assert load.max() < 0.9
        assert (load > 0).sum() >= (3 if on_collapse == "reseed" else 2)
    if on_collapse == "raise_coefficient":
        assert trainer_.get_coefficients()["load_balance"] >= 2 * coefficient


def test_even_routing_is_no_collapse_whatever_the_number_of_experts():
    for n_experts in (1, 2, 4):
        monitor = RoutingMonitor(ExpertLayout(n_experts, n_experts), share=None, patience=3, device="cpu")
        for _ in range(10):
            monitor.update(torch.full((n_experts,), 1 / n_experts))
        assert monitor.collapse() is None
    monitor = RoutingMonitor(ExpertLayout(2, 2), share=None, patience=3, device="cpu")
    for _ in range(3):
        assert monitor.collapse() is None
        monitor.update(torch.tensor([0.8, 0.2]))
    found = monitor.collapse()
    assert found is not None
    assert found.too_busy
    assert found.without_tokens == []
    monitor.update(torch.tensor([0.5, 0.5]))  # steps in a row are what counts
    assert monitor.collapse() is None


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
def test_a_reseeded_expert_is_the_busiest_ones_twin_and_the_reconstruction_stays(optimizer):
    batches = activations(10)
    sae = collapsed_sae()
    trainer_ = our_trainer(sae, batches, optimizer=optimizer, lr=1e-9)
    run(trainer_, batches)
    x = batches[0]
    before = (sae(x) - x).square().sum(-1).mean()
    (pair,) = reseed(sae, trainer_.optimizer, x, [2])
    assert pair == (2, 1)
    assert torch.equal(sae.W_dec[2 * M : 3 * M], sae.W_dec[M : 2 * M])
    assert torch.equal(sae.W_enc[:, 2 * M : 3 * M], sae.W_enc[:, M : 2 * M])
    state = trainer_.optimizer.state[sae.W_dec]
    moments = state["moments"] if optimizer == "row_sparse_adam" else state["exp_avg_sq"]
    assert moments[M : 2 * M].any()
    assert torch.equal(moments[2 * M : 3 * M], moments[M : 2 * M])
    experts = sae.encode_sparse(x).indices[:, 0] // M
    share = (experts == 2).float().mean()
    assert 0.15 < share < 0.85
    assert set(experts.tolist()) == {1, 2}
    assert (sae(x) - x).square().sum(-1).mean() < 1.3 * before


@pytest.mark.parametrize("how", ["constant_norm_rescale", "layer_norm"])
def test_a_twin_is_made_of_the_expert_that_is_busiest_on_normalised_activations(how):
    sae = collapsed_sae(normalize_activations=how)
    batches = [1000 * (b + 2 * torch.arange(D)) for b in activations(3)]  # large, and of one direction
    trainer_ = our_trainer(sae, batches, lr=1e-9)
    run(trainer_, batches)
    x = batches[0]
    along_D = sae.run_time_activation_norm_fn_in(x).mean(0)
    with torch.no_grad():
        sae.W_router.zero_()
        sae.W_router[:, 0], sae.W_router[:, 3] = along_D, -along_D
        sae.b_router.copy_(2 * along_D)  # beyond the normalised activations, far before the others

    def busiest() -> int:
        return int(torch.bincount(sae.encode_routed(x)[1].experts_BA.flatten(), minlength=E).argmax())

    expected = busiest()
    raw = router_logits(x, sae.W_router, sae.b_router).argmax(1)
    assert int(torch.bincount(raw, minlength=E).argmax()) != expected
    ((_, found),) = reseed(sae, trainer_.optimizer, x, [next(e for e in range(E) if e != expected)])
    assert found == expected
