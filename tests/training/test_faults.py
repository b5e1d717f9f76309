"""SparseSAETrainer when things go wrong: signals, kills, damaged files, full disks, numbers that are not finite."""

import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice, product
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import D, activations
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_lens_switch import (
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.checkpoints import CheckpointError
from sae_lens_switch.training.trainer import TrainingDivergedError

F, E, K = 96, 4, 3
BATCH, STEPS = 32, 30
PATIENCE = 600  # seconds; a machine may be busy with other things
OPTIMIZERS = ["adam", "row_sparse_adam"]
ARCHITECTURES = ["switch", "sparse_topk"]
FILES = [
    "activation_scaler.json",
    "cfg.json",
    "checkpoint.json",
    "history.jsonl",
    "sae_weights.safetensors",
    "sparse_trainer_state.pt",
    "sparsity.safetensors",
    "trainer_state.pt",
]
MESSAGE_OF_A_DAMAGED_FILE = {"flipped": "is damaged: {}", "truncated": "is damaged: {}", "missing": "{} is missing"}
# Real processes that have imported everything before they are forked: one costs milliseconds.
FORKS: Any = get_context("forkserver")
FORKS.set_forkserver_preload(["sae_lens_switch"])


def make_sae(architecture: str = "switch", **fields: Any) -> Any:
    torch.manual_seed(0)
    if architecture == "switch":
        return SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=D, d_sae=F, n_experts=E, **{"k": K, **fields}))
    return SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=D, d_sae=F, **{"k": K, **fields}))


def make_trainer(
    path: Path | None,
    source: Any = None,
    sae: dict[str, Any] | None = None,
    trainer_class: Any = SparseSAETrainer,
    **fields: Any,
) -> Any:
    cfg = {
        "total_training_samples": STEPS * BATCH,
        "train_batch_size_samples": BATCH,
        "lr": 1e-2,
        "checkpoint_path": None if path is None else str(path),
        **fields,
    }
    return trainer_class(
        SparseSAETrainerConfig(**cfg), make_sae(**(sae or {})), data("generator") if source is None else source
    )


def data(kind: str, n: int = STEPS + 10) -> Any:
    if kind == "tensor":  # a few epochs
        return torch.cat(activations(13, batch=BATCH))
    return (batch for batch in activations(n, batch=BATCH))


def interrupted_after(n: int, batches: Iterable[Tensor] | None = None) -> Iterator[Tensor]:
    yield from islice(data("generator") if batches is None else batches, n)
    raise KeyboardInterrupt


def everything(trainer: Any) -> dict[str, Any]:
    """All that training has changed, by name."""
    found = {f"weights of {name}": t.clone() for name, t in trainer.sae.state_dict().items()}
    optimizer = trainer.optimizer.state_dict()
    for i, state in optimizer["state"].items():
        found |= {f"{name} of parameter {i}": t.clone() for name, t in state.items()}
    found |= {f"master of parameter {i}": t.clone() for i, t in optimizer.get("masters", {}).items()}
    found["frequencies"] = trainer.act_freq_scores.clone()
    found["since fired"] = trainer.n_forward_passes_since_fired
    for name in ("n_training_steps", "n_training_samples", "n_frac_active_samples"):
        found[name] = torch.tensor(getattr(trainer, name))
    found["learning rate"] = torch.tensor(trainer.lr_scheduler.get_last_lr(), dtype=torch.float64)
    if getattr(trainer, "routing", None) is not None:
        found |= {f"routing {name}": t.clone() for name, t in trainer.routing.state_dict().items()}
    return found


def what_differs(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [n for n in a.keys() | b.keys() if n not in a or n not in b or not same_bits(a[n], b[n])]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def uninterrupted(source: Any = None, **setup: Any) -> dict[str, Tensor]:
    trainer = make_trainer(None, source, **setup)
    trainer.fit()
    return everything(trainer)


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir()) if path.exists() else []


def wait_until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


# Interrupted anywhere, and resumed

