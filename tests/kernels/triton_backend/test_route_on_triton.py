"""The router's choice on Triton against plain torch in float64."""

import pytest
import torch
from helpers.triton_checks import DEVICE, assert_as_good_as_torch, random
from sae_lens_switch_kernels import indexing, torch_routing
from sae_lens_switch_kernels.triton_backend import routing

shapes = pytest.mark.parametrize(
    ("B", "E"), [(1, 1), (7, 3), (33, 32), (130, 5), (2100, 128), (5, 130), (2, 1500)], ids=str
)


def assert_same_load(ours: torch_routing.Routed, plain: torch_routing.Routed) -> None:
    """A count divided by the number of tokens, which on a GPU torch does by a product and rounds twice."""
    torch.testing.assert_close(ours.load_E, plain.load_E, rtol=1e-6, atol=0)


@shapes
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_route(B, E, biased):
    logits, bias = 3 * random(B, E), 2 * random(E, seed=4) if biased else None
    ours, plain = routing.route(logits, bias), torch_routing.route(logits, bias)
    exact = torch_routing.route(logits.double(), None if bias is None else bias.double())
    assert torch.equal(ours.expert_B, plain.expert_B)
    for name in ("order_B", "offsets_E1"):
        assert torch.equal(getattr(ours, name), getattr(plain, name)), name
    assert_same_load(ours, plain)
    assert exact.balance == pytest.approx(E * float(exact.load_E @ exact.importance_E))
    for name in ("probs_BE", "gates_B", "importance_E", "balance"):
        assert_as_good_as_torch(name, *(getattr(found, name) for found in (ours, exact, plain)))


@shapes
@pytest.mark.parametrize("given", [(1, 0, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1), (1, 1, 1, 1)], ids=str)
def test_its_gradient(B, E, given):
    probs = random(B, E).softmax(1)
    upstream = random(B, E, seed=1), random(B, seed=2), random(E, seed=3), random(1, seed=4)[0]
    load = random(E, seed=5).softmax(0)
    grads = [t if is_given else None for t, is_given in zip(upstream, given, strict=True)]
    ours = routing.route_backward(probs, probs.argmax(1), *grads, load)
    plain = torch_routing.route_backward(probs, probs.argmax(1), *grads, load)
    double = [None if t is None else t.double() for t in grads]
    exact = torch_routing.route_backward(probs.double(), probs.argmax(1), *double, load.double())
    if E == 1:  # a softmax of one number has none
        assert ours.abs().max() <= 1e-6
    else:
        assert_as_good_as_torch("d_logits", ours, exact, plain)


@pytest.mark.parametrize("bias", [None, [0.0, 0.0, 0.0], [0.5, -1e30, 0.5]], ids=str)
def test_ties_infinities_and_what_is_not_a_number(bias):
    bias = None if bias is None else torch.tensor(bias, device=DEVICE)
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[1, 2, 2], [0, 0, 0], [0, nan, 1], [1, inf, 0], [nan] * 3, [-inf, 3, 1]], device=DEVICE)
    ours, plain = routing.route(logits, bias), torch_routing.route(logits, bias)
    assert torch.equal(ours.expert_B, plain.expert_B)
    assert torch.equal(ours.gates_B.isnan(), plain.gates_B.isnan())
    assert_same_load(ours, plain)
    assert ours.importance_E.isnan().all()


@pytest.mark.parametrize("E", [1, 2, 130])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_tokens_are_counted_exactly_whatever_the_dtype_of_the_logits(E, biased):
    """A program has hundreds of tokens here, nearly all of one expert: more than bfloat16 can count."""
    logits, bias = random(1501, E, dtype=torch.bfloat16), random(E, dtype=torch.bfloat16, seed=1)
    logits[:, 0] += 9
    found = routing.route(logits, bias if biased else None)
    expected = indexing.expert_groups(found.expert_B, E)
    assert torch.equal(found.order_B, expected.order_B)
    assert torch.equal(found.offsets_E1, expected.offsets_E1.int())
    assert found.probs_BE.dtype == found.load_E.dtype == torch.bfloat16
    torch.testing.assert_close(found.load_E.float(), expected.offsets_E1.diff() / 1501, rtol=0.01, atol=0)


def test_loads_are_followed_as_by_torch():
    states = [
        [torch.full((5,), 0.2, device=DEVICE), *(torch.zeros(n, device=DEVICE) for n in ((5,), ()))] for _ in "ab"
    ]
    for step in range(6):
        load = random(5, seed=step).relu()
        routing.update_loads(load, *states[0], 0.02, 1.0)
        torch_routing.update_loads(load, *states[1], 0.02, 1.0)
    for ours, theirs in zip(*states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert states[0][1].any()
    assert states[0][2].shape == ()


@pytest.mark.parametrize("E", [1, 5, 130])
@pytest.mark.parametrize("is_finite", [True, False])
def test_a_bias_is_moved_as_by_torch(E, is_finite):
    bias = random(E)
    expected = bias.clone()
    for counts in (random(E, seed=1).mul(9).round(), torch.full((E,), 77.0, device=DEVICE)):
        routing.update_expert_bias(bias, counts, torch.tensor(is_finite, device=DEVICE), 0.1)
        torch_routing.update_expert_bias(expected, counts, torch.tensor(is_finite, device=DEVICE), 0.1)
        torch.testing.assert_close(bias, expected, rtol=1e-6, atol=1e-7)
