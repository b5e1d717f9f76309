"""The duration of a training step, for every shape that a figure draws against seconds.

Each round times all shapes in turn, in one process, so that disturbances of the machine affect them all. The time of a
shape is the median over rounds, its range the quartiles. Finished rounds are kept and not repeated; to measure again,
remove the folder `timing` of the output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from cells import PLANS, Cell, Plan, stages
from csv_rows import write_csv
from tqdm.auto import tqdm
from train_cells import Data, make_sae, make_trainer, write

from sae_lens_switch import activation_batches

TIMED = ("fixed width", "matched FLOPs", "scaling")
_WARM_UP, _STEPS, _MAX_STEPS, _SECONDS = 2, 3, 20, 0.2  # per shape and round


def time_all(args: argparse.Namespace, data: Data) -> None:
    shapes = timed_shapes(PLANS[args.plan])
    threads = torch.get_num_threads()
    setting = {
        "threads": threads,
        "batch": args.batch,
        "d_in": data.train.shape[1],
        "shapes": [list(s) for s in shapes],
    }
    rounds = []
    with tqdm(total=args.rounds * len(shapes), desc=f"timing on {threads} threads", unit="shape") as progress:
        for number in range(args.rounds):
            file = args.output / "timing" / f"round-{number}.json"
            known = json.loads(file.read_text()) if file.exists() else {}
            if {n: known.get(n) for n in setting} != setting:
                seconds = []
                for shape in shapes:
                    seconds.append(seconds_per_step(Cell(shape[0], shape[1], shape[3], shape[2]), data, args.batch))
                    progress.update()
                known = setting | {"seconds": seconds}
                write(file, known)
            else:
                progress.update(len(shapes))
            rounds.append(known["seconds"])
    rows = []
    for shape, measured in zip(shapes, zip(*rounds, strict=True), strict=True):
        low, median, high = quartiles(measured)
        rows.append(
            dict(zip(("architecture", "d_sae", "n_experts", "k"), shape, strict=True))
            | {"seconds_per_step": median, "low": low, "high": high}
            | {"rounds": len(rounds), "threads": threads, "batch": args.batch}
        )
    write_csv(args.output / "timing.csv", rows)
    print(f"{len(rows)} shapes in {args.output}/timing.csv")


def timed_shapes(plan: Plan) -> list[tuple[str, int, int, int]]:
    """The shapes with the middle k."""
    cells = {cell for stage in stages(plan, []) for experiment, cell in stage if experiment in TIMED}
    return sorted({cell.shape for cell in cells if cell.k == plan.middle_k})


def seconds_per_step(cell: Cell, data: Data, batch: int) -> float:
    """The median over a few steps, after the warm-up."""
    trainer = make_trainer(
        cell, make_sae(cell, data.train.shape[1]), activation_batches(data.train, batch), 10**6, batch
    )
    times: list[float] = []
    while len(times) < _WARM_UP + _STEPS or (sum(times[_WARM_UP:]) < _SECONDS and len(times) < _WARM_UP + _MAX_STEPS):
        x: Any = next(trainer.data_provider)
        start = time.perf_counter()
        trainer.step(x)
        trainer.n_training_steps += 1
        times.append(time.perf_counter() - start)
    return statistics.median(times[_WARM_UP:])


def quartiles(values: Any) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))  # type: ignore[return-value]
