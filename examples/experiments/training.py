"""Train one cell: every budget of tokens a run of its own, the part that they share trained once."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from activations import Layer, Scaled
from cells import Cell
from claiming import write
from measuring import error
from sae_lens.registry import get_sae_training_class

from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig, activation_batches
from sae_lens_switch.analysis import duplicate_latents
from sae_lens_switch.cost import Cost
from sae_lens_switch.training.manifest import CheckpointError
from sae_lens_switch.upgrade import split_topk

Row = dict[str, Any]
CURVE_POINTS, CURVE_TOKENS = 16, 4096
_DEAD_WINDOW = 200  # steps, for AuxK
_SPLIT_TOKENS = 50_000  # of which latents are clustered, and the router fitted
_SAVE_SECONDS = 120.0  # of training may be lost when a process is killed, and the last fifth of a run


def finished(cell: Cell, folder: Path) -> list[dict[str, Any]]:
    """What was measured after each budget that is over."""
    files = [folder / f"{budget}.json" for budget in cell.budgets]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def train(
    cell: Cell,
    layer: Layer,
    folder: Path,
    ce_recovered: Callable[[Any], float] | None = None,
    go_on: Callable[[], None] = lambda: None,
) -> None:
    """Write ``<folder>/<budget>.json`` for every budget that has none.

    Args:
        cell: With a learning rate.
        layer: Its activations.
        folder: Of this cell alone.
        ce_recovered: Measured after the last budget.
        go_on: Called before every step; may raise.
    """
    for budget in cell.budgets:
        file = folder / f"{budget}.json"
        if not file.exists():
            longer = budget != cell.tokens
            write(file, _train(cell, layer, budget, folder, longer, None if longer else ce_recovered, go_on))
    remove_trunks(folder)


def _train(
    cell: Cell,
    layer: Layer,
    budget: int,
    folder: Path,
    longer: bool,
    ce_recovered: Callable[[Any], float] | None,
    go_on: Callable[[], None],
) -> dict[str, Any]:
    start = saved = time.perf_counter()
    steps = cell.steps(budget)
    trainer = resumed(cell, layer, budget, folder)
    first, falls_at = trainer.n_training_steps, steps - steps // 5
    every, drawn_to = max(1, cell.steps(cell.tokens) // CURVE_POINTS), _drawn_before(cell, budget)
    last = max(1, steps // 10)
    curve: list[Row] = _curve_of_trunk(folder, first) if first > drawn_to else []
    seconds: list[float] = []
    loss, fired_before = 0.0, torch.zeros(cell.d_sae)
    for step in range(first + 1, steps + 1):
        if step == falls_at + 1:
            fired_before = trainer.act_freq_scores.clone()
        is_due = time.perf_counter() - saved > _SAVE_SECONDS or (longer and step == falls_at + 1)
        if is_due and first + 1 < step <= falls_at + 1:
            _save_trunk(trainer, folder, curve)
            saved = time.perf_counter()
        go_on()
        batch = next(trainer.data_provider)
        before = time.perf_counter()
        output = trainer.step(batch)
        seconds.append(time.perf_counter() - before)
        trainer.n_training_steps += 1
        if step > steps - last:
            loss += output.loss.item() / last
        if step == steps or (drawn_to < step <= falls_at and step % every == 0):
            fvu = error(trainer.sae, layer.held_out[:CURVE_TOKENS])["fvu"]
            falling = step > falls_at
            curve.append({"step": step, "tokens_seen": step * cell.batch, "falling": int(falling), "fvu": fvu})
    sae, fired = trainer.sae, trainer.act_freq_scores - fired_before
    load = torch.ones(1) if trainer.routing is None else trainer.routing.load_E
    measured = error(sae, layer.held_out)
    row = {
        **measured,
        "mse": measured["mse"] / layer.scale**2,
        "fvu_other": error(sae, layer.other)["fvu"] if len(layer.other) else math.nan,
        "final_loss": loss,
        "ce_recovered": None if ce_recovered is None else ce_recovered(sae),
        "dead_latents": int((fired == 0).sum()),
        "load_max": load.max().item() * len(load),
        "load_min": load.min().item() * len(load),
        "duplicates": math.nan if longer or cell.n_experts == 1 else _duplicates(sae),
        "flops_per_activation": flops_per_activation(cell, layer.centre.numel()),
        "steps": steps,
        "step_ms": 1e3 * statistics.median(seconds),
    }
    took = {"steps": len(seconds), "seconds": time.perf_counter() - start}
    return {"tokens": budget, "row": row, "curve": curve, "took": took}


def _duplicates(sae: Any) -> float:
    """Share of the latents whose decoder row has a cosine above 0.9 with one of another expert's."""
    return duplicate_latents(sae.W_dec, sae.cfg.n_experts, n_shared=sae.cfg.layout.shared_width).share_across


