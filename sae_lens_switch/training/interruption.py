"""SIGINT, SIGTERM and SIGHUP, at a moment when what training holds is consistent."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sae_lens.training._interruption import InterruptedException

INTERRUPTIONS = (KeyboardInterrupt, InterruptedException)
# A terminal's end is SIGHUP; Windows has none.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class SignalledError(InterruptedException):
    """SAELens's exception, with the signal that it is for."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"training was interrupted by {signal.Signals(signum).name}")
        self.signum = signum


def exit_code(interruption: BaseException) -> int:
    """What a shell gives a process that the signal ended: 130, 143 or 129."""
    if isinstance(interruption, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 128 + getattr(interruption, "signum", signal.SIGTERM)


class Interruption:
    """Within ``with``, a signal raises where training only ``waiting()``s, and waits for such a place elsewhere.

    SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP SAELens's InterruptedException. A signal that is ignored, as
    under nohup, stays ignored, and one that was not set up from Python is left to who did. Further signals change
    nothing while a checkpoint is saved because of the first. Signals reach the main thread alone: in any other nothing
    changes.
    """

    def __init__(self) -> None:
        self._waiting = False
        self._pending: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self._pending = None
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    self._previous[signum] = signal.signal(signum, self._receive)
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
        if self._pending is None:
            self._pending = signum
        if self._waiting:
            self._raise(self._pending)

    def _raise(self, signum: int) -> None:
        self._pending, self._waiting = None, False
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SignalledError(signum)
