"""The router's choice against autograd through its parts, and by torch's own checks of an operator."""

import pytest
import torch
from sae_lens_switch_kernels import route, update_loads
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
    load = torch.tensor([float((expert == e).sum()) / len(logits) for e in range(logits.shape[1])]).double()
    return probs, expert, gates, load, probs.sum(0) / len(logits)


@pytest.mark.parametrize(("B", "E"), SHAPES, ids=str)
@pytest.mark.parametrize("used", [(0,), (2,), (4,), (0, 2, 4), (2, 4)], ids=str)
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
