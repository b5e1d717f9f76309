"""Threads, signals, terminals, logs, and files whose names and contents mean harm."""

import ast
import fcntl
import importlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import permutations
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import sae_lens
from helpers import HOOK, D, E, F, K, activations, run_fields, switch_sae, training_sae
from sae_lens import llm_sae_training_runner as llm_module
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.topk_sae import TopKTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from yaml import safe_load

import sae_lens_switch
from sae_lens_switch import (
    LanguageModelSAERunnerConfig,
    SparseSAETrainer,
    SparseTopKTrainingSAE,
    TrainerOptions,
    override_topk,
    report,
)
from sae_lens_switch.common import printable, progress
from sae_lens_switch.common.progress import Sentences, track
from sae_lens_switch.common.substitution import constructing
from sae_lens_switch.hub.model_card import model_card
from sae_lens_switch.saes import registration
from sae_lens_switch.train import main
from sae_lens_switch.training import checkpoints, interruption
from sae_lens_switch.training import runners as runner_module
from sae_lens_switch.training.history import History, read_history
from sae_lens_switch.training.interruption import Interruption, exit_code
from sae_lens_switch.training.optim.constrained_adam import ConstrainedAdam
from sae_lens_switch.training.optim.row_sparse_adam import RowSparseAdam
from sae_lens_switch.training.runners import _MultiSAETrainer, with_options

ROOT = Path(__file__).parents[2]
EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\x00\u202e\ud800end"


# Which class SAELens constructs


@pytest.fixture
def stock():
    """The class in SAELens's table, which must be there again afterwards."""
    registered = SAE_TRAINING_CLASS_REGISTRY["topk"]
    assert registered[0] is TopKTrainingSAE
    yield registered
    assert SAE_TRAINING_CLASS_REGISTRY["topk"] is registered


def fail_if(what: bool) -> None:
    if what:
        raise RuntimeError


def is_overridden() -> bool:
    return SAE_TRAINING_CLASS_REGISTRY["topk"][0] is SparseTopKTrainingSAE


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_overrides_that_overlap_end_with_the_last(stock, order):  # noqa: ARG001
    overrides = [override_topk() for _ in order]
    for n_ended, i in enumerate(order):
        assert is_overridden(), n_ended
        overrides[i].restore()
        overrides[i].restore()  # a second call ends none of the others
    assert not is_overridden()


def test_an_override_can_be_entered_again_and_ends_with_an_exception(stock):  # noqa: ARG001
    override = override_topk()
    for _ in range(2):
        with pytest.raises(RuntimeError), override:
            fail_if(is_overridden())
        assert not is_overridden()


def test_a_class_from_before_a_reload_of_its_module_still_gives_back(stock):  # noqa: ARG001
    importlib.reload(registration)
    assert registration.override_topk is not override_topk
    with override_topk():
        assert is_overridden()


def test_what_others_register_meanwhile_stays(stock):
    theirs = (type("Theirs", (TopKTrainingSAE,), {}), stock[1])
    with override_topk():
        SAE_TRAINING_CLASS_REGISTRY["topk"] = theirs
    assert SAE_TRAINING_CLASS_REGISTRY["topk"] is theirs
    SAE_TRAINING_CLASS_REGISTRY["topk"] = stock


def test_overrides_in_threads(stock):  # noqa: ARG001
    barrier = threading.Barrier(4)

    def work(_: int) -> list[bool]:
        found = []
        barrier.wait()
        for _ in range(300):
            with override_topk():
                found.append(is_overridden())
        return found

    with ThreadPoolExecutor(4) as pool:
        assert all(all(found) for found in pool.map(work, range(4)))
    assert not is_overridden()


def host() -> tuple[Any, Any]:
    module: Any = ModuleType("host")
    module.Trainer = lambda: "stock"
    return module, module.Trainer


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_of_blocks_that_overlap_the_last_that_is_open_chooses(order):
    module, stock = host()
    blocks = [constructing(module, "Trainer", lambda i=i: i) for i in range(3)]
    for block in blocks:
        block.__enter__()
    still_open = [0, 1, 2]
    for i in order:
        assert module.Trainer() == still_open[-1]
        blocks[i].__exit__(None, None, None)
        still_open.remove(i)
    assert module.Trainer is stock


