"""Check that the machine can hold a run, before anything is allocated: its devices, its folders, its memory."""

import math
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import SAEConfig
from sae_lens.util import str_to_dtype

from sae_lens_switch.common.atomic import refuse_other_weights

_MAX_NUMBERS = 2**62  # in a tensor, in torch
_MAX_NAME_BYTES = 255  # of a file or folder


def check_run_fits(cfg: Any, *saes: SAEConfig) -> None:
    """Check a runner's devices and folders, and the memory for its SAEs and its activation buffer.

    Args:
        cfg: A runner's config, of this package or of SAELens.
        *saes: The configs of the SAEs it trains.

    Raises:
        ValueError: If a device is missing, a folder is not writable or holds weights that those of the run would not
            replace, or memory does not suffice.
    """
    for name in ("checkpoint_path", "output_path"):
        check_writable(name, vars(cfg)[name])
    for folder in _outputs(cfg):
        refuse_other_weights("output_path", folder, [SAE_WEIGHTS_FILENAME])
    for name in ("device", "llm_device", "act_store_device"):
        check_device(name, vars(cfg).get(name))
    for sae in saes:
        check_device("device", sae.device)
        check_sae_fits(sae, vars(cfg).get("expert_parallel", 1) * vars(cfg).get("latent_parallel", 1))
    if "n_batches_in_buffer" in vars(cfg):
        device = cfg.act_store_device or cfg.device
        width = _buffer_width(cfg, saes)
        batches = int(cfg.prefetch_llm_batches) * cfg.train_batch_size_tokens
        for name, rows in {
            "n_batches_in_buffer": cfg.n_batches_in_buffer * cfg.context_size,
            "store_batch_size_prompts": cfg.store_batch_size_prompts * cfg.context_size,
            "prefetch_llm_batches": batches,
        }.items():
            what = f"{name}={vars(cfg)[name]}: its activations alone take"
            _refuse_if_too_much(what, 4 * width * rows, device)


def _outputs(cfg: Any) -> list[Path]:
    """The folders in which a run leaves an SAE."""
    if cfg.output_path is None:
        return []
    folder = Path(cfg.output_path)
    return [folder / name for name in cfg.saes] if isinstance(cfg, MultiSAETrainingRunnerConfig) else [folder]


def _buffer_width(cfg: Any, saes: Iterable[SAEConfig]) -> int:
    """Numbers per token in the activation buffer: SAEs at one hook share them, a transcoder has its targets too."""
    if isinstance(cfg, MultiSAETrainingRunnerConfig):  # on several processes, each has those of all hooks
        return sum({hook: cfg.saes[name].d_in for name, hook in cfg.hook_names_per_sae.items()}.values())
    return sum(sae.d_in + vars(sae).get("d_out", 0) for sae in saes)


def check_writable(name: str, path: str | None) -> None:
    """Check that a folder can be created, or is writable if it exists.

    Raises:
        ValueError: If not.
    """
    if path is None:
        return
    place = Path(path).absolute()
    is_valid = all(len(os.fsencode(part)) <= _MAX_NAME_BYTES for part in place.parts)
    while is_valid and not os.path.lexists(place):
        place = place.parent
    if not (is_valid and place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(f"{name} must be a writable folder, or one that can be created; got {reprlib.repr(path)}")


def check_device(name: str, device: str | torch.device | None) -> None:
    """Check that tensors can be computed on a device.

    Raises:
        ValueError: If not.
    """
    if device is None:
        return
    place = torch.device(device)
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{name} must exist; got {str(device)!r}, and torch finds {torch.cuda.device_count()} GPUs")
    try:
        found = place.type != "meta" and torch.zeros(1, device=place).item() == 0
    except (RuntimeError, AssertionError, ImportError, NotImplementedError):
        found = False
    if not found:
        raise ValueError(f"{name} must be a device that this machine has; got {str(device)!r}")


def check_sae_fits(cfg: SAEConfig, parts: int = 1) -> None:
    """Check that an SAE's weights fit into the memory of its device, before they are allocated.

    Nothing is allocated on torch's meta device, where SAELens constructs the SAEs that it loads. Of ``parts`` that the
    latents are divided into, a process has one.

    Raises:
        ValueError: If they do not fit.
    """
    device = torch.device(cfg.device)
    if device.type != "meta":
        check_device("device", device)
        d_out = vars(cfg).get("d_out") or cfg.d_in  # of a transcoder
        numbers = (cfg.d_in + d_out) * cfg.d_sae // parts + cfg.d_in * vars(cfg).get("n_experts", 0)
        what = f"d_in={cfg.d_in}, d_sae={cfg.d_sae}: the weights alone take"
        _refuse_if_too_much(what, numbers * str_to_dtype(cfg.dtype).itemsize, device)


def _refuse_if_too_much(what: str, need: int, device: str | torch.device) -> None:
    have = _memory(torch.device(device))
    if need > min(have, _MAX_NUMBERS):
        has = "" if math.isinf(have) else f"; {device} has {have / 1e9:,.0f} GB"
        raise ValueError(f"{what} {need / 1e9:,.0f} GB{has}")


def _memory(device: torch.device) -> float:
    if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on a GPU; on a CPU all of its memory, since pages in use may be mere cache."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return _memory(device)
