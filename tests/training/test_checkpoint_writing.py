"""Checkpoints and saved SAEs are whole on disk, whatever is killed or fails while they are written."""

import errno
import json
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HOOK, D, run_fields, training_config
from helpers.kills import killed, small_sae, small_trainer
from helpers.on_disk import CFG, WEIGHTS, names, save
from sae_lens import SAE
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig

from sae_lens_switch import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, MultiSAETrainingRunner
from sae_lens_switch.common import atomic
from sae_lens_switch.common.atomic import replace_files
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.checkpoints import Session, latest, prune

# Folders that cannot be put on disk


@pytest.fixture
def no_fsync(monkeypatch):
    """Folders cannot be synced, for a reason."""
    monkeypatch.setattr(atomic, "_warned_of", set())

    def of(number: int, of_files: bool = False) -> None:
        sync = os.fsync

        def fsync(handle):
            if stat.S_ISDIR(os.fstat(handle).st_mode) or of_files:
                raise OSError(number, os.strerror(number))
            sync(handle)

        monkeypatch.setattr(os, "fsync", fsync)

    return of


@pytest.mark.parametrize("number", ["EINVAL", "EACCES", "EPERM", "ENOTSUP", "EISDIR"])
def test_a_folder_that_cannot_be_synced_is_one_warning(number, no_fsync, tmp_path, caplog):
    no_fsync(getattr(errno, number))
    with caplog.at_level(logging.WARNING):
        small_trainer(tmp_path / "saved", n_checkpoints=2, save_final_checkpoint=True).fit()
        small_sae().save_model(tmp_path / "sae")
    assert len(names(tmp_path / "saved")) == 3
    for name in names(tmp_path / "saved"):
        checkpoints.verify(tmp_path / "saved" / name)
    (record,) = caplog.records
    assert "cannot sync folders to disk" in record.message


def test_a_folder_that_cannot_be_opened_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(atomic, "_warned_of", set())
    really_open = os.open

    def refuse(path, flags, *args, **kwargs):
        if os.path.isdir(path) and "dir_fd" not in kwargs and not flags & os.O_DIRECTORY:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))  # as Windows does
        return really_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with caplog.at_level(logging.WARNING):
        save(tmp_path, "1", 1)
        save(tmp_path, "1", 1)
    assert len(caplog.records) == 1
    monkeypatch.undo()
    checkpoints.verify(tmp_path / "1")
    assert names(tmp_path) == ["1"]


@pytest.mark.parametrize("number", ["EIO", "ENOSPC", "EDQUOT"])
def test_a_disk_that_fails_is_an_error(number, no_fsync, tmp_path, caplog):
    no_fsync(getattr(errno, number))
    with pytest.raises(OSError, match=os.strerror(getattr(errno, number))):
        save(tmp_path, "1", 1)
    small_trainer(tmp_path, n_checkpoints=2).fit()
    assert "could not be saved" in caplog.text


def test_a_final_checkpoint_that_cannot_be_written_does_not_lose_the_sae(tmp_path, model, dataset, monkeypatch, caplog):
    cfg = LanguageModelSAERunnerConfig(
        architecture="switch",
        d_in=D,
        d_sae=40,
        n_experts=4,
        k=3,
        **run_fields(tmp_path, save_final_checkpoint=True, n_checkpoints=0),
    )
    really = checkpoints.sync

    def sync(path):
        if "final_" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        really(path)

    monkeypatch.setattr(checkpoints, "sync", sync)
    sae = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()
    assert "the final checkpoint could not be saved" in caplog.text
    assert not list(Path(cfg.checkpoint_path).iterdir())
    x = torch.randn(5, sae.cfg.d_in)
    assert torch.equal(SAE.load_from_disk(cfg.output_path)(x), sae.eval()(x))


def test_many_saes_are_trained_and_written_whatever_checkpoint_fails(tmp_path, model, dataset, monkeypatch, caplog):
    options = run_fields(tmp_path, n_checkpoints=2, save_final_checkpoint=True)
    cfg = MultiSAETrainingRunnerConfig(
        saes={name: training_config(dtype="float32") for name in "ab"},
        hook_names=dict.fromkeys("ab", HOOK),
        **{n: v for n, v in options.items() if n in {f.name for f in fields(MultiSAETrainingRunnerConfig)}},
    )

    def sync(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoints, "sync", sync)
    saes = MultiSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()
    assert caplog.text.count("could not be saved") == 3
    assert not list(tmp_path.rglob(checkpoints.MANIFEST))
    x = torch.randn(5, D)
    assert torch.equal(SAE.load_from_disk(tmp_path / "output" / "b")(x), saes["b"].eval()(x))


