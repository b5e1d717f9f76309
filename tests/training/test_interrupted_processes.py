"""Signals to a process of its own: it saves, fails, and is resumed to the same bits."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import HOOK, ROOT, activations, training_sae
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
from sae_lens.config import SAETrainerConfig
from sae_lens.training import multi_sae_trainer as multi_trainer_module
from sae_lens.training._interruption import InterruptedException

from sae_lens_switch import SparseSAETrainer, TrainerOptions
from sae_lens_switch.common.substitution import constructing
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.multi_sae_trainer import MultiSAETrainer
from sae_lens_switch.training.runners import with_options

INTERRUPTED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "SIGTERM": (signal.SIGTERM, "tensor", {"optimizer": "adam"}),
    "SIGINT": (
        signal.SIGINT,
        "generator",
        {"optimizer": "row_sparse_adam", "sae": {"architecture": "sparse_topk"}},
    ),
}


class Reporting(SparseSAETrainer):
    """Waits for the signal, in the middle."""

    def step(self, batch):
        output = super().step(batch)
        print(self.n_training_steps, flush=True)  # noqa: T201
        if self.n_training_steps == 9:
            wait_until(lambda: self._interruption._pending is not None)
        return output


def train_when_told(path: str, name: str) -> None:
    """The child's program."""
    _, kind, setup = INTERRUPTED[name]
    trainer = make_trainer(Path(path), data(kind), trainer_class=Reporting, **setup)
    sys.stdin.readline()
    trainer.fit()


@pytest.fixture(scope="module", autouse=True)
def children(tmp_path_factory):
    """Started at once, and told to train by their tests: until then they import, while other tests run."""
    program = f"import sys; sys.path[:0] = sys.argv[1:3]; import {__name__} as t; t.train_when_told(*sys.argv[3:])"
    places = [str(ROOT / "tests"), str(Path(__file__).parent)]
    started = {}
    for name in INTERRUPTED:
        path = tmp_path_factory.mktemp("child")
        command = [sys.executable, "-c", program, *places, str(path), name]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started[name] = path, subprocess.Popen(command, text=True, **pipes)
    yield started
    for _, child in started.values():
        child.kill()
        child.communicate()


@pytest.mark.parametrize("name", INTERRUPTED)
def test_a_process_told_to_stop_saves_fails_and_is_resumed_to_the_same_bits(name, children):
    signum, kind, setup = INTERRUPTED[name]
    path, child = children[name]
    child.stdin.write("go\n")
    child.stdin.flush()
    for line in child.stdout:
        if line.strip() == "9":
            break
    child.send_signal(signum)
    _, errors = child.communicate(timeout=PATIENCE)
    assert child.returncode != 0
    assert ("KeyboardInterrupt" if signum == signal.SIGINT else "interrupted by SIGTERM") in errors
    (saved,) = folders(path)
    assert int(saved) == 10 * BATCH
    checkpoints.verify(path / saved)
    resumed = make_trainer(path, data(kind), resume="latest", **setup)
    resumed.fit()
    assert what_differs(everything(resumed), uninterrupted(data(kind), **setup)) == []


def signalled_in(step: int, signum: int) -> Any:
    class Signalled(SparseSAETrainer):
        def step(self, batch):
            if self.n_training_steps == step:
                os.kill(os.getpid(), signum)
            return super().step(batch)

    return Signalled


@pytest.mark.parametrize(
    ("signum", "exception", "kind", "setup"),
    [
        (signal.SIGTERM, InterruptedException, "generator", {"sae": {"architecture": "sparse_topk"}}),
        (signal.SIGINT, KeyboardInterrupt, "tensor", {"optimizer": "row_sparse_adam"}),
    ],
)
def test_a_signal_waits_for_the_end_of_the_step(signum, exception, kind, setup, tmp_path):
    with pytest.raises(exception):
        make_trainer(tmp_path, data(kind), trainer_class=signalled_in(7, signum), **setup).fit()
    assert folders(tmp_path) == [str(8 * BATCH)]
    resumed = make_trainer(tmp_path, data(kind), resume="latest", **setup)
    resumed.fit()
    assert what_differs(everything(resumed), uninterrupted(data(kind), **setup)) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_last_step_is_not_lost(signum, tmp_path):
    received = []
    previous = signal.signal(signum, lambda *_: received.append(signum))
    try:
        make_trainer(tmp_path, trainer_class=signalled_in(STEPS - 1, signum), save_final_checkpoint=True).fit()
    except (InterruptedException, KeyboardInterrupt):
        received.append(signum)
    finally:
        signal.signal(signum, previous)
    assert received == [signum]
    assert folders(tmp_path)  # and nothing that was learned is


class Places:
    """Batches that know their place, as a loader of the user's may."""

    def __init__(self, signal_at: int | None = None) -> None:
        self.batches, self.place, self.signal_at = activations(STEPS, batch=BATCH), 0, signal_at

    def __iter__(self):
        return self

    def __next__(self):
        if self.place == len(self.batches):
            raise StopIteration
        self.place += 1
        if self.place == self.signal_at:
            os.kill(os.getpid(), signal.SIGINT)
        return self.batches[self.place - 1]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def test_a_signal_while_a_batch_is_drawn_loses_no_batch(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, Places(signal_at=12)).fit()
    resumed = make_trainer(tmp_path, Places(), resume="latest")
    resumed.fit()
    assert resumed.n_training_steps == STEPS
    assert what_differs(everything(resumed), uninterrupted()) == []


def test_a_signal_in_the_last_step_of_many_saes_saves_them(tmp_path):
    def batches():
        for i, batch in enumerate(activations(STEPS, batch=BATCH)):
            if i == STEPS - 1:
                os.kill(os.getpid(), signal.SIGTERM)  # which is seen after the step that follows
            yield {HOOK: batch}

    class Unstoppable(MultiSAETrainer):
        """Signals are seen nowhere but at the end: this one arrives while a batch is drawn."""

        def _batches(self, stream, interruption):  # noqa: ARG002
            return stream

    cfg = SAETrainerConfig(STEPS * BATCH, BATCH, lr=1e-3, lr_end=1e-4, checkpoint_path=str(tmp_path))
    saes = {name: training_sae(dtype="float32") for name in "ab"}
    with constructing(multi_trainer_module, "SAETrainer", with_options(TrainerOptions())):
        trainer = Unstoppable(cfg, saes, dict.fromkeys("ab", HOOK), batches())
    with pytest.raises(InterruptedException):
        trainer.fit()
    assert folders(tmp_path) == [str(STEPS * BATCH)]
