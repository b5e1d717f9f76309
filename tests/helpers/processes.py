"""A function on several processes that form one process group, forked from this one: no imports, no ports."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 240  # seconds, on a machine that may be busy
_FAILED = 3


def on_processes(n: int, function: Callable[[], Any], folder: Path, timeout: float = PATIENCE) -> list[Any]:
    """What the function returns on each of ``n`` processes; what one of them raises fails the test."""
    outcomes = ended_processes(n, function, folder, timeout)
    failed = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert not failed, "\n".join(failed)
    return [outcome[0] for outcome in outcomes]


def ended_processes(
    n: int, function: Callable[[], Any], folder: Path, timeout: float = PATIENCE, kill_after_first: bool = False
) -> list[Any]:
    """Of each process a list with its result, its traceback, or None if it was killed.

    With ``kill_after_first`` the others are killed once the first has ended.
    """
    folder = folder / f"processes-{time.monotonic_ns()}"
    folder.mkdir(parents=True)
    children = [_started(rank, n, function, folder, timeout) for rank in range(n)]
    deadline = time.monotonic() + PATIENCE
    for child in children:
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                for other in children:
                    _kill(other)
                raise AssertionError("the processes hang")
            time.sleep(0.005)
        if kill_after_first:
            for other in children[1:]:
                _kill(other)
            break
    return [_outcome(folder / str(rank)) for rank in range(n)]


def _started(rank: int, n: int, function: Callable[[], Any], folder: Path, timeout: float) -> int:
    child = os.fork()
    if child:
        return child
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=n,
            timeout=timedelta(seconds=timeout),
        )
        _write(folder / str(rank), [function()])
    except BaseException:
        _write(folder / str(rank), f"rank {rank}: {traceback.format_exc()}")
        sys.stderr.flush()
        os._exit(_FAILED)
    os._exit(0)


def _write(file: Path, outcome: object) -> None:
    unfinished = file.with_suffix(".unfinished")
    torch.save(outcome, unfinished)
    os.replace(unfinished, file)


def _outcome(file: Path) -> Any:
    return torch.load(file, weights_only=False) if file.exists() else None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
