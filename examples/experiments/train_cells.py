"""Train the cells of the experiments on one stream of activations of a language model, and write CSVs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from cells import PLANS, Cell, Row, stages
from csv_rows import write_csv
from sae_lens.load_model import load_model
from sae_lens.registry import get_sae_training_class
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig, activation_batches
from sae_lens_switch.cost import Cost

sys.path.insert(0, str(Path(__file__).parents[1]))
from offline import language_model_folder, text_datasets, token_contexts

SKIPPED, CONTEXT = 2, 128
CURVE_POINTS = 12
# Evaluating the language model takes seconds per SAE: only where its loss is drawn. Likewise the curves.
WITH_CE = ("fixed width", "matched FLOPs")


def train_all(args: argparse.Namespace, data: Data) -> None:
    of_run = {n: getattr(args, n) for n in ("tokens", "batch", "held_out", "eval_contexts")} | data.made_of
    plan, d_in = PLANS[args.plan], data.train.shape[1]
    rows: dict[tuple[str, Cell], Row] = {}
    curves: list[Row] = []
    with tqdm(bar_format=_BAR) as progress:
        while True:
            planned = stages(plan, list(rows.values()))
            todo = [[c for c in stage if c not in rows] for stage in planned]
            now = next((stage for stage in todo if stage), None)
            if now is None:
                break
            # Later stages will have other learning rates, but the same number of cells.
            progress.total = progress.n + sum(c.weight(d_in, args.batch) for stage in todo for _, c in stage)
            for experiment, cell in now:
                progress.set_postfix_str(f"{experiment}: {cell.label}, F {cell.d_sae}, k {cell.k}, seed {cell.seed}")
                result = finished_or_trained(cell, experiment in WITH_CE, of_run, data, args)
                settings = {"experiment": experiment, **asdict(cell)}
                rows[experiment, cell] = settings | result["row"]
                if experiment in WITH_CE:
                    curves += [{**settings, **point} for point in result["curve"]]
                progress.update(cell.weight(d_in, args.batch))
    write_csv(args.output / "results.csv", list(rows.values()))
    write_csv(args.output / "curves.csv", curves)
    facts = {**of_run, "plan": args.plan, **data.facts, "torch": torch.__version__}
    write(args.output / "run.json", facts)
    print(f"{len(rows)} rows in {args.output}/results.csv; pictures: python {Path(__file__).with_name('figures.py')}")


_BAR = "{percentage:3.0f}% |{bar:20}| {elapsed}<{remaining} {postfix}"


def finished_or_trained(
    cell: Cell, with_ce: bool, of_run: dict[str, Any], data: Data, args: argparse.Namespace
) -> dict[str, Any]:
    file = args.output / "cells" / f"{cell.key(of_run)}.json"
    if file.exists():
        result = json.loads(file.read_text())
        if result["row"]["ce_recovered"] is not None or not with_ce:
            return result
    write(file, train(cell, data, args, with_ce))
    return json.loads(file.read_text())


def write(file: Path, content: Any) -> None:
    """Write JSON atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, file)


# Activations, and the language model's loss on reconstructions


@dataclass
class Data:
    """Activations, centred and scaled to a mean squared norm of d_in.

    So all SAEs start alike, wherever their biases start, and one sweep of coefficients serves all. The first two
    tokens of each context are skipped: see offline.token_contexts.
    """

    train: Tensor
    held_out: Tensor
    centre: Tensor
    scale: float
    model: Any
    hook_name: str
    tokens: Tensor
    hidden: Tensor
    made_of: dict[str, str]  # model, hook, dataset
    facts: dict[str, Any]

    @classmethod
    @torch.no_grad()
    def load(cls, args: argparse.Namespace) -> Data:
        folder = args.model or str(language_model_folder(args.models))
        made_of = {
            "model": args.model or Path(folder).name,
            "hook_name": args.hook_name,
            "dataset": args.dataset or "Python's documentation",
        }
        train_text, held_out_text = text_datasets(seed=0) if args.dataset is None else _texts(args)
        contexts = [token_contexts(t, folder, CONTEXT).shuffle(seed=0) for t in (train_text, held_out_text)]
        model = load_model(args.model_class, folder, device="cpu", hook_names=[args.hook_name]).eval()

        def activations(name: str, contexts: Any, n: int) -> Tensor:
            return cached_activations(args.output / "activations" / f"{name}.pt", made_of, model, contexts, n)

        train = activations("train", contexts[0], args.tokens)
        n_held_out = min(args.held_out, len(contexts[1]) * (CONTEXT - SKIPPED))
        held_out = activations("held_out", contexts[1], n_held_out)
        centre = train.mean(0)
        train, held_out = train - centre, held_out - centre
        scale = (train.shape[1] / train.square().sum(1).mean()).sqrt().item()
        tokens = torch.tensor(contexts[1][-args.eval_contexts :]["input_ids"])
        hidden = hidden_states(model, args.hook_name, tokens)
        data = cls(
            train * scale, held_out * scale, centre, scale, model, args.hook_name, tokens, hidden, made_of, facts={}
        )
        ablated = hidden.clone()
        ablated[:, SKIPPED:] = centre
        data.facts = {
            "d_in": train.shape[1],
            "variance_in_model_units": train.square().sum(1).mean().item(),
            "ce_model": data.cross_entropy(hidden),
            "ce_ablated": data.cross_entropy(ablated),
        }
        return data

    @torch.no_grad()
    def cross_entropy(self, hidden: Tensor) -> float:
        """The CE loss of the language model with its activations replaced by these."""
        parts = [
            self.model.run_with_hooks(
                t,
                return_type="both",
                fwd_hooks=[(self.hook_name, lambda _x, hook, h=h: h)],  # noqa: ARG005
            )[1].item()
            * len(t)
            for t, h in zip(self.tokens.split(8), hidden.split(8), strict=True)
        ]
        return sum(parts) / len(self.tokens)

    @torch.no_grad()
    def ce_recovered(self, sae: Any) -> float:
        """(ablated - with SAE) / (ablated - model), with mean ablation."""
        hidden = self.hidden.clone()
        x = hidden[:, SKIPPED:]
        x_hat = sae((x.flatten(0, 1) - self.centre) * self.scale) / self.scale + self.centre
        hidden[:, SKIPPED:] = x_hat.view(x.shape)
        ablated, clean = self.facts["ce_ablated"], self.facts["ce_model"]
        return (ablated - self.cross_entropy(hidden)) / (ablated - clean)


