"""Torch's meta device in place of a GPU: reading a number back from it raises, and copies from the host are seen."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Copies(TorchDispatchMode):
    """Operators that bring a host's tensor to the device; the host waits for each, and none can be captured."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        result = func(*args, **(kwargs or {}))
        name, tensors = func.overloadpacket.__name__, [a for a in args if isinstance(a, torch.Tensor)]
        if name in ("_to_copy", "copy_") and result.is_meta and not all(t.is_meta for t in tensors):
            self.found.append(name)
        return result


class Constructions(TorchFunctionMode):
    """Tensors made of the host's numbers, which on a GPU are such copies too, and on the meta device are none."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], torch.Tensor):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