SETUPS: dict[str, dict[str, Any]] = {
    "adam": {},
    "row-sparse": {"optimizer": "row_sparse_adam"},
    "topk": {"sae": {"architecture": "sparse_topk", "aux_loss_coefficient": 0.5}, "dead_feature_window": 3},
    "norm estimated": {
        "sae": {"normalize_activations": "expected_average_only_in"},
        "n_batches_for_norm_estimate": 3,
    },
    "whitened": {
        "sae": {"normalize_activations": "covariance_whitening"},
        "n_batches_for_norm_estimate": 3,
    },
    "bfloat16": {"sae": {"dtype": "bfloat16"}},
    "bfloat16, row-sparse": {"sae": {"dtype": "bfloat16"}, "optimizer": "row_sparse_adam"},
    "bfloat16, topk": {"sae": {"architecture": "sparse_topk", "dtype": "bfloat16"}},
    "float64": {"sae": {"dtype": "float64"}},
    "auxk": {"sae": {"aux_loss_coefficient": 0.5}, "dead_feature_window": 3},
    "auxk, row-sparse": {
        "sae": {"aux_loss_coefficient": 0.5},
        "dead_feature_window": 3,
        "optimizer": "row_sparse_adam",
    },
    "schedules": {"sae": {"load_balance_warm_up_steps": 17}, "lr_warm_up_steps": 7, "lr_decay_steps": 12},
    "cosine": {"lr_scheduler_name": "cosineannealing", "lr_end": 1e-4, "lr_warm_up_steps": 5},
    "collapse countered": {
        "sae": {"load_balance_coefficient": 0.0},
        "on_collapse": "raise_coefficient",
        "collapse_share": 0.26,
        "collapse_patience": 12,
    },
    "reseeded": {
        "sae": {"load_balance_coefficient": 0.0},
        "on_collapse": "reseed",
        "collapse_share": 0.26,
        "collapse_patience": 12,
    },
}


@pytest.mark.parametrize("name", SETUPS)
def test_interrupted_again_and_again_training_ends_with_the_same_bits(name, tmp_path):
    setup = SETUPS[name]
    setup = {"feature_sampling_window": 9, **setup}
    estimates = setup.get("n_batches_for_norm_estimate", 0)
    for i, steps in enumerate([1, 2, 7, 19, STEPS - 1]):
        earlier = checkpoints.latest(tmp_path)
        trainer = make_trainer(
            tmp_path,
            interrupted_after(steps + estimates),
            resume=earlier and ("latest" if i % 2 else str(earlier)),
            **setup,
        )
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        assert trainer.n_training_steps == steps
        assert str(steps * BATCH) in folders(tmp_path)
    resumed = make_trainer(tmp_path, resume="latest", **setup)
    resumed.fit()
    if "on_collapse" in setup:
        assert resumed.n_interventions > 0
    if "dead_feature_window" in setup:
        assert resumed.dead_neurons.any()
    assert what_differs(everything(resumed), uninterrupted(**setup)) == []


def test_interrupted_where_a_window_of_statistics_ends(tmp_path):
    setup = {"feature_sampling_window": 5}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, interrupted_after(10), **setup).fit()
    resumed = make_trainer(tmp_path, resume="latest", **setup)
    resumed.fit()
    assert what_differs(everything(resumed), uninterrupted(**setup)) == []


def test_activations_that_end_where_a_window_of_statistics_ends(tmp_path):
    fields = {"feature_sampling_window": 5, "save_final_checkpoint": True}
    make_trainer(tmp_path, data("generator", 10), **fields).fit()
    assert folders(tmp_path) == [f"final_{10 * BATCH}"]


def test_interrupted_right_after_a_scheduled_checkpoint(tmp_path):
    setup = {"n_checkpoints": 2}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, interrupted_after(11), **setup).fit()
    assert folders(tmp_path) == [str(11 * BATCH)]  # written twice, there once
    resumed = make_trainer(tmp_path, resume="latest", **setup)
    resumed.fit()
    assert len(folders(tmp_path)) == 2
    assert what_differs(everything(resumed), uninterrupted()) == []


