"""Whole steps of our trainer: the same bits on two runs, and the same training from a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu.shapes import Shape
from gpu.timing import free

# A graph takes the learning rate in float32, from which rounding grows a little step by step.
TOLERATED = 1e-4
STEPS = 12


def check(kind: str, s: Shape, precision: str, device: str, **options: Any) -> dict[str, Any]:
    first, again = (train(kind, s, precision, device, **options) for _ in range(2))
    differ = [name for name in first if not torch.equal(first[name], again[name])]
    found: dict[str, Any] = {"steps": STEPS}
    if options.get("optimizer", "adam") == "adam":
        replayed, again = (train(kind, s, precision, device, **options, cuda_graph=True) for _ in range(2))
        errors = {n: ((replayed[n].double() - t.double()).norm() / t.double().norm()).item() for n, t in first.items()}
        found["graph_errors"] = {name: float(f"{error:.3g}") for name, error in errors.items()}
        differ += [f"{name} of a graph" for name in replayed if not torch.equal(replayed[name], again[name])]
        wrong = {name: error for name, error in errors.items() if not error <= TOLERATED}
        if wrong:
            raise AssertionError(f"a graph trains other weights, by {wrong}; other bits on a second run: {differ}")
    if differ:
        raise AssertionError(f"other bits on a second run: {differ}")
    return found


def train(kind: str, s: Shape, precision: str, device: str, **options: Any) -> dict[str, Tensor]:
    """Weights, losses and counts after a few steps."""
    from gpu.steps import trainer_of

    trainer, batches = trainer_of(kind, s, precision, device, **options)
    losses = []
    for i in range(STEPS):
        losses.append(trainer.step(batches[i % len(batches)]).loss.detach().clone())
        trainer.n_training_steps += 1
    found = {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}
    found |= {"losses": torch.stack(losses), "firings": trainer.act_freq_scores.clone()}
    del trainer
    free()
    return found
