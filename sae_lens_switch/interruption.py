"""SIGINT and SIGTERM, at a moment when what training holds is consistent."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sae_lens.training._interruption import InterruptedException

INTERRUPTIONS = (KeyboardInterrupt, InterruptedException)


class Interruption:
    """Within ``with``, a signal raises where training only ``waiting()``s, and waits for such a place elsewhere.

    SIGINT raises KeyboardInterrupt, SIGTERM SAELens's InterruptedException. Signals reach the main thread alone: in
    any other nothing changes.
    """

    def __init__(self) -> None:
        self._waiting = False
        self._pending: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise what has come and not been raised yet."""
        if self._pending is not None:
            self._raise(self._pending)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A stretch that may be broken off anywhere: nothing that a checkpoint holds changes in it."""
        self._waiting = True
        try:
            self.check()
            yield
        finally:
            self._waiting = False

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        self._pending = signum
        if self._waiting:
            self._raise(signum)

    def _raise(self, signum: int) -> None:
        self._pending, self._waiting = None, False
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise InterruptedException(f"training was interrupted by {signal.Signals(signum).name}")
