"""Balancing by a bias, and the router's z-loss: against the token loop, in training, in files, in all that routes."""

import json

import pytest
import torch
from helpers import D, E, F, K, M, activations, random_input, trainer, training_sae
from helpers.faults import everything, interrupted_after, make_trainer, what_differs
from helpers.runs import steps
from helpers.token_loop import make_batch, make_sae, reference_loss, step_input, variance
from helpers.trainers import our_trainer, run
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import load_file, save_file

from sae_lens_switch import SwitchSAE, SwitchTrainingSAE, SwitchTrainingSAEConfig, grow
from sae_lens_switch.analysis import observe
from sae_lens_switch.interop.saedashboard import as_dashboard_sae
from sae_lens_switch.saes.router import router_logits, router_z_loss
from sae_lens_switch.training.collapse_response import reseed

BIASED = {"load_balancing": "bias", "load_balance_bias_rate": 0.05}


def biased_sae(**fields) -> SwitchTrainingSAE:
    """Random weights, and a bias that changes the expert of many tokens."""
    return make_sae(**BIASED, **fields)


def choices(sae: SwitchTrainingSAE | SwitchSAE, x: torch.Tensor) -> torch.Tensor:
    """By the formula: the largest logits plus bias."""
    scores = ((x.to(sae.W_router.dtype) - sae.b_router) @ sae.W_router) + sae.expert_bias
    return scores.topk(sae.cfg.n_active_experts, dim=1).indices


# What is computed


@pytest.mark.parametrize("gate", ["probability", "renormalized", "one"])
@pytest.mark.parametrize("n_active", [1, 2, 3])
@pytest.mark.parametrize(
    "fields", [BIASED, {"router_z_loss_coefficient": 0.3}, BIASED | {"router_z_loss_coefficient": 2}]
)
def test_outputs_loss_and_gradients_equal_the_token_loop(fields, n_active, gate):
    sae = make_sae(n_active_experts=n_active, gate=gate, **fields)
    x = make_batch()
    output = sae.training_forward_pass(step_input(x))
    latents, out, loss, balance = reference_loss(sae, x, 0.7, variance(x))
    torch.testing.assert_close(output.sae_out, out)
    torch.testing.assert_close(output.feature_acts.to_dense(), latents)
    torch.testing.assert_close(sae.encode(x), latents)
    torch.testing.assert_close(output.metrics["load_balance"], balance)
    torch.testing.assert_close(output.loss, loss)
    assert ("router_z_loss" in output.losses) == ("router_z_loss_coefficient" in fields)
    names, parameters = zip(*sae.named_parameters(), strict=True)
    assert "expert_bias" not in names
    ours = torch.autograd.grad(output.loss, parameters, allow_unused=True)
    for name, a, b in zip(names, ours, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_the_bias_of_these_tests_changes_many_choices_and_no_gate():
    sae, x = biased_sae(), make_batch(200)
    plain = ((x - sae.b_router) @ sae.W_router).argmax(1)
    _, found = sae.encode_routed(x)
    assert 30 < (found.experts_BA[:, 0] != plain).sum() < 180
    probs = ((x - sae.b_router) @ sae.W_router).softmax(1)
    torch.testing.assert_close(found.gates_BA, probs.gather(1, found.experts_BA))


def test_the_z_loss_and_its_gradient_in_float32_are_those_of_float64():
    logits = random_input(50, 7).float().mul(4).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    reference = sum(sum(logit.exp() for logit in row).log() ** 2 for row in exact) / 50
    torch.testing.assert_close(router_z_loss(logits).double(), reference, rtol=1e-6, atol=0)
    (ours,), (truth,) = torch.autograd.grad(router_z_loss(logits), logits), torch.autograd.grad(reference, exact)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-7)


def test_the_z_loss_keeps_logits_small():
    def size(coefficient: float) -> float:
        sae = training_sae(dtype="float32", router_z_loss_coefficient=coefficient)
        run(our_trainer(sae, activations(60)), activations(60))
        return router_logits(activations(1)[0], sae.W_router, sae.b_router).logsumexp(1).square().mean().item()

    assert size(0.1) < 0.8 * size(0.0)


