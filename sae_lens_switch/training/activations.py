"""Activations to train on, from wherever they are: an iterator, a tensor, a folder that SAELens has cached."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ActivationSource = Iterable[Tensor] | Tensor | str | Path

# Cached contexts are read this many batches at a time, and their tokens mixed.
_BATCHES_AT_ONCE = 16
# By so many of its contexts a source is known again.
_CONTEXTS_COMPARED = 16


def activation_batches(
    source: ActivationSource, batch_size: int, *, hook_name: str | None = None, seed: int = 0
) -> Iterator[Tensor]:
    """Batches [batch_size, d_in] of activations, without end unless ``source`` is an iterable that ends.

    source:    a tensor [..., d_in], whose rows are shuffled anew in every epoch; the folder of a dataset as SAELens's
               CacheActivationsRunner writes it, whose contexts and tokens are; or anything that can be iterated over,
               whose items [..., d_in] are batches as they are
    hook_name: which column of the dataset, if it has several
    What a tensor or a folder gives has ``state_dict`` and ``load_state_dict``: its place is kept in checkpoints, with
    a fingerprint of the activations, without which the place would mean nothing.
    Raises ValueError for an empty source, fewer rows than a batch, or a folder that holds no activations.
    """
    if isinstance(source, Tensor):
        if source.ndim < 2:
            raise ValueError(f"activations must have shape [..., d_in]; got {tuple(source.shape)}")
        return _Shuffled(_Rows(source.detach().reshape(-1, source.shape[-1])), batch_size, seed)
    if isinstance(source, str | Path):
        return _Shuffled(_CachedContexts(Path(source), hook_name), batch_size, seed)
    return iter(source)


class _Rows:
    """A tensor [N, D]: contexts of one token each."""

    context_size = 1

    def __init__(self, x_ND: Tensor) -> None:
        self.x_ND = x_ND

    def __len__(self) -> int:
        return len(self.x_ND)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.x_ND[rows.to(self.x_ND.device)]


class _CachedContexts:
    """A dataset of contexts [context_size, D]."""

    def __init__(self, folder: Path, hook_name: str | None) -> None:
        import datasets

        if not (folder / "dataset_info.json").exists():
            raise ValueError(f"{folder} holds no cached activations: it has no dataset_info.json")
        dataset: Any = datasets.load_from_disk(str(folder))
        columns = [name for name, feature in dataset.features.items() if len(getattr(feature, "shape", ())) == 2]
        if hook_name is None and len(columns) == 1:
            hook_name = columns[0]
        if hook_name not in columns:
            raise ValueError(f"hook_name must be one of the activations in {folder}, {columns}; got {hook_name!r}")
        self.context_size = dataset.features[hook_name].shape[0]
        self.column: Any = hook_name
        self.dataset = dataset.with_format("torch", columns=[hook_name])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.dataset[rows.tolist()][self.column].flatten(0, 1).float()


class _Shuffled(Iterator[Tensor]):
    """Epoch after epoch, each in an order of its own that ``seed`` and the epoch decide."""

    def __init__(self, contexts: _Rows | _CachedContexts, batch_size: int, seed: int) -> None:
        self.contexts, self.batch_size, self.seed = contexts, batch_size, seed
        self.epoch, self.batch = 0, 0
        n_tokens = len(contexts) * contexts.context_size
        self.batches_an_epoch = n_tokens // batch_size
        if self.batches_an_epoch == 0:
            raise ValueError(f"activations must be at least one batch of {batch_size}; there are {n_tokens}")
        # Whole contexts make whole batches, so that none is left over in a part.
        unit = batch_size // math.gcd(batch_size, contexts.context_size)
        self.at_once = unit * max(1, _BATCHES_AT_ONCE * batch_size // (unit * contexts.context_size))
        self._order: tuple[int, Tensor] | None = None
        self._part: tuple[tuple[int, int], Tensor] | None = None

    def __next__(self) -> Tensor:
        if self.batch == self.batches_an_epoch:
            self.epoch, self.batch = self.epoch + 1, 0
        per_part = self.at_once * self.contexts.context_size // self.batch_size
        part, place = divmod(self.batch, per_part)
        tokens = self._tokens(part)
        self.batch += 1
        return tokens[place * self.batch_size : (place + 1) * self.batch_size]

    def _tokens(self, part: int) -> Tensor:
        """The mixed tokens of one part of the epoch; the last one made is kept."""
        if self._part is None or self._part[0] != (self.epoch, part):
            rows = self._permutation()[part * self.at_once : (part + 1) * self.at_once]
            tokens = self.contexts[rows]
            if self.contexts.context_size > 1:
                generator = torch.Generator().manual_seed(hash((self.seed, self.epoch, part)) & (2**63 - 1))
                tokens = tokens[torch.randperm(len(tokens), generator=generator)]
            self._part = (self.epoch, part), tokens
        return self._part[1]

    def _permutation(self) -> Tensor:
        if self._order is None or self._order[0] != self.epoch:
            generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) & (2**63 - 1))
            self._order = self.epoch, torch.randperm(len(self.contexts), generator=generator)
        return self._order[1]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "batch": self.batch, "source": self._source}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the place is one in other activations; nothing has changed then."""
        before = state.get("source", self._source)  # earlier versions kept none
        if before != self._source:
            what = "; ".join(
                f"{n} was {v!r}, is {self._source[n]!r}" for n, v in before.items() if v != self._source[n]
            )
            raise ValueError(
                f"activations must be those that the checkpoint was trained on, to go on in them: {what}. To train the "
                "SAE on others, load it with TrainingSAE.load_from_disk and begin a run of its own"
            )
        if not 0 <= state["batch"] <= self.batches_an_epoch:
            raise ValueError(
                f"batch must be one of an epoch's {self.batches_an_epoch}, to go on from there; got {state['batch']}"
            )
        self.epoch, self.batch = state["epoch"], state["batch"]

    @cached_property
    def _source(self) -> dict[str, Any]:
        n = len(self.contexts)
        sample = self.contexts[torch.linspace(0, n - 1, min(n, _CONTEXTS_COMPARED), dtype=torch.float64).long()]
        digest = hashlib.sha256(sample.float().cpu().contiguous().numpy().tobytes()).hexdigest()
        return {"contexts": n, "context_size": self.contexts.context_size, "sample_sha256": digest}