def test_interrupted_before_the_first_step_nothing_is_saved(tmp_path):
    setup = {"sae": {"normalize_activations": "expected_average_only_in"}, "n_batches_for_norm_estimate": 3}
    for n in (0, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path, interrupted_after(n), **setup).fit()
        assert folders(tmp_path) == []


def test_with_nothing_to_resume_from_training_starts_afresh(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        trainer = make_trainer(path, resume="latest")
        trainer.fit()
        assert what_differs(everything(trainer), uninterrupted()) == []
    with pytest.raises(ValueError, match="resume='latest' needs a checkpoint_path; it is None"):
        make_trainer(None, resume="latest").fit()


def test_a_finished_run_is_not_what_latest_means(tmp_path):
    make_trainer(tmp_path, save_final_checkpoint=True, n_checkpoints=2).fit()
    trainer = make_trainer(tmp_path)
    assert trainer.resume("latest").name == str(21 * BATCH)


def test_random_numbers_go_on_where_they_were(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, interrupted_after(5)).fit()
    expected = torch.rand(3)
    torch.manual_seed(99)
    make_trainer(tmp_path).resume("latest")
    assert torch.equal(torch.rand(3), expected)


def test_activations_that_end_before_the_place_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, interrupted_after(9)).fit()
    with pytest.raises(ValueError, match="activations ended after 4 of 9 batches"):
        make_trainer(tmp_path, data("generator", 4), resume="latest").fit()


# Checkpoints that are refused


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints")
    with pytest.raises(KeyboardInterrupt):
        make_trainer(path, interrupted_after(12), n_checkpoints=2).fit()
    return path


@pytest.fixture
def saved(two_checkpoints, tmp_path):
    """A folder with an older and a newer checkpoint, to be damaged."""
    shutil.copytree(two_checkpoints, tmp_path / "saved")
    return tmp_path / "saved"


OLDER, NEWER = str(11 * BATCH), str(12 * BATCH)


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 0x80]) + content[middle + 1 :])


def test_a_checkpoint_has_these_files_and_no_others(saved):
    for name in (OLDER, NEWER):
        assert folders(saved / name) == FILES


@pytest.mark.parametrize("how", MESSAGE_OF_A_DAMAGED_FILE)
@pytest.mark.parametrize("file", [f for f in FILES if f != checkpoints.MANIFEST])
def test_a_damaged_file_is_named_and_nothing_is_loaded(file, how, saved):
    damage(saved / NEWER / file, how)
    trainer = make_trainer(saved)
    before = everything(trainer)
    message = MESSAGE_OF_A_DAMAGED_FILE[how].format(file)
    for load in (trainer.resume, trainer.load_trainer_state):
        with pytest.raises(CheckpointError, match=f"{NEWER} .*{message}"):
            load(saved / NEWER)
    assert what_differs(before, everything(trainer)) == []


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "a list", "files no table"])
def test_an_unreadable_manifest_is_named(how, saved):
    manifest = saved / NEWER / checkpoints.MANIFEST
    contents = {"empty": "", "a list": "[]", "files no table": '{"files": 3, "saved_at": 1, "n_training_samples": 1}'}
    if how in contents:
        manifest.write_text(contents[how])
    else:
        damage(manifest, how)
    with pytest.raises(CheckpointError, match=f"{NEWER} is damaged: checkpoint.json cannot be read"):
        make_trainer(saved).resume(saved / NEWER)


def test_whichever_byte_of_the_manifest_is_wrong_it_is_refused(saved):
    manifest = saved / NEWER / checkpoints.MANIFEST
    content = manifest.read_bytes()
    for i in random.Random(0).sample(range(len(content)), 300):
        manifest.write_bytes(content[:i] + bytes([content[i] ^ (1 << i % 7)]) + content[i + 1 :])
        with pytest.raises(CheckpointError, match=f"{NEWER} is damaged: checkpoint.json"):
            checkpoints.verify(saved / NEWER)
    assert checkpoints.latest(saved) == saved / OLDER


