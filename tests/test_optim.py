"""What happens around an optimiser's step."""

import pytest
import torch
from torch import nn

from sae_lens_switch.optim import step_in_memory_order


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
            step_in_memory_order(optimizer)
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
    step_in_memory_order(optimizer)
    optimizer.step()
    assert p.grad is None
    assert p.stride() == (1, 4)
    assert torch.equal(p, before)
