"""Stage `correctness`, the kernels around a step's products: routing, gates, loss, clipping, counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from sae_lens_switch_kernels import torch_codes, torch_grouped, torch_loss, torch_routing
from sae_lens_switch_kernels.indexing import expert_groups
from torch import Tensor

from gpu.timing import normal

Pairs = Iterator[tuple[str, Tensor, Tensor]]


def check_route(p: Any, c: SimpleNamespace) -> Pairs:
    """The router's choice, its balance, tokens by expert, and the gradient of all that has one; in float32."""
    logits_BE = 2 * normal(c.s.B, c.s.E, seed=50, device=c.x.device)
    ours, truth = p.route(logits_BE), torch_routing.route(logits_BE.double())
    for name in truth._fields:
        yield name, getattr(ours, name).double(), getattr(truth, name).double()
    bias_E = normal(c.s.E, seed=53, device=c.x.device)
    biased, exact = p.route(logits_BE, bias_E), torch_routing.route(logits_BE.double(), bias_E.double())
    for name in truth._fields:
        yield f"{name}, biased", getattr(biased, name).double(), getattr(exact, name).double()
    grads = (normal(c.s.B, c.s.E, seed=51, device=c.x.device), *normal(3, c.s.B, seed=52, device=c.x.device))
    upstream = grads[0], grads[1], grads[2][: c.s.E], grads[3][0]
    exact = torch_routing.route_backward(truth.probs_BE, truth.expert_B, *(g.double() for g in upstream), truth.load_E)
    yield "d_logits", p.route_backward(ours.probs_BE, ours.expert_B, *upstream, ours.load_E), exact


def check_gated(p: Any, c: SimpleNamespace) -> Pairs:
    """An expert's gate and decoder, and the backward pass of both, from codes in the order of the tokens."""
    mixed_B = torch.randperm(c.s.B, generator=torch.Generator().manual_seed(4)).to(c.x.device)
    expert_B = c.expert[mixed_B]
    groups = expert_groups(expert_B, c.s.E)
    values_BK, indices_BK = c.values[mixed_B].relu(), c.indices[mixed_B]
    gates_B = normal(c.s.B, seed=60, device=c.x.device).sigmoid()
    sorted_codes = groups.sorted(values_BK), groups.sorted(indices_BK)
    out_BD, acts_BK, *_ = p.gated_decode(*sorted_codes, gates_B, c.W, groups, c.dtype)
    double = [t.double() for t in (values_BK, gates_B, c.d_pre, c.g, c.x, c.x[0], c.W)]
    values, gates, grad_values, g, x, bias, W = double
    truth = torch_grouped.gated_decode(groups.sorted(values), sorted_codes[1], gates, W, groups, torch.float64)
    yield "out", out_BD, truth[0]
    yield "acts", acts_BK, truth[1]
    found = p.gated_grads(values_BK, indices_BK, gates_B, c.d_pre, c.g, c.x, c.x[0].clone(), c.W, groups, c.dtype)
    exact = torch_grouped.gated_grads(values, indices_BK, gates, grad_values, g, x, bias, W, groups, torch.float64)
    yield from zip(("dW_dec", "dW_enc", "d_bias", "d_gates", "centered"), found, exact, strict=True)


def check_loss(p: Any, c: SimpleNamespace) -> Pairs:
    """float32 reconstructions of the activations, in their dtype."""
    out_BD, bias_D = (normal(*shape, seed=70, device=c.x.device) for shape in ((c.s.B, c.s.D), (c.s.D,)))
    balance, grad = normal(2, seed=71, device=c.x.device).abs()
    x_BD = c.x + 20
    ours = p.loss(out_BD, bias_D, x_BD, balance, 0.3, None)
    truth = torch_loss.loss(out_BD.double(), bias_D.double(), x_BD.double(), balance.double(), 0.3, None)
    for name in ("out_BD", "total", "error", "balance"):
        yield name, getattr(ours, name), getattr(truth, name)
    saved, exact_saved = (ours.out_BD, x_BD, ours.factor), (truth.out_BD, x_BD.double(), truth.factor)
    found = p.loss_backward(*saved, ours.columns_PD, None, grad, None, None)
    exact = torch_loss.loss_backward(*exact_saved, truth.columns_PD, None, grad.double(), None, None)
    for name, mine, true in zip(exact._fields, found, exact, strict=True):
        yield f"d {name}", mine, true


def check_clip(p: Any, c: SimpleNamespace) -> Pairs:
    """Of float32 gradients of several layouts; steps that are finite are counted, others are skipped."""
    grads = [normal(c.s.F, c.s.D, seed=80, device=c.x.device), normal(c.s.D, c.s.E, seed=81, device=c.x.device).T]
    norm = torch.cat([g.double().flatten() for g in grads]).norm()
    skipped, step = torch.zeros(2, dtype=torch.int64, device=c.x.device), torch.ones((), device=c.x.device)
    for loss in (1.0, torch.nan, torch.inf):
        found = p.clip(grads, torch.full((), loss, device=c.x.device), 1e-3, skipped, [step])
    yield "scale", found.scale, (norm + 1e-6) / 1e-3
    yield "skipped", skipped.double(), torch.full_like(skipped, 2).double()
    yield "step", step, torch.full_like(step, 2).double()


def check_counts(p: Any, c: SimpleNamespace) -> Pairs:
    last_F, total_F = (torch.zeros(c.s.F, dtype=t, device=c.x.device) for t in (torch.int32, torch.int64))
    p.count_codes(c.values, c.indices, torch.ones((), dtype=torch.bool, device=c.x.device), 5, last_F, total_F)
    truth = torch.zeros(c.s.F, dtype=torch.float64, device=c.x.device)
    truth.index_add_(0, c.indices.flatten(), (c.values != 0).flatten().double())
    yield "counts", total_F.double(), truth
    yield "last", last_F.double(), 5.0 * (truth > 0)


def check_above(p: Any, c: SimpleNamespace) -> Pairs:
    """In the dtype of the weights, rounded alike: the same codes in the same order."""
    pre_RP = normal(c.s.B, c.s.F // c.s.E, seed=90, device=c.x.device).to(c.x.dtype)
    threshold_P, bias_P = normal(2, pre_RP.shape[1], seed=91, device=c.x.device).to(c.x.dtype)
    gates_R1 = normal(c.s.B, 1, seed=92, device=c.x.device)
    for name, given in (("bias", (bias_P, None)), ("gates", (None, gates_R1))):
        truth = torch_codes.codes_above(pre_RP.clone(), threshold_P + 1, *given)
        found = p.codes_above(pre_RP, threshold_P + 1, *given)
        yield f"{name}: number", torch.tensor(float(len(found[0]))), torch.tensor(float(len(truth[0])))
        for what, mine, true in zip(("row", "latent", "value"), found, truth, strict=True):
            yield f"{name}: {what}", mine[: len(true)].double(), true.double()


CHECKS: dict[str, Callable[[Any, SimpleNamespace], Pairs]] = {
    "route": check_route,
    "gated": check_gated,
    "loss": check_loss,
    "clip": check_clip,
    "count_codes": check_counts,
    "codes_above": check_above,
}