def test_a_block_that_fails_or_is_closed_by_another_thread_leaves_nothing_behind():
    module, stock = host()
    with pytest.raises(RuntimeError), constructing(module, "Trainer", lambda: "ours"):
        raise RuntimeError
    assert module.Trainer is stock

    block = constructing(module, "Trainer", lambda: "ours")
    block.__enter__()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(block.__exit__, None, None, None).result()
    assert module.Trainer is stock
    with constructing(module, "Trainer", lambda: "later"):
        assert module.Trainer() == "later"
    assert module.Trainer is stock


def test_each_thread_constructs_what_it_has_chosen_and_others_what_saelens_would():
    module, stock = host()
    barrier = threading.Barrier(5)

    def work(name: str) -> set[str]:
        barrier.wait()
        found = set()
        for _ in range(300):
            with ExitStack() as stack:
                if name != "stock":
                    stack.enter_context(constructing(module, "Trainer", lambda: name))
                found.add(module.Trainer())
        return found

    names = ["a", "b", "c", "stock", "stock"]
    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(work, names)) == [{name} for name in names]
    assert module.Trainer is stock


def test_runs_in_two_threads_have_their_own_options_and_a_stock_run_between_them_its_own_trainer(
    tmp_path, model, dataset, monkeypatch
):
    """All three are in ``run`` at once: a trainer is made only when the others are about to make theirs."""
    barrier = threading.Barrier(3, timeout=120)
    made: dict[str, Any] = {}
    lock = threading.Lock()  # the language model is one

    def check_hook(*args: Any) -> None:
        with lock:
            check(*args)
        barrier.wait()

    check = runner_module.check_hook
    monkeypatch.setattr(runner_module, "check_hook", check_hook)

    def ours(name: str, optimizer: Any) -> None:
        class Runner(sae_lens_switch.LanguageModelSAETrainingRunner):
            def run_trainer_with_interruption_handling(self, trainer):
                made[name] = trainer
                barrier.wait()
                with lock:
                    return super().run_trainer_with_interruption_handling(trainer)

        cfg = LanguageModelSAERunnerConfig(
            architecture="switch", d_in=D, d_sae=F, n_experts=E, k=K, optimizer=optimizer, **run_fields(tmp_path / name)
        )
        Runner(cfg, override_model=model, override_dataset=dataset).run()

    class Stock(llm_module.LanguageModelSAETrainingRunner):
        def run_trainer_with_interruption_handling(self, trainer):
            made["stock"] = trainer
            barrier.wait()
            with lock:
                return trainer.fit()

    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(ours, name, name) for name in ("adam", "row_sparse_adam")]
        cfg = sae_lens.LanguageModelSAERunnerConfig(
            sae=sae_lens_switch.SwitchTrainingSAEConfig(d_in=D, d_sae=F, n_experts=E, k=K),
            **run_fields(tmp_path / "stock"),
        )
        runner = Stock(cfg, override_model=model, override_dataset=dataset)
        barrier.wait()
        runner.run()
        for run in runs:
            run.result()
    assert {s: signal.getsignal(s) for s in handlers} == handlers
    assert llm_module.SAETrainer is SAETrainer
    assert type(made["stock"]) is SAETrainer
    assert type(made["adam"]) is type(made["row_sparse_adam"]) is SparseSAETrainer
    assert type(made["adam"].optimizer) is ConstrainedAdam
    assert type(made["row_sparse_adam"].optimizer) is RowSparseAdam
    for name in made:
        assert (tmp_path / name / "output" / "sae_weights.safetensors").exists()


# Signals


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


