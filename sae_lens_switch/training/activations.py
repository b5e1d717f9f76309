"""Batches of activations from any source: an iterator, a tensor, or a folder of activations cached by SAELens."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from sae_lens_switch.common.seeds import mixed_seed

ActivationSource = Iterable[Tensor] | Tensor | str | Path

# Cached contexts are read this many batches at a time, and their tokens shuffled together.
_BATCHES_AT_ONCE = 16
# A source is recognised by the activations of this many contexts.
_CONTEXTS_COMPARED = 16


def activation_batches(
    source: ActivationSource,
    batch_size: int,
    *,
    targets: Tensor | None = None,
    hook_name: str | None = None,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Iterate over batches of activations, [batch_size, d_in].

    Batches from a tensor or a folder never end and have ``state_dict`` and ``load_state_dict``: checkpoints keep the
    position, with a fingerprint of the activations it belongs to.

    Args:
        source: A tensor [..., d_in], whose rows are reshuffled every epoch; the folder of a dataset written by
            SAELens's CacheActivationsRunner, whose contexts and tokens are reshuffled every epoch; or an iterable of
            batches [..., d_in], which are passed through as they are.
        batch_size: Tokens per batch.
        targets: For a transcoder and a source that is a tensor: what is to be reconstructed from each of its rows, a
            tensor [..., d_out]. Batches are then [batch_size, d_in + d_out].
        hook_name: The column of the dataset, if it has several.
        seed: Decides the order.

    Raises:
        ValueError: If the source is empty or shorter than a batch, if the folder holds no activations, or if targets
            are not as many as the rows of a tensor.
    """
    if isinstance(source, Tensor):
        if source.ndim < 2:
            raise ValueError(f"activations must have shape [..., d_in]; got {tuple(source.shape)}")
        if targets is not None and targets.shape[:-1] != source.shape[:-1]:
            raise ValueError(
                f"targets must have shape {(*source.shape[:-1], 'd_out')}, a row for each activation; "
                f"got {tuple(targets.shape)}"
            )
        given = [source] if targets is None else [source, targets]
        return _Shuffled(_Rows(*(t.detach().reshape(-1, t.shape[-1]) for t in given)), batch_size, seed)
    if targets is not None:
        raise ValueError(f"targets must be None unless the source is a tensor; got a {type(source).__name__}")
    if isinstance(source, str | Path):
        return _Shuffled(_CachedContexts(Path(source), hook_name), batch_size, seed)
    return iter(source)


def cached_rows(folder: str | Path, hook_name: str | None = None) -> int:
    """The number of activations in a folder of SAELens's CacheActivationsRunner. Raises ValueError if it holds none."""
    contexts = _CachedContexts(Path(folder), hook_name)
    return len(contexts) * contexts.context_size


class _Rows:
    """A tensor [N, D], as contexts of one token each; of several tensors, the rows of all side by side."""

    context_size = 1

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, rows: Tensor) -> Tensor:
        taken = [x_ND[rows.to(x_ND.device)] for x_ND in self.parts]
        return taken[0] if len(taken) == 1 else torch.cat(taken, dim=1)


class _CachedContexts:
    """A dataset of contexts, [context_size, D] each."""

    def __init__(self, folder: Path, hook_name: str | None) -> None:
        import datasets

        if not (folder / "dataset_info.json").exists():
            raise ValueError(f"{folder} holds no cached activations: it has no dataset_info.json")
        dataset = datasets.Dataset.load_from_disk(str(folder))
        shapes = {name: f.shape for name, f in dataset.features.items() if isinstance(f, datasets.Array2D)}
        if hook_name is None and len(shapes) == 1:
            (hook_name,) = shapes
        if hook_name not in shapes:
            raise ValueError(f"hook_name must be one of the activations in {folder}, {list(shapes)}; got {hook_name!r}")
        self.context_size = shapes[hook_name][0]
        self.column = hook_name
        self.dataset = dataset.with_format("torch", columns=[hook_name])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.dataset[rows.tolist()][self.column].flatten(0, 1).float()


class _Position(TypedDict):
    """Where iteration stands, for a checkpoint."""

    epoch: int
    batch: int
    source: NotRequired[dict[str, int | str]]  # earlier versions kept none


class _Shuffled(Iterator[Tensor]):
    """Endless epochs, each in an order that depends on ``seed`` and the epoch alone."""

    def __init__(self, contexts: _Rows | _CachedContexts, batch_size: int, seed: int) -> None:
        self.contexts, self.batch_size, self.seed = contexts, batch_size, seed
        self.epoch, self.batch = 0, 0
        n_tokens = len(contexts) * contexts.context_size
        self.batches_per_epoch = n_tokens // batch_size
        if self.batches_per_epoch == 0:
            raise ValueError(f"activations must be at least one batch of {batch_size}; there are {n_tokens}")
        # Parts of whole contexts and whole batches, so that no token is left over.
        unit = batch_size // math.gcd(batch_size, contexts.context_size)
        self.at_once = unit * max(1, _BATCHES_AT_ONCE * batch_size // (unit * contexts.context_size))
        self._order: tuple[int, Tensor] | None = None
        self._part: tuple[tuple[int, int], Tensor] | None = None

    def __next__(self) -> Tensor:
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0
        per_part = self.at_once * self.contexts.context_size // self.batch_size
        part, place = divmod(self.batch, per_part)
        tokens = self._tokens(part)
        self.batch += 1
        return tokens[place * self.batch_size : (place + 1) * self.batch_size]

    def _tokens(self, part: int) -> Tensor:
        """The shuffled tokens of one part of the epoch; the latest part is cached."""
        if self._part is None or self._part[0] != (self.epoch, part):
            rows = self._permutation()[part * self.at_once : (part + 1) * self.at_once]
            tokens = self.contexts[rows]
            if self.contexts.context_size > 1:
                generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch, part))
                tokens = tokens[torch.randperm(len(tokens), generator=generator)]
            self._part = (self.epoch, part), tokens
        return self._part[1]

    def _permutation(self) -> Tensor:
        if self._order is None or self._order[0] != self.epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
            self._order = self.epoch, torch.randperm(len(self.contexts), generator=generator)
        return self._order[1]

    def state_dict(self) -> _Position:
        return {"epoch": self.epoch, "batch": self.batch, "source": self._source}

    def load_state_dict(self, state: _Position) -> None:
        """Continue from a position.

        Raises:
            ValueError: If the position is one in other activations; nothing has changed then.
        """
        before = state.get("source", self._source)
        if before != self._source:
            what = "; ".join(
                f"{n} was {v!r}, is {self._source[n]!r}" for n, v in before.items() if v != self._source[n]
            )
            raise ValueError(
                f"activations must be those that the checkpoint was trained on: {what}. To train the SAE on others, "
                "load it with TrainingSAE.load_from_disk and start a new run"
            )
        if not 0 <= state["batch"] <= self.batches_per_epoch:
            raise ValueError(
                f"batch must be between 0 and {self.batches_per_epoch}, the batches per epoch; got {state['batch']}"
            )
        self.epoch, self.batch = state["epoch"], state["batch"]

    @cached_property
    def _source(self) -> dict[str, int | str]:
        n = len(self.contexts)
        sample = self.contexts[torch.linspace(0, n - 1, min(n, _CONTEXTS_COMPARED), dtype=torch.float64).long()]
        digest = hashlib.sha256(sample.float().cpu().contiguous().numpy().tobytes()).hexdigest()
        return {"contexts": n, "context_size": self.contexts.context_size, "sample_sha256": digest}