def _texts(args: argparse.Namespace) -> tuple[Any, Any]:
    """Documents with twice the tokens needed, at four characters per token; the first tenth is held out."""
    import datasets

    texts, wanted = [], 8 * (args.tokens + args.held_out)
    for row in datasets.load_dataset(args.dataset, split="train", streaming=True):
        texts.append(row["text"])
        wanted -= len(row["text"])
        if wanted < 0:
            break
    n = max(1, len(texts) // 10)
    return datasets.Dataset.from_dict({"text": texts[n:]}), datasets.Dataset.from_dict({"text": texts[:n]})


@torch.no_grad()
def hidden_states(model: Any, hook_name: str, tokens: Tensor) -> Tensor:
    _, cache = model.run_with_cache(
        tokens, names_filter=[hook_name], stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(hook_name) or 0
    )
    return cache[hook_name]


def cached_activations(file: Path, made_of: dict[str, str], model: Any, contexts: Any, n: int) -> Tensor:
    """Activations [n, d_in], computed once; a file made from another model, hook, dataset or length is replaced."""
    n_contexts = -(-n // (CONTEXT - SKIPPED))
    if n_contexts > len(contexts):
        raise ValueError(f"there are {len(contexts) * (CONTEXT - SKIPPED)} tokens of text; got {n} wanted")
    tokens = torch.tensor(contexts[:n_contexts]["input_ids"])
    if file.exists():
        saved = torch.load(file, weights_only=True)
        if saved["made_of"] == made_of and torch.equal(saved["tokens"], tokens):
            return saved["activations"][:n]
    parts = [
        hidden_states(model, made_of["hook_name"], part)[:, SKIPPED:].flatten(0, 1)
        for part in tqdm(tokens.split(16), desc="activations", unit="batch")
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    torch.save({"made_of": made_of, "tokens": tokens, "activations": torch.cat(parts)}, unfinished)
    os.replace(unfinished, file)
    return torch.cat(parts)[:n]


# One cell


def train(cell: Cell, data: Data, args: argparse.Namespace, with_ce: bool) -> dict[str, Any]:
    steps = cell.passes * (args.tokens // args.batch)
    sae, held_out = make_sae(cell, data.train.shape[1]), data.held_out
    batches = activation_batches(data.train, args.batch, seed=cell.seed)
    if cell.units == "model":
        held_out, batches = held_out / data.scale, (x / data.scale for x in batches)
    trainer = make_trainer(cell, sae, batches, steps, args.batch)
    flops = flops_per_activation(cell, data.train.shape[1])
    marks = {round(steps * (i + 1) / CURVE_POINTS) for i in range(CURVE_POINTS)}
    curve: list[Row] = []
    loss, counted_from = 0.0, torch.zeros(cell.d_sae)
    last = max(1, steps // 10)
    for step in range(1, steps + 1):
        output = trainer.step(next(batches))
        trainer.n_training_steps += 1
        if step > steps - last:
            loss += output.loss.item() / last
        if step == steps // 2:
            counted_from = trainer.act_freq_scores.clone()
        if step in marks:
            seen = {"step": step, "flops": 3 * flops * step * args.batch}
            curve.append(seen | {"fvu": error(sae, held_out[:2048])["fvu"]})
    fired = trainer.act_freq_scores - counted_from
    load = getattr(trainer.routing, "load_E", torch.ones(1))
    measured = error(sae, held_out)
    if cell.units != "model":
        measured["mse"] /= data.scale**2
    row = {
        **measured,
        "final_loss": loss,
        "ce_recovered": data.ce_recovered(sae) if with_ce else None,
        "dead_latents": int((fired == 0).sum()),
        "load_max": load.max().item() * len(load),
        "load_min": load.min().item() * len(load),
        "flops_per_activation": flops,
        "steps": steps,
        "tokens": steps * args.batch,
    }
    return {"row": row, "curve": curve}


def make_sae(cell: Cell, d_in: int) -> Any:
    torch.manual_seed(cell.seed)
    sae_class, config_class = get_sae_training_class(cell.architecture)
    of_config = {f.name for f in fields(config_class)}
    return sae_class(config_class(d_in=d_in, **{n: v for n, v in asdict(cell).items() if n in of_config}))


def make_trainer(cell: Cell, sae: Any, batches: Iterator[Tensor], steps: int, batch: int) -> SparseSAETrainer[Any, Any]:
    cfg = SparseSAETrainerConfig(
        steps * batch, batch, lr=cell.lr, feature_sampling_window=10**9, dead_feature_window=steps
    )
    return SparseSAETrainer(cfg, sae, batches)


def flops_per_activation(cell: Cell, d_in: int) -> int:
    """As the paper counts: the encoder of one expert, and the router. Dense SAEs cost as much as TopK."""
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
