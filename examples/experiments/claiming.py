"""Work that several processes share: each piece is taken by one of them, and is free again if that one dies."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[bool]:
    """Whether this process alone may now do the work of this name: the system frees it however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def write(file: Path, content: Any) -> None:
    """Write JSON atomically; it is on the disk when it appears. For the one process that has claimed the file.

    What a killed process left unfinished is written over.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    with open(unfinished, "w") as handle:
        handle.write(json.dumps(content, indent=1) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(unfinished, file)
