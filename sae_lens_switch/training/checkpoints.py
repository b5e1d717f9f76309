"""Atomic checkpoints: written aside, flushed to disk, then moved into place; checked before use.

A checkpoint is a folder of SAELens's files and ours, and ``checkpoint.json``: the size and SHA-256 of each file, how
far training was, and the settings it depends on.
"""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from sae_lens.constants import TRAINER_STATE_FILENAME
from safetensors import SafetensorError

from sae_lens_switch.common.atomic import discard, locked, remove_left_overs, scratch, sync
from sae_lens_switch.common.printable import logger
from sae_lens_switch.common.types import Json
from sae_lens_switch.training.manifest import (
    MANIFEST,
    ORDERED_BY,
    CheckpointError,
    check_config,
    check_files,
    has_manifest,
    read_manifest,
    reading,
    write_manifest,
)

# In a checkpoint of a run that scales its activations: what training resumes from.
TRAINING_FOLDER = "training"
# In one of several processes with divided experts: what all of them share.
SHARED = "trainer.pt"
_FINAL, _DIVERGED = "final_", "diverged_"

CheckFiles = Callable[[Path, Json], None]
_check_files: ContextVar[CheckFiles] = ContextVar("_check_files", default=check_files)


class Session:
    """One process's part of a run; orders checkpoints, and tells them from those of other runs in the same folder.

    A fresh or resumed run comes after all that it finds, even with fewer samples or if the clock has gone back.
    """

    def __init__(self) -> None:
        self._run = uuid.uuid4().hex
        self._after = 0.0
        self._started: float | None = None

    def go_on_from(self, checkpoint: Path) -> None:
        """Belong to the run of a checkpoint, and come after it. One without ``checkpoint.json`` says nothing."""
        with suppress(CheckpointError):
            manifest = read_manifest(checkpoint)
            self._run = manifest.get("run", self._run)
            self._after, self._started = manifest.get("session_started", 0.0), None

    def facts(self, base: Path) -> Json:
        """What ``checkpoint.json`` says of it, for a checkpoint in ``base``."""
        if self._started is None:
            earlier = max([self._after, *(c.order.session_started for c in _checkpoints(base, depth=1))])
            self._started = round(max(time.time(), earlier + 1e-3), 3)
        return {"run": self._run, "session_started": self._started}


@contextmanager
def whole_folder(path: Path, facts: Json, fingerprints: Mapping[str, Json] | None = None) -> Iterator[Path]:
    """A folder to write a checkpoint into: renamed to ``path`` when the block succeeds, removed otherwise.

    ``fingerprints`` are those of files that other processes have written and read back, known by the block's end.
    Raises OSError if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left_overs(path.parent)
    _settle_replaced(path.parent)
    folder = scratch(path.parent, "saving", path.name)
    folder.mkdir()
    try:
        yield folder
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        write_manifest(folder, files, facts, fingerprints or {})
        for entry in [*files, folder / MANIFEST, *(f for f in folder.rglob("*") if f.is_dir()), folder]:
            sync(entry)
        with locked(path.parent):
            if path.exists():
                _replace(path)
            os.rename(folder, path)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, RuntimeError | SafetensorError):  # torch's and safetensors' names for a full disk
            raise OSError(f"checkpoint {path} could not be written: {error}") from error
        raise
    sync(path.parent)
    if _replaced(path).exists():
        _remove(_replaced(path))


@contextmanager
def failure_is_logged(what: str) -> Iterator[None]:
    """Log, rather than raise, an OSError: for a checkpoint that training can do without."""
    try:
        yield
    except OSError as error:
        logger.error(f"{what} could not be saved: {error}")


@contextmanager
def scheduled(thresholds: list[int], n_samples: int) -> Iterator[None]:
    """For a scheduled checkpoint: one that cannot be written is logged and given up, and training continues."""
    try:
        yield
    except OSError as error:
        thresholds.pop(0)
        logger.error(f"checkpoint at {n_samples} samples could not be saved: {error}")


@contextmanager
def checking_files_by(check: CheckFiles) -> Iterator[None]:
    """Within the block ``verify`` and ``latest`` call this in place of ``check_files``, which reads every byte."""
    before = _check_files.set(check)
    try:
        yield
    finally:
        _check_files.reset(before)


def verify(path: Path | str, config: Json | None = None) -> None:
    """Raises CheckpointError, saying which file or setting is wrong; ``config`` is that of the run to resume.

    A folder without ``checkpoint.json``, as SAELens's own trainer writes it, cannot be checked and passes.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: there is no such folder")
    if not has_manifest(path):
        with reading(path):
            is_empty = not any(path.iterdir())
        if is_empty:
            raise CheckpointError(f"no checkpoint at {path}: the folder is empty")
        if not has_manifest(path.parent):  # where it is part of a checkpoint of several SAEs
            logger.warning(f"{path} has no {MANIFEST}: its files cannot be checked")
        return
    manifest = read_manifest(path)
    _check_files.get()(path, manifest)
    if config is not None:
        check_config(path, manifest, config)