# The part that runs of different length share


def _save_trunk(trainer: SparseSAETrainer[Any, Any], folder: Path, curve: list[Row]) -> None:
    """What this run and longer ones can continue from: the state before the learning rate falls, and the curve."""
    step = trainer.n_training_steps
    write(folder / f"curve-{step}.json", curve)
    trainer.save_checkpoint(f"trunk-{step}", base_path=folder)
    remove_trunks(folder, but=step)


def _curve_of_trunk(folder: Path, step: int) -> list[Row]:
    file = folder / f"curve-{step}.json"
    return json.loads(file.read_text()) if file.exists() else []


def remove_trunks(folder: Path, but: int | None = None) -> None:
    """Also those of a worker that was killed, whatever another one has removed by now."""
    for path in (*folder.glob("trunk-*"), *folder.glob(".*trunk-*")):  # and what a killed process began to save
        if path.name != f"trunk-{but}":
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("curve-*.json"):
        if path.name != f"curve-{but}.json":
            path.unlink(missing_ok=True)


def _drawn_before(cell: Cell, budget: int) -> int:
    """The last step that is on the curve of a shorter budget."""
    shorter = [cell.steps(b) for b in cell.budgets if b < budget]
    return max((steps - steps // 5 for steps in shorter), default=0)


def resumed(cell: Cell, layer: Layer, budget: int, folder: Path) -> SparseSAETrainer[Any, Any]:
    """A trainer for this budget, from the latest shared state that it has a use for."""
    steps = cell.steps(budget)
    found = {int(path.name.split("-")[1]): path for path in folder.glob("trunk-*")}
    for step in sorted((s for s in found if s <= steps - steps // 5), reverse=True):
        trainer = make_trainer(cell, layer, budget)
        try:
            trainer.resume(found[step])
        except CheckpointError:
            shutil.rmtree(found[step])
        else:
            return trainer
    trainer = make_trainer(cell, layer, budget)
    if cell.start == "shared":
        _train_shared_expert(trainer, cell, layer, budget)
    if cell.start == "split":
        _train_and_split(trainer, cell, layer, budget)
    return trainer


def make_trainer(cell: Cell, layer: Layer, budget: int) -> SparseSAETrainer[Any, Any]:
    assert cell.lr is not None
    steps = cell.steps(budget)
    cfg = SparseSAETrainerConfig(
        total_training_samples=steps * cell.batch,
        train_batch_size_samples=cell.batch,
        lr=cell.lr,
        lr_warm_up_steps=int(cell.lr_warm_up * steps),
        feature_sampling_window=10**9,
        dead_feature_window=_DEAD_WINDOW,
    )
    rows = layer.train
    if cell.tokens > len(rows):
        raise ValueError(f"tokens must be at most {len(rows)}, those of layer {layer.number}; got {cell.tokens}")
    batches: Iterator[Any] = Scaled(activation_batches(rows, cell.batch, seed=cell.seed), layer.centre, layer.scale)
    trainer = SparseSAETrainer(cfg, make_sae(cell, rows.shape[1], steps), batches)
    if cell.router_lr != 1:
        _give_own_rate(trainer, cell.router_lr)
    return trainer


def make_sae(cell: Cell, d_in: int, steps: int) -> Any:
    torch.manual_seed(cell.seed)
    sae_class, config_class = get_sae_training_class(cell.architecture)
    given = asdict(cell) | {"d_in": d_in, "load_balance_warm_up_steps": int(cell.load_balance_warm_up * steps)}
    known = {f.name for f in fields(config_class)}
    sae = sae_class(config_class(**{n: v for n, v in given.items() if n in known}))
    if cell.start == "copies":
        _start_as_copies(sae)
    return sae


@torch.no_grad()
def _start_as_copies(sae: Any) -> None:
    """All experts start as the first one; biases and router still start from the first batch."""
    E = sae.cfg.n_experts
    width = sae.cfg.d_sae // E
    sae.W_dec.copy_(sae.W_dec[:width].repeat(E, 1))
    sae.W_enc.copy_(sae.W_enc[:, :width].repeat(1, E))
    sae.is_fresh = True


def _train_shared_expert(trainer: SparseSAETrainer[Any, Any], cell: Cell, layer: Layer, budget: int) -> None:
    """Begin the run with one expert alone, a TopK SAE, on a tenth of the tokens; all experts start as copies of it."""
    width = cell.d_sae // cell.n_experts
    alone = _topk_begins(trainer, cell, layer, budget, width, cell.steps(budget) // 10)
    with torch.no_grad():
        trainer.sae.W_dec[:width] = alone.sae.W_dec
        trainer.sae.W_enc[:, :width] = alone.sae.W_enc
    _start_as_copies(trainer.sae)


def _train_and_split(trainer: SparseSAETrainer[Any, Any], cell: Cell, layer: Layer, budget: int) -> None:
    """Begin the run with a TopK SAE of the same width, on half of the tokens, and split that."""
    seen = cell.steps(budget) // 2
    alone = _topk_begins(trainer, cell, layer, budget, cell.d_sae, seen)
    some = layer.scaled(layer.train[:_SPLIT_TOKENS])
    split = split_topk(alone.sae, cell.n_experts, some, seed=cell.seed)
    trainer.sae.load_state_dict(split.state_dict())
    trainer.sae.is_fresh = False


def _topk_begins(
    trainer: SparseSAETrainer[Any, Any], cell: Cell, layer: Layer, budget: int, width: int, steps: int
) -> SparseSAETrainer[Any, Any]:
    """Train a TopK SAE on the first tokens of the run, which goes on after them; returns its trainer."""
    one = replace(cell, architecture="sparse_topk", d_sae=width, n_experts=1, start="apart")
    alone = make_trainer(one, layer, budget)
    for _ in range(steps):
        alone.step(next(alone.data_provider))
        alone.n_training_steps += 1
        trainer.lr_scheduler.step()
    trainer.data_provider = alone.data_provider
    trainer.n_training_steps, trainer.n_training_samples = alone.n_training_steps, alone.n_training_samples
    trainer.n_batches_drawn = alone.n_batches_drawn
    return alone


def _give_own_rate(trainer: SparseSAETrainer[Any, Any], times: float) -> None:
    """The router learns at ``times`` the learning rate."""
    router = [trainer.sae.W_router, trainer.sae.b_router]
    (group,) = trainer.optimizer.param_groups
    group["params"] = [p for p in group["params"] if all(p is not r for r in router)]
    own = {n: v for n, v in group.items() if n not in ("params", "initial_lr")}
    trainer.optimizer.add_param_group(own | {"params": router, "lr": own["lr"] * times})
    trainer.lr_scheduler = trainer._make_schedule(trainer.cfg)


def flops_per_activation(cell: Cell, d_in: int) -> int:
    """As the paper counts: the encoder of one expert, and the router. Dense SAEs cost as much as TopK."""
    kind: Any = "switch" if cell.architecture == "switch" else "topk"
    several = {"n_active_experts": cell.n_active_experts, "n_shared_experts": cell.n_shared_experts}
    return Cost(kind, d_in, cell.d_sae, cell.k, cell.n_experts, **several).paper_flops
