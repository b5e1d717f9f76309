"""Where no GPU is, the kernels run in Triton's interpreter; unwritten memory is poisoned either way."""

import os

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def needs_a_gpu_or_the_interpreter():
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("neither a GPU nor TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(monkeypatch):
    """A kernel that leaves part of its output unwritten fails, whatever the memory held before."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def poison(t: Tensor) -> Tensor:
        return t.fill_(float("nan") if t.is_floating_point() else -(2**31) + 1)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


@pytest.fixture(autouse=True, scope="module")
def interpreter_knows_bfloat16():
    """Triton's interpreter keeps bf16 as 16-bit integers: its dot multiplies those, and its casts cut bits off."""
    if DEVICE == "cuda":
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def lift(t: TensorHandle) -> TensorHandle:
        if t.dtype != tl.bfloat16:
            return t
        return TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast(self: InterpreterBuilder, t: TensorHandle, to: tl.dtype) -> TensorHandle:
        if (t.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, t, to)
        rounded = torch.from_numpy(np.array(t.data, np.float32)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(self, lift(a), lift(b), *rest)
    InterpreterBuilder.cast_impl = cast
    yield
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
