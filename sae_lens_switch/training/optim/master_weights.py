"""What an optimiser steps in place of the parameters: float32 masters of low-precision weights, in memory order."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from sae_lens_switch_kernels import WorkingCopies, version_of
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sae_lens_switch.common.types import StateDict
from sae_lens_switch.training.optim.gradients import parameters_of, trained


class MasterWeights:
    """Swaps an optimiser's parameters while it steps or loads its state, and swaps them back afterwards.

    Transposed matrices, such as W_enc, are shown as memory holds them: elementwise nothing changes, but torch's fused
    steps copy a whole matrix whose rows are not contiguous. With ``masters``, parameters of less than float32 are
    stepped in float32, kept here and saved with the optimiser's state: updates smaller than a weight's rounding then
    add up instead of being lost. A parameter with a master, and the working copy of one without, are the same to a
    step: numbers of low precision to be written beside those that are stepped (``written``).

    Args:
        optimizer: From now on, every one of its steps is preceded by ``swap_in`` and followed by ``swap_out``.
        masters: Whether low-precision parameters have float32 masters.
        after_step: Called at the end of a step, before the parameters are swapped back.
        copies: The working copies of the parameters.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        masters: bool,
        after_step: Callable[[], None] | None = None,
        copies: WorkingCopies | None = None,
    ) -> None:
        self.optimizer, self.has_masters, self.after_step = optimizer, masters, after_step
        self.copies = WorkingCopies() if copies is None else copies
        self.has_written: set[nn.Parameter] = set()
        self.masters: dict[nn.Parameter, Tensor] = {}
        self.versions: dict[nn.Parameter, tuple[int, int]] = {}
        self.low_precision: dict[nn.Parameter, Tensor] = {}
        self.transposed: list[nn.Parameter] = []
        optimizer.register_step_pre_hook(lambda *_: self.swap_in())
        optimizer.register_step_post_hook(lambda *_: self.swap_out())
        if masters:
            optimizer.register_state_dict_post_hook(lambda _, state: state | {"masters": self.saved_masters()})
            optimizer.register_load_state_dict_pre_hook(lambda _, state: self.before_loading(state))
            optimizer.register_load_state_dict_post_hook(lambda *_: self.after_loading())

    def refresh(self) -> None:
        """Take over what others than this optimiser have written to the parameters since its last step.

        Masters keep their memory, which a captured step reads and writes.
        """
        for p, master in self.masters.items():
            if p in self.versions and self.versions[p] != version_of(p):
                self.masters[p] = taken_over(master, p.detach())
                self.versions[p] = version_of(p)

    def swap_in(self) -> None:
        if self.has_masters:
            self.refresh()
            self._swap_in_masters()
        self.transposed = [p for p in parameters_of(self.optimizer) if p.ndim == 2 and not p.is_contiguous()]
        self._transpose()

    def swap_out(self) -> None:
        if self.after_step is not None:
            self.after_step()
        self._transpose()
        self.transposed = []
        self._swap_out_masters()

    @contextmanager
    def written(self, p: nn.Parameter) -> Iterator[Tensor | None]:
        """Around a step of one parameter, while swapped: what to write beside it in lower precision, laid out alike."""
        low = self.low_precision.get(p)
        if low is None:
            with self.copies.written(p) as copy:
                yield copy
        elif low.stride() != self.masters[p].stride():
            yield None
        else:
            yield low.as_strided(p.shape, p.stride())
            self.has_written.add(p)

    def _transpose(self) -> None:
        for p in self.transposed:
            _transpose(p, self.optimizer.state.get(p, {}))

    def _swap_in_masters(self) -> None:
        for p in trained(parameters_of(self.optimizer)):
            if p.dtype in (torch.bfloat16, torch.float16):
                grad, p.grad, self.low_precision[p] = p.grad, None, p.data
                if p not in self.masters:
                    self.masters[p] = p.data.float()
                p.data = self.masters[p]
                p.grad = None if grad is None else grad.float()

    def _swap_out_masters(self) -> None:
        for p, low in self.low_precision.items():
            p.grad = None
            p.data = low if p in self.has_written else low.copy_(p.data)
            torch.autograd.graph.increment_version(p)
            self.versions[p] = version_of(p)
        self.low_precision, self.has_written = {}, set()

    def saved_masters(self) -> dict[int, Tensor]:
        return {i: self.masters[p] for i, p in enumerate(parameters_of(self.optimizer)) if p in self.masters}

    def before_loading(self, state: StateDict) -> None:
        parameters = parameters_of(self.optimizer)
        self.masters = {parameters[i]: t.to(parameters[i].device) for i, t in state.get("masters", {}).items()}
        self.versions = {}
        self.low_precision = {p: p.data for p in self.masters}
        for p, master in self.masters.items():  # torch casts a parameter's state to the parameter's dtype
            p.data = master

    def after_loading(self) -> None:
        for p, data in self.low_precision.items():
            p.data = data
        self.low_precision = {}


def taken_over(master: Tensor, weights: Tensor) -> Tensor:
    """The float32 master of ``weights``: as it was where it still rounds to them, in the same memory if that fits."""
    if master.device != weights.device or master.shape != weights.shape:
        return weights.to(master.dtype)
    return master.copy_(torch.where(master.to(weights.dtype) == weights, master, weights.to(master.dtype)))


def _transpose(p: nn.Parameter, state: StateDict) -> None:
    grad, p.grad = p.grad, None
    p.data = p.data.T
    p.grad = None if grad is None else grad.T
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim == 2:
            state[name] = value.T