# One SAE in place of another


def write(content: str):
    def save_both(folder: Path) -> tuple[Path, Path]:
        for name in (WEIGHTS, CFG):
            (folder / name).write_text(content)
        return folder / WEIGHTS, folder / CFG

    return save_both


def contents(path: Path) -> set[str]:
    return {(path / name).read_text() for name in (WEIGHTS, CFG)}


@pytest.mark.parametrize("links", [True, False])
def test_killed_at_any_file_operation_an_sae_is_the_old_or_the_new(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(atomic, "_symlink", lambda *_: False)
    found = []
    for n in count():
        path = tmp_path / str(n)
        replace_files(path, write("old"))
        for mine in ("sparsity.safetensors", "folder/notes.txt"):
            (path / mine).parent.mkdir(exist_ok=True)
            (path / mine).write_text("mine")
        was_killed = killed(lambda path=path: replace_files(path, write("new")), at=n)
        if links or (path / CFG).exists():
            (is_there,) = contents(path)  # never some of the one and some of the other
            found.append(is_there)
        else:
            atomic.remove_left_overs(path)
            assert contents(path) == {"new"}
            found.append("nothing")
        replace_files(path, write("newer"))
        assert contents(path) == {"newer"}
        assert names(path) == sorted([CFG, WEIGHTS, "folder", "sparsity.safetensors"])
        assert not any(file.is_symlink() for file in path.iterdir())
        assert {(path / mine).read_text() for mine in ("sparsity.safetensors", "folder/notes.txt")} == {"mine"}
        if not was_killed:
            break
    assert found[0] == "old"
    assert found[-1] == "new"
    assert found == sorted(found, key=["old", "nothing", "new"].index)
    assert found.count("nothing") == (0 if links else 2)


def failing_replace(at: int) -> Callable[..., None]:
    """``os.replace``, whose call number ``at`` fails."""
    left, really = [at], os.replace

    def replace(*args: Any) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        really(*args)

    return replace


@pytest.mark.parametrize("at", range(5))
def test_what_fails_while_files_are_replaced_leaves_the_old_ones_or_the_new(at, tmp_path, monkeypatch):
    replace_files(tmp_path, write("old"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing_replace(at))
        with pytest.raises(OSError, match="Input/output error"):
            replace_files(tmp_path, write("new"))
    (is_there,) = contents(tmp_path)
    assert is_there == ("old" if at < 3 else "new")
    replace_files(tmp_path, write("newer"))
    assert contents(tmp_path) == {"newer"}


class WindowsWithLinks:
    """The module os of a Windows whose user may make links."""

    name = "nt"

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@pytest.mark.parametrize("at", range(3))
def test_what_fails_there_on_windows_leaves_an_sae_too(at, tmp_path, monkeypatch):
    replace_files(tmp_path, write("old"))
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "os", WindowsWithLinks())
        patch.setattr(os, "replace", failing_replace(at))
        with pytest.raises(OSError, match="Input/output error"):
            replace_files(tmp_path, write("new"))
    assert contents(tmp_path) == {"old" if at == 0 else "new"}
    assert not any(file.is_symlink() for file in tmp_path.iterdir())


@pytest.mark.parametrize("architecture", ["switch", "sparse_topk"])
@pytest.mark.parametrize("how", ["save_model", "save_inference_model"])
def test_an_sae_in_the_working_folder_or_behind_a_link_is_replaced(architecture, how, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    for path, k in ((".", 2), (tmp_path / "link", 3), (".", 4)):
        files = getattr(small_sae(architecture, k=k), how)(path)
        assert files == (Path(path) / WEIGHTS, Path(path) / CFG)
        assert json.loads((tmp_path / "real" / CFG).read_text())["k"] == k
        assert names(tmp_path / "real") == [CFG, WEIGHTS]


def test_killed_at_any_file_operation_a_whole_checkpoint_is_found(tmp_path):
    for n in count():
        base = tmp_path / str(n)
        session = Session()
        for samples in (10, 20):
            save(base, str(samples), samples, session)

        def save_and_prune(base=base, session=session):
            prune(base, 1, save(base, "20", 20, session, content="again"))

        was_killed = killed(save_and_prune, at=n)
        found = latest(base)
        assert found is not None
        assert found.name.rstrip("~") == "20"
        prune(base, 1, save(base, "30", 30, session))
        assert names(base) == ["30"]
        if not was_killed:
            break
    assert n > 20
