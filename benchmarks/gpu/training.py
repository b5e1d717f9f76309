"""Stage `training`: error against seconds of training, TopK and Switch, at fixed width and at matched FLOPs.

Activations are those of a packed language model on a token file, made on the spot; where either is missing, a synthetic
stream: sparse mixtures of fixed directions. Error is the unexplained share of the variance of tokens held out.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu.record import Case, Record
from gpu.shapes import Shape
from gpu.timing import free, normal, synchronize, use
from sae_lens_switch import scaling_law_lr

# The token at a context's begin has a norm two hundred times the others'; one context in seventy has two such.
_SKIPPED = 2
_CONTEXT = 128
_MODEL_BATCH = 256  # contexts
_POINTS = 30  # of a curve


class Contestant(NamedTuple):
    kind: str  # SAELens topk, sparse_topk or switch
    widening: int  # F in units of the narrowest, whose encoder costs what a Switch SAE's expert of that width costs
    experts: int
    precision: str
    aux_loss_coefficient: float = 0.0


# Fixed width: all of 4. Matched FLOPs: TopK of the narrowest F beside a Switch SAE with experts as wide.
CONTESTANTS = [
    Contestant("SAELens topk", 4, 1, "bf16"),
    Contestant("sparse_topk", 4, 1, "bf16"),
    Contestant("switch", 4, 32, "bf16"),
    Contestant("sparse_topk", 1, 1, "bf16"),
    Contestant("switch", 16, 16, "bf16"),
    Contestant("switch", 4, 8, "bf16"),
    Contestant("sparse_topk", 4, 1, "bf16", 1 / 32),
]
TINY = [Contestant("SAELens topk", 4, 1, "bf16"), Contestant("sparse_topk", 1, 1, "bf16")]
TINY += [Contestant("switch", 4, 4, "bf16")]


class Activations(NamedTuple):
    """Scaled to a mean norm of sqrt(D). ``train`` are the rows of ``all`` to train on, shuffled anew at every pass."""

    all: Tensor
    train: Tensor
    held_out: Tensor
    source: str


def cases(args: argparse.Namespace) -> Iterator[Case]:
    made: list[Activations] = []

    def activations() -> Activations:
        if not made:
            made.append(from_model(args) if args.model and args.tokens else synthetic(args))
        return made[0]

    for c in TINY if args.tiny else CONTESTANTS:
        narrow, k, B = (16, 4, 64) if args.tiny else (6144, 32, 8192)
        s = Shape(B, 16 if args.tiny else 576, narrow * c.widening, k, c.experts)
        name = f"{c.kind}, F {s.F:,}, E {s.E}, {c.precision}{', AuxK' if c.aux_loss_coefficient else ''}"
        yield name, lambda c=c, s=s, n=name: train(n, c, s, activations(), args)


def from_model(args: argparse.Namespace) -> Activations:
    """The residual stream after the last packed layer, of all tokens of the file."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    from packed_model import load_model, load_tokens

    start = time.perf_counter()
    model = load_model(args.model, args.device, torch.bfloat16)
    tokens = load_tokens(args.tokens, _CONTEXT)
    tokens = tokens[:8] if args.tiny else tokens
    kept = _CONTEXT - _SKIPPED
    width = model.config.hidden_size
    found = torch.empty(len(tokens) * kept, width, dtype=torch.bfloat16, device=args.device)
    with torch.no_grad():
        for low in range(0, len(tokens), _MODEL_BATCH):
            batch = tokens[low : low + _MODEL_BATCH].to(args.device)
            hidden = model(batch, use_cache=False).last_hidden_state[:, _SKIPPED:]
            found[low * kept : (low + len(batch)) * kept] = hidden.flatten(0, 1)
    synchronize(args.device)
    seconds = time.perf_counter() - start
    del model
    free()
    return split(found, f"{len(found):,} tokens of {args.model.name}, made in {seconds:.1f} s")


def synthetic(args: argparse.Namespace) -> Activations:
    """Each token a few of many fixed directions, of Zipf-like frequency, and noise."""
    D, n, directions, active = (16, 4096, 64, 4) if args.tiny else (576, 2_000_000, 16384, 24)
    dictionary = torch.nn.functional.normalize(normal(directions, D, seed=40, device=args.device), dim=1)
    found = torch.empty(n, D, dtype=torch.bfloat16, device=args.device)
    generator = torch.Generator(args.device).manual_seed(41)
    for part in found.split(1 << 16):
        uniform = torch.rand(len(part), active, generator=generator, device=args.device)
        chosen = (directions**uniform - 1).long().clamp_(max=directions - 1)
        strength = torch.rand(len(part), active, generator=generator, device=args.device) + 0.5
        mixed = torch.nn.functional.embedding_bag(chosen, dictionary, per_sample_weights=strength, mode="sum")
        noise = torch.randn(mixed.shape, generator=generator, device=args.device) / D**0.5
        part.copy_(mixed + 0.1 * noise)
    return split(found, f"{n:,} synthetic tokens")


