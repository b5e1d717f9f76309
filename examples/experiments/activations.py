"""A cache of activations on disk, written part by part by several processes, and read as one memory-mapped tensor.

One file per layer, float16 [n, d_in], in the shuffled order of the contexts; one pass of the language model serves all
layers. A part counts once its digest is written, after its rows are on the disk. Why not the format of SAELens's
CacheActivationsRunner, which the trainer reads as well: that runner starts anew when it is killed, has one process and
one layer, and keeps all tokens of a context; and its datasets are read seven times more slowly at random.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claiming import claimed, write
from texts import SPLITS, Contexts
from torch import Tensor

# The first two tokens of a context have massive activations in many models: see offline.token_contexts. So have a few
# others (Sun et al. 2024, arXiv 2402.17762): after layer 12 of SmolLM2-135M 7 of 60,000, with 81 % of the variance. No
# SAE is trained or measured on a norm above so many times the median.
SKIPPED = 2
MASSIVE = 10.0
_BATCH = 16
_BYTES = 2


@dataclass(frozen=True)
class Source:
    """Where activations come from."""

    model: str  # name or folder
    model_class: str  # AutoModelForCausalLM or HookedTransformer, as in SAELens
    hook_name: str  # with {layer}
    layers: dict[int, int]  # training contexts of each layer
    d_in: int


class Cache:
    """The activations of one source, by layer and split: those that are not trained on come first."""

    def __init__(self, folder: Path, source: Source, contexts: Contexts, contexts_per_part: int = 256) -> None:
        self.source, self.contexts, self.contexts_per_part = source, contexts, contexts_per_part
        made_of = [source.model, source.model_class, source.hook_name, contexts.digest, SKIPPED]
        self.folder = folder / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
        self.tokens = np.concatenate([contexts.tokens[s] for s in SPLITS])
        self.n_first = len(self.tokens) - len(contexts.tokens["train"])

    @property
    def per_context(self) -> int:
        return self.tokens.shape[1] - SKIPPED

    def n_contexts(self, layer: int) -> int:
        return min(len(self.tokens), self.n_first + self.source.layers[layer])

    def file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.f16"

    def n_bytes(self, layer: int) -> int:
        return self.n_contexts(layer) * self.per_context * self.source.d_in * _BYTES

    # Room

    def bytes_wanted(self) -> int:
        """What is not yet there."""
        there = sum(f.stat().st_blocks * 512 for layer in self.source.layers if (f := self.file(layer)).exists())
        return max(0, sum(map(self.n_bytes, self.source.layers)) - there)

    def reserve(self, spare: int) -> None:
        """Make the files in their full size, so that a disk that is too small is known before an hour has gone.

        Raises:
            ValueError: If there is no room for them and ``spare`` bytes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted, free = self.bytes_wanted() + spare, shutil.disk_usage(self.folder).free
        if wanted > free:
            raise ValueError(
                f"output needs {wanted / 1e9:.2f} GB of disk at {self.folder}; got {free / 1e9:.2f} GB free"
            )
        for layer in self.source.layers:
            with open(self.file(layer), "ab") as handle:
                missing = self.n_bytes(layer) - handle.tell()
            if missing > 0:
                with open(self.file(layer), "r+b") as handle:
                    os.posix_fallocate(handle.fileno(), 0, self.n_bytes(layer))

    # Parts

    @property
    def n_parts(self) -> int:
        return -(-max(map(self.n_contexts, self.source.layers)) // self.contexts_per_part)

    def part_file(self, part: int) -> Path:
        return self.folder / "parts" / f"{part:05d}.json"

    def _span(self, part: int, layer: int) -> tuple[int, int]:
        """First and last byte of a part in a layer's file; both the same if the layer has none of it."""
        first, last = part * self.contexts_per_part, (part + 1) * self.contexts_per_part
        per_context = self.per_context * self.source.d_in * _BYTES
        first, last = (min(n, self.n_contexts(layer)) * per_context for n in (first, last))
        return first, last

    def is_whole(self, part: int) -> bool:
        """Whether the rows of a part are what was written, in every layer."""
        file = self.part_file(part)
        if not file.exists():
            return False
        digests = json.loads(file.read_text())["sha256"]
        return all(digests.get(f"{layer}:{b - a}") == self._digest(layer, a, b) for layer, a, b in self._pieces(part))

    def _pieces(self, part: int) -> Iterator[tuple[int, int, int]]:
        for layer in self.source.layers:
            first, last = self._span(part, layer)
            if last > first:
                yield layer, first, last

    def _digest(self, layer: int, first: int, last: int) -> str:
        if not self.file(layer).exists():
            return ""
        with open(self.file(layer), "rb") as handle:
            return hashlib.sha256(os.pread(handle.fileno(), last - first, first)).hexdigest()

    def missing(self) -> list[int]:
        """Parts to be computed; the note of a part that is damaged is removed."""
        found = [part for part in range(self.n_parts) if not self.is_whole(part)]
        for part in found:
            self.part_file(part).unlink(missing_ok=True)
        return found

    def fill(self) -> Iterator[int]:
        """Compute every part that no other process computes, and yield it."""
        model: Any = None
        for part in range(self.n_parts):
            with claimed(self.folder / "locks", f"{part:05d}") as mine:
                if mine and not self.part_file(part).exists():
                    model = model or load_model(self.source)
                    self._compute(part, model)
                    yield part

    @torch.no_grad()
    def _compute(self, part: int, model: Any) -> None:
        start = time.perf_counter()
        digests = {}
        for layer, rows in self._rows(part, model).items():
            first, last = self._span(part, layer)
            data = rows.numpy().tobytes()
            with open(self.file(layer), "r+b") as handle:
                os.pwrite(handle.fileno(), data, first)
                os.fsync(handle.fileno())
            digests[f"{layer}:{last - first}"] = hashlib.sha256(data).hexdigest()
        write(self.part_file(part), {"sha256": digests, "seconds": round(time.perf_counter() - start, 2)})

    def _rows(self, part: int, model: Any) -> dict[int, Tensor]:
        """What the language model computes, float16 [n, d_in] by layer."""
        first = part * self.contexts_per_part
        found: dict[int, list[Tensor]] = {layer: [] for layer, _, _ in self._pieces(part)}
        tokens = torch.from_numpy(self.tokens[first : first + self.contexts_per_part].astype(np.int64))
        for batch in tokens.split(_BATCH):
            layers = [layer for layer in found if first < self.n_contexts(layer)]
            for layer, hidden in hidden_states(model, self.source.hook_name, layers, batch).items():
                kept = hidden[: self.n_contexts(layer) - first, SKIPPED:]
                found[layer].append(_half(kept.flatten(0, 1)))
            first += len(batch)
        return {layer: torch.cat(parts) for layer, parts in found.items()}

    # Reading

    def rows(self, layer: int, split: str, n: int | None = None) -> Tensor:
        """Activations [n, d_in] of a split, float16, memory-mapped; writing to them leaves the file alone."""
        lengths = [len(self.contexts.tokens[s]) for s in SPLITS]
        at = SPLITS.index(split)
        first = sum(lengths[:at])
        last = min(first + lengths[at], self.n_contexts(layer))
        data = np.memmap(self.file(layer), np.float16, "c").reshape(-1, self.source.d_in)
        found = torch.from_numpy(data[first * self.per_context : last * self.per_context])
        if n is not None and n > len(found):
            raise ValueError(f"tokens must be at most {len(found)}, those of layer {layer}; got {n}")
        return found[:n]


def _half(x: Tensor) -> Tensor:
    if not torch.isfinite(half := x.half()).all():
        raise ValueError(f"activations must fit into float16, whose largest number is 65504; got {x.abs().max():.4g}")
    return half


def load_model(source: Source) -> Any:
    from sae_lens.load_model import load_model

    hooks = [source.hook_name.format(layer=layer) for layer in source.layers]
    return load_model(source.model_class, source.model, device="cpu", hook_names=hooks).eval()


@torch.no_grad()
def hidden_states(model: Any, hook_name: str, layers: Sequence[int], tokens: Tensor) -> dict[int, Tensor]:
    """[contexts, tokens, d_in] at each layer; the model stops after the last one."""
    names = {hook_name.format(layer=layer): layer for layer in layers}
    _, cache = model.run_with_cache(tokens, names_filter=list(names), stop_at_layer=max(layers) + 1)
    return {layer: cache[name] for name, layer in names.items()}


class Scaled:
    """Batches centred and scaled to a mean squared norm of d_in, so that all SAEs start alike, wherever they start.

    Keeps its place: checkpoints of the trainer return to it.
    """

    def __init__(self, batches: Any, centre: Tensor, scale: float) -> None:
        self.batches, self.centre, self.scale = batches, centre, scale

    def __iter__(self) -> Scaled:
        return self

    def __next__(self) -> Tensor:
        return self.of(next(self.batches))

    def of(self, x: Tensor) -> Tensor:
        return (x.float() - self.centre) * self.scale

    def state_dict(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state)


@dataclass
class Layer:
    """The activations of one layer as SAEs see them."""

    cache: Cache
    number: int
    largest_norm: float  # of an activation that is not massive
    centre: Tensor
    scale: float

    @classmethod
    def of(cls, cache: Cache, number: int) -> Layer:
        some = cache.rows(number, "train")[: 1 << 17].float()
        norms = some.norm(dim=1)
        largest = MASSIVE * norms.median().item()
        some = some[norms <= largest]
        centre = some.mean(0)
        scale = (some.shape[1] / (some - centre).square().sum(1).mean()).sqrt().item()
        return cls(cache, number, largest, centre, scale)

    def scaled(self, x: Tensor) -> Tensor:
        return (x.float() - self.centre) * self.scale

    def is_massive(self, x: Tensor) -> Tensor:
        """Which of the activations [..., d_in] are: [...]."""
        return x.float().norm(dim=-1) > self.largest_norm

    @cached_property
    def train(self) -> Tensor:
        """Not scaled, as the other two are; memory-mapped if none is massive."""
        return self._rows("train")

    @cached_property
    def held_out(self) -> Tensor:
        return self.scaled(self._rows("held_out"))

    @cached_property
    def other(self) -> Tensor:
        return self.scaled(self._rows("other"))

    def _rows(self, split: str) -> Tensor:
        rows = self.cache.rows(self.number, split)
        massive = [self.is_massive(part) for part in rows.split(1 << 16)]
        kept = ~torch.cat(massive) if massive else torch.ones(0, dtype=torch.bool)
        return rows if kept.all() else rows[kept]
