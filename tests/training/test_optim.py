"""What happens around an optimiser's step."""

import pytest
import torch
from sae_lens_switch_kernels import huge_pages
from sae_lens_switch_kernels.huge_pages import zeros_huge
from torch import nn

from sae_lens_switch.training.optim import constrained_adam as optim
from sae_lens_switch.training.optim.constrained_adam import ConstrainedAdam
from sae_lens_switch.training.optim.master_weights import MasterWeights


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_stepping_in_memory_order_changes_no_number_and_no_shape(options):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 5, generator=generator)
    gradients = [torch.randn(7, 5, generator=generator) for _ in range(3)]
    results = []
    for in_memory_order in (False, True):
        transposed, straight = nn.Parameter(start.T.contiguous().T), nn.Parameter(start.clone())
        optimizer = torch.optim.Adam([transposed, straight], lr=0.1, **options)
        if in_memory_order:
            MasterWeights(optimizer, masters=False)
        for gradient in gradients:
            transposed.grad, straight.grad = gradient.T.contiguous().T, gradient.clone()
            optimizer.step()
        assert transposed.shape == transposed.grad.shape == (7, 5)
        assert transposed.stride() == (1, 7)
        for state in optimizer.state_dict()["state"].values():
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (7, 5)
        torch.testing.assert_close(transposed, straight)
        results.append(transposed.detach())
    torch.testing.assert_close(*results)


def test_a_transposed_parameter_without_a_gradient_is_left_alone():
    p = nn.Parameter(torch.randn(3, 4).T)
    before = p.detach().clone()
    optimizer = torch.optim.Adam([p])
    MasterWeights(optimizer, masters=False)
    optimizer.step()
    assert p.grad is None
    assert p.stride() == (1, 4)
    assert torch.equal(p, before)


def unit(W):
    return W / W.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("fused", [True, "told the components", False])
def test_constrained_adam_is_project_adam_renormalise_over_the_whole_matrix(fused, project):
    """Beside torch's own Adam on whole matrices; more rows than a block has, and no multiple of it."""
    generator = torch.Generator().manual_seed(0)
    start = [unit(torch.randn(1301, 6, generator=generator)), torch.randn(6, 1301, generator=generator)]
    ours = [nn.Parameter(start[0].clone()), nn.Parameter(start[1].T.contiguous().T)]
    plain = [nn.Parameter(t.clone().double()) for t in start]
    optimizer = ConstrainedAdam(ours, 0.05, (0.8, 0.9), unit_rows=ours[0], project=project)
    if not fused:
        optimizer.param_groups[0]["fused"] = False
    reference = torch.optim.Adam(plain, lr=0.05, betas=(0.8, 0.9))
    for _ in range(4):
        grads = [torch.randn(t.shape, generator=generator) for t in start]
        known = (grads[0] * ours[0].detach()).sum(1) if fused == "told the components" else None
        for p, q, g in zip(ours, plain, grads, strict=True):
            p.grad, q.grad = g.clone(), g.double() / (3 if fused else 1)
        if project:
            along = (plain[0].grad * plain[0].detach()).sum(1, keepdim=True)
            plain[0].grad -= along * plain[0].detach()
        if fused:
            optimizer.step(grad_scale=torch.tensor(3.0), found_inf=torch.tensor(0.0), radial_F=known)
        else:
            optimizer.step()
        reference.step()
        plain[0].data = unit(plain[0].data)
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-4, atol=1e-6)
    assert ours[1].stride() == (1, 6)
    state = optimizer.state[ours[0]]
    torch.testing.assert_close(state["exp_avg"].double(), reference.state[plain[0]]["exp_avg"], rtol=1e-4, atol=1e-6)
    assert state["step"] == 4


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "scalar", "empty"])
def test_moments_so_large_that_they_get_huge_pages_are_those_of_torch(layout, monkeypatch):
    """Made anew, and read from a checkpoint."""
    made = []
    monkeypatch.setattr(huge_pages, "zeros_huge", lambda *shape, **of: made.append(shape) or zeros_huge(*shape, **of))
    monkeypatch.setattr(optim, "zeros_huge", huge_pages.zeros_huge)
    shape = {"scalar": (), "empty": (0, 3)}.get(layout, (1 << 11, 1 << 10))
    start = torch.randn(shape)
    ours, plain = (nn.Parameter(start.T.contiguous().T if layout == "transposed" else start.clone()) for _ in range(2))
    in_memory = start.T.shape if layout == "transposed" else start.shape
    optimizers = [ConstrainedAdam([ours], 1e-2), torch.optim.Adam([plain], lr=1e-2, fused=True)]
    MasterWeights(optimizers[1], masters=False)
    for again in range(2):
        for _ in range(3):
            grad = torch.randn_like(start)
            for p, optimizer in zip((ours, plain), optimizers, strict=True):
                p.grad = torch.empty_like(p).copy_(grad)
                optimizer.step()
        assert made == (4 if again and start.ndim == 2 and len(start) else 2) * [in_memory]
        assert torch.equal(ours, plain)
        states = [o.state_dict()["state"][0] for o in optimizers]
        for name in ("exp_avg", "exp_avg_sq"):
            assert states[0][name].stride() == ours.stride()
            assert torch.equal(states[0][name], states[1][name])
        saved = optimizers[0].state_dict()
        optimizers[0] = ConstrainedAdam([ours], 1e-2)
        optimizers[0].load_state_dict(saved)


def test_a_step_that_found_inf_changes_nothing_and_does_not_count():
    p = nn.Parameter(unit(torch.randn(700, 5)))
    optimizer = ConstrainedAdam([p], 0.1, unit_rows=p)
    for grad, found in ((torch.randn(700, 5), 0.0), (torch.full((700, 5), torch.nan), 1.0)):
        p.grad = grad
        before = p.detach().clone()
        moments = {n: t.clone() for n, t in optimizer.state.get(p, {}).items()}
        optimizer.step(grad_scale=torch.tensor(1.0), found_inf=torch.tensor(found))
    assert torch.equal(p, before)
    assert moments
    for name, t in moments.items():
        assert torch.equal(optimizer.state[p][name], t), name
