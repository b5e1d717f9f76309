"""Each process's share of the activations."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from sae_lens_switch.common.types import StateDict
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.training.activations import ActivationSource, activation_batches
from sae_lens_switch.training.resumable_trainer import ResumableData


def share_of(source: ActivationSource, batch_size: int, ranks: Ranks) -> Iterator[Tensor]:
    """This process's part of every batch.

    Args:
        source: A tensor or folder that all processes have: rank r of W takes the r-th of W parts of each batch, so that
            together they train on the batches of a single process. An iterable of this process's own batches, of about
            ``batch_size / W`` tokens each, is passed through.
        batch_size: Tokens of the whole batch.
        ranks: Which part is this process's.
    """
    if not isinstance(source, Tensor | str | Path):
        return iter(source)
    if batch_size < ranks.size:
        raise ValueError(f"train_batch_size_samples must be at least the {ranks.size} processes; got {batch_size}")
    return _Share(activation_batches(source, batch_size), ranks)


class _Share(Iterator[Tensor]):
    """The place in the activations is that of the whole batches, and holds for any number of processes."""

    def __init__(self, batches: Iterator[Tensor], ranks: Ranks) -> None:
        self.batches, self.ranks = batches, ranks

    def __next__(self) -> Tensor:
        batch = next(self.batches)
        first, end = (len(batch) * r // self.ranks.size for r in (self.ranks.rank, self.ranks.rank + 1))
        return batch[first:end]

    def state_dict(self) -> StateDict:
        assert isinstance(self.batches, ResumableData)
        return self.batches.state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        assert isinstance(self.batches, ResumableData)
        self.batches.load_state_dict(state_dict)
