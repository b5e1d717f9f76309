"""How much a token's id or position tells about its expert."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_lens_switch.analysis.label_counts import LabelCounts

# A table of experts x labels up to this size is counted directly.
_DENSE = 2**22


@dataclass(frozen=True)
class MutualInformation:
    """Mutual information of expert and label, I = H(expert) + H(label) - H(expert, label), in bits.

    The plug-in estimate is too high where labels are rare: a label seen once seems to determine its expert. Two
    corrections: Miller and Madow's, of first order in 1 / N, and the mean over shuffles of the labels, which is the
    information found where there is none. For many rare labels, such as token ids, trust the second.

    Attributes:
        bits: The plug-in estimate.
        miller_madow: ``bits`` with the Miller-Madow correction.
        shuffled: Mean plug-in estimate after shuffling.
        shuffled_std: Its standard deviation over the shuffles.
        expert_entropy: H(expert), the most that can be known.
        label_entropy: H(label).
    """

    bits: float
    miller_madow: float
    shuffled: float
    shuffled_std: float
    expert_entropy: float
    label_entropy: float

    @property
    def corrected(self) -> float:
        """``bits`` less what shuffled labels tell."""
        return self.bits - self.shuffled

    @property
    def normalized(self) -> float:
        """Share of what can be known beyond chance: 1 if the label determines the expert, 0 if it tells nothing."""
        most = self.expert_entropy - self.shuffled
        return self.corrected / most if most > 0 else float("nan")


def mutual_information(counts: LabelCounts, *, n_shuffles: int = 20, seed: int = 0) -> MutualInformation:
    """Estimate how many bits the label of a token tells about its expert.

    Args:
        counts: As ``count_labels`` returns them, or of an ``Activity``.
        n_shuffles: Number of shuffles, at O(N) each.
        seed: Seed of the shuffles.

    Raises:
        ValueError: If nothing was counted, or ``n_shuffles`` is below 2.
    """
    if counts.n == 0:
        raise ValueError("counts must hold at least one token; got none")
    if n_shuffles < 2:
        raise ValueError(f"n_shuffles must be at least 2; got {n_shuffles}")
    _, label_P = counts.labels_P.unique(return_inverse=True)
    of_expert, of_label = counts.of_expert_E, torch.zeros(int(label_P.max()) + 1, dtype=torch.int64)
    of_label.index_add_(0, label_P, counts.counts_P)
    H_expert, H_label = _entropy(of_expert), _entropy(of_label)
    bits = H_expert + H_label - _entropy(counts.counts_P)
    cells = int((of_expert > 0).sum()) + len(of_label) - len(counts.counts_P) - 1
    correction = cells / (2 * counts.n) / math.log(2)
    experts_N, labels_N = (t.repeat_interleave(counts.counts_P) for t in (counts.experts_P, label_P))
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.tensor(
        [
            H_expert + H_label - _joint_entropy(experts_N, labels_N[torch.randperm(counts.n, generator=generator)])
            for _ in range(n_shuffles)
        ],
        dtype=torch.float64,
    )
    return MutualInformation(bits, bits + correction, shuffled.mean().item(), shuffled.std().item(), H_expert, H_label)


def _joint_entropy(experts_N: Tensor, labels_N: Tensor) -> float:
    n_labels = int(labels_N.max()) + 1
    keys = experts_N * n_labels + labels_N
    small = (int(experts_N.max()) + 1) * n_labels <= _DENSE
    return _entropy(torch.bincount(keys) if small else keys.unique(return_counts=True)[1])


def _entropy(counts: Tensor) -> float:
    """In bits, of the distribution that counts are proportional to."""
    return torch.special.entr(counts / counts.sum().double()).sum().item() / math.log(2)
