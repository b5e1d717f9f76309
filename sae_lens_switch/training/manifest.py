"""``checkpoint.json``: the size and SHA-256 of each file, how far training was, and the settings it depends on."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sae_lens_switch.common.types import Json

MANIFEST = "checkpoint.json"
# How long a run is to be, and with it the end of its schedule, may change between a checkpoint and the resumed run.
MAY_CHANGE = {"total_training_samples", "lr_decay_steps"}
# What checkpoints from before a field was there have for it.
_BEFORE = {
    "encoder_precision": "full",
    "n_active_experts": 1,
    "n_shared_experts": 0,
    "shared_width": None,
    "load_balancing": "loss",
    "load_balance_bias_rate": 0.01,
    "router_z_loss_coefficient": 0.0,
    "expert_overlap_coefficient": 0.0,
    "activation": "topk",
    "topk_threshold_lr": 0.01,
    "matryoshka_widths": None,
    "moments_dtype": "float32",
}
ORDERED_BY = ("n_training_samples", "saved_at")


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from, and why."""


def has_manifest(folder: Path) -> bool:
    return os.path.exists(folder / MANIFEST)  # which raises nothing, whatever is there


def write_manifest(folder: Path, files: Iterable[Path], facts: Json, known: Mapping[str, Json]) -> None:
    """``facts``, with the time and the fingerprints of ``files``, into the checkpoint's folder; some may be known."""
    names = {f.relative_to(folder).as_posix(): f for f in files}
    manifest = facts | {
        "saved_at": round(time.time(), 3),  # so that it is another number if any digit changes
        "files": {name: known.get(name) or fingerprint(f) for name, f in names.items()},
    }
    manifest = json.loads(json.dumps(manifest, default=str))
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": _digest(manifest)}, indent=2) + "\n")


def check_files(path: Path, manifest: Json) -> None:
    """Raises CheckpointError for a file that is missing or not what was written."""
    for name, expected in manifest["files"].items():
        with reading(path / name):
            _check_file(path, name, expected)


def check_config(path: Path, manifest: Json, config: Json) -> None:
    """Raises CheckpointError if a run with ``config`` cannot resume from the checkpoint."""
    found = list(_differences(manifest.get("config", {}), json.loads(json.dumps(config, default=str))))
    if found:
        raise CheckpointError(f"checkpoint {path} is of another configuration: {'; '.join(found)}")


def config_of(path: Path) -> Json:
    """The settings that a verified checkpoint, or one SAE's part of it, was written with; {} where none are kept."""
    if (path / MANIFEST).exists():
        return read_manifest(path).get("config", {})
    return config_of(path.parent).get(path.name, {}) if (path.parent / MANIFEST).exists() else {}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error


def _check_file(path: Path, name: str, expected: Json) -> None:
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"checkpoint {path} is not whole: {name} is missing")
    if file.stat().st_size != expected["bytes"]:
        raise CheckpointError(
            f"checkpoint {path} is damaged: {name} has {file.stat().st_size} bytes, it was written with "
            f"{expected['bytes']}"
        )
    if fingerprint(file) != expected:
        raise CheckpointError(f"checkpoint {path} is damaged: {name} is not what was written (SHA-256 differs)")


def read_manifest(path: Path) -> Json:
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


def _has_its_form(manifest: Json) -> bool:
    """Whether it can be used without a further look, also if somebody has written it by hand."""
    files, started = manifest.get("files"), manifest.get("session_started", 0.0)
    return (
        isinstance(files, dict)
        and all(isinstance(f, dict) and {"bytes", "sha256"} == f.keys() for f in files.values())
        and all(isinstance(n, int | float) and abs(n) < 1e18 for n in (started, *map(manifest.get, ORDERED_BY)))
        and isinstance(manifest.get("run", ""), str)
        and isinstance(manifest.get("config", {}), dict)
    )


def _digest(manifest: Json) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _differences(saved: Json, wanted: Json) -> Iterator[str]:
    for name in sorted((saved.keys() | wanted.keys()) - MAY_CHANGE):
        a, b = saved.get(name, _BEFORE.get(name) if name in wanted else None), wanted.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b)
        elif a != b:
            yield f"{name} was {a!r}, is {b!r}"


def fingerprint(file: Path) -> Json:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
