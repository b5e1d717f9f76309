"""Of the stage `primitives`: the optimisers' kernels beside their floor in bytes and beside torch's passes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from sae_lens_switch_kernels import torch_backend
from torch import Tensor

from gpu import shapes
from gpu.correctness import kernels
from gpu.record import Case, Record
from gpu.shapes import Shape, Work
from gpu.timing import free, median_ms, normal

# Of all latents, those that a batch of the width's size activates, about.
ACTIVE = 4


def cases(of: list[Shape], args: argparse.Namespace) -> Iterator[Case]:
    yield f"Adam, {of[0]}, fp32", partial(both_matrices, of[0], args)
    for s in of:
        for constrained in (True, False):
            label = "projected, unit" if constrained else "no constraint"
            width = f"D {s.D:,} F {s.F:,}, fp32"
            yield f"adam_rows, {label}, {width}", partial(dense, s, constrained, args)
            yield f"adam_rows, {label}, bf16 copy, {width}", partial(with_copy, s, constrained, args)
            yield f"lazy_adam_rows, {label}, 1 of {ACTIVE} rows, {width}", partial(lazy, s, constrained, args)


def both_matrices(s: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """Our optimiser's step with the decoder's constraint, and torch's fused one, over both matrices."""
    from sae_lens_switch.training.optim.constrained_adam import ConstrainedAdam

    def matrices(seed: int) -> list[torch.nn.Parameter]:
        found = [torch.nn.Parameter(normal(s.F, s.D, seed=seed + i, device=args.device)) for i in range(2)]
        for i, p in enumerate(found):
            p.grad = normal(s.F, s.D, seed=seed + 2 + i, device=args.device)
        return found

    ours, theirs = matrices(0), matrices(4)
    steppers = {
        "ours": ConstrainedAdam(ours, 1e-4, unit_rows=ours[1]),
        "torch.optim.Adam, fused": torch.optim.Adam(theirs, lr=1e-4, fused=True),
    }
    return timed({name: optimizer.step for name, optimizer in steppers.items()}, shapes.adam(2 * s.F * s.D), args)


def dense(s: Shape, constrained: bool, args: argparse.Namespace) -> dict[str, Any]:
    """One matrix in one pass, and in torch's: the fused step alone, and between projection and renormalisation."""
    from sae_lens_switch.common.torch_private import fused_adam
    from sae_lens_switch.saes.decoder_constraint import normalize_rows_, project_out_rows

    t = Tensors(s, constrained, args.device)
    scratch = torch.empty_like(t.W) if constrained else t.W
    none = {"weight_decay": 0.0, "amsgrad": False, "maximize": False, "found_inf": t.found}

    def fused(grad: Tensor) -> None:
        fused_adam(False)([t.W], [grad], [t.m], [t.v], [], [t.step], **t.options, **none)

    def passes() -> None:
        fused(project_out_rows(t.grad, t.W, scratch, t.radial))
        normalize_rows_(t.W)

    calls: dict[str, Callable[[], Any]] = {"ours": t.dense, "torch's fused Adam": lambda: fused(t.grad)}
    calls |= {"project, fused Adam, renormalise": passes} if constrained else {}
    return timed(calls, shapes.adam(s.F * s.D), args)


def with_copy(s: Shape, constrained: bool, args: argparse.Namespace) -> dict[str, Any]:
    """The weights in bfloat16 too: written by the step, or by a cast after it."""
    t = Tensors(s, constrained, args.device)
    copy = t.W.to(torch.bfloat16)

    def then_cast() -> None:
        t.dense()
        t.W.to(torch.bfloat16)

    return timed({"ours": lambda: t.dense(copy), "a step, then a cast": then_cast}, shapes.adam(s.F * s.D, 2), args)


def lazy(s: Shape, constrained: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Some rows by their own counts of steps, with the copy; in torch some 25 passes over gathered rows."""
    t = Tensors(s, constrained, args.device)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(s.F, generator=generator)[: s.F // ACTIVE].sort().values.to(args.device)
    moments, step = torch.stack([t.m, t.v], 1), torch.ones(s.F, device=args.device)
    grad, copy = t.grad[rows], t.W.to(torch.bfloat16)
    given = {"radial_R": None if t.radial is None else t.radial[rows], **t.constraint}

    def stepped(p: Any) -> None:
        p.lazy_adam_rows(t.W, grad, moments[:, 0], moments[:, 1], step, rows, **t.options, **given, copy_FD=copy)

    calls = {"ours": lambda: stepped(kernels(torch.float32)), "torch's passes": lambda: stepped(torch_backend)}
    return timed(calls, shapes.adam(len(rows) * s.D, 2), args)


class Tensors:
    """A matrix of unit rows with all that a step of it takes."""

    def __init__(self, s: Shape, constrained: bool, device: str) -> None:
        self.W, self.grad, self.m, self.v = (normal(s.F, s.D, seed=i, device=device) for i in range(4))
        self.v.square_()
        self.W = torch.nn.functional.normalize(self.W, dim=1)
        self.radial = (self.grad * self.W).sum(1) if constrained else None
        self.step, self.found = torch.ones((), device=device), torch.zeros((), device=device)
        scale = torch.ones((), device=device)
        self.options = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "grad_scale": scale}
        self.constraint = {"unit_rows": constrained, "project": constrained}

    def dense(self, copy: Tensor | None = None) -> None:
        given = {"found_inf": self.found, "radial_F": self.radial, "copy_FD": copy, **self.constraint}
        kernels(torch.float32).adam_rows(self.W, self.grad, self.m, self.v, self.step, **self.options, **given)


def timed(calls: dict[str, Callable[[], Any]], work: Work, args: argparse.Namespace) -> dict[str, Any]:
    """What is recorded of ``ours`` and the others."""
    ms = {name: median_ms(lambda call: call(), [call], args.device) for name, call in calls.items()}
    floor = shapes.ceilings_of(Record(args.output / "primitives.json").cases).ms(work, "fp32")
    free()
    ours = ms.pop("ours")
    found = {"ms": ours, "floor_ms": floor, "times_floor": ours / floor, "theirs_ms": ms}
    return found | {"flops": work.flops, "bytes": work.bytes}
