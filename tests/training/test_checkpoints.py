"""Checkpoints on disk: which one is newest, and who else writes beside."""

import errno
import json
import logging
import os
import shutil
import signal
import time
from itertools import count
from pathlib import Path

import pytest
from helpers.kills import SAMPLES, same, small_sae, small_trainer, weights
from helpers.on_disk import CFG, names, save
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_switch.common import atomic
from sae_lens_switch.report import find_sae
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training import manifest as manifest_module
from sae_lens_switch.training.checkpoints import CheckpointError, Session, latest, prune, whole_folder


@pytest.fixture
def clock_that_goes_back(monkeypatch):
    times = count(2_000_000_000, -3600)
    monkeypatch.setattr(checkpoints.time, "time", lambda: float(next(times)))


# Which one is the newest


@pytest.mark.usefixtures("clock_that_goes_back")
def test_by_samples_also_if_the_clock_goes_back(tmp_path):
    trainer = small_trainer(tmp_path, n_checkpoints=5, keep_checkpoints=2)
    trainer.fit()
    everyone = small_trainer(tmp_path / "all", n_checkpoints=5)
    everyone.fit()
    all_names = sorted(names(tmp_path / "all"), key=int)
    assert sorted(names(tmp_path), key=str.isalpha)[:-1] == all_names[-2:]
    assert latest(tmp_path / "all") == tmp_path / "all" / all_names[-1]


@pytest.mark.usefixtures("clock_that_goes_back")
def test_without_a_session_as_in_earlier_versions_by_samples_then_by_time(tmp_path):
    for n in (300, 1000, 20):
        save(tmp_path, str(n), n)
    assert latest(tmp_path) == tmp_path / "1000"
    save(tmp_path, "same", 1000)  # saved an hour earlier, says the clock
    assert latest(tmp_path) == tmp_path / "1000"
    prune(tmp_path, 2)
    assert names(tmp_path) == ["1000", "same"]


@pytest.mark.usefixtures("clock_that_goes_back")
def test_what_was_just_written_is_never_pruned(tmp_path):
    old, fresh = Session(), Session()
    for n in (90_000, 100_000):
        save(tmp_path, str(n), n, old)
    for n in (1000, 2000, 3000):
        written = save(tmp_path, str(n), n, fresh)
        prune(tmp_path, 1, written)
        assert latest(tmp_path) == written  # the run that was begun last
    assert names(tmp_path) == ["100000", "3000", "90000"]  # the other run's are not ours to remove
    prune(tmp_path, 1, save(tmp_path, "no session", 10))
    assert "no session" in names(tmp_path)


@pytest.mark.usefixtures("clock_that_goes_back")
def test_a_run_that_goes_on_from_an_earlier_checkpoint_is_the_newest_and_of_the_same_run(tmp_path):
    first, second = Session(), Session()
    for n in (100, 200, 300):
        save(tmp_path, str(n), n, first)
    second.go_on_from(tmp_path / "100")
    written = save(tmp_path, "150", 150, second)
    assert latest(tmp_path) == written
    prune(tmp_path, 2, written)
    assert names(tmp_path) == ["150", "300"]
    elsewhere = save(tmp_path / "other", "150", 150, second)
    assert latest(tmp_path / "other") == elsewhere


def test_a_checkpoint_without_the_new_facts_is_resumed(tmp_path):
    small_trainer(tmp_path, n_checkpoints=2).fit()
    for file in tmp_path.glob(f"*/{checkpoints.MANIFEST}"):
        manifest = json.loads(file.read_text())
        del manifest["run"], manifest["session_started"], manifest["sha256"]
        file.write_text(json.dumps(manifest | {"sha256": manifest_module._digest(manifest)}))
    resumed, whole = small_trainer(tmp_path, resume="latest", n_checkpoints=5, keep_checkpoints=1), small_trainer(None)
    resumed.fit()
    whole.fit()
    assert same(weights(resumed), weights(whole))
    assert len(names(tmp_path)) == 1  # those of before count as its own


def test_any_digit_of_a_manifest_counts(tmp_path, monkeypatch):
    now = 1795812345.1234567  # the last digit of which does not
    monkeypatch.setattr(checkpoints.time, "time", lambda: now)
    file = save(tmp_path, "1", 1, Session()) / checkpoints.MANIFEST
    content = file.read_text()
    for i in [i for i, letter in enumerate(content) if letter.isdigit()]:
        file.write_text(f"{content[:i]}{int(content[i]) ^ 1}{content[i + 1 :]}")
        with pytest.raises(CheckpointError, match=checkpoints.MANIFEST):
            checkpoints.verify(tmp_path / "1")


@pytest.mark.parametrize("same_run", [True, False])
def test_diverged_ones_are_passed_over_by_name_and_do_not_count(same_run, tmp_path, caplog):
    session = Session()
    save(tmp_path, "100", 100, session)
    bad = save(tmp_path, "diverged_200", 200, session if same_run else Session())
    prune(tmp_path, 1, bad)
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == tmp_path / "100"
    assert f"passed over: {bad}" in caplog.text
    shutil.rmtree(tmp_path / "100")
    with pytest.raises(CheckpointError, match=f"only checkpoints of runs that diverged: {bad}.*resume='{bad}'"):
        latest(tmp_path)


# Nothing to resume from


