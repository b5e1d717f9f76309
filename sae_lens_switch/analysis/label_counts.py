"""How often each label of a token, such as its id or its position, was routed to each expert."""

from dataclasses import dataclass

import torch
from torch import Tensor

# expert * this + label encodes both in one number.
_LABELS = 2**32


@dataclass(frozen=True)
class LabelCounts:
    """The pairs of expert and label that occur (P pairs), sorted by expert, then label. All int64.

    Attributes:
        n_experts: Number of experts.
        experts_P: The expert.
        labels_P: The label.
        counts_P: How often this expert was chosen for this label.
    """

    n_experts: int
    experts_P: Tensor
    labels_P: Tensor
    counts_P: Tensor

    @property
    def n(self) -> int:
        """Number of choices: of tokens, if each has one expert."""
        return int(self.counts_P.sum())

    @property
    def of_expert_E(self) -> Tensor:
        """Number of choices of each expert."""
        return self.counts_P.new_zeros(self.n_experts).index_add_(0, self.experts_P, self.counts_P)

    @property
    def of_label_P(self) -> Tensor:
        """Number of choices for the label of each pair."""
        _, where = self.labels_P.unique(return_inverse=True)
        return torch.zeros_like(self.counts_P).index_add_(0, where, self.counts_P)[where]

    def dense(self, n_labels: int) -> Tensor:
        """[E, n_labels] counts of labels 0 to n_labels - 1."""
        counts = self.counts_P.new_zeros(self.n_experts, n_labels)
        counts[self.experts_P, self.labels_P] = self.counts_P
        return counts


def count_labels(experts: Tensor, labels_N: Tensor, n_experts: int) -> LabelCounts:
    """Count how often each label was routed to each expert.

    Args:
        experts: The expert of each token, [N], or its A experts, [N, A]; each counts once.
        labels_N: A label of each token in [0, 2^32): its id, its position.
        n_experts: Number of experts.

    Raises:
        ValueError: For different numbers of tokens, or experts or labels out of range.
    """
    counting = CountingLabels()
    counting.add(experts, labels_N)
    found = counting.result(n_experts)
    if len(found.experts_P) and int(found.experts_P.max()) >= n_experts:
        raise ValueError(f"experts must be between 0 and {n_experts - 1}; got {int(found.experts_P.max())}")
    return found


class CountingLabels:
    """Counts so far; only pairs that occur take memory."""

    def __init__(self) -> None:
        self.keys, self.counts = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)

    def add(self, experts: Tensor, labels_B: Tensor) -> None:
        experts_BA = experts[:, None] if experts.ndim == 1 else experts
        if len(experts_BA) != len(labels_B):
            raise ValueError(
                f"experts and labels must be of the same tokens; got {len(experts_BA)} and {len(labels_B)}"
            )
        for name, values in (("experts", experts_BA), ("labels", labels_B)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < _LABELS:
                raise ValueError(f"{name} must be in [0, 2^32); got {int(values.min())} to {int(values.max())}")
        new = (experts_BA.cpu().long() * _LABELS + labels_B.cpu().long()[:, None]).flatten()
        keys, counts = torch.cat([self.keys, new]), torch.cat([self.counts, torch.ones_like(new)])
        self.keys, where = keys.unique(return_inverse=True)
        self.counts = torch.zeros_like(self.keys).index_add_(0, where, counts)

    def result(self, n_experts: int) -> LabelCounts:
        return LabelCounts(n_experts, self.keys // _LABELS, self.keys % _LABELS, self.counts)


def strongest_per_expert(counts: LabelCounts, score_P: Tensor, n: int) -> Tensor:
    """[E, n] the pairs of each expert with the highest positive scores, highest first, ties by label; -1 where none."""
    best = torch.full((counts.n_experts, n), -1)
    for e in range(counts.n_experts):
        pairs = ((counts.experts_P == e) & (score_P > 0)).nonzero().flatten()
        pairs = pairs[score_P[pairs].argsort(descending=True, stable=True)][:n]
        best[e, : len(pairs)] = pairs
    return best


def taken(values_P: Tensor, pairs: Tensor, missing: float) -> Tensor:
    """Values of the listed pairs, in their shape; ``missing`` where the pair is -1."""
    return torch.cat([values_P, values_P.new_tensor([missing])])[pairs]
