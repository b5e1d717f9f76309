"""Checkpoints of a parallel run: written by all processes together, atomic, and read by any number of them.

```text
checkpoint.json         as every checkpoint's: size and SHA-256 of each file, and the settings
cfg.json                of the whole SAE
weights/                its weights, one safetensors file per process
optimizer/              moments and statistics of latents, likewise
trainer.pt              what is the same on all processes
ranks/00000.pt, ...     what is not: random numbers, the place in the activations
training/weights/       where activations are scaled: the weights that training resumes from
```
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sae_lens_switch.common.types import Json, Options
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.parallel.shard import LATENT_DIM, Shard
from sae_lens_switch.parallel.sharded_files import Part, read_parts, shapes
from sae_lens_switch.saes.serialization import FRESH
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.manifest import fingerprint
from sae_lens_switch.training.optim.row_sparse_adam import RowSparseAdam

WEIGHTS, OPTIMIZER, RANKS = "weights", "optimizer", "ranks"
# Of the trainer, with an entry per latent.
STATISTICS = ("act_freq_scores", "passes_since_fired")
_MASTER = "master of the weights"

T = TypeVar("T")


def write_together(ranks: Ranks, path: Path, facts: Json, write: Callable[[Path], None]) -> None:
    """``checkpoints.whole_folder``, written by all processes.

    Args:
        ranks: All processes must take part, and see one file system.
        path: The checkpoint.
        facts: As in ``whole_folder``.
        write: Writes this process's files into the folder it is given.

    Raises:
        OSError: On every process, if one could not write; there is no checkpoint then.
    """
    fingerprints: dict[str, Json] = {}
    what = f"checkpoint {path}"
    with ExitStack() as stack:

        def begin() -> Path | None:
            return stack.enter_context(checkpoints.whole_folder(path, facts, fingerprints)) if ranks.is_first else None

        folder = ranks.first_says(all_do(ranks, what, begin))
        assert folder is not None
        all_do(ranks, what, lambda: write(folder))

        def read_back() -> dict[str, Json]:
            mine = sorted(f for f in folder.rglob("*") if f.is_file())[ranks.rank :: ranks.size]
            return {f.relative_to(folder).as_posix(): fingerprint(f) for f in mine}

        for known in ranks.gather_objects(all_do(ranks, what, read_back)):
            fingerprints.update(known)
        all_do(ranks, what, stack.close)


class _AgreedError(OSError):
    """What one process could not do, raised by all."""


def all_do(ranks: Ranks, what: str, action: Callable[[], T]) -> T:
    """What it returns here; an error on one process is one on all, which so stay in step.

    What can fail on one process alone, for want of memory or of room on the disk, belongs in such an action. Messages
    in it must fail on all alike, as those of ``all_do`` and ``write_parts`` do.

    Args:
        ranks: All processes must take part.
        what: Is to be written; for the message.
        action: This process's part.

    Raises:
        OSError: On every process, if it fails on one.
    """
    result, error = None, None
    try:
        result = action()
    except _AgreedError:
        raise
    except (OSError, RuntimeError, SafetensorError) as failure:  # the latter two are names for a full disk
        error = f"rank {ranks.rank}: {failure}"
    errors = [told for told in ranks.gather_objects(error) if told is not None]
    if errors:
        raise _AgreedError(f"{what} could not be written: {'; '.join(errors)}")
    return cast(T, result)


# What of a run is whose


def weight_parts(shard: Shard, *, for_inference: bool = False) -> dict[str, Part]:
    """The weights as an ordinary file has them: that of an SAE in training, or after it."""
    weights = shard.state_dict()
    if for_inference:
        shard.process_state_dict_for_saving_inference(weights)
    else:
        shard.process_state_dict_for_saving(weights)
    # A number, such as a threshold, as a vector of one, which torch loads as well; its consolidation makes numbers 0.
    return {name: Part(t if t.ndim else t.view(1), LATENT_DIM.get(name)) for name, t in weights.items()}


def optimizer_parts(shard: Shard, optimizer: Optimizer) -> dict[str, Part]:
    """The optimiser's tensors, by parameter and name; those of latents with a row per latent."""
    state, names = optimizer.state_dict(), [name for name, _ in shard.named_parameters()]
    parts = {}
    for i, of_one in {**state["state"]}.items():
        parts |= {f"{names[i]}/{key}": _rows(names[i], t, optimizer) for key, t in of_one.items()}
    parts |= {f"{names[i]}/{_MASTER}": _rows(names[i], t, optimizer) for i, t in state.get("masters", {}).items()}
    return parts


def load_optimizer(shard: Shard, optimizer: Optimizer, parts: Mapping[str, Tensor], groups: list[Options]) -> None:
    """From what ``optimizer_parts`` gave, for this process's latents."""
    names = [name for name, _ in shard.named_parameters()]
    state: dict[int, dict[str, Tensor]] = {}
    masters: dict[int, Tensor] = {}
    for full_name, t in parts.items():
        name, _, key = full_name.partition("/")
        dim, i = _dim(name, t, optimizer), names.index(name)
        t = t if dim is None else t.movedim(0, dim)
        if key == _MASTER:
            masters[i] = t
        else:
            state.setdefault(i, {})[key] = t
    optimizer.load_state_dict({"state": state, "param_groups": groups, "masters": masters})


def _rows(name: str, t: Tensor, optimizer: Optimizer) -> Part:
    dim = _dim(name, t, optimizer)
    return Part(t) if dim is None else Part(t.movedim(dim, 0), 0)


def _dim(name: str, t: Tensor, optimizer: Optimizer) -> int | None:
    """Which dimension of an optimiser's tensor counts latents."""
    if name not in LATENT_DIM or t.ndim == 0:
        return None
    return 0 if isinstance(optimizer, RowSparseAdam) else LATENT_DIM[name]


def read_optimizer_parts(folder: Path, shard: Shard) -> dict[str, Tensor]:
    """This process's part of all that a checkpoint's ``optimizer/`` holds."""
    P = shard.ranks.row_size
    parts = {}
    for name, (shape, dtype) in shapes(folder).items():
        of_latents = len(shape) > 0 and (name in STATISTICS or name.partition("/")[0] in LATENT_DIM)
        local = (shape[0] // P, *shape[1:]) if of_latents else shape
        parts[name] = Part(torch.empty(local, dtype=dtype, device=shard.ranks.device), 0 if of_latents else None)
    read_parts(folder, parts, shard.ranks)
    return {name: part.tensor for name, part in parts.items()}


def read_weights(folder: Path, shard: Shard) -> None:
    """This process's part of the weights in ``folder``, into the SAE."""
    there = shapes(folder)
    fresh = {FRESH: Part(torch.ones(1))} if FRESH in there else {}
    parts = {name: part for name, part in (weight_parts(shard) | fresh).items() if name in there}
    parts = {name: Part(part.tensor.clone(), part.dim) for name, part in parts.items()}
    read_parts(folder, parts, shard.ranks)
    weights = {name: part.tensor for name, part in parts.items()}
    shard.process_state_dict_for_loading(weights)
    shard.load_state_dict(weights)
