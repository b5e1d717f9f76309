"""Trains every SAE of the experiments on one stream of activations of a real language model, and writes the CSVs.

    make experiments                # or: python examples/experiments/run.py --help

Killed, it goes on where it was: a finished cell is never computed again. Activations are computed once. Every SAE has
the same activations in the same order (the seed decides), the same number of steps, and a learning rate tuned for its
architecture by the same small sweep. Seconds are those of training steps alone: evaluations are not counted.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cells import N_STAGES, PLANS, Cell, Row, stage
from sae_lens.registry import get_sae_training_class
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig, activation_batches
from sae_lens_switch.cost import Cost

sys.path.insert(0, str(Path(__file__).parents[1]))
from offline import cached_activations, language_model_folder, text_datasets, token_contexts

LAYER, SKIPPED, CONTEXT = 12, 2, 128
CURVE_POINTS = 12


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    warnings.filterwarnings("ignore")
    data = Data.load(args)
    of_run = {n: getattr(args, n) for n in ("tokens", "epochs", "batch", "held_out", "eval_contexts")}
    rows: list[Row] = []
    curves: list[Row] = []
    for number in range(N_STAGES):
        planned = stage(number, PLANS[args.plan], rows)
        weights = [cell.weight(data.train.shape[1]) for _, cell in planned]
        with tqdm(total=sum(weights), desc=f"stage {number + 1} of {N_STAGES}", bar_format=_BAR) as progress:
            for (experiment, cell), weight in zip(planned, weights, strict=True):
                progress.set_postfix_str(f"{experiment}: {cell.label}, F {cell.d_sae}, k {cell.k}, seed {cell.seed}")
                file = args.output / "cells" / f"{cell.key(of_run)}.json"
                if not file.exists():
                    write(file, train(cell, data, args))
                result = json.loads(file.read_text())
                settings = {"experiment": experiment, **asdict(cell)}
                rows.append(settings | result["row"])
                curves += [{**settings, **point} for point in result["curve"]]
                progress.update(weight)
    write_csv(args.output / "results.csv", rows)
    write_csv(args.output / "curves.csv", curves)
    write(args.output / "run.json", {"arguments": {n: str(v) for n, v in vars(args).items()}, **data.facts})
    print(f"{len(rows)} rows in {args.output}/results.csv; pictures: python {Path(__file__).with_name('figures.py')}")


_BAR = "{desc}: {percentage:3.0f}% |{bar:20}| {elapsed}<{remaining} {postfix}"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--plan", choices=list(PLANS), default="default", help="how many cells")
    parser.add_argument("--tokens", type=int, default=200_000, help="activations to train on")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=8192, help="activations to evaluate on")
    parser.add_argument("--eval-contexts", type=int, default=24, help="contexts for the language model's loss")
    parser.add_argument("--models", type=Path, default=Path("runs/models"))
    parser.add_argument("--model", help="folder of any transformers model; none: SmolLM2-135M of an installed package")
    parser.add_argument("--output", type=Path, default=Path("runs/experiments"))
    return parser.parse_args(argv)


def write(file: Path, content: Any) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, file)


def write_csv(file: Path, rows: Sequence[Row]) -> None:
    with open(file, "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(
            {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
        )


# Activations, and what the language model makes of reconstructions


@dataclass
class Data:
    """Activations centred, and scaled to a mean squared norm of d_in: wherever an SAE's biases start, all start alike,
    and one sweep of coefficients serves all."""

    train: Tensor
    held_out: Tensor
    centre: Tensor
    scale: float
    tail: Any
    tokens: Tensor
    hidden: Tensor
    ce_model: float
    ce_ablated: float
    facts: dict[str, Any]

    @classmethod
    @torch.no_grad()
    def load(cls, args: argparse.Namespace) -> Data:
        from transformers import AutoModelForCausalLM

        folder = Path(args.model) if args.model else language_model_folder(args.models)
        train_text, held_out_text = text_datasets(seed=0)
        contexts = token_contexts(train_text, folder, CONTEXT).shuffle(seed=0)
        held_out_contexts = token_contexts(held_out_text, folder, CONTEXT).shuffle(seed=0)
        cache = args.output / "activations"
        train = cached_activations(cache / "train.safetensors", folder, contexts, args.tokens, LAYER, SKIPPED)
        n_held_out = min(args.held_out, len(held_out_contexts) * (CONTEXT - SKIPPED))
        held_out = cached_activations(
            cache / "held_out.safetensors", folder, held_out_contexts, n_held_out, LAYER, SKIPPED
        )
        centre = train.mean(0)
        train, held_out = train - centre, held_out - centre
        scale = (train.shape[1] / train.square().sum(1).mean()).sqrt().item()

        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        tokens = torch.tensor(held_out_contexts[-args.eval_contexts :]["input_ids"])
        hidden: list[Tensor] = []
        handle = model.model.layers[LAYER].register_forward_hook(
            lambda _m, _i, out: hidden.append(out if isinstance(out, Tensor) else out[0])
        )
        model(tokens, use_cache=False)
        handle.remove()
        model.model.layers = model.model.layers[LAYER + 1 :]
        data = cls(train * scale, held_out * scale, centre, scale, model, tokens, hidden[0], 0.0, 0.0, {})
        data.ce_model = data.cross_entropy(hidden[0])
        ablated = hidden[0].clone()
        ablated[:, SKIPPED:] = centre
        data.ce_ablated = data.cross_entropy(ablated)
        data.facts = {
            "d_in": train.shape[1],
            "ce_model": data.ce_model,
            "ce_ablated": data.ce_ablated,
            "threads": torch.get_num_threads(),
        }
        return data

    @torch.no_grad()
    def cross_entropy(self, hidden: Tensor) -> float:
        """Of the language model that goes on from a residual stream."""
        logits = torch.cat([self.tail(inputs_embeds=h, use_cache=False).logits for h in hidden.split(8)])
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.tokens[:, 1:].flatten()).item()

    @torch.no_grad()
    def ce_recovered(self, sae: Any) -> float:
        """(ablated - with SAE) / (ablated - model); ablated is by the mean."""
        hidden = self.hidden.clone()
        x = hidden[:, SKIPPED:]
        x_hat = sae((x.flatten(0, 1) - self.centre) * self.scale) / self.scale + self.centre
        hidden[:, SKIPPED:] = x_hat.view(x.shape)
        return (self.ce_ablated - self.cross_entropy(hidden)) / (self.ce_ablated - self.ce_model)


# One cell


def train(cell: Cell, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(cell.seed)
    sae = make_sae(cell, data.train.shape[1])
    steps = args.epochs * args.tokens // args.batch
    cfg = SparseSAETrainerConfig(
        steps * args.batch, args.batch, lr=cell.lr, feature_sampling_window=10**9, dead_feature_window=steps
    )
    batches = activation_batches(data.train, args.batch, seed=cell.seed)
    trainer = SparseSAETrainer(cfg, sae, batches)
    flops = flops_per_activation(cell, data.train.shape[1])
    marks = {round(steps * (i + 1) / CURVE_POINTS) for i in range(CURVE_POINTS)}
    curve: list[Row] = []
    seconds, counted_from = 0.0, torch.zeros(cell.d_sae)
    for step in range(1, steps + 1):
        batch = next(batches)
        start = time.perf_counter()
        trainer.step(batch)
        trainer.n_training_steps += 1
        seconds += time.perf_counter() - start
        if step == steps // 2:
            counted_from = trainer.act_freq_scores.clone()
        if step in marks:
            seen = {"step": step, "seconds": seconds, "flops": 3 * flops * step * args.batch}
            curve.append(seen | {"fvu": error(sae, data.held_out[:2048])["fvu"]})
    fired = trainer.act_freq_scores - counted_from
    load = getattr(trainer.routing, "load_E", torch.ones(1))
    row = {
        **error(sae, data.held_out),
        "ce_recovered": data.ce_recovered(sae),
        "dead_latents": int((fired == 0).sum()),
        "load_max": load.max().item() * len(load),
        "load_min": load.min().item() * len(load),
        "flops_per_activation": flops,
        "steps": steps,
        "tokens": steps * args.batch,
        "seconds": seconds,
    }
    return {"row": row, "curve": curve}


def make_sae(cell: Cell, d_in: int) -> Any:
    sae_class, config_class = get_sae_training_class(cell.architecture)
    options: dict[str, Any] = {"d_in": d_in, "d_sae": cell.d_sae}
    if cell.architecture in ("topk", "sparse_topk", "switch"):
        options["k"] = cell.k
    else:
        options["l1_coefficient"] = cell.l1_coefficient
    if cell.architecture == "switch":
        options |= {
            "n_experts": cell.n_experts,
            "gate": cell.gate,
            "load_balance_coefficient": cell.load_balance_coefficient,
        }
    return sae_class(config_class(**options))


def flops_per_activation(cell: Cell, d_in: int) -> int:
    """As the paper counts: the encoder of one expert, and the router. A dense SAE's is that of TopK."""
    kind: Any = "switch" if cell.architecture == "switch" else "topk"
    return Cost(kind, d_in, cell.d_sae, cell.k, cell.n_experts).paper_flops


@torch.no_grad()
def error(sae: Any, x: Tensor) -> dict[str, float]:
    residual, l0 = 0.0, 0.0
    for part in x.split(2048):
        if hasattr(sae, "encode_sparse"):
            codes = sae.encode_sparse(part)
            values, x_hat = codes.values, sae.decode(codes)
        else:
            values = sae.encode(part)
            x_hat = sae.decode(values)
        residual += (x_hat - part).square().sum().item()
        l0 += (values != 0).sum().item()
    return {"l0": l0 / len(x), "mse": residual / len(x), "fvu": residual / (x - x.mean(0)).square().sum().item()}


if __name__ == "__main__":
    main()