def latest(base: Path | str, config: Json | None = None, n_samples: int = 0) -> Path | None:
    """The newest checkpoint below ``base``, of this run or of an earlier one, that is whole; None if there is none.

    The newest has seen the most samples since a run was last begun or resumed. A run that is to be longer, to
    ``n_samples``, resumes from the final one too, unless its activation scaling has been folded into that. Damaged ones
    and those of a run that diverged are passed over with a warning. Raises CheckpointError if there are no others, or
    if the newest whole one is of another configuration.
    """
    base = Path(base)
    if base.exists():
        with reading(base):
            next(base.iterdir(), None)
    damage: CheckpointError | None = None
    diverged: list[Path] = []
    # What may have been the newest comes first, to be named.
    for found in sorted(_checkpoints(base, depth=2), key=lambda c: (c.order == _UNKNOWN, c.order), reverse=True):
        if found.is_final and (found.folded or not 0 <= found.order.n_training_samples < n_samples):
            continue
        if found.path.name.startswith(_DIVERGED):
            diverged.append(found.path)
            logger.warning(f"passed over: {found.path} was saved when its run diverged")
            continue
        try:
            verify(found.path)
        except CheckpointError as error:
            if not has_manifest(found.path):  # another process has removed it since
                continue
            logger.warning(f"passed over: {error}")
            damage = damage or error
            continue
        if config is not None:
            check_config(found.path, read_manifest(found.path), config)
        return found.path
    if damage is not None:
        raise damage
    if diverged:
        raise CheckpointError(
            f"below {base} there are only checkpoints of runs that diverged: {', '.join(map(str, diverged))}. To "
            f"resume from one of them, name it: resume={str(diverged[0])!r}"
        )
    _say_what_else_is_there(base)
    return None


def prune(base: Path, keep: int, written: Path | None = None) -> None:
    """Remove all but the ``keep`` newest checkpoints in ``base``; final ones and those of diverged runs stay.

    ``written`` was just saved: it stays, and so does what is of another run or damaged. A failure is only warned of.
    """
    run = None
    if written is not None:
        with suppress(CheckpointError):
            run = read_manifest(written).get("run")
    found = [
        c
        for c in _checkpoints(base, depth=1)
        if c.order != _UNKNOWN and not c.path.name.startswith((_FINAL, _DIVERGED)) and run in (None, c.run or run)
    ]
    for doomed in sorted(found, key=lambda c: (c.path == written, c.order), reverse=True)[keep:]:
        if doomed.path != written:
            _remove(doomed.path)


class _Order(NamedTuple):
    """The larger, the newer. The clock only tells apart what nothing else does."""

    session_started: float
    n_training_samples: int
    in_its_place: bool  # and not under the name of one that is being replaced
    saved_at: float


_UNKNOWN = _Order(0.0, -1, False, 0.0)  # of one whose manifest is damaged


class _Found(NamedTuple):
    path: Path
    order: _Order
    run: str | None = None
    folded: bool = False

    @property
    def is_final(self) -> bool:
        return self.path.name.startswith(_FINAL)


def _checkpoints(base: Path, depth: int) -> Iterator[_Found]:
    """All that there are. Other processes may be removing some meanwhile."""
    for folder in _subfolders(base, depth):
        if not has_manifest(folder):
            continue
        in_its_place = not folder.name.endswith("~")
        try:
            manifest = read_manifest(folder)
        except CheckpointError:
            if has_manifest(folder):
                yield _Found(folder, _UNKNOWN)
            continue
        started, n, saved_at = (manifest.get(name, 0) for name in ("session_started", *ORDERED_BY))
        order = _Order(started, n, in_its_place, saved_at)
        yield _Found(folder, order, manifest.get("run"), manifest.get("folded", False))


def _subfolders(base: Path, depth: int) -> Iterator[Path]:
    """All but hidden ones, down to ``depth``."""
    try:
        folders = sorted(f for f in base.iterdir() if not f.name.startswith(".") and os.path.isdir(f))
    except OSError:  # removed since it was listed, or closed to us
        return
    for folder in folders:
        yield folder
        if depth > 1:
            yield from _subfolders(folder, depth - 1)


def _say_what_else_is_there(base: Path) -> None:
    """That nothing is resumed from, and what a user might have meant."""
    others = []
    for folder in _subfolders(base, depth=3):
        inside = any(has_manifest(parent) for parent in folder.parents if parent.is_relative_to(base))
        if has_manifest(folder):
            others.append(f"{folder} (of a finished run)")
        elif (folder / TRAINER_STATE_FILENAME).exists() and not inside:
            others.append(f"{folder} (without {MANIFEST}, as SAELens's own trainer writes it)")
    if others:
        listed = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
        logger.warning(
            f"no checkpoint below {base} that resume='latest' means: starting from the beginning. There is {listed}; "
            "to resume from one of them, name it"
        )
    else:
        logger.info(f"no checkpoint below {base} yet: starting from the beginning")


def _replaced(path: Path) -> Path:
    """Where a checkpoint stays, and can be found, until the one that replaces it is there."""
    return path.with_name(f"{path.name}~")


def _replace(path: Path) -> None:
    if _replaced(path).exists():
        discard(_replaced(path))
    os.rename(path, _replaced(path))


def _settle_replaced(base: Path) -> None:
    """After a kill while a checkpoint was replaced: the old one goes if the new one is there, else it is restored."""
    for old in [f for f in _subfolders(base, depth=1) if f.name.endswith("~")]:
        path = old.with_name(old.name[:-1])
        with locked(base), suppress(OSError):
            if not path.exists() and has_manifest(old):
                os.rename(old, path)
            elif has_manifest(path) and {f.name for f in old.iterdir()} <= {f.name for f in path.iterdir()}:
                discard(old)


def _remove(checkpoint: Path) -> None:
    try:
        discard(checkpoint)
    except FileNotFoundError:  # another process was faster
        pass
    except OSError as error:
        logger.warning(f"old checkpoint {checkpoint} could not be removed: {error}")


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Turn whatever loading raises into a CheckpointError that names the checkpoint."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # what torch, pickle and safetensors raise has no common name
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {error!r}") from error
