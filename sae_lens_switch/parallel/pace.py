"""Whose steps take longest: all processes wait for the slowest, and should say which that is."""

import statistics
import time
from collections.abc import Sequence

from sae_lens_switch.common.printable import logger
from sae_lens_switch.parallel.ranks import Ranks

# Steps over which times are averaged, and after which one may be named.
_STEPS = 100
# Named if it takes so many times as long as the others' median, and so many seconds per step longer.
_RATIO, _SECONDS = 1.5, 0.005


class Pace:
    """Each process's seconds per step, without those in which it waits for messages of the others.

    On a GPU they are the host's: its language model and its data count, a device that others wait for does not.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._began: float | None = None
        self._waited = 0.0
        self._sums = [0.0] * ranks.size
        self._n_steps = 0

    def worked(self) -> float:
        """Seconds of work in the step that ends now; 0 before the first."""
        if self._began is None:
            return 0.0
        return time.perf_counter() - self._began - (self.ranks.seconds_waited - self._waited)

    def next_step(self, everybodys: Sequence[float]) -> None:
        """Begin a step; ``everybodys`` is what each process has worked in the last. May warn of a slow one."""
        if self._began is not None:
            self._sums = [total + seconds for total, seconds in zip(self._sums, everybodys, strict=True)]
            self._n_steps += 1
        if self._n_steps == _STEPS:
            self._name_slowest([total / _STEPS for total in self._sums])
            self._sums, self._n_steps = [0.0] * self.ranks.size, 0
        self._began, self._waited = time.perf_counter(), self.ranks.seconds_waited

    def _name_slowest(self, seconds: Sequence[float]) -> None:
        if len(seconds) < 2 or not self.ranks.is_first:
            return
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        others = statistics.median(s for rank, s in enumerate(seconds) if rank != slowest)
        if seconds[slowest] > max(_RATIO * others, others + _SECONDS):
            logger.warning(
                f"rank {slowest} works {seconds[slowest]:.3g} s per step, the others {others:.3g} s (median): all wait "
                "for it"
            )
