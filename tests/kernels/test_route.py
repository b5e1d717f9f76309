"""The router's choice against autograd through its parts, and by torch's own checks of an operator."""

import pytest
import torch
from sae_lens_switch_kernels import route, router_logits, routing, update_expert_bias, update_loads
from sae_lens_switch_kernels.routing import routed
from torch import Tensor

SHAPES = [(7, 3), (1, 1), (33, 5), (20, 40)]


def logits_of(B: int, E: int) -> Tensor:
    return torch.randn(B, E, generator=torch.Generator().manual_seed(B), dtype=torch.float64)


def by_parts(logits: Tensor, bias: Tensor | None = None):
    """As it is defined, token by token where that is clearer."""
    probs = torch.stack([row.exp() / row.exp().sum() for row in logits])
    ranked = logits.detach() if bias is None else logits.detach() + bias
    expert = torch.tensor([max(range(len(row)), key=lambda e, row=row: float(row[e])) for row in ranked])
    gates = torch.stack([row[e] for row, e in zip(probs, expert, strict=True)])
    counts = torch.tensor([int((expert == e).sum()) for e in range(logits.shape[1])])
    load = counts.double() / len(logits)
    importance = probs.sum(0) / len(logits)
    order = torch.tensor([b for e in range(logits.shape[1]) for b in range(len(logits)) if expert[b] == e])
    offsets = torch.tensor([int((expert < e).sum()) for e in range(logits.shape[1] + 1)])
    return probs, expert, gates, load, importance, logits.shape[1] * (load * importance).sum(), order, offsets


@pytest.mark.parametrize(("B", "E"), SHAPES, ids=str)
@pytest.mark.parametrize("used", [(0,), (2,), (4,), (5,), (0, 2, 4, 5), (2, 5)], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_outputs_and_every_gradient(B, E, used, biased):
    logits = logits_of(B, E).requires_grad_()
    bias = 2 * logits_of(E + 1, E)[0] if biased else None
    ours, truth = route(logits, bias), by_parts(logits, bias)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-9)
    upstream = [torch.randn(t.shape, generator=torch.Generator().manual_seed(i)).double() for i, t in enumerate(truth)]
    grads = [
        torch.autograd.grad(sum((found[i] * upstream[i]).sum() for i in used), logits)[0] for found in (ours, truth)
    ]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_ties_go_to_the_first_and_what_is_not_a_number_to_the_first_of_all():
    logits = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0], [0.0, float("nan"), 1.0], [1.0, float("inf"), 0.0]])
    found = route(logits)
    assert found.expert_B.tolist() == [1, 0, 0, 0]
    assert found.gates_B.isnan().tolist() == [False, False, True, True]


def test_a_bias_changes_the_choice_and_nothing_else():
    logits, bias = logits_of(200, 5), 2 * logits_of(1, 5)[0]
    plain, biased = route(logits), route(logits, bias)
    assert 20 < (plain.expert_B != biased.expert_B).sum() < 180
    assert torch.equal(biased.probs_BE, plain.probs_BE)
    assert torch.equal(biased.importance_E, plain.importance_E)
    assert torch.equal(biased.gates_B, plain.probs_BE.gather(1, biased.expert_B.unsqueeze(1)).squeeze(1))


