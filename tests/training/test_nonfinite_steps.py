"""Steps with numbers that are not finite change nothing, and too many of them stop training."""

import logging
from itertools import islice, product
from typing import Any

import pytest
import torch
from helpers.faults import (
    ARCHITECTURES,
    BATCH,
    STEPS,
    K,
    data,
    everything,
    folders,
    interrupted_after,
    make_sae,
    make_trainer,
    same_bits,
    uninterrupted,
    what_differs,
)
from torch import Tensor

from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.skipped_steps import TrainingDivergedError

OPTIMIZERS = ["adam", "row_sparse_adam"]


def spoiled(batch: Tensor, how: str) -> Tensor:
    batch = batch.clone()
    if how == "one NaN":
        batch[3, 2] = torch.nan
    elif how == "all NaN":
        batch.fill_(torch.nan)
    elif how == "one inf":
        batch[5, 1] = torch.inf
    elif how == "-inf":
        batch[:, 0] = -torch.inf
    elif how == "too large":  # the loss is still finite, the norm of the gradient is not
        batch *= 1e17
    return batch


def weights_and_moments(trainer: Any) -> dict[str, Tensor]:
    return {name: t for name, t in everything(trainer).items() if "parameter" in name or "weights" in name}


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        *product(["float32", "bfloat16", "float64"], ["one NaN", "all NaN", "one inf", "-inf"]),
        *product(["float32", "bfloat16"], ["too large"]),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing(optimizer, architecture, dtype, how):
    sae = {"architecture": architecture, "dtype": dtype}
    trainer = make_trainer(None, optimizer=optimizer, sae=sae)
    # A first batch that is finite is where a Switch SAE starts from, whatever its size.
    bad = (6, 9) if how == "too large" else (0, 1, 6, 9)
    skipped = 0
    for n, batch in enumerate(islice(data("generator"), 12)):
        before = weights_and_moments(trainer)
        output = trainer.step(spoiled(batch, how) if n in bad else batch)
        trainer.n_training_steps += 1
        changed = [name for name, t in before.items() if not same_bits(t, weights_and_moments(trainer)[name])]
        skipped += n in bad
        assert trainer.n_skipped_steps == skipped
        if n in bad:
            assert changed == []
            assert torch.isfinite(output.loss) == (how == "too large")
        else:
            assert "weights of W_dec" in changed
    assert all(torch.isfinite(t).all() for t in weights_and_moments(trainer).values())
    assert trainer.act_freq_scores.sum() <= (12 - len(bad)) * BATCH * K
    assert torch.isfinite(trainer.act_freq_scores).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_under_a_finite_loss_changes_nothing(optimizer, architecture):
    trainer = make_trainer(None, optimizer=optimizer, sae={"architecture": architecture})
    for batch in islice(data("generator"), 4):
        trainer.step(batch)
    hook = trainer.sae.b_dec.register_hook(lambda g: g * torch.inf)
    before = weights_and_moments(trainer)
    assert torch.isfinite(trainer.step(next(data("generator"))).loss)
    hook.remove()
    assert what_differs(before, weights_and_moments(trainer)) == []
    assert trainer.n_skipped_steps == 1
    trainer.step(next(data("generator")))
    assert trainer.n_skipped_steps == 1
    assert what_differs(before, weights_and_moments(trainer)) != []


@pytest.mark.parametrize("bad", [{0}, {0, 1, 2}, {7}, {3, 4, 5, 20, 29}], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_after_bad_batches_and_says_so(optimizer, bad, caplog):
    batches = (spoiled(b, "one NaN") if i in bad else b for i, b in enumerate(data("generator")))
    trainer = make_trainer(None, batches, optimizer=optimizer)
    with caplog.at_level(logging.WARNING):
        trainer.fit()
    assert trainer.n_training_steps == STEPS
    assert trainer.n_skipped_steps == len(bad)
    for i, n in enumerate(sorted(bad), start=1):
        assert f"step {n}: {i} steps skipped so far" in caplog.text
    assert caplog.text.count("(1 activations are not finite)") == len(bad)
    x = next(data("generator"))
    fresh = make_sae()
    assert (trainer.sae(x) - x).square().sum() < 0.5 * (fresh(x) - x).square().sum()


@pytest.mark.parametrize("stop", [1, 2, 6])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bad_batches_and_an_interruption_end_with_the_same_bits(optimizer, stop, tmp_path):
    def batches(interrupted=False):
        for i, batch in enumerate(data("generator")):
            if i == stop and interrupted:
                raise KeyboardInterrupt
            yield spoiled(batch, "all NaN") if i in (0, 1, 5) else batch

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, batches(interrupted=True), optimizer=optimizer).fit()
    resumed = make_trainer(tmp_path, batches(), optimizer=optimizer, resume="latest")
    resumed.fit()
    assert resumed.n_skipped_steps == 3
    assert what_differs(everything(resumed), uninterrupted(batches(), optimizer=optimizer)) == []


