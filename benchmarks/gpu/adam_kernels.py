"""Stage `correctness`, the optimiser's kernels: Adam over rows, over active rows and over small tensors; in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from sae_lens_switch_kernels import reference
from torch import Tensor
from torch.nn import functional

from gpu.timing import normal

Pairs = Iterator[tuple[str, Tensor, Tensor]]


def check_adam(p: Any, c: SimpleNamespace) -> Pairs:
    """Rows as they are, and joined to ones too wide for registers; with a constraint and without."""
    W_FD, grad_FD, m_FD, v_FD = (normal(c.s.F, c.s.D, seed=i, device=c.x.device) for i in range(4))
    matrices = (functional.normalize(W_FD, dim=1), grad_FD, m_FD, v_FD.square())
    step, lr, scale, found = (torch.full((), x, device=c.x.device) for x in (3.0, 0.01, 2.0, 0.0))
    for label, rows in (("", 1), ("wide ", 6000 // c.s.D)):
        F = c.s.F // rows
        given = [t[: F * rows].reshape(F, -1) for t in matrices] if F else []
        for unit, radial in ((False, False), (True, False), (True, True)) if F else ():
            along_F = (given[0] * given[1]).sum(1) if radial else None
            W, grad, m, v = (t.clone() for t in given)
            low = torch.full_like(W, torch.nan, dtype=torch.bfloat16)
            p.adam_rows(W, grad, m, v, step, lr, 0.9, 0.999, 1e-8, scale, found, along_F, unit, unit, low)
            exact = [t.double() for t in given]
            truths = reference.adam_rows(*exact, 3.0, 0.01, 0.9, 0.999, 1e-8, 2.0, unit, unit)
            constraint = ("unit rows, radial given" if radial else "unit rows") if unit else "no constraint"
            for name, ours, truth in zip("Wmv", (W, m, v), truths, strict=True):
                yield f"{label}{constraint}, {name}", ours, truth
            yield f"{label}{constraint}, copy", *not_near(low, W)
        if F:
            yield from _with_low_moments(p, c, label, given)


def _with_low_moments(p: Any, c: SimpleNamespace, label: str, given: list[Tensor]) -> Pairs:
    """Moments in bfloat16: a neighbour of the exact ones, the same on a second step from the same state."""
    W_FD, grad_FD, *moments = given
    moments = [t.to(torch.bfloat16) for t in moments]
    step, scale = (torch.full((), x, device=c.x.device) for x in (3.0, 2.0))
    results = []
    for _ in range(2):
        W, (m, v) = W_FD.clone(), (t.clone() for t in moments)
        p.adam_rows(W, grad_FD, m, v, step, 0.01, 0.9, 0.999, 1e-8, scale, None, None, True, True)
        results.append((W, m, v))
    exact = [t.double() for t in (W_FD, grad_FD, *moments)]
    truths = reference.adam_rows(*exact, 3.0, 0.01, 0.9, 0.999, 1e-8, 2.0, True, True)
    yield f"{label}bf16 moments, W", results[0][0], truths[0]
    for name, ours, again, truth in zip("mv", results[0][1:], results[1][1:], truths[1:], strict=True):
        yield f"{label}bf16 moments, {name}", *not_near(ours, truth)
        yield f"{label}bf16 moments, {name} again", *equal_bits(again, ours)


def check_lazy_adam(p: Any, c: SimpleNamespace) -> Pairs:
    """Every third row, each of its own age, moments side by side; all other rows keep their bits."""
    W_FD, m_FD, v_FD = (normal(c.s.F, c.s.D, seed=i, device=c.x.device) for i in range(3))
    W_FD, moments_F2D = functional.normalize(W_FD, dim=1), torch.stack([m_FD, v_FD.square()], 1)
    step_F, rows_R = torch.arange(c.s.F, device=c.x.device) % 1000.0, torch.arange(0, c.s.F, 3, device=c.x.device)
    grad_RD, scale = normal(len(rows_R), c.s.D, seed=3, device=c.x.device), torch.full((), 2.0, device=c.x.device)
    options = 0.01, 0.9, 0.999, 1e-8
    old_W, old_m, old_v = (t[rows_R].double() for t in (W_FD, moments_F2D[:, 0], moments_F2D[:, 1]))
    exact, age_R1 = (old_W, grad_RD.double(), old_m, old_v), step_F[rows_R].double().unsqueeze(1) + 1
    rest_F = torch.ones(c.s.F, dtype=torch.bool, device=c.x.device).index_fill_(0, rows_R, False)
    for unit, radial in ((False, False), (True, False), (True, True)):
        W, moments, step, low = W_FD.clone(), moments_F2D.clone(), step_F.clone(), W_FD.to(torch.bfloat16)
        radial_R = (W[rows_R] * grad_RD).sum(1) if radial else None
        m, v = moments[:, 0], moments[:, 1]
        p.lazy_adam_rows(W, grad_RD, m, v, step, rows_R, *options, scale, radial_R, unit, unit, low)
        constraint = ("unit rows, radial given" if radial else "unit rows") if unit else "no constraint"
        truths = reference.adam_rows(*exact, age_R1, *options, 2.0, unit, unit)
        for name, ours, truth in zip("Wmv", (W, m, v), truths, strict=True):
            yield f"{constraint}, {name}", ours[rows_R], truth
        yield f"{constraint}, copy", *not_near(low, W)
        yield f"{constraint}, other rows", *equal_bits(moments[rest_F], moments_F2D[rest_F])
        yield f"{constraint}, step", step, step_F.double() + ~rest_F


def check_adam_tensors(p: Any, c: SimpleNamespace) -> Pairs:
    """Biases and a router, each of its own age."""
    shapes, device = ((c.s.D,), (c.s.D, c.s.E), (c.s.F,)), c.x.device
    W, grad, m, v = ([normal(*shape, seed=90 + i, device=device) for shape in shapes] for i in range(4))
    v, steps = [t.square() for t in v], [torch.full((), 1.0 + i, device=device) for i in range(3)]
    options, scale, found = (0.01, 0.9, 0.999, 1e-8), *torch.tensor([2.0, 0.0]).to(device)
    exact = [
        reference.adam_rows(*(t.double().view(1, -1) for t in given), 1.0 + i, *options, 2.0, False, False)
        for i, given in enumerate(zip(W, grad, m, v, strict=True))
    ]
    p.adam_tensors(W, grad, m, v, steps, *options, scale, found)
    for i, truths in enumerate(exact):
        for name, ours, truth in zip("Wmv", (W[i], m[i], v[i]), truths, strict=True):
            yield f"{name} {i}", ours, truth.view_as(ours)


def not_near(low: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """As a pair: how many numbers are further than one rounding from W, and none. The interpreter cuts bits off."""
    far = ((low.float() - W).abs() > torch.finfo(low.dtype).eps * W.abs()) | low.isnan()
    return far.sum().unsqueeze(0), torch.zeros(1, dtype=torch.float64, device=W.device)


def equal_bits(ours: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """As a pair: how many numbers differ, and none."""
    differ = (ours != expected).sum().unsqueeze(0)
    return differ, torch.zeros(1, dtype=torch.float64, device=ours.device)


CHECKS: dict[str, Callable[[Any, SimpleNamespace], Pairs]] = {
    "adam_rows": check_adam,
    "lazy_adam_rows": check_lazy_adam,
    "adam_tensors": check_adam_tensors,
}
