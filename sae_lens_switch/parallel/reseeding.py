"""A collapsed router countered where the experts are divided: one process's expert copied to another's."""

from torch import Tensor
from typing_extensions import override

from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.training.collapse_response import ExpertPlacement


class DividedPlacement(ExpertPlacement):
    """Each process of a row has its own experts, and its own part of the batch; all must take part."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    @override
    def whole(self, x_BD: Tensor) -> Tensor:
        return self._ranks.gather_rows(x_BD, "the batch")

    @override
    def two_of(self, n: int) -> list[int]:
        return self._ranks.first_says(super().two_of(n))

    @override
    def copy(self, tensors: list[Tensor], source: slice, target: slice) -> None:
        for t in tensors:
            self._copy(t, source.start, target.start, source.stop - source.start)

    def _copy(self, t: Tensor, source: int, target: int, n: int) -> None:
        """``n`` rows, counted over all processes of the row, which have equally many."""
        me, P = self._ranks.row_rank, self._ranks.row_size
        (home, first), (owner, place) = divmod(source, len(t)), divmod(target, len(t))
        sent, received = [0] * P, [0] * P
        if me == home:
            sent[owner] = n
        if me == owner:
            received[home] = n
        rows = self._ranks.exchange(t[first : first + sum(sent)], sent, received, "an expert")
        if me == owner:
            t[place : place + n].copy_(rows)