def test_what_was_reported_before_an_interruption_is_not_reported_again(tmp_path, caplog):
    bad_first = [spoiled(b, "one NaN") if i == 2 else b for i, b in enumerate(data("generator"))]
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, interrupted_after(6, bad_first)).fit()
    assert "1 steps skipped so far" in caplog.text
    caplog.clear()
    resumed = make_trainer(tmp_path, iter(bad_first), resume="latest")
    resumed.fit()
    assert resumed.n_skipped_steps == 1
    assert "skipped so far" not in caplog.text


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_too_many_bad_steps_in_a_row_stop_training_with_the_last_good_weights_saved(architecture, optimizer, tmp_path):
    setup = {"max_skipped_steps": 4, "optimizer": optimizer, "sae": {"architecture": architecture}}
    bad = {3, 4, 5, *range(10, STEPS)}  # three in a row are not yet too many
    trainer = make_trainer(
        tmp_path, (spoiled(b, "one inf") if i in bad else b for i, b in enumerate(data("generator"))), **setup
    )
    name = f"diverged_{14 * BATCH}"
    with pytest.raises(TrainingDivergedError, match=f"4 steps in a row were skipped.*step 13.*{tmp_path / name}"):
        trainer.fit()
    assert folders(tmp_path) == [name]
    checkpoints.verify(tmp_path / name)
    good = make_trainer(
        None, (spoiled(b, "one inf") if i in bad else b for i, b in enumerate(data("generator"))), **setup
    )
    for batch in islice(good.data_provider, 10):
        good.step(batch)
        good.n_training_steps += 1
    loaded = make_trainer(tmp_path, **setup)
    loaded.resume(tmp_path / name)
    assert what_differs(weights_and_moments(loaded), weights_and_moments(good)) == []
    assert loaded.n_training_samples == 14 * BATCH
    assert loaded.n_training_steps == 14
    loaded.fit()  # over batches that are good
    assert loaded.n_skipped_steps == 7


def test_diverged_without_a_place_to_save_says_so():
    with pytest.raises(TrainingDivergedError, match="saved: nowhere, as checkpoint_path is None"):
        make_trainer(None, (spoiled(b, "all NaN") for b in data("generator")), max_skipped_steps=2).fit()


@pytest.fixture
def seldom_looked_at(monkeypatch):
    """As on a GPU, whose counts are read back every hundred steps."""
    monkeypatch.setattr("sae_lens_switch.training.trainer._LOOK_EVERY", {"cpu": 10**6})


@pytest.mark.usefixtures("seldom_looked_at")
def test_a_run_that_diverged_after_the_last_look_ends_as_one_that_was_looked_at(tmp_path):
    bad = range(STEPS - 5, STEPS)
    batches = (spoiled(b, "one NaN") if i in bad else b for i, b in enumerate(data("generator")))
    trainer = make_trainer(tmp_path, batches, max_skipped_steps=5)
    name = f"diverged_{STEPS * BATCH}"
    with pytest.raises(TrainingDivergedError, match=f"5 steps in a row .* step {STEPS - 1}.*{tmp_path / name}"):
        trainer.fit()
    checkpoints.verify(tmp_path / name)
    assert trainer.n_training_steps == STEPS


@pytest.mark.usefixtures("seldom_looked_at")
def test_steps_skipped_after_the_last_look_are_reported(caplog):
    batches = (spoiled(b, "one NaN") if i == STEPS - 2 else b for i, b in enumerate(data("generator")))
    make_trainer(None, batches).fit()
    assert "1 steps skipped so far, 0 in a row" in caplog.text


@pytest.mark.parametrize("window", [10**6, 7])
@pytest.mark.parametrize("stop", [None, STEPS // 2])
def test_what_skipped_steps_did_not_count_is_not_missing_from_the_l0(stop, window, tmp_path):
    def batches(interrupted=False):
        for i, batch in enumerate(data("generator")):
            if i == stop and interrupted:
                raise KeyboardInterrupt
            yield spoiled(batch, "all NaN") if i % 3 == 1 else batch

    trainer = make_trainer(tmp_path, batches(interrupted=True), feature_sampling_window=window)
    if stop is not None:
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        trainer = make_trainer(tmp_path, batches(), resume="latest", feature_sampling_window=window)
    trainer.fit()
    assert trainer.n_skipped_steps == len(range(1, STEPS, 3))
    begins = (STEPS - 1) // window * window
    n_finite = sum(i % 3 != 1 for i in range(begins, STEPS))
    assert 0 < n_finite < STEPS - begins
    l0 = float(trainer.act_freq_scores.sum()) / (n_finite * BATCH)
    assert 0.9 * K < l0 <= K
    assert trainer.sae.cfg.metadata.l0 == pytest.approx(l0, rel=1e-6)
