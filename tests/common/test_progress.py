"""Progress: sentences in a batch job's log, a bar on a terminal."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import HOOK, activations, training_sae
from sae_lens.config import SAETrainerConfig

from sae_lens_switch import SparseSAETrainer, TrainerOptions
from sae_lens_switch.common import progress
from sae_lens_switch.common.progress import Sentences, track
from sae_lens_switch.common.substitution import constructing
from sae_lens_switch.training.multi_sae_trainer import MultiSAETrainer
from sae_lens_switch.training.runners import with_options


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
        MultiSAETrainer(cfg, saes, dict.fromkeys(saes, HOOK), stream).fit()
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
