"""Progress of a long loop: a bar on a terminal or in a notebook, an occasional line in the log of a batch job."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from tqdm.auto import tqdm
from tqdm.autonotebook import tqdm as tqdm_of_notebooks
from tqdm.std import tqdm as tqdm_of_terminals

from sae_lens_switch.common.printable import say

T = TypeVar("T")
Facts = Callable[[], Mapping[str, object]]  # called only when shown: reading them synchronises with the device

# Seconds before each of the first lines; the last gap repeats.
_GAPS = (10.0, 30.0, 60.0)
_DESCRIBED_EVERY = 100  # updates


class Bar:
    """tqdm's bar, described by the facts."""

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
    """A line on stderr after 10 seconds, after another 30, then every minute; and one at the end.

    Args:
        total: The count at the end of the loop.
        initial: The count at its start.
        begins: How each line begins, such as "trained on".
        unit: What is counted.
        clock: A monotonic clock, in seconds.
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

    def _write(self, now: float, facts: Mapping[str, object]) -> None:
        self.written = self.n
        elapsed, done, left = now - self.started, self.n - self.initial, self.total - self.n
        share = f" ({100 * self.n / self.total:.0f} %)" if self.total > 0 else ""
        to_go = f", {_clock_time(elapsed * left / done)} to go" if left > 0 and done > 0 else ""
        says = ", ".join(f"{name} {_shown(value, '.4g')}" for name, value in facts.items())
        line = f"{self.begins} {self.n:,} of {self.total:,} {self.unit}{share} in {_clock_time(elapsed)}{to_go}"
        say(f"{line}; {says}" if says else line, error=True)


class Silent:
    """Nothing is shown."""

    n = 0

    def update(self, n: int, facts: Facts = dict) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def progress(total: int, initial: int, desc: str, begins: str, unit: str = "samples") -> Bar | Sentences:
    """A context manager whose ``update(n, facts)`` shows how far a loop is.

    On a terminal and in a notebook it is tqdm's bar; elsewhere, where every frame of a bar would be a new line, it is
    lines on stderr. Like tqdm it is silent with ``TQDM_DISABLE=1``.

    Args:
        total: The count at the end of the loop.
        initial: The count at its start.
        desc: The label of the bar.
        begins: How each line begins.
        unit: What is counted.
    """
    return Bar(total, initial, desc) if has_bar() else Sentences(total, initial, begins, unit)


def track(items: Iterable[T], desc: str = "", leave: bool = False, total: int | None = None) -> Iterator[T]:
    """Iterate like ``tqdm(items, ...)``, with the arguments SAELens gives it; progress is shown as by ``progress``."""
    if has_bar():
        yield from tqdm(items, desc=desc, leave=leave, total=total)
        return
    n = total if total is not None else len(items)  # type: ignore[arg-type]
    with Sentences(n, begins=f"{desc}:", unit="batches") as sentences:
        for item in items:
            yield item
            sentences.update(1)


def has_bar() -> bool:
    """Whether progress is a bar, or nothing at all, rather than lines."""
    in_notebook = tqdm_of_notebooks is not tqdm_of_terminals
    silent = os.environ.get("TQDM_DISABLE", "") not in ("", "0")
    return in_notebook or silent or (sys.stderr is not None and sys.stderr.isatty())


def _shown(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, float) else str(value)


def _clock_time(seconds: float) -> str:
    s = round(seconds)
    return f"{s // 3600:02}:{s // 60 % 60:02}:{s % 60:02}"
