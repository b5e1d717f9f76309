"""Train every SAE of the experiments on one stream of activations of a real language model, and write the CSVs.

    make experiments                # or: python examples/experiments/run.py --help

An interrupted run resumes: finished cells are never recomputed, and activations are computed once. Every SAE gets the
same activations in the same order (the seed decides), the same number of steps, and a learning rate tuned for its
architecture by the same small sweep. Training steps are timed separately, at the end: see timing.py.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from cells import PLANS


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    warnings.filterwarnings("ignore")
    from train_cells import Data, train_all

    data = Data.load(args)
    try:
        if not args.timing_only:
            train_all(args, data)
        if not args.no_timing:
            from timing import time_all

            time_all(args, data)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command resumes")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--plan", choices=list(PLANS), default="default", help="which cells to train")
    parser.add_argument("--full", action="store_const", const="full", dest="plan", help="--plan full: takes a night")
    parser.add_argument("--tokens", type=int, default=100_000, help="training activations")
    parser.add_argument("--batch", type=int, default=256, help="activations per step")
    parser.add_argument("--held-out", type=int, default=8192, help="held-out activations for the evaluation")
    parser.add_argument("--eval-contexts", type=int, default=8, help="contexts for the language model's loss")
    parser.add_argument("--model", help="name or folder; by default SmolLM2-135M from an installed package")
    parser.add_argument("--model-class", default="AutoModelForCausalLM", help="or HookedTransformer, as in SAELens")
    parser.add_argument("--hook-name", default="model.layers.12", help="where the activations are taken")
    parser.add_argument("--dataset", help="with a column `text`; by default Python's documentation")
    parser.add_argument("--models", type=Path, default=Path("runs/models"), help="where the default model is kept")
    parser.add_argument("--output", type=Path, default=Path("runs/experiments"), help="folder for the results")
    parser.add_argument("--timing-only", action="store_true", help="only time the training steps")
    parser.add_argument("--no-timing", action="store_true", help="do not time the training steps")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