@pytest.mark.parametrize("n_active", [1, 2])
def test_hooks_on_dense_latents_and_on_the_routers_probabilities_see_the_same_choice(n_active):
    sae, x = biased_sae(n_active_experts=n_active), make_batch()
    plain = sae.training_forward_pass(step_input(x))
    for name in ("hook_sae_acts_pre", "hook_sae_router_probs"):
        hooked = biased_sae(n_active_experts=n_active)
        hooked.add_hook(name, lambda t, hook: None)  # noqa: ARG005
        output = hooked.training_forward_pass(step_input(x))
        torch.testing.assert_close(output.loss, plain.loss)
        torch.testing.assert_close(hooked.encode(x), sae.encode(x))
        assert torch.equal(hooked._counts_E, sae._counts_E)


# What training does to the bias


@pytest.mark.parametrize("n_active", [1, 2])
@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
def test_a_bias_that_stays_zero_trains_as_the_loss_with_a_coefficient_of_zero(optimizer, n_active):
    batches = activations(30)
    saes = [
        training_sae(dtype="float32", n_active_experts=n_active, **fields)
        for fields in ({"load_balancing": "bias", "load_balance_bias_rate": 0.0}, {"load_balance_coefficient": 0.0})
    ]
    outputs = [run(our_trainer(sae, batches, optimizer=optimizer), batches) for sae in saes]
    weights, expected = (sae.state_dict() for sae in saes)
    assert torch.equal(weights.pop("expert_bias"), torch.zeros(E))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [o.loss.item() for o in outputs[0]] == [o.loss.item() for o in outputs[1]]


@pytest.mark.parametrize("saelens", [False, True], ids=["our trainer", "SAELens's"])
@pytest.mark.parametrize("n_experts", [3, 4])
def test_where_experts_have_as_many_tokens_nothing_is_moved(n_experts, saelens):
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=D, d_sae=12 * n_experts, n_experts=n_experts, k=3, **BIASED))
    sae.is_fresh = False
    batch = torch.eye(D)[:n_experts].repeat(15, 1) * 9 + 0.1 * random_input(15 * n_experts, D).float()
    with torch.no_grad():
        sae.W_router.copy_(torch.eye(D)[:, :n_experts])
    if saelens:
        list(steps(trainer(sae, [batch] * 5, lr=1e-6), [batch] * 5))
    else:
        run(our_trainer(sae, [batch] * 5, lr=1e-6), [batch] * 5)
    assert torch.equal(sae.expert_bias, torch.zeros(n_experts))
    assert sae._counts_E is None


@pytest.mark.parametrize("n_active", [1, 2])
def test_a_step_moves_the_bias_against_its_load_under_any_trainer(n_active):
    batch = activations(1)[0]
    found = {}
    for name in ("ours", "in parts", "through a graph", "SAELens's", "a loop"):
        sae = training_sae(n_active_experts=n_active, **BIASED)
        if name == "SAELens's":
            next(steps(trainer(sae, [batch]), [batch]))
        elif name == "a loop":
            optimizer = torch.optim.SGD(sae.parameters(), lr=1e-3)
            sae.training_forward_pass(step_input(batch, coefficient=0.0, step=0)).loss.backward()
            assert torch.equal(sae.expert_bias, torch.zeros(E).double())
            optimizer.step()
        else:
            # a batch in parts is initialised from its first
            sae.is_fresh = name != "in parts"
            options = {"in parts": {"gradient_accumulation_steps": 3}, "through a graph": {"cuda_graph": True}}
            run(our_trainer(sae, [batch], **options.get(name, {})), [batch])
        found[name] = sae
    expected = {}
    for fresh in (True, False):
        sae = training_sae(n_active_experts=n_active, **BIASED)
        sae.is_fresh = fresh
        sae.training_forward_pass(step_input(batch, step=0))  # which gives it its start
        counts_E = choices(sae, batch).flatten().bincount(minlength=E)
        signs_E = (counts_E.double().mean() - counts_E).sign()
        assert signs_E.abs().sum() > 1
        expected[fresh] = 0.05 * (signs_E - signs_E.mean())
    for name, sae in found.items():
        torch.testing.assert_close(sae.expert_bias, expected[name != "in parts"], msg=name)


