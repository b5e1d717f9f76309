"""Copies of weights in low precision, for the products of a training step; written by the step that writes the weights.

Under autocast a product reads a weight in bfloat16. Cast anew in every forward and backward pass, whole matrices go
through memory several times per step. An optimiser has each new weight in a register or in cache: from there its copy
costs two bytes to write.

A copy is used only where it is known to equal its weight: inside ``WorkingCopies.offered``, and if neither the weight's
memory nor its version counter has changed since both were written together; otherwise it is written anew. The counter
counts every write but those through ``.data``, and those of torch's fused optimisers.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sae_lens_switch_kernels.huge_pages import zeros_huge
from sae_lens_switch_kernels.torch_private import version_of

# By the address of the weight's storage. Not a context variable: autograd runs backward passes in threads of its own.
_offered: "dict[int, _Copy]" = {}


def working_copy(W: Tensor, dtype: torch.dtype) -> Tensor:
    """``W.to(dtype)``, without a cast where W is a weight that an optimiser offers a copy of, or a view of one.

    Args:
        W: Weights. Of a transpose or of some rows, the result is that view of the copy.
        dtype: The first dtype that a weight is asked for in is that of its copy; to others it is cast.

    Returns:
        Numbers to read at once: the next step overwrites them.
    """
    copy = _offered.get(W.untyped_storage().data_ptr()) if _offered and W.dtype != dtype else None
    found = None if copy is None else copy.seen_as(W, dtype)
    return W.to(dtype) if found is None else found


class WorkingCopies:
    """The copies of some weights, each made when a product first asks for it, and at the same address from then on.

    Args:
        weights: Matrices, contiguous or the transpose of a contiguous one. Others have no copy.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        self._copies = [_Copy(weight) for weight in weights if weight.ndim == 2]

    @contextmanager
    def offered(self) -> Iterator[None]:
        """For one training step: ``working_copy`` finds the copies, which are all current when it begins."""
        mine = {copy.weight.untyped_storage().data_ptr(): copy for copy in self._copies}
        for copy in self._copies:
            copy.refresh()  # a captured step reads it without asking
        _offered.update(mine)
        try:
            yield
        finally:
            for address, copy in mine.items():
                if _offered.get(address) is copy:
                    del _offered[address]

    @contextmanager
    def written(self, weight: Tensor) -> Iterator[Tensor | None]:
        """Around a write to a weight, which is counted, however it is done.

        Args:
            weight: Any tensor. It may be shown otherwise than usual, as by its transpose.

        Yields:
            Its copy, laid out as the weight now is, to be written wherever the weight is; None if there is none, or if
            it would not be current afterwards.
        """
        copy = next((copy for copy in self._copies if copy.weight is weight), None)
        target = None if copy is None else copy.to_write()
        try:
            yield target
        finally:
            torch.autograd.graph.increment_version(weight)
        if copy is not None and target is not None:
            copy.is_current_now()


class _Copy:
    """One weight's copy: its numbers in the order of the weight's memory."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.numbers: Tensor | None = None
        # An alias of what the copy equals: as long as it lives, no other memory has this address.
        self._equals: Tensor | None = None
        self._version: tuple[int, int] | None = None

    @property
    def is_current(self) -> bool:
        return self.numbers is not None and self._version == version_of(self.weight)

    def is_current_now(self) -> None:
        self._equals, self._version = self.weight.detach(), version_of(self.weight)

    def refresh(self) -> None:
        """Write the copy anew if the weight was written without it; drop it if the weight has moved elsewhere."""
        if self.numbers is None or self.is_current:
            return
        if self.numbers.device != self.weight.device or not _is_dense(self.weight):
            self.numbers = self._equals = self._version = None
            return
        _laid_out_as(self.weight, self.numbers).copy_(self.weight.detach())
        self.is_current_now()

    def seen_as(self, W: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The part of the copy that W is of the weight; None if W is no part of it, or cannot have one."""
        start = W.storage_offset() - self.weight.storage_offset()
        end = start + 1 + sum((n - 1) * stride for n, stride in zip(W.shape, W.stride(), strict=True))
        same_memory = W.untyped_storage().data_ptr() == self.weight.untyped_storage().data_ptr()
        if not same_memory or W.dtype != self.weight.dtype or not 0 <= start < end <= self.weight.numel():
            return None
        if self.numbers is None and _is_dense(self.weight) and not _is_capturing(W.device):
            self.numbers = zeros_huge(self.weight.numel(), dtype=dtype, device=W.device)
        if self.numbers is None or self.numbers.dtype != dtype:
            return None
        self.refresh()
        return None if self.numbers is None else _laid_out_as(W, self.numbers, int(start))

    def to_write(self) -> Tensor | None:
        """The copy in the weight's present shape, if it is current."""
        return _laid_out_as(self.weight, self.numbers) if self.numbers is not None and self.is_current else None


def _laid_out_as(W: Tensor, numbers: Tensor, start: int = 0) -> Tensor:
    return numbers.as_strided(W.shape, W.stride(), start)


def _is_dense(W: Tensor) -> bool:
    return W.is_contiguous() or W.T.is_contiguous()


def _is_capturing(device: torch.device) -> bool:
    """Whether new memory would be a CUDA graph's own, and empty until the first replay."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
