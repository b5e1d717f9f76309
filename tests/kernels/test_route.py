"""The router's choice against autograd through its parts, and by torch's own checks of an operator."""

import pytest
import torch
from sae_lens_switch_kernels import route, router_logits, routing, update_loads
from sae_lens_switch_kernels.routing import routed
from torch import Tensor

SHAPES = [(7, 3), (1, 1), (33, 5), (20, 40)]


def logits_of(B: int, E: int) -> Tensor:
    return torch.randn(B, E, generator=torch.Generator().manual_seed(B), dtype=torch.float64)


def by_parts(logits: Tensor):
    """As it is defined, token by token where that is clearer."""
    probs = torch.stack([row.exp() / row.exp().sum() for row in logits])
    expert = torch.tensor([max(range(len(row)), key=lambda e, row=row: float(row[e])) for row in probs.detach()])
    gates = torch.stack([row[e] for row, e in zip(probs, expert, strict=True)])
    counts = torch.tensor([int((expert == e).sum()) for e in range(logits.shape[1])])
    load = counts.double() / len(logits)
    importance = probs.sum(0) / len(logits)
    order = torch.tensor([b for e in range(logits.shape[1]) for b in range(len(logits)) if expert[b] == e])
    offsets = torch.tensor([int((expert < e).sum()) for e in range(logits.shape[1] + 1)])
    return probs, expert, gates, load, importance, logits.shape[1] * (load * importance).sum(), order, offsets


@pytest.mark.parametrize(("B", "E"), SHAPES, ids=str)
@pytest.mark.parametrize("used", [(0,), (2,), (4,), (5,), (0, 2, 4, 5), (2, 5)], ids=str)
def test_outputs_and_every_gradient(B, E, used):
    logits = logits_of(B, E).requires_grad_()
    ours, truth = route(logits), by_parts(logits)
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


def test_it_is_an_operator_of_torch():
    torch.library.opcheck(routed, (logits_of(6, 4).requires_grad_(),))


@pytest.mark.parametrize("logits", [torch.zeros(3), torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 0)], ids=str)
def test_what_cannot_be_logits_is_refused(logits):
    with pytest.raises(ValueError, match="logits_BE must be a floating-point matrix of tokens by experts"):
        route(logits)


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