def test_a_bias_of_zero_or_of_one_number_for_all_changes_no_bit():
    logits = logits_of(300, 6).float().round(decimals=1)  # with ties
    for bias in (torch.zeros(6), torch.full((6,), -3.7)):
        for a, b in zip(route(logits, bias), route(logits), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("size", [90.0, 1e4, 1e30])
def test_a_huge_bias_sends_everything_to_one_expert_and_overflows_nowhere(size):
    logits = logits_of(50, 4).float()
    found = route(logits, torch.tensor([0.0, size, -size, 0.0]))
    assert found.expert_B.unique().tolist() == [1]
    assert all(torch.isfinite(t).all() for t in found)


def test_it_is_an_operator_of_torch():
    torch.library.opcheck(routed, (logits_of(6, 4).requires_grad_(),))
    torch.library.opcheck(routed, (logits_of(6, 4).requires_grad_(), logits_of(1, 4)[0]))


NO_LOGITS = [torch.zeros(3), torch.zeros(3, 0)]
NO_LOGITS += [torch.zeros(3, 2, dtype=dtype) for dtype in (torch.long, torch.half, torch.bfloat16)]


@pytest.mark.parametrize("logits", NO_LOGITS, ids=str)
def test_what_cannot_be_logits_is_refused(logits):
    with pytest.raises(ValueError, match="logits_BE must be a float32 or float64 matrix of tokens by experts"):
        route(logits)


@pytest.mark.parametrize("bias", [torch.zeros(2).double(), torch.zeros(1, 3).double(), torch.zeros(3)], ids=str)
def test_a_bias_that_does_not_fit_is_refused(bias):
    with pytest.raises(ValueError, match=r"bias_E must have shape \(3,\) in torch.float64; got"):
        route(logits_of(4, 3), bias)


def test_a_bias_on_another_device_is_refused():
    with pytest.raises(ValueError, match="bias_E and logits_BE must share a device; got meta and cpu"):
        route(logits_of(4, 3), torch.zeros(3, dtype=torch.float64, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_bias_moves_against_the_load_by_a_fixed_amount(dtype):
    bias = torch.tensor([0.5, -0.5, 0.25], dtype=dtype)
    update_expert_bias(bias, torch.tensor([10, 1, 1], dtype=dtype), torch.tensor(True), 0.3)
    # -1, +1 and +1 less their mean, 1/3
    expected = torch.tensor([0.5 - 0.4, -0.5 + 0.2, 0.25 + 0.2], dtype=dtype)
    torch.testing.assert_close(bias, expected)
    update_expert_bias(bias, torch.tensor([0, 9, 3], dtype=dtype), torch.tensor(False), 0.3)
    torch.testing.assert_close(bias, expected)


@pytest.mark.parametrize("E", [1, 3, 7, 49, 160])
@pytest.mark.parametrize("count", [0, 1, 7, 12345])
def test_a_bias_stays_where_every_expert_has_as_many_tokens(E, count):
    bias = logits_of(1, E)[0].float()
    before = bias.clone()
    update_expert_bias(bias, torch.full((E,), float(count)), torch.tensor(True), 0.3)
    assert torch.equal(bias, before)


def test_loads_are_followed_step_by_step():
    running, without, busy = torch.full((3,), 1 / 3), torch.zeros(3), torch.zeros(())
    expected = [1 / 3] * 3
    steps = [[0.5, 0.5, 0.0], [0.9, 0.1, 0.0], [0.8, 0.0, 0.2], [0.4, 0.3, 0.3]]
    seen = []
    for load in steps:
        update_loads(torch.tensor(load), running, without, busy, 0.1, 0.7)
        expected = [r + 0.1 * (now - r) for r, now in zip(expected, load, strict=True)]
        seen.append((without.tolist(), busy.item()))
    assert seen == [([0, 0, 1], 0), ([0, 0, 2], 1), ([0, 1, 0], 2), ([0, 0, 0], 0)]
    torch.testing.assert_close(running.tolist(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("by_token", [{"cpu"}, set()], ids=["on a CPU", "on a GPU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_logits_and_every_gradient(dtype, by_token, needs_x, monkeypatch):
    monkeypatch.setattr(routing, "_BY_TOKEN", by_token)
    high = torch.promote_types(dtype, torch.float32)
    x, W, bias = logits_of(9, 5).to(dtype), logits_of(5, 3).to(high), logits_of(5, 1)[:, 0].to(high)
    leaves = [x.requires_grad_(needs_x), W.requires_grad_(), bias.requires_grad_()][0 if needs_x else 1 :]
    grads = []
    for logits in (router_logits(x, W, bias), (x.to(high) - bias) @ W):
        upstream = logits_of(9, 3).to(high)
        grads.append([logits, *torch.autograd.grad(logits, leaves, upstream)])
    for a, b in zip(*grads, strict=True):
        assert a.dtype == b.dtype
        if by_token:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b)


def test_the_logits_are_an_operator_of_torch():
    leaves = [logits_of(6, 4), logits_of(4, 3), logits_of(4, 1)[:, 0]]
    torch.library.opcheck(routing.logits_of, tuple(t.requires_grad_() for t in leaves))
    leaves[:2] = (t.detach().T.contiguous().T for t in leaves[:2])  # of any strides
    torch.library.opcheck(routing.logits_of, tuple(t.requires_grad_() for t in leaves))
