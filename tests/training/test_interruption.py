"""Signals in one process and from a terminal: held while a checkpoint is saved, and given back."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, D, E, F, K, activations, run_fields, training_sae
from sae_lens.config import SAETrainerConfig

from sae_lens_switch import SparseSAETrainer
from sae_lens_switch.training import checkpoints, interruption
from sae_lens_switch.training.interruption import Interruption, exit_code


@pytest.fixture
def handlers():
    """As they are when Python starts."""
    theirs = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored, if this suite runs under nohup
    yield {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, theirs)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored(signum, handlers):  # noqa: ARG001
    signal.signal(signum, signal.SIG_IGN)
    with Interruption() as held:
        assert signal.getsignal(signum) is signal.SIG_IGN
        os.kill(os.getpid(), signum)
        held.check()
    assert signal.getsignal(signum) is signal.SIG_IGN


def test_each_signal_raises_with_its_exit_code_and_handlers_are_given_back(handlers):
    for signum, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        with pytest.raises(interruption.INTERRUPTIONS) as caught, Interruption() as held, held.waiting():
            os.kill(os.getpid(), signum)
        assert exit_code(caught.value) == code
        assert {s: signal.getsignal(s) for s in handlers} == handlers


class Finalised:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


def except_everything() -> None:
    with contextlib.suppress(Exception):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("swallow", [Finalised, except_everything])
def test_a_signal_that_others_swallow_is_raised_at_the_next_moment(swallow, handlers):  # noqa: ARG001
    with Interruption() as held:
        with held.waiting():
            swallow()
        with pytest.raises(interruption.SignalledError):
            held.check()
        held.check()  # once
    with pytest.raises(interruption.SignalledError), Interruption() as held, held.waiting():
        swallow()


def test_a_handler_that_was_not_set_from_python_is_left_alone(monkeypatch, handlers):
    set_up = []
    get, put = signal.getsignal, signal.signal
    monkeypatch.setattr(signal, "getsignal", lambda s: None if s == signal.SIGTERM else get(s))
    monkeypatch.setattr(signal, "signal", lambda s, handler: set_up.append(s) or put(s, handler))
    with Interruption():
        pass
    assert sorted(set_up) == sorted([*(set(handlers) - {signal.SIGTERM})] * 2)


def test_a_platform_without_sighup():
    program = """
import signal
del signal.SIGHUP
from sae_lens_switch.training.interruption import Interruption
with Interruption() as held:
    held.check()
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, timeout=600)
    assert done.stdout == "fine\n", done.stderr


def test_further_signals_while_a_checkpoint_is_saved_change_nothing(tmp_path, handlers):  # noqa: ARG001
    """It is whole, and the first signal's exception is the one that comes out."""

    def save(checkpoint_path: Any) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), signum)
        (checkpoint_path / "extra").write_text("x")

    batches = activations(5)
    cfg = SAETrainerConfig(5 * 64, 64, lr=1e-3, lr_end=1e-4, checkpoint_path=str(tmp_path))

    def source():
        yield from batches[:3]
        os.kill(os.getpid(), signal.SIGTERM)
        yield batches[3]

    made = SparseSAETrainer(cfg, training_sae(), source(), save_checkpoint_fn=save)
    with pytest.raises(interruption.SignalledError, match="SIGTERM"):
        made.fit()
    (saved,) = tmp_path.iterdir()
    checkpoints.verify(saved)
    assert (saved / "extra").exists()


PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import time
import torch
from helpers import tiny_dataset, tiny_model
from sae_lens_switch import SparseSAETrainer
from sae_lens_switch.train import main

step = SparseSAETrainer._train_step

def slowly(self, *args, **kwargs):
    with open(sys.argv[1], "a") as file:
        print(self.n_training_steps, file=file)
    time.sleep(0.01)
    return step(self, *args, **kwargs)

SparseSAETrainer._train_step = slowly
sys.exit(main(sys.argv[2:], override_model=tiny_model(), override_dataset=tiny_dataset()))
"""


def command(path: Path, **fields: Any) -> list[str]:
    fields = {"training_tokens": 64 * 10**6, "checkpoint_path": path / "saved", "output_path": "none", **fields}
    given = {**run_fields(path), **fields}
    del given["logger"]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    sizes = ["--d-in", str(D), "--d-sae", str(F), "--n-experts", str(E), "--k", str(K), "--no-log-to-wandb"]
    return [sys.executable, "-c", PROGRAM, str(path / "steps"), "--architecture", "switch", *sizes, *flags]


def wait_for_steps(child: subprocess.Popen[Any], path: Path, n: int, seconds: float = 600) -> int:
    deadline = time.monotonic() + seconds
    while not (path / "steps").exists() or len((path / "steps").read_text().splitlines()) < n:
        assert child.poll() is None, child.returncode
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return len((path / "steps").read_text().splitlines())


def test_a_terminal_that_is_closed_saves_and_ends_with_129_and_a_job_that_ignores_signals_goes_on(tmp_path):
    """As a closed ssh session and as nohup do it; at once, since most of either is the import."""
    hung_up, ignoring = tmp_path / "hung up", tmp_path / "ignoring"
    hung_up.mkdir()
    ignoring.mkdir()
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    first = subprocess.Popen(
        command(hung_up), stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=take_terminal, pass_fds=[theirs]
    )
    os.close(theirs)
    second = subprocess.Popen(
        command(ignoring), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=ignore
    )
    try:
        read = threading.Thread(target=drain, args=(ours, first), daemon=True)
        read.start()
        wait_for_steps(first, hung_up, 5)
        read_stop.set()
        read.join()
        os.close(ours)  # the kernel sends SIGHUP
        n = wait_for_steps(second, ignoring, 5)
        for signum in (signal.SIGINT, signal.SIGHUP):
            second.send_signal(signum)
        assert first.wait(timeout=600) == 129
        saved = checkpoints.latest(hung_up / "saved")
        assert saved is not None
        wait_for_steps(second, ignoring, n + 20)
        second.terminate()
        out, err = second.communicate(timeout=600)
        assert second.returncode == 143, err
        assert "to resume, run the same command with --resume latest" in out
        assert checkpoints.latest(ignoring / "saved") is not None
    finally:
        for child in (first, second):
            child.kill()
            child.wait()


read_stop = threading.Event()


def drain(terminal: int, child: subprocess.Popen[Any]) -> None:
    """Or the child waits for somebody to read."""
    while child.poll() is None and not read_stop.is_set():
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 1 << 16)
