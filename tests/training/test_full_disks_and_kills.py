"""A disk that is full and a process that is killed damage no checkpoint."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.faults import (
    BATCH,
    PATIENCE,
    STEPS,
    data,
    everything,
    folders,
    make_trainer,
    uninterrupted,
    wait_until,
    what_differs,
)

from sae_lens_switch.training import checkpoints

# Real processes that have imported everything before they are forked: one costs milliseconds.
FORKS: Any = get_context("forkserver")
FORKS.set_forkserver_preload(["sae_lens_switch"])


# A disk that is full


def train_into_a_full_disk(path: str, limit: int) -> None:
    """The child's program: between batches 10 and 20 no file may be longer than ``limit``."""
    silence()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def batches():
        for i, batch in enumerate(data("generator")):
            if i in (10, 20):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit if i == 10 else hard, hard))
            yield batch

    trainer = make_trainer(Path(path), batches(), n_checkpoints=STEPS)
    trainer.fit()
    torch.save(everything(trainer), Path(path).parent / "end.pt")


@pytest.mark.parametrize("limit", [0, 100, 6000, 12_000])
def test_where_files_cannot_be_written_training_goes_on_and_old_checkpoints_stay(limit, tmp_path):
    path = tmp_path / "checkpoints"
    child = FORKS.Process(target=train_into_a_full_disk, args=(str(path), limit))
    child.start()
    child.join(PATIENCE)
    assert child.exitcode == 0
    steps = sorted(int(name) // BATCH for name in whole_checkpoints(path))
    assert set(range(3, 10)) <= set(steps)
    assert not set(range(11, 20)) & set(steps)
    assert set(range(22, STEPS)) <= set(steps)
    assert not [name for name in folders(path) if name.startswith(".")]
    assert what_differs(torch.load(tmp_path / "end.pt"), uninterrupted()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A megabyte of its own."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        pytest.skip("only root can mount a small disk")
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(path)], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)  # a traceback may hold a file


@pytest.mark.parametrize("free_kilobytes", [0, 16, 24, 48])
def test_a_disk_that_fills_up_stops_no_training_and_damages_no_checkpoint(free_kilobytes, small_disk, caplog):
    def batches():
        for i, batch in enumerate(data("generator")):
            if i == 12:
                (small_disk / "filler").write_bytes(bytes(free_bytes(small_disk) - 1024 * free_kilobytes))
            yield batch

    trainer = make_trainer(small_disk, batches(), n_checkpoints=2)
    trainer.fit()
    assert folders(small_disk) == [str(11 * BATCH), "filler"]
    assert f"checkpoint at {21 * BATCH} samples could not be saved" in caplog.text
    assert caplog.text.count("could not be saved") == 1
    resumed = make_trainer(small_disk)
    assert resumed.resume("latest") == small_disk / str(11 * BATCH)
    assert what_differs(everything(trainer), uninterrupted()) == []


def free_bytes(path: Path) -> int:
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


def test_a_full_disk_at_an_interruption_is_an_error_that_leaves_nothing_half_written(small_disk):
    def batches():
        yield from islice(data("generator"), 15)
        (small_disk / "filler").write_bytes(bytes(free_bytes(small_disk)))
        raise KeyboardInterrupt

    with pytest.raises(OSError, match="No space left on device"):
        make_trainer(small_disk, batches(), n_checkpoints=2).fit()
    assert folders(small_disk) == [str(11 * BATCH), "filler"]
    checkpoints.verify(small_disk / str(11 * BATCH))


# Killed without warning


N_KILLS, LONG = 10, 400


class Allowance:
    """So many checkpoints, or a child that nobody finds the time to kill would train to the end."""

    left = LONG // (N_KILLS + 2)

    def __call__(self, checkpoint_path: Path | None) -> None:  # noqa: ARG002
        self.left -= 1
        if self.left <= 0:
            time.sleep(PATIENCE)


def save_all_the_time(path: str) -> None:
    """The child's program: after every step there is a checkpoint, and it is found by the next child."""
    silence()
    trainer = long_run(Path(path), n_checkpoints=LONG, keep_checkpoints=2, resume="latest")
    trainer.save_checkpoint_fn = Allowance()
    trainer.fit()


def die_while_saving(path: str) -> None:
    silence()
    trainer = long_run(Path(path), n_checkpoints=LONG, keep_checkpoints=2, resume="latest")
    n_saved = []

    def killed_in_the_third(checkpoint_path):  # noqa: ARG001
        n_saved.append(1)
        if len(n_saved) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.save_checkpoint_fn = killed_in_the_third
    trainer.fit()


def silence() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)


def long_run(path: Path | None, **fields: Any) -> Any:
    return make_trainer(path, data("tensor"), total_training_samples=LONG * BATCH, **fields)


def whole_checkpoints(path: Path) -> list[str]:
    """All that can be seen; each must be whole."""
    visible = [name for name in folders(path) if not name.startswith(".")]
    for name in visible:
        checkpoints.verify(path / name)
        assert (path / name / checkpoints.MANIFEST).exists()
    return visible


def test_after_kill_9_at_any_moment_a_whole_checkpoint_is_found(tmp_path):
    moments = random.Random(0)
    left_over, far = 0, 0
    for n in range(N_KILLS + 1):
        before = set(folders(tmp_path))
        child = FORKS.Process(target=die_while_saving if n == N_KILLS else save_all_the_time, args=(str(tmp_path),))
        child.start()
        if n < N_KILLS:
            wait_until(lambda before=before: {f for f in folders(tmp_path) if f[0] != "."} - before)
            time.sleep(moments.uniform(0, 0.05))
            child.kill()
        child.join(PATIENCE)
        assert child.exitcode == -signal.SIGKILL
        left_over += any(name.startswith(".") for name in folders(tmp_path))
        assert whole_checkpoints(tmp_path)
        trainer = long_run(tmp_path)
        assert trainer.resume("latest").name in folders(tmp_path)
        assert trainer.n_training_steps > far
        far = trainer.n_training_steps
    assert left_over > 0
    assert far < LONG
    last = long_run(tmp_path, n_checkpoints=4, keep_checkpoints=2, resume="latest", save_final_checkpoint=True)
    last.fit()
    found = folders(tmp_path)
    assert f"final_{LONG * BATCH}" in found
    assert len(found) == 3
    assert not [name for name in found if name.startswith(".") or name.endswith("~")]
    without = long_run(None)
    without.fit()
    assert what_differs(everything(last), everything(without)) == []
