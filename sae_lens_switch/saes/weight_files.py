"""Weights in several safetensors files, with an index, as Hugging Face's libraries have them for large models::

    SAE.load_from_disk(folder, converter=sharded_safetensors)  # of sae_lens_switch.converters

SAELens itself reads one file, ``sae_weights.safetensors``.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import (
    get_sae_lens_config_from_disk,
    read_sae_components_from_disk,
    sae_lens_disk_loader,
)

from sae_lens_switch.common.atomic import INDEX_FILENAME
from sae_lens_switch.common.types import Json, StateDict

_MAP = "weight_map"


def sharded_safetensors(
    path: str | Path, device: str = "cpu", cfg_overrides: Json | None = None
) -> tuple[Json, StateDict]:
    """The config and weights in a folder, whether these are in one file or in several.

    Raises:
        FileNotFoundError: For missing files.
        ValueError: If the index is none, if a file lacks a tensor that it should have, or if there are weights in one
            file beside an index of several.
    """
    folder = Path(path)
    if not (folder / INDEX_FILENAME).exists():
        return sae_lens_disk_loader(folder, device, cfg_overrides)
    cfg = get_sae_lens_config_from_disk(folder, device, cfg_overrides)
    file_of = _read_index(folder / INDEX_FILENAME)
    if SAE_WEIGHTS_FILENAME not in file_of.values() and (folder / SAE_WEIGHTS_FILENAME).exists():
        raise ValueError(f"{folder} must hold weights in one form; got {SAE_WEIGHTS_FILENAME} and {INDEX_FILENAME}")
    weights: StateDict = {}
    for name in sorted(set(file_of.values())):
        cfg, part = read_sae_components_from_disk(cfg, folder / name, device)
        weights |= part
    missing = [f"{tensor} in {name}" for tensor, name in file_of.items() if tensor not in weights]
    if missing:
        raise ValueError(f"{folder} must hold every tensor of its index; there is no {', no '.join(missing)}")
    return cfg, weights


def _read_index(file: Path) -> dict[str, str]:
    try:
        file_of = json.loads(file.read_text(encoding="utf-8"))[_MAP]
        names = {Path(name).name for name in file_of.values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} must be an index of weights: JSON with a {_MAP} of tensors to files") from error
    if names != set(file_of.values()):
        raise ValueError(f"{file} must name files of its own folder; got {sorted(set(file_of.values()))}")
    return file_of


def split_by_size(sizes: Mapping[str, int], max_bytes: float | None) -> dict[str, int]:
    """In which file, counted from 1, each tensor goes: as many as fit, in their order, but at least one.

    Args:
        sizes: Bytes of each tensor.
        max_bytes: Of a file. None: all go into one.
    """
    number_of, number, size = {}, 1, 0
    for name, n in sizes.items():
        if max_bytes is not None and size and size + n > max_bytes:
            number, size = number + 1, 0
        number_of[name], size = number, size + n
    return number_of


def file_name(i: int, n: int) -> str:
    """Of the i-th of n files, counted from 1."""
    path = Path(SAE_WEIGHTS_FILENAME)
    return path.name if n == 1 else f"{path.stem}-{i:05}-of-{n:05}{path.suffix}"


def write_index(folder: Path, file_of: Mapping[str, str], n_bytes: int) -> Path:
    """Which file has which tensor; ``n_bytes`` are those of all tensors."""
    content = {"metadata": {"total_size": n_bytes}, _MAP: dict(file_of)}
    (folder / INDEX_FILENAME).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder / INDEX_FILENAME
