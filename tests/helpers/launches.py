"""Kernels that a training step would launch on a GPU, counted without one.

The step runs on torch's meta device: its shapes are those of real training, the code takes the paths of a GPU, and
whatever would wait for the device to read a number raises. Counted are our kernels, as ``launch`` records them, and
torch's operators that compute; views, allocations and metadata launch nothing.
"""

import sys
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LoggingConfig
from sae_lens_switch_kernels import backend
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import ROOT
from helpers.pretended_gpu import on_device
from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig
from sae_lens_switch.saes.sparse_sae import SparseTrainingSAE
from sae_lens_switch.training import trainer

# Of one call, where CUDA launches more than one kernel. A stable sort of int64 was measured to take eight passes (its
# DeviceRadixSortOnesweepKernel, docs/gpu); its histogram, prefix sum, and the making of its indices are known from its
# source. Of the others only the least is known.
_SEVERAL = {
    "_grouped_mm": 2,
    "sort": 12,
    "topk": 2,
    "embedding_bag": 3,
    "_embedding_bag": 3,
    "unique_consecutive": 4,
    "_foreach_norm": 3,
}
_NONE = {
    "squeeze_",
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "set_",
}


class Launches(TorchDispatchMode):
    """Launches of what runs inside, by place: ``places["kernels/.../gather.py:96 sparse_decode", "kernel"]``."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[tuple[str, str]] = Counter()
        self.waits: list[str] = []

    @property
    def n(self) -> int:
        return self.places.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        kwargs = kwargs or {}
        if func.namespace == "sae_lens_switch":  # on the meta device torch would not run what is inside
            with self:
                return OPDEFS[func.name()]._init_fn(*args, **kwargs)
        with self:  # where autograd is off, as inside our operators, torch has not taken composite ones apart
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        name = func.overloadpacket.__name__
        result = None if name.startswith(("_fused_", "_assert_async")) else func(*args, **kwargs)
        written = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        if not (func.is_view or name in _NONE or all(t.numel() == 0 for t in written)):
            self.add(name, _SEVERAL.get(name, 1))
        if name in ("_to_copy", "copy_") and not all(t.is_meta for t in written):
            self.waits.append(f"{_place()}: copies from the host")
        return result

    def add(self, name: str, n: int = 1) -> None:
        self.places[_place(), name] += n

    def table(self) -> str:
        return "\n".join(f"{n:4} {name:32} {place}" for (place, name), n in sorted(self.places.items()))


def _place() -> str:
    """The innermost line of ours; within autograd's own backward, the node."""
    frames = [f for f in traceback.extract_stack() if _is_ours(f.filename) and f.name != "launch"]
    if not frames:
        return "elsewhere"
    where = f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno} {frames[-1].name}"
    node = torch._C._current_autograd_node()
    return f"{where}, {node.name()}" if node is not None and ".backward()" in (frames[-1].line or "") else where


def _is_ours(filename: str) -> bool:
    return any(f"{ROOT}/{room}/" in filename for room in ("sae_lens_switch", "kernels"))


class _Autocast:
    """torch.autocast for the meta device, which torch's own does not know: all that ours reads of it."""

    on = False

    def __init__(self, *_, enabled: bool = True, **__) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        self.before, _Autocast.on = _Autocast.on, self.enabled

    def __exit__(self, *_) -> None:
        _Autocast.on = self.before


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch):
    """The meta device takes the paths of a GPU on which every kernel has proven itself; yields the Launches."""
    from sae_lens_switch_kernels.triton_backend import launch as launching
    from sae_lens_switch_kernels.triton_backend.blocks import Arch

    counted = Launches()

    class Recorded(list):
        def append(self, launched) -> None:
            counted.add(launched.kernel.__name__)

    monkeypatch.setenv("SAE_LENS_SWITCH_BACKEND", "triton")
    monkeypatch.setattr(backend, "_proven", lambda *_: True)
    monkeypatch.setattr(trainer, "check_device", lambda *_: None)
    monkeypatch.setattr(
        sys.modules[torch.optim.Optimizer.__module__], "_get_fused_kernels_supported_devices", lambda: ["meta"]
    )
    monkeypatch.setattr(
        sys.modules["torch.utils._foreach_utils"], "_get_foreach_kernels_supported_devices", lambda: ["meta"]
    )
    # Every storage of the meta device would be at 0, and all weights one.
    monkeypatch.setattr(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata)
    monkeypatch.setattr(torch, "autocast", _Autocast)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: _Autocast.on)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda *_: torch.bfloat16)
    token = launching._recorder.set((Arch(lanes=32, shared=232448), Recorded()))
    try:
        yield counted
    finally:
        launching._recorder.reset(token)


def launches_of_a_step(
    sae: SparseTrainingSAE, n_tokens: int, autocast: bool, monkeypatch: pytest.MonkeyPatch, **fields: Any
):
    """Of the third step of a run that is far from any log, on an SAE of the meta device."""
    with pretended_gpu(monkeypatch) as counted:
        cfg = SparseSAETrainerConfig(
            total_training_samples=10**12,
            train_batch_size_samples=n_tokens,
            lr=1e-4,
            device="meta",
            autocast=autocast,
            logger=LoggingConfig(log_to_wandb=False),
            **fields,
        )
        run = SparseSAETrainer(cfg, sae, iter([]))
        for _ in range(3):
            counted.places.clear()
            counted.waits.clear()
            with counted:
                run.step(on_device(n_tokens, sae.cfg.d_in))
            run.n_training_steps += 1
    return counted
