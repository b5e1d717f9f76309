"""The Switch SAE against an independent reference: a loop over tokens in float64, and SAELens's own TopK."""

import math

import pytest
import torch
from helpers import largest_allocation
from helpers.token_loop import make_batch, make_sae, reference_loss, step_input, variance
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

from sae_lens_switch import SwitchTrainingSAE, SwitchTrainingSAEConfig


def assert_same_gradients(sae: SwitchTrainingSAE, actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    parameters = dict(sae.named_parameters())
    ours = torch.autograd.grad(actual, list(parameters.values()), allow_unused=True)
    truth = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    for name, a, b in zip(parameters, ours, truth, strict=True):
        a = torch.zeros_like(parameters[name]) if a is None else a
        b = torch.zeros_like(parameters[name]) if b is None else b
        assert (a - b).abs().max() <= tolerance * (1 + b.abs().max()), f"gradient of {name}"


@pytest.mark.parametrize("n_experts", [1, 2, 7, 32])
@pytest.mark.parametrize("case", ["plain", "k = M", "B = 1"])
def test_outputs_loss_and_gradients_equal_the_token_loop(n_experts, case):
    width = 4
    sae = make_sae(
        n_experts=n_experts,
        d_sae=n_experts * width,
        k=width if case == "k = M" else 2,
    )
    x = make_batch(1 if case == "B = 1" else 30)
    compare_with_token_loop(sae, x)


def compare_with_token_loop(sae: SwitchTrainingSAE, x: Tensor) -> None:
    output = sae.training_forward_pass(step_input(x))
    latents, out, loss, balance = reference_loss(sae, x, 0.7, variance(x))
    assert (output.sae_out - out).abs().max() < 1e-10
    assert (output.feature_acts.to_dense() - latents).abs().max() < 1e-10
    assert (sae.encode(x) - latents).abs().max() < 1e-10
    assert abs(output.loss - loss) < 1e-10 * loss.abs()
    assert abs(output.metrics["load_balance"] - balance) < 1e-10
    assert abs(sum(output.losses.values()) - output.loss) < 1e-10
    assert_same_gradients(sae, output.loss, loss)


def test_an_expert_without_tokens():
    sae = make_sae(n_experts=4, d_sae=20, k=2)
    with torch.no_grad():
        sae.W_router[:, 2] = 0
        sae.W_router[0, 2] = -100
    x = make_batch()
    x[:, 0] = sae.b_router[0].item() + 5
    latents = sae.encode(x)
    assert latents[:, 10:15].count_nonzero() == 0
    compare_with_token_loop(sae, x)
    sae.training_forward_pass(step_input(x)).loss.backward()
    assert sae.W_dec.grad[10:15].count_nonzero() == 0
    assert sae.W_enc.grad[:, 10:15].count_nonzero() == 0


def test_one_expert_with_every_token():
    sae = make_sae(n_experts=3, d_sae=15, k=2)
    with torch.no_grad():
        sae.W_router[:] = 0
        sae.W_router[0, 1] = 100
    x = make_batch()
    x[:, 0] = sae.b_router[0].item() + 5
    assert sae.encode(x)[:, [*range(5), *range(10, 15)]].count_nonzero() == 0
    compare_with_token_loop(sae, x)


def test_all_pre_activations_negative():
    sae = make_sae()
    x = make_batch().abs()
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.W_enc.copy_(-sae.W_enc.abs())
    assert sae.encode(x).count_nonzero() == 0
    compare_with_token_loop(sae, x)


def test_ties_between_latents_and_between_experts():
    sae = make_sae(n_experts=2, d_sae=12, k=2)
    with torch.no_grad():
        sae.W_router[:, 1] = sae.W_router[:, 0]  # every token ties: the first expert takes them
        sae.W_enc[:, 1:6] = sae.W_enc[:, :1]  # every latent of it ties, and decodes alike
        sae.W_dec[1:6] = sae.W_dec[:1]
    x = make_batch()
    output = sae.training_forward_pass(step_input(x))
    _, out, loss, _ = reference_loss(sae, x, 0.7, variance(x))
    assert (output.sae_out - out).abs().max() < 1e-10
    assert abs(output.loss - loss) < 1e-10 * loss
    active = output.feature_acts.to_dense() != 0
    assert active[:, 6:].sum() == 0
    assert active.sum(1).max() == 2


@pytest.mark.parametrize("lead", [(), (1,), (3, 4), (2, 1, 3, 2)])
def test_any_leading_dimensions(lead):
    sae = make_sae()
    x = make_batch(math.prod(lead)).view(*lead, 10)
    latents, out, _, _ = reference_loss(sae, x.view(-1, 10), 0, 0)
    codes = sae.encode_sparse(x)
    assert codes.values.shape == codes.indices.shape == (*lead, 3)
    for dense in (sae.encode(x), codes.to_dense(), codes.to_coo().to_dense()):
        assert dense.shape == (*lead, 56)
        assert (dense.reshape(-1, 56) - latents).abs().max() < 1e-10
    for decoded in (sae.decode(sae.encode(x)), sae.decode(codes), sae(x)):
        assert (decoded.reshape(-1, 10) - out).abs().max() < 1e-10


def test_decode_is_linear_in_latents_of_any_expert():
    sae = make_sae()
    latents = torch.randn(5, 56, dtype=torch.float64)
    assert torch.allclose(sae.decode(latents), latents @ sae.W_dec + sae.b_dec, rtol=0, atol=1e-12)


def test_gate_one_leaves_the_latents_unweighted():
    sae, plain = make_sae(), make_sae(gate="one")
    x = make_batch()
    gates = ((x - sae.b_router) @ sae.W_router).softmax(-1).amax(-1, keepdim=True)
    assert torch.allclose(sae.encode(x), plain.encode(x) * gates, rtol=1e-12)
    output = plain.training_forward_pass(step_input(x, coefficient=0.0))
    (grad,) = torch.autograd.grad(output.loss, plain.W_router)
    assert grad.count_nonzero() == 0


def test_without_b_dec_in_the_input():
    sae = make_sae(apply_b_dec_to_input=False)
    x = make_batch()
    shifted = make_sae()
    with torch.no_grad():
        shifted.b_router += shifted.b_dec
    assert torch.allclose(sae.encode(x)[:1] * 0, torch.zeros(1, 56, dtype=torch.float64))
    e = int(((x[0] - sae.b_router) @ sae.W_router).argmax())
    pre = torch.relu(x[0] @ sae.W_enc[:, e * 8 : e * 8 + 8]).sort(descending=True).values[:3]
    gate = ((x[0] - sae.b_router) @ sae.W_router).softmax(-1)[e]
    assert torch.allclose(sae.encode(x)[0].sort(descending=True).values[:3], gate * pre)


def test_one_expert_equals_saelens_topk_without_rescaling():
    switch = make_sae(n_experts=1, k=6)
    topk = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=10, d_sae=56, k=6, dtype="float64", rescale_acts_by_decoder_norm=False)
    )
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_dec"):
            getattr(topk, name).copy_(getattr(switch, name))
    x = make_batch()
    ours = switch.training_forward_pass(step_input(x, coefficient=0.0))
    theirs = topk.training_forward_pass(step_input(x))
    assert torch.allclose(ours.sae_out, theirs.sae_out, rtol=0, atol=1e-12)
    assert torch.allclose(ours.feature_acts.to_dense(), theirs.feature_acts, rtol=0, atol=1e-12)
    assert abs(ours.loss - theirs.loss) < 1e-11
    ours.loss.backward()
    theirs.loss.backward()
    for name in ("W_enc", "W_dec", "b_dec"):
        assert torch.allclose(getattr(switch, name).grad, getattr(topk, name).grad, rtol=0, atol=1e-11), name


