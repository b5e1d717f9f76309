"""What a run asks of the machine, checked before anything is made: devices that are there, memory for the weights."""

import math
import os
import reprlib
from pathlib import Path
from typing import Any

import torch
from sae_lens.util import str_to_dtype

# A tensor of more numbers than this is none in torch.
_MOST_NUMBERS = 2**62
_LONGEST_NAME = 255  # bytes, of a file or folder


def check_run_fits(cfg: Any, *saes: Any) -> None:
    """A runner's devices and folders, memory for its SAEs and its buffer of activations. Raises ValueError."""
    for name in ("checkpoint_path", "output_path"):
        check_writable(name, getattr(cfg, name))
    for name in ("device", "llm_device", "act_store_device"):
        check_device(name, getattr(cfg, name, None))
    for sae in saes:
        check_device("device", sae.device)
        check_sae_fits(sae)
    if hasattr(cfg, "n_batches_in_buffer"):
        device = cfg.act_store_device or cfg.device
        d_in = sum({id(sae): sae.d_in for sae in saes}.values())
        batches = int(cfg.prefetch_llm_batches) * cfg.train_batch_size_tokens
        for name, rows in {
            "n_batches_in_buffer": cfg.n_batches_in_buffer * cfg.context_size,
            "store_batch_size_prompts": cfg.store_batch_size_prompts * cfg.context_size,
            "prefetch_llm_batches": batches,
        }.items():
            what = f"{name}={getattr(cfg, name)}: its activations alone take"
            _refuse_if_too_much(what, 4 * d_in * rows, device)


def check_writable(name: str, path: str | None) -> None:
    """Raises ValueError where a folder cannot be made, or written in if it is there."""
    if path is None:
        return
    place = Path(path).absolute()
    good = all(len(os.fsencode(part)) <= _LONGEST_NAME for part in place.parts)
    while good and not os.path.lexists(place):
        place = place.parent
    if not (good and place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(f"{name} must be a folder that can be written in, or made; got {reprlib.repr(path)}")


def check_device(name: str, device: Any) -> None:
    """Raises ValueError for a device that cannot be computed on."""
    if device is None:
        return
    place = torch.device(device)
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{name} must be there; got {str(device)!r}, and torch finds {torch.cuda.device_count()} GPUs")
    try:
        found = place.type != "meta" and torch.zeros(1, device=place).item() == 0
    except (RuntimeError, AssertionError, ImportError, NotImplementedError):
        found = False
    if not found:
        raise ValueError(f"{name} must be one that this machine computes on; got {str(device)!r}")


def check_sae_fits(cfg: Any) -> None:
    """Raises ValueError for an SAE whose weights are more than its device has memory, before any is asked for.

    On torch's meta device, where SAELens makes SAEs that it loads, nothing is.
    """
    device = torch.device(cfg.device)
    if device.type != "meta":
        check_device("device", device)
        numbers = cfg.d_in * (2 * cfg.d_sae + getattr(cfg, "n_experts", 0))
        what = f"d_in={cfg.d_in}, d_sae={cfg.d_sae}: the weights alone take"
        _refuse_if_too_much(what, numbers * str_to_dtype(cfg.dtype).itemsize, device)


def _refuse_if_too_much(what: str, need: int, device: Any) -> None:
    have = _memory(torch.device(device))
    if need > min(have, _MOST_NUMBERS):
        has = "" if math.isinf(have) else f"; {device} has {have / 1e9:,.0f} GB"
        raise ValueError(f"{what} {need / 1e9:,.0f} GB{has}")


def _memory(device: torch.device) -> float:
    if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf
