"""Checkpoints that are whole or not there: written aside, put on disk, then moved into place; checked before use.

A checkpoint is a folder of SAELens's files and ours, and ``checkpoint.json``: the size and SHA-256 of each file, how
far training was, and the settings it depends on.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens.constants import TRAINER_STATE_FILENAME
from safetensors import SafetensorError

from sae_lens_switch.common.atomic import discard, locked, remove_left_overs, scratch, sync
from sae_lens_switch.common.printable import logger

MANIFEST = "checkpoint.json"
# In a checkpoint of a run that scales its activations: what training goes on from.
TRAINING_FOLDER = "training"
# How long a run is to be, and with it the end of its schedule: a checkpoint is no bar to changing one's mind.
MAY_CHANGE = {"total_training_samples", "lr_decay_steps"}
_FINAL, _DIVERGED = "final_", "diverged_"
_ORDERED_BY = ("n_training_samples", "saved_at")


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from, and why."""


class Session:
    """A process's part of a run: by it checkpoints are ordered, and told from those of other runs in one folder.

    A fresh or resumed run comes after all that it finds, also with fewer samples, or if the clock has gone back.
    """

    def __init__(self) -> None:
        self._run = uuid.uuid4().hex
        self._after = 0.0
        self._started: float | None = None

    def go_on_from(self, checkpoint: Path) -> None:
        """Belong to the run of a checkpoint, and come after it. One without ``checkpoint.json`` says nothing."""
        with suppress(CheckpointError):
            manifest = _read_manifest(checkpoint)
            self._run = manifest.get("run", self._run)
            self._after, self._started = manifest.get("session_started", 0.0), None

    def facts(self, base: Path) -> dict[str, Any]:
        """What ``checkpoint.json`` says of it, for a checkpoint in ``base``."""
        if self._started is None:
            earlier = max([self._after, *(c.order.session_started for c in _checkpoints(base, depth=1))])
            self._started = round(max(time.time(), earlier + 1e-3), 3)
        return {"run": self._run, "session_started": self._started}


