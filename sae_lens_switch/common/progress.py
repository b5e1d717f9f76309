"""Progress of a long loop: a bar on a terminal or in a notebook, and a sentence now and then in a batch job's log."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from tqdm.auto import tqdm
from tqdm.autonotebook import tqdm as tqdm_of_notebooks
from tqdm.std import tqdm as tqdm_of_terminals

from sae_lens_switch.common.printable import say

T = TypeVar("T")
Facts = Callable[[], Mapping[str, Any]]  # called only when they are shown: to read them waits for the device

# Seconds before each of the first sentences; the last one stays.
_GAPS = (10.0, 30.0, 60.0)
_DESCRIBED_EVERY = 100


class Bar:
    """tqdm, with facts in front."""

    def __init__(self, total: int, initial: int, desc: str) -> None:
        self.bar = tqdm(total=total, initial=initial, desc=desc)
        self.n_updates = 0

    @property
    def n(self) -> int:
        return self.bar.n

    def update(self, n: int, facts: Facts = dict) -> None:
        self.bar.update(n)
        self.n_updates += 1
        if self.n_updates % _DESCRIBED_EVERY == 0:
            self.bar.set_description(" | ".join(f"{name}: {_shown(value, '.5f')}" for name, value in facts().items()))

    def close(self) -> None:
        self.bar.close()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Sentences:
    """A line when 10 seconds have gone by, then 30, then once a minute; and one at the end.

    begins: what a line begins with, such as "trained on"
    unit:   of what is counted
    clock:  seconds that only grow
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        begins: str = "done",
        unit: str = "samples",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.initial, self.n = total, initial, initial
        self.begins, self.unit, self.clock = begins, unit, clock
        self.started = clock()
        self.gaps = iter(_GAPS)
        self.due = self.started + next(self.gaps)
        self.gap = _GAPS[-1]
        self.written: int | None = None

    def update(self, n: int, facts: Facts = dict) -> None:
        self.n += n
        now = self.clock()
        if now >= self.due:
            self.gap = next(self.gaps, self.gap)
            self.due = now + self.gap
            self._write(now, facts())

    def close(self) -> None:
        if self.written != self.n and self.n > self.initial:
            self._write(self.clock(), {})

    def __enter__(self) -> "Sentences":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, now: float, facts: Mapping[str, Any]) -> None:
        self.written = self.n
        elapsed, done, left = now - self.started, self.n - self.initial, self.total - self.n
        share = f" ({100 * self.n / self.total:.0f} %)" if self.total > 0 else ""
        to_go = f", {_clock_time(elapsed * left / done)} to go" if left > 0 and done > 0 else ""
        says = ", ".join(f"{name} {_shown(value, '.4g')}" for name, value in facts.items())
        line = f"{self.begins} {self.n:,} of {self.total:,} {self.unit}{share} in {_clock_time(elapsed)}{to_go}"
        say(f"{line}; {says}" if says else line, error=True)


def progress(total: int, initial: int, desc: str, begins: str, unit: str = "samples") -> Bar | Sentences:
    """What tells how far a loop is, which gives ``update(n, facts)`` the steps that it took; a context manager.

    On a terminal and in a notebook tqdm's bar, with ``desc``; elsewhere, where each of its frames would be a line more,
    sentences on stderr. Like tqdm it is silent with ``TQDM_DISABLE=1``.
    """
    return Bar(total, initial, desc) if has_bar() else Sentences(total, initial, begins, unit)


def track(items: Iterable[T], desc: str = "", leave: bool = False, total: int | None = None) -> Iterator[T]:
    """``tqdm(items, ...)`` as SAELens calls it, likewise."""
    if has_bar():
        yield from tqdm(items, desc=desc, leave=leave, total=total)
        return
    n = total if total is not None else len(items)  # type: ignore[arg-type]
    with Sentences(n, begins=f"{desc}:", unit="batches") as sentences:
        for item in items:
            yield item
            sentences.update(1)


def has_bar() -> bool:
    in_notebook = tqdm_of_notebooks is not tqdm_of_terminals
    silent = os.environ.get("TQDM_DISABLE", "") not in ("", "0")
    return in_notebook or silent or (sys.stderr is not None and sys.stderr.isatty())


def _shown(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, float) else str(value)


def _clock_time(seconds: float) -> str:
    s = round(seconds)
    return f"{s // 3600:02}:{s // 60 % 60:02}:{s % 60:02}"
