"""Processes killed at a moment of choice, and the small runs that they are killed in."""

import builtins
import io
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers import D, activations
from sae_lens_switch import (
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)

BATCH, STEPS = 8, 6
SAMPLES = BATCH * STEPS
_OPERATIONS = ("rename", "replace", "fsync", "symlink", "link", "unlink", "remove", "rmdir", "mkdir", "open")
_FAILED = 3


def small_sae(architecture: str = "switch", **fields: Any) -> Any:
    torch.manual_seed(0)
    if architecture == "switch":
        return SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=D, d_sae=32, n_experts=4, **{"k": 3, **fields}))
    return SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=D, d_sae=32, **{"k": 3, **fields}))


def small_trainer(path: Path | None, architecture: str = "switch", **fields: Any) -> Any:
    """A run of a few steps on a tensor."""
    cfg = {
        "total_training_samples": SAMPLES,
        "train_batch_size_samples": BATCH,
        "lr": 1e-2,
        "checkpoint_path": None if path is None else str(path),
        **fields,
    }
    return SparseSAETrainer(SparseSAETrainerConfig(**cfg), small_sae(architecture), torch.cat(activations(3, batch=16)))


def weights(trainer: Any) -> dict[str, Tensor]:
    """The weights and the optimiser's moments, by name."""
    found = {name: t.clone() for name, t in trainer.sae.state_dict().items()}
    for i, state in trainer.optimizer.state_dict()["state"].items():
        found |= {f"{name} of parameter {i}": torch.as_tensor(t).clone() for name, t in state.items()}
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def killed(function: Callable[[], object], at: int | None = None, after: float | None = None) -> bool:
    """Run it in a process that is killed before its file operation number ``at``, or ``after`` so many seconds.

    Returns whether it was killed before it came to its end. What it raises fails the test.
    """
    child = started(function, at)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return ended(child) == signal.SIGKILL


def started(function: Callable[[], object], at: int | None = None) -> int:
    """A process that runs it. Forked from this one, it has imported everything and costs milliseconds."""
    child = os.fork()
    if child == 0:
        status = _FAILED
        try:
            _say_nothing()
            if at is not None:
                _die_at(at)
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    """What a process ended with: 0, or SIGKILL. One that hangs or fails, fails the test."""
    for _ in range(30_000):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status in (0, signal.SIGKILL), f"the child ended with status {status}; KILLS_VERBOSE=1 shows why"
            return status
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


def _die_at(n: int) -> None:
    left = [n]

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return call

    for name in _OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = io.open = counted(open)


def _say_nothing() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    if "KILLS_VERBOSE" not in os.environ:
        os.dup2(null, 2)