def split(found: Tensor, source: str) -> Activations:
    """Some of them held out, all scaled."""
    order = torch.randperm(len(found), device=found.device, generator=torch.Generator(found.device).manual_seed(42))
    n_held_out = min(65536, len(found) // 8)
    held_out = found[order[-n_held_out:]].float()
    scale = found.shape[1] ** 0.5 / held_out.norm(dim=1).mean()
    return Activations(found.mul_(scale), order[:-n_held_out], held_out * scale, source)


def batches(given: Activations, size: int) -> Iterator[Tensor]:
    device, n = given.all.device, len(given.train)
    generator = torch.Generator(device).manual_seed(43)
    while True:
        order = given.train[torch.randperm(n, device=device, generator=generator)]
        for rows in order[: n // size * size].split(size):
            yield given.all[rows].float()


def train(name: str, c: Contestant, s: Shape, given: Activations, args: argparse.Namespace) -> dict[str, Any]:
    """Train for --train-seconds, evaluations not counted, and note the error at _POINTS moments."""
    from gpu.steps import trainer_of

    s = s._replace(D=given.all.shape[1])
    free()
    use(c.precision)
    options: dict[str, Any] = {"window": 500, "lr": scaling_law_lr(s.F), "aux_loss_coefficient": c.aux_loss_coefficient}
    options["cuda_graph"] = c.kind != "SAELens topk" and not args.no_graph
    trainer, some = trainer_of(c.kind, s, c.precision, args.device, **options)
    for _ in range(2):  # kernels are compiled at their first call: that is no training
        trainer.step(some[0])
    trainer, _ = trainer_of(c.kind, s, c.precision, args.device, **options)
    stream = batches(given, s.B)
    seconds, n_steps, curve = 0.0, 0, []
    curve.append(point(0.0, 0, trainer, given, s))
    while seconds < args.train_seconds:
        mark, start = args.train_seconds * len(curve) / _POINTS, time.perf_counter()
        while True:
            trainer.step(next(stream))
            trainer.n_training_steps += 1
            n_steps += 1
            if n_steps % 16 == 0 or args.tiny:
                synchronize(args.device)
                if seconds + time.perf_counter() - start >= mark:
                    break
        seconds += time.perf_counter() - start
        curve.append(point(seconds, n_steps * s.B, trainer, given, s))
    found = {"contestant": c._asdict(), "shape": s._asdict(), "activations": given.source, "curve": curve}
    write_csv(args.output, name, curve)
    del trainer
    free()
    return found


@torch.no_grad()
def point(seconds: float, tokens: int, trainer: Any, given: Activations, s: Shape) -> dict[str, Any]:
    """Of tokens held out: unexplained variance, and latents active a token."""
    sae, x_ND = trainer.sae, given.held_out
    total = (x_ND - x_ND.mean(0)).square().sum()
    squared, active = x_ND.new_zeros(()), x_ND.new_zeros(())
    for x_BD in x_ND.split(min(s.B, 4096)):
        if hasattr(sae, "encode_sparse"):
            codes = sae.encode_sparse(x_BD)
            out_BD, n_active = sae.decode(codes), (codes.values > 0).sum()
        else:
            acts_BF = sae.encode(x_BD)
            acts_BF = acts_BF.to_dense() if acts_BF.is_sparse else acts_BF
            out_BD, n_active = sae.decode(acts_BF), (acts_BF > 0).sum()
        squared += (x_BD - out_BD).square().sum()
        active += n_active
    dead = (trainer.n_forward_passes_since_fired > 500).float().mean()
    return {
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "error": (squared / total).item(),
        "l0": (active / len(x_ND)).item(),
        "dead": dead.item(),
    }


def write_csv(output: Path, name: str, curve: list[dict[str, Any]]) -> None:
    """All curves so far, this one last."""
    rows = [
        {"sae": sae, **found}
        for sae, case in Record(output / "training.json").cases.items()
        for found in case.get("curve", [])
        if sae != name
    ]
    rows += [{"sae": name, **found} for found in curve]
    unfinished = output / ".training.csv"
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(output / "training.csv")
