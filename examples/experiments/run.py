"""Train every SAE of the experiments on one cache of activations of a real language model, and write the CSVs.

    make experiments                # or: python examples/experiments/run.py --help

Text, activations and SAEs are made once: killed at any moment, the same command goes on where it was. Two
single-threaded workers share the work, the most important cells first, so that a run cut short still compares all
architectures. Every SAE sees every token at most once, in an order that the seed decides, at a learning rate that the
same small sweep has found for its architecture.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from claiming import write
from costs import costs, minutes_left
from plans import PLANS, Plan

CONTEXT = 128
_SPARE_TOKENS = 1.01  # massive activations are left out
_SPARE_BYTES = 2 << 30  # checkpoints of the widest SAEs of two workers, and results
_POLL_SECONDS, _SAY_EVERY = 1.0, 60.0


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    plan = PLANS[args.plan]
    warnings.filterwarnings("ignore")
    if args.dry_run:
        print(costs(plan, args.workers))
        return
    from worker import Results, work

    cache, of_run = prepared(args, plan)
    results = Results(args.output / "cells", of_run)
    if args.worker is not None:
        _one_thread()
        work(plan, cache, results, args.worker)
        return
    cache.reserve(_SPARE_BYTES if args.plan != "tiny" else 0)
    missing = cache.missing()
    size = sum(map(cache.n_bytes, cache.source.layers)) / 1e9
    print(f"{cache.folder}: {size:.2f} GB; {cache.n_parts - len(missing)} of {cache.n_parts} parts are there and whole")
    print(costs(plan, args.workers), flush=True)
    try:
        run_workers(args, plan, cache, results)
    except KeyboardInterrupt:
        collect(args, plan, cache, results)
        sys.exit("\ninterrupted: the same command resumes")
    n_rows = collect(args, plan, cache, results)
    print(f"{n_rows} rows in {args.output}/results.csv; pictures: python {Path(__file__).with_name('figures.py')}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--plan", choices=list(PLANS), default="default", help="which cells to train")
    parser.add_argument("--full", action="store_const", const="full", dest="plan", help="--plan full: takes a night")
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be trained, and in how many minutes"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--text", type=Path, help="folder of text files, a kind of text per subfolder; no other text")
    parser.add_argument("--dataset", help="name or folder of a dataset with a column `text`; no other text")
    parser.add_argument(
        "--kept-out", help="the kind of text that is only tested on; by default the Bible, or the least"
    )
    parser.add_argument("--model", help="name or folder; by default SmolLM2-135M from an installed package")
    parser.add_argument("--model-class", default="AutoModelForCausalLM", help="or HookedTransformer, as in SAELens")
    parser.add_argument("--hook-name", default="model.layers.{layer}", help="where the activations are taken")
    parser.add_argument("--models", type=Path, default=Path("runs/models"), help="where the default model is kept")
    parser.add_argument("--output", type=Path, default=Path("runs/experiments"), help="folder for the results")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # the process that started it
    return parser.parse_args(argv)


# Text and activations


def prepared(args: argparse.Namespace, plan: Plan) -> tuple[Any, dict[str, Any]]:
    """The cache of activations, not yet filled, and what besides a cell's settings decides its results."""
    import texts
    from activations import MASSIVE, SKIPPED, Cache, Source
    from offline import language_model_folder
    from transformers import AutoConfig

    model = args.model or str(language_model_folder(args.models))

    def n_contexts(tokens: int) -> int:
        return math.ceil(tokens * _SPARE_TOKENS / (CONTEXT - SKIPPED))

    wanted = {
        "train": n_contexts(plan.tokens),
        "held_out": plan.held_out_contexts,
        "other": plan.held_out_contexts // 4,
    }
    file = args.output / "texts" / f"{_text_name(args, model, wanted)}.npz"
    if not file.exists():
        found = texts.contexts(_kinds(args), model, CONTEXT, wanted, args.kept_out)
        file.parent.mkdir(parents=True, exist_ok=True)
        texts.save(found, file)
    contexts = texts.load(file)
    layers = {layer: n_contexts(n) for layer, n in plan.layer_tokens().items()}
    d_in = AutoConfig.from_pretrained(model).hidden_size
    cache = Cache(args.output / "activations", Source(model, args.model_class, args.hook_name, layers, d_in), contexts)
    of_run = {
        "model": args.model or Path(model).name,
        "hook_name": args.hook_name,
        "text": contexts.digest[:16],
        "context": CONTEXT,
        "skipped": SKIPPED,
        "massive": MASSIVE,
    }
    return cache, of_run