def test_without_a_manifest_it_cannot_be_checked_and_a_warning_says_so(saved, caplog):
    (saved / NEWER / checkpoints.MANIFEST).unlink()
    trainer = make_trainer(saved)
    with caplog.at_level(logging.WARNING):
        trainer.resume(saved / NEWER)
    assert f"{NEWER} has no checkpoint.json: its files cannot be checked" in caplog.text
    assert trainer.n_training_steps == 12
    assert checkpoints.latest(saved) == saved / OLDER


@pytest.mark.parametrize(
    ("setup", "was", "now"),
    [
        ({"sae": {"k": 5}}, "k was 3", "is 5"),
        ({"sae": {"gate": "one"}}, "gate was 'probability'", "is 'one'"),
        ({"sae": {"dtype": "bfloat16"}}, "dtype was 'float32'", "is 'bfloat16'"),
        ({"lr": 0.02}, "lr was 0.01", "is 0.02"),
        ({"lr_warm_up_steps": 5}, "lr_warm_up_steps was 0", "is 5"),
        ({"optimizer": "row_sparse_adam"}, "optimizer was 'adam'", "is 'row_sparse_adam'"),
        ({"train_batch_size_samples": 16}, "train_batch_size_samples was 32", "is 16"),
        ({"max_grad_norm": None}, "max_grad_norm was 1.0", "is None"),
        ({"dead_feature_window": 5}, "dead_feature_window was 1000", "is 5"),
    ],
    ids=str,
)
def test_another_configuration_is_refused_with_both_values(setup, was, now, saved):
    trainer = make_trainer(saved, resume="latest", **setup)
    before = everything(trainer)
    with pytest.raises(CheckpointError, match=f"{NEWER} is of another configuration: .*{was}, {now}"):
        trainer.fit()
    assert what_differs(before, everything(trainer)) == []


def test_another_size_or_architecture_is_refused_with_both_values(saved):
    for sae, message in [
        (SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=D, d_sae=128, n_experts=E, k=K)), "d_sae was 96, is 128"),
        (SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=8, d_sae=F, n_experts=E, k=K)), "d_in was 12, is 8"),
        (make_sae("sparse_topk"), "architecture was 'switch', is 'sparse_topk'"),
    ]:
        trainer = SparseSAETrainer(SparseSAETrainerConfig(STEPS * BATCH, BATCH, lr=1e-2), sae, data("tensor"))
        with pytest.raises(CheckpointError, match=message):
            trainer.resume(saved / NEWER)


def test_what_a_resumed_run_may_change(saved):
    free = {"n_checkpoints": 1, "keep_checkpoints": 1, "max_skipped_steps": 3, "save_final_checkpoint": True}
    trainer = make_trainer(saved, resume="latest", **free)
    trainer.fit()
    assert what_differs(everything(trainer), uninterrupted()) == []


def test_a_path_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, reason in (("nothing", "there is no such folder"), ("file", "no such folder"), ("empty", "is empty")):
        with pytest.raises(CheckpointError, match=f"no checkpoint at {tmp_path / name}: .*{reason}"):
            make_trainer(tmp_path, resume=str(tmp_path / name)).fit()


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("file", FILES)
def test_latest_passes_over_a_damaged_one_and_says_so(file, how, saved, caplog):
    damage(saved / NEWER / file, how)
    trainer = make_trainer(saved)
    with caplog.at_level(logging.WARNING):
        assert trainer.resume("latest") == saved / OLDER
    assert trainer.n_training_steps == 11
    found = (file, how) != (checkpoints.MANIFEST, "missing")  # else it is no checkpoint of ours
    if found:
        assert f"passed over: checkpoint {saved / NEWER}" in caplog.text
        assert file in caplog.text
    damage(saved / OLDER / "cfg.json", "missing")
    with pytest.raises(CheckpointError, match=f"{NEWER} .*{file}" if found else f"{OLDER} .*cfg.json is missing"):
        make_trainer(saved, resume="latest").fit()


