"""The paper's recipe for one step, written out, and the constraint of the decoder's rows that is part of it."""

import torch
from helpers.token_loop import make_batch, make_sae, reference_loss, step_input
from torch import Tensor

from sae_lens_switch import SwitchTrainingSAE, SwitchTrainingSAEConfig


def reference_recipe_step(sae: SwitchTrainingSAE, x: Tensor, lr: float) -> dict[str, Tensor]:
    """arXiv 2410.08201's first step written out: clip 1.0, project, Adam, renormalise. Returns the new parameters."""
    parameters = {name: p.detach().clone() for name, p in sae.named_parameters()}
    _, _, loss, _ = reference_loss(sae, x, 3.0, sae.cfg.d_in)
    grads = dict(zip(parameters, torch.autograd.grad(loss, list(sae.parameters())), strict=True))
    norm = sum((g**2).sum() for g in grads.values()).sqrt()
    assert norm > 1, "clipping must matter here"
    grads = {name: g / (norm + 1e-6) for name, g in grads.items()}
    W_dec, g = parameters["W_dec"], grads["W_dec"]
    grads["W_dec"] = torch.stack([row - (row @ w) * w for row, w in zip(g, W_dec, strict=True)])
    new = {}
    for name, p in parameters.items():
        m, v = 0.1 * grads[name], 0.001 * grads[name] ** 2
        new[name] = p - lr * (m / 0.1) / ((v / 0.001).sqrt() + 1e-8)
    new["W_dec"] = torch.stack([row / row.norm() for row in new["W_dec"]])
    return new


def weiszfeld(x: Tensor, steps: int = 2000) -> Tensor:
    point = x.mean(0)
    for _ in range(steps):
        weights = 1 / (x - point).norm(dim=1)
        point = (weights[:, None] * x).sum(0) / weights.sum()
    return point


def test_one_step_of_the_papers_recipe_equals_a_written_out_one():
    torch.manual_seed(0)
    sae = SwitchTrainingSAE(
        SwitchTrainingSAEConfig(
            d_in=10, d_sae=56, n_experts=7, k=3, dtype="float64", load_balance_scale="d_in", router_start_std=None
        )
    )
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(56, dtype=torch.float64))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.W_router.abs().max() <= 10**-0.5
    router_at_birth = sae.W_router.detach().clone()
    x = make_batch(60)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2, betas=(0.9, 0.999))

    output = sae.training_forward_pass(step_input(x, coefficient=3.0, step=0))
    assert torch.equal(sae.W_router, router_at_birth)
    assert torch.equal(sae.b_dec, sae.b_router)
    assert sae.b_dec.data_ptr() != sae.b_router.data_ptr()
    assert (sae.b_dec - weiszfeld(x)).norm() < 1e-2 * (x.mean(0) - weiszfeld(x)).norm()
    expected = reference_recipe_step(sae, x, lr=1e-2)
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    optimizer.step()
    for name, p in sae.named_parameters():
        assert (p - expected[name]).abs().max() < 1e-9, name


def test_the_constraint_can_be_turned_off():
    x = make_batch()
    for fields in ({"normalize_decoder": False}, {"project_decoder_grad": False}):
        sae = make_sae(**fields)
        sae.training_forward_pass(step_input(x)).loss.backward()
        grad = sae.W_dec.grad.clone()
        torch.optim.SGD(sae.parameters(), lr=1e-3).step()
        assert torch.equal(sae.W_dec.grad, grad), "no projection"
        unit = (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-12
        assert unit == sae.cfg.normalize_decoder


def test_only_this_saes_optimiser_is_touched():
    sae, other = make_sae(), torch.nn.Parameter(torch.full((3, 2), 5.0))
    x = make_batch()
    sae.training_forward_pass(step_input(x)).loss.backward()
    grad = sae.W_dec.grad.clone()
    other.grad = torch.zeros_like(other)
    torch.optim.SGD([other], lr=0.1).step()
    assert torch.equal(other, torch.full((3, 2), 5.0))
    assert torch.equal(sae.W_dec.grad, grad)
