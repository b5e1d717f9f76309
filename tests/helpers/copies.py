"""Working copies under watch."""

import importlib

import pytest
import torch
from torch import Tensor

# The module, not the function of the same name that the package exports.
working_copy = importlib.import_module("sae_lens_switch_kernels.working_copy")


def watch_copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that products ask for from now on; each answer is compared with a fresh cast, bit by bit."""
    asked: list[tuple[int, ...]] = []

    def checked(self: working_copy._Copy, W: Tensor, dtype: torch.dtype) -> Tensor | None:
        low = seen_as(self, W, dtype)
        assert low is not None
        assert torch.equal(low, W.to(dtype)), "a stale copy"
        asked.append(tuple(W.shape))
        return low

    seen_as = working_copy._Copy.seen_as  # what every product goes through, in whichever file it is
    monkeypatch.setattr(working_copy._Copy, "seen_as", checked)
    return asked