@contextmanager
def whole_folder(path: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """A folder to write a checkpoint into. It becomes ``path`` when the block ends well, and vanishes otherwise.

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
        manifest = facts | {
            "saved_at": round(time.time(), 3),  # so that it is another number if any digit changes
            "files": {f.relative_to(folder).as_posix(): _fingerprint(f) for f in files},
        }
        manifest = json.loads(json.dumps(manifest, default=str))
        (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": _digest(manifest)}, indent=2) + "\n")
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
    """For a checkpoint that training can do without: one that cannot be written is reported, and no error."""
    try:
        yield
    except OSError as error:
        logger.error(f"{what} could not be saved: {error}")


def verify(path: Path | str, config: dict[str, Any] | None = None) -> None:
    """Raises CheckpointError, saying which file or setting is wrong; ``config`` is that of the run that would go on.

    A folder without ``checkpoint.json``, as SAELens's own trainer writes it, cannot be checked and passes.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: there is no such folder")
    if not _has_manifest(path):
        with _reading(path):
            is_empty = not any(path.iterdir())
        if is_empty:
            raise CheckpointError(f"no checkpoint at {path}: the folder is empty")
        if not _has_manifest(path.parent):  # where it is part of a checkpoint of several SAEs
            logger.warning(f"{path} has no {MANIFEST}: its files cannot be checked")
        return
    manifest = _read_manifest(path)
    for name, expected in manifest["files"].items():
        with _reading(path / name):
            _check_file(path, name, expected)
    if config is not None:
        differences = list(_differences(manifest.get("config", {}), json.loads(json.dumps(config, default=str))))
        if differences:
            raise CheckpointError(f"checkpoint {path} is of another configuration: {'; '.join(differences)}")


def latest(base: Path | str, config: dict[str, Any] | None = None, n_samples: int = 0) -> Path | None:
    """The newest checkpoint below ``base``, of this run or of an earlier one, that is whole; None if there is none.

    The newest has seen the most samples since a run was last begun or resumed. A run that is to be longer, to
    ``n_samples``, goes on from the final one too, unless what scaled its activations is folded into that. Damaged ones
    and those of a run that diverged are passed over with a warning. Raises CheckpointError if there are no others, or
    if the newest whole one is of another configuration.
    """
    base = Path(base)
    if base.exists():
        with _reading(base):
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
            if not _has_manifest(found.path):  # another process has removed it since
                continue
            logger.warning(f"passed over: {error}")
            damage = damage or error
            continue
        verify(found.path, config)
        return found.path
    if damage is not None:
        raise damage
    if diverged:
        raise CheckpointError(
            f"below {base} there are only checkpoints of runs that diverged: {', '.join(map(str, diverged))}. To go on "
            f"from one of them, name it: resume={str(diverged[0])!r}"
        )
    _say_what_else_is_there(base)
    return None


def config_of(path: Path) -> dict[str, Any]:
    """The settings that a verified checkpoint, or one SAE's part of it, was written with; {} where none are kept."""
    if (path / MANIFEST).exists():
        return _read_manifest(path).get("config", {})
    return config_of(path.parent).get(path.name, {}) if (path.parent / MANIFEST).exists() else {}


def prune(base: Path, keep: int, written: Path | None = None) -> None:
    """Remove all but the ``keep`` newest checkpoints in ``base``; final ones and those of diverged runs stay.

    ``written`` was just saved: it stays, and so does what is of another run or damaged. A failure is only warned of.
    """
    run = None
    if written is not None:
        with suppress(CheckpointError):
            run = _read_manifest(written).get("run")
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
        if not _has_manifest(folder):
            continue
        in_its_place = not folder.name.endswith("~")
        try:
            manifest = _read_manifest(folder)
        except CheckpointError:
            if _has_manifest(folder):
                yield _Found(folder, _UNKNOWN)
            continue
        started, n, saved_at = (manifest.get(name, 0) for name in ("session_started", *_ORDERED_BY))
        order = _Order(started, n, in_its_place, saved_at)
        yield _Found(folder, order, manifest.get("run"), manifest.get("folded", False))


def _has_manifest(folder: Path) -> bool:
    return os.path.exists(folder / MANIFEST)  # which raises nothing, whatever is there


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
        inside = any(_has_manifest(parent) for parent in folder.parents if parent.is_relative_to(base))
        if _has_manifest(folder):
            others.append(f"{folder} (of a finished run)")
        elif (folder / TRAINER_STATE_FILENAME).exists() and not inside:
            others.append(f"{folder} (without {MANIFEST}, as SAELens's own trainer writes it)")
    if others:
        listed = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
        logger.warning(
            f"no checkpoint below {base} that resume='latest' means: starting from the beginning. There is {listed}; "
            "to go on from one of them, name it"
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
            if not path.exists() and _has_manifest(old):
                os.rename(old, path)
            elif _has_manifest(path) and {f.name for f in old.iterdir()} <= {f.name for f in path.iterdir()}:
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
    """Whatever is wrong with files that could not be checked, it is a CheckpointError that names the checkpoint."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # what torch, pickle and safetensors raise has no common name
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {error!r}") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error


def _check_file(path: Path, name: str, expected: dict[str, Any]) -> None:
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"checkpoint {path} is not whole: {name} is missing")
    if file.stat().st_size != expected["bytes"]:
        raise CheckpointError(
            f"checkpoint {path} is damaged: {name} has {file.stat().st_size} bytes, it was written with "
            f"{expected['bytes']}"
        )
    if _fingerprint(file) != expected:
        raise CheckpointError(f"checkpoint {path} is damaged: {name} is not what was written (SHA-256 differs)")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        digest = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({error!r})") from error
    if digest != _digest(manifest):
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} is not what was written (SHA-256 differs)")
    if not _has_its_form(manifest):
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} does not say what it must")
    return manifest


def _has_its_form(manifest: dict[str, Any]) -> bool:
    """Whether it can be used without a further look, also if somebody has written it by hand."""
    files, started = manifest.get("files"), manifest.get("session_started", 0.0)
    return (
        isinstance(files, dict)
        and all(isinstance(f, dict) and {"bytes", "sha256"} == f.keys() for f in files.values())
        and all(isinstance(n, int | float) and abs(n) < 1e18 for n in (started, *map(manifest.get, _ORDERED_BY)))
        and isinstance(manifest.get("run", ""), str)
        and isinstance(manifest.get("config", {}), dict)
    )


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    for name in sorted((saved.keys() | wanted.keys()) - MAY_CHANGE):
        a, b = saved.get(name), wanted.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b)
        elif a != b:
            yield f"{name} was {a!r}, is {b!r}"


def _fingerprint(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
