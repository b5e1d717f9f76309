"""SIGINT, SIGTERM and SIGHUP, deferred to a moment when the state of training is consistent."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sae_lens_switch.common.saelens_private import InterruptedException

INTERRUPTIONS = (KeyboardInterrupt, InterruptedException)
# A closed terminal sends SIGHUP; Windows has none.
_SIGNALS = [s for name in ("SIGINT", "SIGTERM", "SIGHUP") if (s := vars(signal).get(name)) is not None]


class SignalledError(InterruptedException):
    """SAELens's exception, with the number of the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"training was interrupted by {signal.Signals(signum).name}")
        self.signum = signum


def exit_code(interruption: BaseException) -> int:
    """The exit code that a shell reports for a process killed by the signal: 130, 143 or 129."""
    if isinstance(interruption, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 128 + (interruption.signum if isinstance(interruption, SignalledError) else signal.SIGTERM)


class Interruption:
    """Inside the context, signals raise immediately within ``waiting()``, and otherwise at the next ``check()``.

    SIGINT raises KeyboardInterrupt; SIGTERM and SIGHUP raise SAELens's InterruptedException. What others' code swallows
    within ``waiting()``, by a broad except or since it was in a finaliser, is raised again at the next ``check()``. A
    signal that is ignored, as SIGHUP is under nohup, stays ignored; a handler that was not installed from Python is
    left alone. Until the first signal has been raised, later ones are ignored. Only the main thread receives signals;
    in any other thread the context does nothing.
    """

    def __init__(self) -> None:
        self._waiting = False
        self._pending: int | None = None
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

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
        """Raise a signal that has arrived and not been raised yet."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._raise(pending)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A stretch that may be interrupted anywhere, since it changes nothing that a checkpoint holds."""
        self._waiting = True
        try:
            self.check()
            yield
        except INTERRUPTIONS:
            self._pending = None  # it is on its way
            raise
        finally:
            self._waiting = False

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        if self._pending is None:
            self._pending = signum
        if self._waiting:
            self._raise(self._pending)

    def _raise(self, signum: int) -> None:
        self._waiting = False
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SignalledError(signum)
