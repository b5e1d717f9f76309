"""The running thresholds of BatchTopK SAEs: what after training decides in place of a batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_switch.common.types import StateDict


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


class ExactThresholds(nn.Module):
    """Keeps ``topk_threshold`` in float64 whatever the SAE's dtype: in bfloat16 a small change of it would be lost."""

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self._buffers.get("topk_threshold")
        super()._apply(fn, recurse)
        after = self._buffers.get("topk_threshold")
        if before is not None and after is not None and after.dtype != torch.float64:
            self._buffers["topk_threshold"] = before.to(after.device, torch.float64)
        return self

    @override
    def _load_from_state_dict(self, state_dict: StateDict, prefix: str, *args: Any, **kwargs: Any) -> None:
        """As torch's; SAELens has cast every tensor of a file to the SAE's dtype, and has the buffer replaced by it."""
        name = f"{prefix}topk_threshold"
        if name in state_dict:
            state_dict[name] = state_dict[name].double()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