def test_d_in_scale_is_the_authors_loss_to_the_digit():
    sae = make_sae(load_balance_scale="d_in")
    assert sae.cfg.load_balance_coefficient == 3.0
    x = make_batch()
    output = sae.training_forward_pass(step_input(x, coefficient=sae.get_coefficients()["load_balance"].value))
    _, _, loss, balance = reference_loss(sae, x, 3.0, 10)
    assert abs(output.losses["load_balance_loss"] - 3 * 10 * balance) < 1e-10
    assert abs(output.loss - loss) < 1e-10 * loss
    assert_same_gradients(sae, output.loss, loss)


def test_weights_that_came_from_elsewhere_are_not_restarted():
    x = make_batch()
    given = make_sae()
    b_dec = given.b_dec.detach().clone()
    given.training_forward_pass(step_input(x, step=0))
    assert torch.equal(given.b_dec, b_dec)

    said_so = SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=10, d_sae=56, n_experts=7, k=3, dtype="float64"))
    said_so.is_fresh = False
    said_so.training_forward_pass(step_input(x, step=0))
    assert said_so.b_dec.count_nonzero() == 0


def test_a_training_step_makes_no_tensor_of_batch_times_width():
    B, D, E, M, K = 256, 6, 16, 32, 4
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=D, d_sae=E * M, n_experts=E, k=K))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    x = torch.randn(B, D)

    def step() -> None:
        sae.training_forward_pass(step_input(x, step=0)).loss.backward()
        optimizer.step()

    allowed = 4 * max(B * M, B * K * D, E * M * D)
    assert allowed < 4 * B * E * M
    assert largest_allocation(step) <= allowed
    sae.hook_sae_acts_post.add_hook(lambda _acts, hook: None)  # noqa: ARG005, SAELens passes `hook` by name
    assert largest_allocation(step) >= 4 * B * E * M, "the census can see a dense tensor"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_sae": 50}, "d_sae must be a multiple of n_experts=7; got d_sae=50"),
        ({"k": 9}, r"k must be at most d_sae / n_experts = 56 / 7 = 8.*got k=9"),
        ({"k": 0}, "k must be a whole number, at least 1; got 0"),
        ({"n_experts": 0}, "n_experts must be a whole number, at least 1; got 0"),
        ({"n_experts": 7.0}, "n_experts must be a whole number"),
        ({"d_in": 0}, "d_in must be"),
        ({"gate": "softmax"}, "gate must be one of 'probability', 'renormalized', 'one'; got 'softmax'"),
        ({"load_balance_scale": "rms"}, "load_balance_scale must be one of"),
        (
            {"load_balance_coefficient": -1.0},
            "load_balance_coefficient must be a finite number, at least 0 or None; got -1.0",
        ),
        (
            {"load_balance_coefficient": math.nan},
            "load_balance_coefficient must be a finite number, at least 0 or None; got nan",
        ),
        ({"bias_start": "median"}, "bias_start must be one of"),
        ({"aux_k": 0}, "aux_k must be a whole number, at least 1 or None; got 0"),
        ({"router_start_std": 0.0}, "router_start_std must be a positive finite number"),
        ({"decoder_init_norm": 0.1}, "decoder_init_norm must be 1.0 or None"),
        (
            {"normalize_activations": "covariance_whitening", "apply_b_dec_to_input": False},
            "apply_b_dec_to_input must be True",
        ),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SwitchTrainingSAEConfig(**({"d_in": 10, "d_sae": 56, "n_experts": 7, "k": 3} | fields))


@pytest.mark.parametrize(("value", "word"), [(math.nan, "3 NaN and 0 infinite"), (math.inf, "0 NaN and 3 infinite")])
def test_a_batch_that_is_not_finite_stops_training_with_the_step_number(value, word):
    sae = make_sae()
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    x = make_batch()
    x[5:8, 2] = value
    with pytest.raises(ValueError, match=f"training step 17 got {word} values in 3 of 40 tokens, the first in row 5"):
        sae.training_forward_pass(step_input(x, step=17))
    for name, p in sae.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


def test_activations_of_another_width_are_refused():
    with pytest.raises(ValueError, match="d_in must be the width of the activations, 12; got d_in=10"):
        make_sae().training_forward_pass(step_input(make_batch(d_in=12)))
