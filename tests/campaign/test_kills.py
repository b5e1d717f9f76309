"""Training and saving killed without warning: nothing is lost, mixed or left behind, and a run goes on to the bit."""

import logging
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from helpers.kills import ended, killed, same, small_sae, small_trainer, started, weights
from sae_lens import SAE, logger
from torch import Tensor

from sae_lens_switch.training import checkpoints

SETUPS = [
    {"architecture": architecture, "optimizer": optimizer}
    for architecture in ("switch", "sparse_topk")
    for optimizer in ("adam", "row_sparse_adam")
]
COUNTS: Counter[str] = Counter()
OTHER_FILES = ("notes.txt", "report.html")


@pytest.fixture(autouse=True, scope="module")
def said_at_the_end():
    yield
    print(f"\n{dict(COUNTS)}")  # noqa: T201


@pytest.fixture(autouse=True)
def one_thread():
    """A process forked beside threads of torch would wait for them for ever."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(path: Path, setup: dict[str, Any], keep: int | None) -> Any:
    """Resume or begin a run that saves all the time; at its end it puts its SAE in place of an old one."""
    trainer = small_trainer(
        path / "saved", **setup, n_checkpoints=6, keep_checkpoints=keep, save_final_checkpoint=True, resume="latest"
    )
    trainer.fit()
    trainer.sae.save_inference_model(path / "output")
    return trainer


@cache
def reference(number: int) -> Any:
    trainer = small_trainer(None, **SETUPS[number])
    trainer.fit()
    return trainer


@cache
def uninterrupted(number: int) -> dict[str, Tensor]:
    return weights(reference(number))


@cache
def new_sae(number: int) -> Any:
    with TemporaryDirectory() as folder:
        reference(number).sae.save_inference_model(folder)
        return SAE.load_from_disk(folder)


@cache
def seconds_of_a_run(number: int, path: Path) -> float:
    begun = time.monotonic()
    assert not killed(lambda: train(path / f"timed-{number}", SETUPS[number], 2))
    return time.monotonic() - begun


def an_old_sae(path: Path) -> None:
    small_sae(k=2).save_inference_model(path)
    for name in OTHER_FILES:
        (path / name).write_text("mine")


def check_output(path: Path, number: int) -> str:
    """The SAE there is the "old" or the "new" one, in weights and config; returns which."""
    sae: Any = SAE.load_from_disk(path)
    which, expected = ("old", small_sae(k=2)) if sae.cfg.k == 2 else ("new", new_sae(number))
    assert sae.cfg.architecture() == expected.cfg.architecture()
    assert sae.cfg.k == expected.cfg.k
    assert same(sae.state_dict(), expected.state_dict())
    assert all((path / name).read_text() == "mine" for name in OTHER_FILES)
    return which


def check_checkpoints(path: Path) -> int:
    """All that can be seen are whole; returns how far the newest is."""
    for folder in path.glob("[!.]*"):
        checkpoints.verify(folder)
        assert (folder / checkpoints.MANIFEST).exists(), folder
    newest = checkpoints.latest(path)
    return 0 if newest is None else int(newest.name.rstrip("~"))


def left_overs(path: Path) -> list[Path]:
    return [f for f in path.rglob("*") if f.name.startswith(".") or f.name.endswith("~") or f.is_symlink()]


def kill(function: Callable[[], object], rng: random.Random, seconds: float, operations: int) -> bool:
    if rng.random() < 0.5:
        was_killed = killed(function, at=rng.randrange(operations))
    else:
        was_killed = killed(function, after=rng.uniform(0, 1.2 * seconds))
    COUNTS["killed" if was_killed else "ended first"] += 1
    return was_killed


def test_a_run_killed_again_and_again_ends_with_the_same_bits(trials, tmp_path):
    n_killed = 0
    for name, rng in trials(140):
        number, keep, path = rng.randrange(len(SETUPS)), rng.choice([None, 1, 2]), tmp_path / "run"
        setup, far = SETUPS[number], 0
        an_old_sae(path / "output")
        for _ in range(rng.choice([1, 1, 2, 3])):
            run = lambda path=path, setup=setup, keep=keep: train(path, setup, keep)  # noqa: E731
            n_killed += kill(run, rng, seconds_of_a_run(number, tmp_path), 700)
            now = check_checkpoints(path / "saved")
            assert now >= far, name
            far = now
            check_output(path / "output", number)
        trainer = train(path, setup, keep)
        assert same(weights(trainer), uninterrupted(number)), name
        assert check_output(path / "output", number) == "new", name
        assert left_overs(path) == [], name
        assert keep is None or len(os.listdir(path / "saved")) == keep + 1, name
        shutil.rmtree(path)
    assert n_killed > 0


def test_an_sae_killed_while_it_is_replaced_is_the_old_or_the_new(trials, tmp_path):
    path, found = tmp_path / "output", set()
    for name, rng in trials(140):
        an_old_sae(path)
        number = rng.randrange(len(SETUPS))
        trainer = reference(number)
        for _ in range(rng.choice([1, 1, 2])):
            kill(lambda trainer=trainer: trainer.sae.save_inference_model(path), rng, 0.02, 60)
            found.add(check_output(path, number))
        trainer.sae.save_inference_model(path)
        assert check_output(path, number) == "new", name
        assert left_overs(tmp_path) == [], name
        shutil.rmtree(path)
    assert found == {"old", "new"}


def train_without_losing_a_checkpoint(path: Path, setup: dict[str, Any]) -> None:
    errors = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    trainer = small_trainer(path, **setup, n_checkpoints=6, keep_checkpoints=2)
    trainer.fit()
    assert not errors, errors
    assert same(weights(trainer), uninterrupted(SETUPS.index(setup)))


def test_one_of_two_runs_in_a_folder_is_killed_and_the_other_loses_nothing(trials, tmp_path):
    for name, rng in trials(50):
        number, path = rng.randrange(len(SETUPS)), tmp_path / "saved"
        uninterrupted(number)
        other = started(lambda path=path, number=number: train_without_losing_a_checkpoint(path, SETUPS[number]))
        run = lambda path=path, number=number: train_without_losing_a_checkpoint(path, SETUPS[number])  # noqa: E731
        try:
            kill(run, rng, seconds_of_a_run(number, tmp_path), 500)
        finally:
            assert ended(other) == 0, name
        assert check_checkpoints(path) > 0, name
        trainer = small_trainer(path, **SETUPS[number], n_checkpoints=6, keep_checkpoints=2, resume="latest")
        trainer.fit()
        assert same(weights(trainer), uninterrupted(number)), name
        trainer.save_checkpoint("the next")
        assert left_overs(path) == [], name
        shutil.rmtree(path)
