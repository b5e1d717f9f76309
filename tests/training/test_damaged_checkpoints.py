"""Checkpoints that are damaged or of another run are refused by name, and so many are kept."""

import logging
import random
import shutil
from pathlib import Path

import pytest
from helpers import D
from helpers.faults import (
    BATCH,
    STEPS,
    E,
    F,
    K,
    data,
    everything,
    folders,
    interrupted_after,
    make_sae,
    make_trainer,
    uninterrupted,
    what_differs,
)

from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig, SwitchTrainingSAE, SwitchTrainingSAEConfig
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.checkpoints import CheckpointError

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