# Numbers that are not finite


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


# Pruning


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_so_many_checkpoints_are_kept_and_the_final_one_always(keep, tmp_path):
    trainer = make_trainer(tmp_path, n_checkpoints=7, keep_checkpoints=keep, save_final_checkpoint=True)
    trainer.fit()
    found = folders(tmp_path)
    assert f"final_{STEPS * BATCH}" in found
    others = sorted(int(name) for name in found if not name.startswith("final_"))
    everyone = make_trainer(tmp_path / "all", n_checkpoints=7)
    everyone.fit()
    assert others == sorted(map(int, folders(tmp_path / "all")))[-keep:]
    make_trainer(tmp_path, n_checkpoints=7, keep_checkpoints=keep, resume="latest").fit()
    assert f"final_{STEPS * BATCH}" in folders(tmp_path)
    make_trainer(tmp_path, n_checkpoints=7, keep_checkpoints=keep).fit()  # another run into the same folder
    found = folders(tmp_path)
    assert f"final_{STEPS * BATCH}" in found
    assert len(found) == keep + 2  # and the folder "all"


# SAELens's own trainer


def stock_trainer(path: Path, batches: Iterator[Tensor], sae: Any, **fields: Any) -> SAETrainer[Any, Any]:
    ours = make_trainer(path, **fields)
    return SAETrainer(cfg=ours.cfg, sae=sae, data_provider=batches)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalize_activations", ["none", "expected_average_only_in"])
def test_a_checkpoint_of_saelens_own_trainer_is_resumed(architecture, normalize_activations, tmp_path):
    setup = {"n_batches_for_norm_estimate": 3}
    sae = {"architecture": architecture, "normalize_activations": normalize_activations}
    stock = stock_trainer(tmp_path, interrupted_after(15), make_sae(**sae), **setup)
    with pytest.raises(KeyboardInterrupt):
        stock.fit()
    stock.save_checkpoint("stock")
    ours = make_trainer(tmp_path, sae=sae, **setup)
    ours.resume(tmp_path / "stock")
    assert what_differs(shared(ours), shared(stock)) == []
    ours.fit()
    assert ours.n_training_steps == STEPS
    whole = stock_trainer(tmp_path, data("generator"), make_sae(**sae), **setup)
    whole.fit()
    for name, weight in whole.sae.state_dict().items():
        torch.testing.assert_close(ours.sae.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


def shared(trainer: Any) -> dict[str, Tensor]:
    return {name: t for name, t in everything(trainer).items() if not name.startswith("routing")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saelens_own_trainer_goes_on_from_a_checkpoint_of_ours(architecture, tmp_path):
    sae = {"architecture": architecture}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, interrupted_after(15), sae=sae).fit()
    saved = tmp_path / str(15 * BATCH)
    stock = stock_trainer(tmp_path, islice(data("generator"), 15, None), make_sae(**sae))
    stock.load_trainer_state(saved)
    stock.sae.load_weights_from_checkpoint(saved)
    ours = make_trainer(tmp_path, sae=sae)
    ours.resume(saved)
    assert what_differs(shared(ours), shared(stock)) == []
    stock.fit()
    ours.fit()
    assert stock.n_training_steps == STEPS
    for name, weight in stock.sae.state_dict().items():
        torch.testing.assert_close(ours.sae.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


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


# Signals, to a process of its own

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
    forkserver.ensure_running()
    program = "import sys; sys.path.insert(0, sys.argv[1]); import test_faults as t; t.train_when_told(*sys.argv[2:])"
    started = {}
    for name in INTERRUPTED:
        path = tmp_path_factory.mktemp("child")
        command = [sys.executable, "-c", program, str(Path(__file__).parent), str(path), name]
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
