"""Each process's share of the activations: of a tensor or folder, and of the texts that SAELens's store reads."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from sae_lens.config import HfDataset
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lens_switch.common.types import StateDict
from sae_lens_switch.parallel.checkpoints import RANKS
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
    return Share(activation_batches(source, batch_size), ranks)


class Share(Iterator[Tensor]):
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


# Of SAELens's store


def take_share_of_store(store: ActivationsStore, batch_size: int, ranks: Ranks) -> None:
    """Have the store read this process's part of the dataset, or of cached activations, and of each batch.

    Raises:
        ValueError: If the dataset has several splits.
    """
    if store.dataset is not None:
        store.dataset = _share_of_dataset(store.dataset, ranks)
    if store.cached_activation_dataset is not None:
        cached = store.cached_activation_dataset
        store.cached_activation_dataset = split_dataset_by_node(cached, ranks.rank, ranks.size)
    first, end = (batch_size * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    store.train_batch_size_tokens = end - first


def return_to_place(store: ActivationsStore, checkpoint: Path, ranks: Ranks) -> None:
    """In this process's part of the dataset: of another number of parts, by what all have read together."""
    files = sorted((checkpoint / RANKS).glob(f"*/{ACTIVATIONS_STORE_STATE_FILENAME}"))
    files = files or list(checkpoint.glob(ACTIVATIONS_STORE_STATE_FILENAME))  # of a run on one process
    if len(files) == ranks.size:
        store.load(str(files[ranks.rank]))
    elif files:
        n_read = sum(int(load_file(file)["n_dataset_processed"]) for file in files) // ranks.size
        with TemporaryDirectory() as folder:
            place = Path(folder) / ACTIVATIONS_STORE_STATE_FILENAME
            save_file({"n_dataset_processed": torch.tensor(n_read)}, place)
            store.load(str(place))


def _share_of_dataset(dataset: HfDataset, ranks: Ranks) -> HfDataset:
    if isinstance(dataset, Dataset):
        return split_dataset_by_node(dataset, ranks.rank, ranks.size)
    if isinstance(dataset, IterableDataset):
        return split_dataset_by_node(dataset, ranks.rank, ranks.size)
    raise ValueError(f"the dataset must be one split, such as train; got a {type(dataset).__name__}")
