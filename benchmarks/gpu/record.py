"""What a stage has found so far: one JSON file, whole after every case, and the loop that fills it."""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

# The exit code of a process that has lost its device to a faulty kernel: the next one goes on with the next case.
DEVICE_LOST = 75

Case = tuple[str, Callable[[], dict[str, Any]]]


class Record:
    """Cases by name, each with a ``status``: running, ok, failed, crashed, hung or unfinished (its time was up)."""

    def __init__(self, file: Path, about: dict[str, Any] | None = None) -> None:
        self.file = file
        self.data: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"about": {}, "cases": {}}
        if about is not None:
            self.data["about"] = about

    @property
    def cases(self) -> dict[str, dict[str, Any]]:
        return self.data["cases"]

    def set(self, name: str, **fields: Any) -> None:
        self.cases[name] = fields
        self.write()

    def running(self) -> str | None:
        return next((name for name, case in self.cases.items() if case["status"] == "running"), None)

    def is_done(self, name: str) -> bool:
        """Whether an earlier call has settled the case, however it ended."""
        return self.cases.get(name, {}).get("status") in ("ok", "failed", "crashed", "hung")

    def forget_failures(self) -> None:
        self.data["cases"] = {name: case for name, case in self.cases.items() if case["status"] == "ok"}
        self.write()

    def write(self) -> None:
        """Beside its place first, then renamed: whoever reads finds the old file or the new one.

        A file has one writer at a time; what one that was killed left unfinished is written over.
        """
        unfinished = self.file.with_name(f".{self.file.name}.unfinished")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n")
        unfinished.replace(self.file)


def run_cases(record: Record, cases: Iterable[Case], deadline: float) -> None:
    """Run what is not done yet until ``deadline`` (of time.time()). What a case raises is recorded with its place."""
    for name, run in cases:
        if record.is_done(name):
            continue
        if time.time() >= deadline:
            return
        record.set(name, status="running", started=time.time())
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                fields = {"status": "ok", **run()}
            except Exception as error:  # noqa: BLE001, the other cases are still to run
                fields = {"status": "failed", "error": summary(error), "traceback": traceback.format_exc()[-4000:]}
        # Such as that a kernel has failed its self-check, and plain torch runs in its place from here on.
        ours = sorted({str(w.message)[:500] for w in caught if "sae_lens_switch" in str(w.message)})
        fields |= {"warnings": ours} if ours else {}
        record.set(name, seconds=round(time.perf_counter() - start, 3), **fields)
        if fields["status"] == "failed" and device_is_lost():
            record.write()
            sys.exit(DEVICE_LOST)


def summary(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0][:300]


def device_is_lost() -> bool:
    """After an illegal access, an assertion on the device or a capture that failed, every later call fails."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.rand(1, device="cuda").sum().item()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False