@pytest.mark.parametrize("spoiled", [0, 4])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_skipped_step_leaves_the_bias_and_the_next_one_does_not_count_its_tokens(parts, spoiled):
    batches = activations(8)
    with_gap, without = (training_sae(dtype="float32", **BIASED) for _ in range(2))
    bad = batches[0].clone()
    bad[3, 2] = torch.nan
    trainer_ = our_trainer(with_gap, batches, gradient_accumulation_steps=parts)
    for i, batch in enumerate(batches):
        if i == spoiled:
            before = with_gap.expert_bias.clone()
            run(trainer_, [bad])
            assert torch.equal(with_gap.expert_bias, before)
            assert trainer_.n_skipped_steps == 1
        run(trainer_, [batch])
    run(our_trainer(without, batches, gradient_accumulation_steps=parts), batches)
    assert with_gap.expert_bias.abs().max() > 0
    torch.testing.assert_close(with_gap.expert_bias, without.expert_bias)


def test_a_step_that_saelens_trainer_stops_at_is_not_counted():
    sae, batch = training_sae(**BIASED), activations(1)[0]
    with pytest.raises(ValueError, match="activations must be finite"):
        next(steps(trainer(sae, [batch]), [batch * torch.nan]))
    assert sae._counts_E is None
    with torch.no_grad():  # nor is an evaluation
        sae.training_forward_pass(step_input(batch, step=0))
    assert sae._counts_E is None


@pytest.mark.parametrize(
    ("dtype", "options"), [("float32", {}), ("bfloat16", {}), ("float32", {"optimizer": "row_sparse_adam"})], ids=str
)
def test_a_run_resumes_to_the_same_bits(tmp_path, dtype, options):
    setup = {"sae": {"dtype": dtype, "n_active_experts": 2, "router_z_loss_coefficient": 0.01, **BIASED}, **options}
    whole = make_trainer(None, **setup)
    whole.fit()
    first = make_trainer(tmp_path, interrupted_after(13), **setup)
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    again = make_trainer(tmp_path, resume="latest", **setup)
    again.fit()
    assert whole.sae.expert_bias.dtype == torch.float32
    assert whole.sae.expert_bias.abs().min() > 0
    assert what_differs(everything(again), everything(whole)) == []


# What is in files


def test_without_a_bias_the_files_hold_no_new_tensor(tmp_path):
    weights, _ = training_sae().save_model(tmp_path)
    names = {"W_enc", "W_dec", "b_dec", "W_router", "b_router", "W_router_digits", "b_router_digits", "fresh"}
    assert load_file(weights).keys() == names
    assert training_sae().state_dict().keys() == {"W_enc", "W_dec", "b_dec", "W_router", "b_router"}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_inference_routes_as_training_did(tmp_path, dtype):
    sae = biased_sae(dtype=dtype, n_active_experts=2)
    x = make_batch(100)
    (_, expected), latents = sae.encode_routed(x), sae.encode(x)
    sae.save_inference_model(tmp_path / "inference")
    sae.save_model(tmp_path / "training")
    assert json.loads((tmp_path / "inference" / "cfg.json").read_text())["load_balancing"] == "bias"
    loaded = [SAE.load_from_disk(tmp_path / "inference"), SAE.load_from_disk(tmp_path / "training")]
    loaded += [TrainingSAE.load_from_disk(tmp_path / "training"), as_dashboard_sae(sae)]
    other = make_sae(3, **BIASED, dtype=dtype, n_active_experts=2)
    other.load_weights_from_checkpoint(tmp_path / "training")
    for found in (*loaded, other):
        assert found.expert_bias.dtype == sae.W_router.dtype
        assert torch.equal(found.expert_bias, sae.expert_bias)
        assert torch.equal(found.encode_routed(x)[1].experts_BA, expected.experts_BA)
        assert torch.equal(found.encode(x), latents)
    low = SAE.load_from_disk(tmp_path / "inference", dtype="bfloat16")
    assert torch.equal(low.expert_bias, sae.expert_bias.to(low.expert_bias.dtype))
    assert torch.equal(sae.float().bfloat16().float().expert_bias, low.expert_bias.float())


