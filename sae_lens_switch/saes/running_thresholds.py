"""The running thresholds of BatchTopK SAEs: what after training decides in place of a batch."""

import torch
from torch import Tensor


def move_thresholds_(thresholds: Tensor, least: Tensor, lr: float) -> None:
    """By ``lr`` of the difference towards the least active latents; where none is, infinite, they stay. In place."""
    after = (1 - lr) * thresholds + lr * least.to(thresholds.dtype)
    thresholds.copy_(torch.where(least < torch.inf, after, thresholds))


def least_active(acts: Tensor) -> Tensor:
    """The least positive number; infinite if there is none."""
    return acts.masked_fill(~(acts > 0), torch.inf).amin() if acts.numel() else acts.new_full((), torch.inf)


def least_active_of(acts_S: Tensor, owner_S: Tensor, n_owners: int) -> Tensor:
    """``least_active`` of each owner's."""
    positive_S = acts_S.masked_fill(~(acts_S > 0), torch.inf)
    return acts_S.new_full((n_owners,), torch.inf).scatter_reduce(0, owner_S, positive_S, "amin")


class BeforeStep:
    """Thresholds as they were before a step, until it is known whether the step is one. Waits for nothing."""

    def __init__(self) -> None:
        self._thresholds: Tensor | None = None

    def keep(self, thresholds: Tensor) -> None:
        """Called before each part of a step: the first counts."""
        if self._thresholds is None:
            self._thresholds = thresholds.clone()

    def settle_(self, thresholds: Tensor, is_finite: Tensor) -> None:
        """Go back, unless the step was finite."""
        if self._thresholds is not None:
            thresholds.copy_(torch.where(is_finite, thresholds, self._thresholds))
        self._thresholds = None
