"""Files of unknown origin: read as tensors and plain values only, and checked before anything is made of them.

All errors are ValueErrors that name the file and the key.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from sae_lens.constants import DTYPE_TO_STR
from torch import Tensor


def read_torch(file: Path) -> dict[str, object]:
    """A state dict that ``torch.save`` wrote; pickled objects are refused."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{file} is damaged, or holds other things than tensors and plain values, which are never loaded"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} must hold a state dict; got {type(state).__name__}")
    return dict(state)


def read_json(file: Path) -> dict[str, object]:
    """A JSON object."""
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    try:
        value = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a table of settings; got {type(value).__name__}")
    return value


def matrix_shape(file: Path, tensors: Mapping[str, object], name: str) -> tuple[int, int]:
    """The shape of a tensor that must be a matrix."""
    matrix = tensors.get(name)
    if not isinstance(matrix, Tensor) or matrix.dim() != 2:
        shape = list(matrix.shape) if isinstance(matrix, Tensor) else []
        what = "nothing" if matrix is None else shape or type(matrix).__name__
        raise ValueError(f"{file}: {name} must be a matrix; got {what}, among {sorted(map(str, tensors))}")
    return matrix.shape[0], matrix.shape[1]


def check_tensors(
    file: Path, tensors: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The tensors, which must be of exactly these names and shapes, dense and finite."""
    missing, unknown = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
    if missing or unknown:
        raise ValueError(
            f"{file} must hold {sorted(shapes)}; missing: {sorted(missing)}, unknown: {sorted(map(str, unknown))}"
        )
    checked: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or not _is_dense(tensor) or tensor.dtype not in DTYPE_TO_STR:
            what = f"{tensor.layout}, {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{file}: {name} must be a dense tensor of {sorted(DTYPE_TO_STR.values())}; got {what}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{file}: {name} must have shape {shape}; got {tuple(tensor.shape)}")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(f"{file}: {name} claims {tensor.numel()} numbers, the file does not hold as many")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: {name} holds NaN or infinite values")
        checked[name] = tensor
    return checked


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type == "cpu"


def whole_number(file: Path, settings: Mapping[str, object], name: str) -> int:
    """A setting that must be an integer of at least 1."""
    value = settings.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{file}: {name} must be a whole number, at least 1; got {value!r}")
    return value


def truth(file: Path, settings: Mapping[str, object], name: str) -> bool:
    """A setting that must be true or false; false if it is missing."""
    value = settings.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{file}: {name} must be true or false; got {value!r}")
    return value


def check_sizes(file: Path, settings: Mapping[str, object], found: Mapping[str, int], weights: Path) -> None:
    """Sizes in the settings must be those found in the weights."""
    for name, size in found.items():
        if name in settings and settings[name] != size:
            raise ValueError(f"{file}: {name} is {settings[name]!r}, but {weights.name} has {size}")