def _kinds(args: argparse.Namespace) -> Any:
    import texts

    if args.text is not None:
        return texts.folder_kinds(args.text)
    if args.dataset is not None:
        return texts.dataset_kind(args.dataset)
    return texts.default_kinds(args.output / "debian")


def _text_name(args: argparse.Namespace, model: str, wanted: dict[str, int]) -> str:
    import hashlib

    made_of = [str(args.text), args.dataset, args.kept_out, model, sorted(wanted.items())]
    return hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]


# Workers


def run_workers(args: argparse.Namespace, plan: Plan, cache: Any, results: Any) -> None:
    """Start the workers and tell of their progress until all have ended. Raises SystemExit if one fails."""
    (args.output / "logs").mkdir(parents=True, exist_ok=True)
    logs = [args.output / "logs" / f"worker-{i}.log" for i in range(args.workers)]
    workers = [_started(args, log) for log in logs]
    start, said = time.perf_counter(), 0.0
    try:
        while any(worker.poll() is None for worker in workers):
            time.sleep(_POLL_SECONDS)
            for worker, log in zip(workers, logs, strict=True):
                if worker.poll() not in (None, 0):
                    sys.exit(f"a worker failed; the end of {log}:\n{_end_of(log)}\nthe same command goes on")
            if time.perf_counter() - said > _SAY_EVERY:
                said = time.perf_counter()
                collect(args, plan, cache, results)  # whatever happens to this process
                print(f"{(said - start) / 60:.0f} min; {_progress(args, plan, cache, results)}", flush=True)
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait()


def _started(args: argparse.Namespace, log: Path) -> subprocess.Popen[bytes]:
    given = {n: v for n, v in vars(args).items() if v is not None and n not in ("worker", "dry_run", "workers")}
    flags = [text for n, v in given.items() for text in (f"--{n.replace('_', '-')}", str(v))]
    command = [sys.executable, str(Path(__file__).resolve()), *flags, "--worker", str(os.getpid())]
    with open(log, "wb") as handle:
        return subprocess.Popen(command, stdout=handle, stderr=handle, env=os.environ | _ONE_THREAD)


_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1") | {"TOKENIZERS_PARALLELISM": "false"}


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _progress(args: argparse.Namespace, plan: Plan, cache: Any, results: Any) -> str:
    parts = sum(cache.part_file(part).exists() for part in range(cache.n_parts))
    planned = results.planned(plan)
    done = sum(results.is_finished(cell) for cell in planned)
    left = minutes_left(plan, cache, results, args.workers)
    return f"{parts}/{cache.n_parts} parts, {done}/{len(planned)} cells; about {left:.0f} min left"


# Results


def collect(args: argparse.Namespace, plan: Plan, cache: Any, results: Any) -> int:
    """Write results.csv, curves.csv and run.json from what the workers have left so far; returns the rows."""
    import torch
    from csv_rows import write_csv

    rows, curves = results.rows_and_curves(results.planned(plan))
    write_csv(args.output / "results.csv", rows)
    write_csv(args.output / "curves.csv", curves)
    facts = {
        **results.of_run,
        "plan": args.plan,
        "d_in": cache.source.d_in,
        "texts": cache.contexts.facts,
        "kept_out": cache.contexts.kept_out,
        "settings": asdict(plan),
        "torch": torch.__version__,
    }
    write(args.output / "run.json", facts)
    return len(rows)


if __name__ == "__main__":
    main()