def test_starting_from_zero_beside_foreign_checkpoints_is_said(tmp_path, caplog):
    stock = small_trainer(tmp_path, n_checkpoints=1)
    SAETrainer(cfg=stock.cfg, sae=small_sae(), data_provider=stock.data_provider).fit()
    small_trainer(tmp_path / "run", save_final_checkpoint=True).fit()
    (foreign,) = [name for name in names(tmp_path) if name != "run"]
    with caplog.at_level(logging.WARNING):
        small_trainer(tmp_path, resume="latest").fit()
    assert f"no checkpoint below {tmp_path} that resume='latest' means: starting from the beginning" in caplog.text
    assert f"{tmp_path / foreign} (without checkpoint.json" in caplog.text
    assert f"{tmp_path / 'run' / f'final_{SAMPLES}'} (of a finished run)" in caplog.text


def test_starting_from_zero_where_nothing_is_is_said_without_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        small_trainer(tmp_path / "nothing", resume="latest").fit()
    (record,) = [r for r in caplog.records if "starting from the beginning" in r.message]
    assert record.levelno == logging.INFO


# Others in the same folder


def test_what_vanishes_while_it_is_looked_at_is_no_error(tmp_path, monkeypatch, caplog):
    for n in (1, 2, 3):
        save(tmp_path, str(n), n)
    look = checkpoints.verify

    def verify(path, config=None):
        if path.name != "1":
            shutil.rmtree(path)  # by a process that prunes
        look(path, config)

    monkeypatch.setattr(checkpoints, "verify", verify)
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == tmp_path / "1"
    assert not caplog.records
    read = manifest_module.read_manifest
    monkeypatch.setattr(checkpoints, "read_manifest", lambda path: (shutil.rmtree(path), read(path))[1])
    assert latest(tmp_path) is None


def in_another_process(base: Path, name: str) -> int:
    """A process that is still saving when this returns."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with whole_folder(base / name, {"n_training_samples": 1}) as folder:
            (folder / "part").write_text("x")
            os.write(tell, b"!")
            time.sleep(60)
        os._exit(0)
    assert os.read(told, 1) == b"!"
    return child


def test_what_a_living_process_writes_stays_and_of_a_dead_one_nothing(tmp_path, monkeypatch):
    child = in_another_process(tmp_path, "1")
    try:
        (unfinished,) = names(tmp_path)
        save(tmp_path, "2", 2)
        assert names(tmp_path) == [unfinished, "2"]
        with monkeypatch.context() as patch:  # the number is in use again, by another process
            patch.setattr(atomic, "_started", lambda _: 1)
            assert atomic._is_abandoned(tmp_path / unfinished)
    finally:
        os.kill(child, signal.SIGKILL)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT) is None:
        pass
    save(tmp_path, "3", 3)  # a zombie does not write
    os.waitpid(child, 0)
    assert names(tmp_path) == ["2", "3"]


def test_what_another_machine_writes_stays_for_a_day(tmp_path, monkeypatch):
    mine = atomic._place()
    monkeypatch.setattr(atomic, "_place", lambda: "0" * 8)
    foreign = atomic.scratch(tmp_path, "saving", "1")
    foreign.mkdir()
    monkeypatch.setattr(atomic, "_place", lambda: mine)
    save(tmp_path, "2", 2)
    assert names(tmp_path) == [foreign.name, "2"]
    long_ago = time.time() - 25 * 3600
    os.utime(foreign, (long_ago, long_ago))
    save(tmp_path, "3", 3)
    assert names(tmp_path) == ["2", "3"]


def test_left_overs_of_earlier_versions_are_removed(tmp_path):
    for name in (".saving-999999999-7", ".deleting-999999999-7", ".saving-abc123", f".saving-{os.getpid()}-7"):
        (tmp_path / name).mkdir()
    (tmp_path / ".saving-1-7").mkdir()  # process 1 always runs
    save(tmp_path, "1", 1)
    assert names(tmp_path) == [".saving-1-7", "1"]


def test_half_deleted_ones_are_removed_and_replaced_ones_restored(tmp_path):
    save(tmp_path, "1", 1)
    save(tmp_path, "2", 2)
    (tmp_path / "1~").mkdir()
    (tmp_path / "1~" / CFG).write_text("{}")
    os.rename(tmp_path / "2", tmp_path / "2~")
    for name in ("mine~", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "3~").mkdir()
    assert latest(tmp_path) == tmp_path / "2~"
    assert find_sae(tmp_path) == tmp_path / "1"
    save(tmp_path, "4", 4)
    assert names(tmp_path) == ["1", "2", "3~", "4", "mine", "mine~"]


def test_a_checkpoint_that_cannot_be_pruned_is_a_warning_about_that(tmp_path, monkeypatch, caplog):
    rename = os.rename

    def refuse(a, b):
        if ".deleting" in str(b):
            raise OSError(errno.EACCES, "Permission denied")
        rename(a, b)

    monkeypatch.setattr(os, "rename", refuse)
    with caplog.at_level(logging.WARNING):
        small_trainer(tmp_path, n_checkpoints=3, keep_checkpoints=1).fit()
    assert len(names(tmp_path)) == 3
    said = [r.message for r in caplog.records]
    assert [m for m in said if "could not be removed" in m]
    assert not [m for m in said if "could not be saved" in m]