# A batch job's log


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_progress_is_a_sentence_after_10_seconds_then_30_then_one_a_minute(capsys):
    clock = Clock()
    asked = []

    def facts() -> dict[str, Any]:
        asked.append(clock.now)
        return {"mse_loss": 12.3111, "dead latents": 512}

    with Sentences(10_000_000, 0, "trained on", clock=clock) as sentences:
        for _ in range(1200):  # half a second and 1024 samples a step
            clock.now += 0.5
            sentences.update(1024, facts)
    assert capsys.readouterr().out == ""
    assert [t - 1000 for t in asked] == [10, 40, 100, 160, 220, 280, 340, 400, 460, 520, 580]


def test_the_sentence(capsys):
    clock = Clock()
    with Sentences(10_000_000, 0, "trained on", clock=clock) as sentences:
        clock.now += 600
        sentences.update(1_228_800, lambda: {"mse_loss": 12.3111, "dead latents": 512})
    place = "trained on 1,228,800 of 10,000,000 samples (12 %) in 00:10:00, 01:11:23 to go"
    assert capsys.readouterr().err == f"{place}; mse_loss 12.31, dead latents 512\n"  # once: the end has nothing to add


def test_a_resumed_run_counts_its_own_time_and_the_end_is_told(capsys):
    clock = Clock()
    with Sentences(1000, 600, "trained on", clock=clock) as sentences:
        clock.now += 10
        sentences.update(100)
        clock.now += 20
        sentences.update(300)
    assert capsys.readouterr().err.splitlines() == [
        "trained on 700 of 1,000 samples (70 %) in 00:00:10, 00:00:30 to go",
        "trained on 1,000 of 1,000 samples (100 %) in 00:00:30",
    ]


@pytest.fixture
def times(monkeypatch):
    """Of sentences: every look at the clock is five seconds later."""
    clock = Clock()

    def later() -> float:
        clock.now += 5
        return clock.now

    make = Sentences.__init__
    monkeypatch.setattr(Sentences, "__init__", lambda self, *args, **kwargs: make(self, *args, clock=later, **kwargs))


def lines_of(capsys) -> list[str]:
    err = capsys.readouterr().err
    assert "\r" not in err  # no frames of a bar
    return err.splitlines()


@pytest.mark.usefixtures("times")
def test_fit_the_estimate_and_the_way_back_write_sentences(tmp_path, capsys):
    batches = activations(30)
    cfg = SAETrainerConfig(24 * 64, 64, lr=1e-3, lr_end=1e-4, checkpoint_path=str(tmp_path))
    cfg.n_batches_for_norm_estimate = 6
    SparseSAETrainer(cfg, training_sae(normalize_activations="expected_average_only_in"), iter(batches)).fit()
    lines = lines_of(capsys)
    assert lines[0].startswith("Estimating norm scaling factor: 2 of 6 batches (33 %) in 00:00:10, 00:00:20 to go")
    place, _, facts = lines[2].partition("; ")
    assert place.startswith("trained on 64 of 1,536 samples (4 %) in 00:00:")
    assert facts.startswith("step 1, mse_loss ")
    assert lines[-1].startswith("trained on 1,536 of 1,536 samples (100 %)")
    assert len(lines) < 12
    ended, resumed = (SparseSAETrainer(cfg, training_sae(), iter(batches)) for _ in range(2))
    ended.fit()
    ended.save_checkpoint("here")
    capsys.readouterr()
    resumed.resume(tmp_path / "here")
    lines = lines_of(capsys)
    assert lines[0].startswith("Returning to the place in the activations: 2 of 24 batches (8 %)")


@pytest.mark.usefixtures("times")
def test_many_saes_on_one_stream_write_sentences(capsys):
    from sae_lens.training import multi_sae_trainer as module

    cfg = SAETrainerConfig(10 * 64, 64, lr=1e-3, lr_end=1e-4)
    saes = {name: training_sae(dtype="float32") for name in "ab"}
    stream = iter([{HOOK: batch} for batch in activations(10)])
    with constructing(module, "SAETrainer", with_options(TrainerOptions())):
        _MultiSAETrainer(cfg, saes, dict.fromkeys(saes, HOOK), stream).fit()
    lines = lines_of(capsys)
    assert lines[0].startswith("trained on 128 of 640 samples (20 %) in 00:00:10, 00:00:40 to go; a ")
    assert lines[-1].startswith("trained on 640 of 640 samples (100 %)")
    assert len(lines) < 8


