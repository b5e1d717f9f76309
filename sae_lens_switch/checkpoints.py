"""Checkpoints that are whole or not there: written aside, put on disk, then moved into place; checked before use.

A checkpoint is a folder of SAELens's files and ours, and ``checkpoint.json``: the size and SHA-256 of each file, how
far training was, and the settings it depends on.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sae_lens_switch.printable import logger

MANIFEST = "checkpoint.json"
_FINAL = "final_"


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from, and why."""


@contextmanager
def whole_folder(path: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """A folder to write a checkpoint into. It becomes ``path`` when the block ends well, and vanishes otherwise.

    Raises OSError if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_overs(path.parent)
    folder = path.parent / f".saving-{os.getpid()}-{path.name}"
    folder.mkdir()
    try:
        yield folder
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        manifest = facts | {
            "saved_at": time.time(),
            "files": {f.relative_to(folder).as_posix(): _fingerprint(f) for f in files},
        }
        manifest = json.loads(json.dumps(manifest, default=str))
        (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": _digest(manifest)}, indent=2) + "\n")
        for entry in [*files, folder / MANIFEST, *(f for f in folder.rglob("*") if f.is_dir()), folder]:
            _sync(entry)
        previous = path.with_name(f"{path.name}~")  # stays a checkpoint that can be found until the new one is there
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.rename(path, previous)
        os.rename(folder, path)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, RuntimeError | SafetensorError):  # torch's and safetensors' names for a full disk
            raise OSError(f"checkpoint {path} could not be written: {error}") from error
        raise
    _sync(path.parent)
    shutil.rmtree(previous, ignore_errors=True)


def verify(path: Path | str, config: dict[str, Any] | None = None) -> None:
    """Raises CheckpointError, saying which file or setting is wrong; ``config`` is that of the run that would go on.

    A folder without ``checkpoint.json``, as SAELens's own trainer writes it, cannot be checked and passes.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: there is no such folder")
    if not (path / MANIFEST).exists():
        if not any(path.iterdir()):
            raise CheckpointError(f"no checkpoint at {path}: the folder is empty")
        if not (path.parent / MANIFEST).exists():  # where it is part of a checkpoint of several SAEs
            logger.warning(f"{path} has no {MANIFEST}: its files cannot be checked")
        return
    manifest = _read_manifest(path)
    for name, expected in manifest["files"].items():
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
    if config is not None:
        differences = list(_differences(manifest.get("config", {}), json.loads(json.dumps(config, default=str))))
        if differences:
            raise CheckpointError(f"checkpoint {path} is of another configuration: {'; '.join(differences)}")


def latest(base: Path | str, config: dict[str, Any] | None = None) -> Path | None:
    """The newest checkpoint below ``base``, of this run or of an earlier one, that is whole; None if there is none.

    Damaged ones are passed over with a warning. Raises CheckpointError if all are damaged, or if the newest whole
    one is of another configuration.
    """
    found = sorted(_unfinished(Path(base), depth=2), key=lambda c: c[1], reverse=True)
    damage: CheckpointError | None = None
    for path, _ in found:
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning(f"passed over: {error}")
            damage = damage or error
            continue
        verify(path, config)
        return path
    if damage is not None:
        raise damage
    return None


def prune(base: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints in ``base``; final ones stay."""
    for path, _ in sorted(_unfinished(base, depth=1), key=lambda c: c[1], reverse=True)[keep:]:
        doomed = path.with_name(f".deleting-{os.getpid()}-{path.name}")
        os.rename(path, doomed)  # at once, so that half a checkpoint is never found
        shutil.rmtree(doomed, ignore_errors=True)


def _unfinished(base: Path, depth: int) -> Iterator[tuple[Path, tuple[float, int]]]:
    """Checkpoints of runs that are under way, with what orders them: when saved, and how far training was."""
    for level in range(1, depth + 1):
        for file in base.glob("/".join(["*"] * level + [MANIFEST])):
            folder = file.parent
            if folder.name.startswith((".", _FINAL)):
                continue
            try:
                manifest = _read_manifest(folder)
                yield folder, (manifest["saved_at"], manifest["n_training_samples"])
            except CheckpointError:
                yield folder, (file.stat().st_mtime, 0)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        digest = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({error!r})") from error
    if digest != _digest(manifest):
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} is not what was written (SHA-256 differs)")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    for name in sorted(saved.keys() | wanted.keys()):
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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_left_overs(base: Path) -> None:
    """Of processes that were killed while they saved or deleted."""
    for folder in [*base.glob(".saving-*"), *base.glob(".deleting-*")]:
        pid = folder.name.split("-")[1]
        if not pid.isdigit() or int(pid) == os.getpid() or not _runs(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