@pytest.mark.parametrize("change", ["missing", "misshaped", "unexpected"])
def test_files_that_do_not_fit_are_refused(tmp_path, change):
    sae = make_sae() if change == "unexpected" else biased_sae()
    weights_path, _ = sae.save_inference_model(tmp_path)
    weights = load_file(weights_path)
    if change == "missing":
        del weights["expert_bias"]
    else:
        weights["expert_bias"] = torch.zeros(3, dtype=torch.float64)
    save_file(weights, weights_path)
    with pytest.raises((ValueError, RuntimeError), match="expert_bias"):
        SAE.load_from_disk(tmp_path)


def test_folding_a_scaling_of_the_activations_leaves_the_routing():
    sae, x = biased_sae(), make_batch()
    expected = sae.encode_routed(x)[1].experts_BA
    sae.fold_activation_norm_scaling_factor(4.0)
    assert torch.equal(sae.encode_routed(x / 4)[1].experts_BA, expected)


# What else routes


def test_analysis_counts_the_biased_choices():
    sae, x = biased_sae(), make_batch(300)
    found = observe(sae, [x]).routing
    assert found.tokens_E.tolist() == choices(sae, x).flatten().bincount(minlength=7).tolist()


def test_a_reseeded_expert_is_its_twins_equal_in_bias_too():
    batches = activations(10)
    sae = training_sae(dtype="float32", **BIASED)
    trainer_ = our_trainer(sae, batches, lr=1e-9)
    run(trainer_, batches)
    x = torch.cat(batches)
    with torch.no_grad():
        sae.expert_bias.copy_(torch.tensor([-9.0, 9.0, -9.0, -9.0]))
    assert choices(sae, x).unique().tolist() == [1]
    before = (sae(x) - x).square().sum(-1).mean()
    assert reseed(sae, trainer_.optimizer, x, [2]) == [(2, 1)]
    assert sae.expert_bias.tolist() == [-9, 9, 9, -9]
    share = (sae.encode_routed(x)[1].experts_BA == 2).float().mean()
    assert 0.15 < share < 0.85
    assert (sae(x) - x).square().sum(-1).mean() < 1.3 * before


def test_a_grown_sae_has_the_bias_of_its_experts_sources():
    batches = activations(40)
    sae = training_sae(dtype="float32", **BIASED)
    run(our_trainer(sae, batches, lr=3e-3), batches)
    x = torch.cat(batches)
    with torch.no_grad():
        sae.expert_bias[2] += 1.0
    old = choices(sae, x).flatten()
    busiest = int(old.bincount(minlength=E).argmax())
    grown = grow(sae, E + 1, x)
    assert torch.equal(grown.expert_bias[:E], sae.expert_bias)
    assert grown.expert_bias[E] == sae.expert_bias[busiest]
    new = grown.encode_routed(x)[1].experts_BA.flatten()
    source = torch.where(new == E, busiest, new)
    assert (source == old).float().mean() > 0.9
    assert grown.cfg.d_sae == F + M
    assert grown.cfg.k == K


# Configs


def test_the_loss_is_off_by_default_where_a_bias_balances():
    options = {"d_in": D, "d_sae": F, "n_experts": E, "k": K}
    assert SwitchTrainingSAEConfig(**options).load_balance_coefficient == 0.3
    assert SwitchTrainingSAEConfig(**options, load_balancing="bias").load_balance_coefficient == 0.0
    both = SwitchTrainingSAEConfig(**options, load_balancing="bias", load_balance_coefficient=0.01)
    assert both.load_balance_coefficient == 0.01


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"load_balancing": "sign"}, "load_balancing must be one of 'loss', 'bias'; got 'sign'"),
        ({"load_balance_bias_rate": -1}, "load_balance_bias_rate must be"),
        ({"router_z_loss_coefficient": float("nan")}, "router_z_loss_coefficient must be"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        training_sae(**fields)