def test_on_a_terminal_there_is_a_bar_with_facts(capsys, monkeypatch):
    monkeypatch.setattr(progress, "has_bar", lambda: True)
    monkeypatch.setattr(progress, "_DESCRIBED_EVERY", 2)
    with progress.progress(100, 20, "Training SAE", "trained on") as bar:
        for _ in range(4):
            bar.update(20, lambda: {"step": 3, "mse_loss": 1.5})
        assert bar.n == 100
    assert list(track(range(3), "Looking")) == [0, 1, 2]
    err = capsys.readouterr().err
    assert "step: 3 | mse_loss: 1.50000: 100%" in err
    assert "\r" in err
    assert "trained on" not in err


@pytest.mark.parametrize(("terminal", "variable", "bar"), [(True, "", True), (False, "", False), (False, "1", True)])
def test_who_gets_a_bar(terminal, variable, bar, monkeypatch):
    """With TQDM_DISABLE tqdm, which then is silent."""
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: terminal))
    monkeypatch.setenv("TQDM_DISABLE", variable)
    assert progress.has_bar() == bar


# Files and names that mean harm


def loads_of(file: Path) -> list[str]:
    """Calls that read what could hold code, without saying that they do not run it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        unsafe = {
            "torch.load": options.get("weights_only") != "True",
            "yaml.load": True,
            "yaml.unsafe_load": True,
            "yaml.full_load": True,
            "np.load": options.get("allow_pickle") != "False",
            "numpy.load": options.get("allow_pickle") != "False",
            "pd.read_pickle": True,
            "eval": True,
            "exec": True,
        }
        if unsafe.get(name) or name.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"):
            found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_what_is_read_from_files_is_never_run():
    files = [
        f for folder in ("sae_lens_switch", "kernels", "benchmarks", "examples") for f in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 40
    assert [call for file in files for call in loads_of(file)] == []


def test_the_search_finds_what_it_looks_for(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "x.py"
    file.write_text("torch.load(f)\ntorch.load(f, weights_only=True)\npickle.loads(x)\nyaml.load(x, L)\nnp.load(f)\n")
    assert [call.split(": ")[0] for call in loads_of(file)] == ["x.py:1", "x.py:3", "x.py:4", "x.py:5"]


BROKEN = {
    "no JSON": b'{"step": 1}\n{"step": 2, "losses/m',
    "no object": b"[1, 2]\n",
    "binary": bytes(range(256)) * 9,
    "deep": b"[" * 200_000 + b"]" * 200_000,
    "deep object": b'{"a":' * 100_000,
    "huge whole number": b'{"step": ' + b"9" * 10_000 + b"}\n",
    "empty lines": b"\n\n\n",
}
# Readable, with values that no curve can have.
ODD = [
    '{"step": 1, "losses/mse_loss": NaN, "routing/load": [0.5, Infinity, "x", 0.1]}',
    '{"step": 1' + "0" * 400 + ', "losses/mse_loss": 1e999, "routing/load": 7, "metrics/l0": {"a": [[[1]]]}}',
    '{"step": "\\ud800\\u001b[2J", "losses/mse_loss": [1, 2], "routing/load": [1, 2, 3, -Infinity]}',
    '{"step": null, "losses/mse_loss": true, "routing/load": [[1], [2], [3], [4]], "metrics/explained_variance": "x"}',
    '{"step": 5, "losses/mse_loss": 2.5, "routing/load": [0.25, 0.25, 0.25, 0.25], "\\ud800\\u001b": 1}',
    '{"step": 6, "losses/mse_loss": -1e308, "routing/load": [0.25, null, 1e400, 0.25], "details/x": {}}',
]


def saved_sae(path: Path, **metadata: Any) -> Path:
    sae = switch_sae(dtype="float32")
    for name, value in metadata.items():
        setattr(sae.cfg.metadata, name, value)
    sae.save_model(path)
    return path


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_history_does_no_harm_to_a_report_or_a_resumed_run(kind, tmp_path, caplog):
    run = saved_sae(tmp_path / "run")
    (run / "history.jsonl").write_bytes(BROKEN[kind])
    page = report.write_report(run, contexts=0).read_text(encoding="utf-8")
    assert "The history of the run cannot be read: " in page
    with pytest.raises(ValueError, match=r"history.jsonl, line \d+: expected"):
        report.load_run(run, history=run / "history.jsonl")
    history = History(100)
    history.rows = [{"step": 1}]
    history.load(run)
    assert history.rows == []
    assert "the curves begin anew: " in caplog.text


def test_a_history_that_is_too_large_is_not_read(tmp_path):
    file = tmp_path / "history.jsonl"
    with open(file, "wb") as handle:
        handle.truncate(1 << 40)  # it takes no space on disk
    with pytest.raises(ValueError, match="expected at most 268,435,456 bytes; got 1,099,511,627,776"):
        read_history(file)


def test_a_damaged_wandb_file_is_a_value_error(tmp_path):
    file = tmp_path / "run.wandb"
    data = b"\xff" * 40
    file.write_bytes(b":W&B\x00\x00\x00" + b"\x00" * 4 + len(data).to_bytes(2, "little") + b"\x01" + data)
    with pytest.raises(ValueError, match="is damaged: "):
        read_history(file)


def test_odd_values_in_a_history_are_left_out(tmp_path):
    run = saved_sae(tmp_path / "run")
    (run / "history.jsonl").write_text("\n".join(ODD) + "\n")
    rows = read_history(run / "history.jsonl")
    assert [row.get("losses/mse_loss", "none") for row in rows] == [None, None, [1, 2], "none", 2.5, -1e308]
    assert [row.get("routing/load", "none") for row in rows] == [
        *("none", 7, [1, 2, 3, None], "none"),
        *([0.25] * 4, [0.25, None, None, 0.25]),
    ]
    page = report.write_report(run, contexts=0).read_text(encoding="utf-8")
    assert "plot-loss" in page
    assert "plot-load-history" in page
    history = History(100)
    history.load(run)
    history.save(tmp_path)
    assert read_history(tmp_path / "history.jsonl") == rows


@pytest.mark.parametrize("text", ["[" * 10**5, '{"n": ' + "9" * 9999 + "}", "NaN", "\x00\x01"])
def test_a_broken_metrics_file_is_named(text, tmp_path):
    run = saved_sae(tmp_path / "run")
    (run / "metrics.json").write_text(text)
    if text == "NaN":  # which Python reads; there is no table in it
        assert report.load_run(run).metrics == {}
    else:
        with pytest.raises(ValueError, match="metrics.json is not JSON"):
            report.load_run(run)
    (run / "metrics.json").write_text(
        '{"l0": 1e999, "explained_variance": NaN, "ce_loss_recovered": 1' + "0" * 400 + "}"
    )
    assert "Summary" in report.write_report(run, contexts=0).read_text(encoding="utf-8")


HARMFUL = [*map(chr, (*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x202E, 0x2066, 0xD800, 0xDFFF))]


def test_what_is_shown_holds_nothing_that_a_terminal_obeys():
    assert printable.printable("a\x1b[31mb\r\x9b\ud800") == "a\\x1b[31mb\\r\\x9b\\ud800"
    assert not set(printable.printable("".join(HARMFUL))) & set(HARMFUL)
    kept = "Zwölf\tBoxkämpfer\n日本語 \u200d\xa0עברית 🎉"
    assert printable.printable(kept) == kept
    assert printable.printable(Path("x\x07")) == "x\\x07"


def shown_without_harm(text: str) -> bool:
    return not set(text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass")) & set(HARMFUL)


def test_names_in_a_report_and_its_file_do_no_harm(tmp_path, capsys):
    run = saved_sae(tmp_path / "run\x1b[2J\x07", model_name=EVIL, hook_name=f"blocks.{EVIL}", dataset_path=EVIL)
    report.main([str(run), "--contexts", "0"])
    out, err = capsys.readouterr()
    assert "run\\x1b[2J\\x07/report.html" in out
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "\\x1b[2J" in page
    assert shown_without_harm(page.split("<script")[0])
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path / "no\x1b[2J")])
    assert end.value.code == 2
    out_after, err_after = capsys.readouterr()
    assert "no\\x1b[2J is no folder" in err_after
    assert all(map(shown_without_harm, (out, err, out_after, err_after)))


def test_names_in_a_model_card_do_no_harm():
    cfg = {"architecture": "switch", "d_in": D, "d_sae": F, "k": K, "n_experts": E, "gate": EVIL}
    cfg["metadata"] = {"model_name": EVIL, "hook_name": EVIL, "dataset_path": EVIL, "measured": {}}
    cfg["metadata"]["measured"] |= {"eval_dataset": EVIL, "evaluations": {EVIL: 0.5}}
    card = model_card("someone/saes", {EVIL: cfg}, front_matter={}, derived={"base_model": [EVIL], "datasets": []})
    assert shown_without_harm(card)
    assert safe_load(card.split("---")[1])["library_name"] == "saelens"


def test_names_and_messages_of_training_do_no_harm(tmp_path, capsys, caplog, model, dataset):
    file = tmp_path / "evil.json"
    settings = {"architecture": "switch", "d_in": D, "d_sae": F, "n_experts": E, "k": K, "hook_name": HOOK}
    name = EVIL.replace("\0", "")  # which no text may hold
    given = run_fields(tmp_path / "x\x1b[2J", dataset_path=name, log_to_wandb=False)
    settings |= {n: v for n, v in given.items() if n not in ("logger", "hook_name")}
    file.write_text(json.dumps(settings))
    assert main(["--config", str(file), "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert main(["--config", str(file), f"--{EVIL}"]) == 2
    assert main(["--config", f"{file}{EVIL[:5]}"]) == 2
    file.write_text(json.dumps(settings | {"log_to_wandb": True}))
    assert main(["--config", str(file)]) == 2  # W&B would fail after training
    file.write_text(json.dumps(settings | {"hook_name": f"no{EVIL}"}))
    assert main(["--config", str(file), "--dry-run"]) == 2
    file.write_text(json.dumps(settings))
    assert main(["--config", str(file)], override_model=model, override_dataset=dataset) == 0
    more = capsys.readouterr()
    assert "saved: " in more.out
    assert "x\\x1b[2J" in more.out
    assert all(map(shown_without_harm, (*shown, *more, caplog.text)))


def test_our_log_and_in_a_command_saelens_too_do_no_harm(caplog):
    printable.logger.warning(f"passed over: {EVIL}")
    with printable.printable_logs():
        sae_lens.logger.warning("model %s", EVIL)
    assert sae_lens.logger.filters == []
    assert len(caplog.records) == 2
    assert shown_without_harm(caplog.text)


def test_every_message_of_ours_goes_through_it():
    for file in (ROOT / "sae_lens_switch").glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        imported = {
            a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "sae_lens" for a in n.names
        }
        assert "logger" not in imported, file
        if file.name not in ("printable.py", "cost.py"):  # the cost's table is of numbers
            assert not calls & {"print", "sys.stderr.write", "sys.stdout.write"}, file


def test_output_that_cannot_be_encoded_or_that_nobody_reads_ends_no_run():
    program = """
import os, sys
from sae_lens_switch.common.printable import say
say("caf\\u00e9 \\ud800")
say("there", error=True)
read, write = os.pipe()
os.dup2(write, 1)
os.close(write)
os.close(read)
for _ in range(3):
    say("nobody reads this")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        timeout=600,
    )
    assert done.stdout == b"caf\\xe9 \\ud800\n"
    assert done.stderr.endswith(b"there\n")
    assert done.returncode == 0
