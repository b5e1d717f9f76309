"""Statistics that ``observe`` accumulates over a stream of activations, each with the form in which it is returned.

N is the number of tokens in total.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_lens_switch.analysis.coactivation import CoActivation, against_independence, coactivation_counts
from sae_lens_switch.analysis.label_counts import LabelCounts, strongest_per_expert, taken
from sae_lens_switch.saes.router import Assignment

GATE_BINS = 50


@dataclass(frozen=True)
class Routing:
    """Where a router sent the tokens.

    Attributes:
        tokens_E: Number of tokens routed to each expert, int64.
        probability_E: The router's mean probability of each expert.
        entropy: Mean entropy of the router's probabilities per token, in nats.
        gate_mean: Mean probability of a chosen expert.
        gate_counts: Histogram of the gates in 50 equal bins of [0, 1].
        coactivation: Which experts are chosen together; None if each token has one.
    """

    tokens_E: Tensor
    probability_E: Tensor
    entropy: float
    gate_mean: float
    gate_counts: Tensor
    coactivation: CoActivation | None = None

    @property
    def load_E(self) -> Tensor:
        """Share of the tokens routed to each expert; sums to 1."""
        return self.tokens_E / self.tokens_E.sum().clamp(min=1)


@dataclass(frozen=True)
class Examples:
    """The contexts in which each latent fires most strongly, strongest first; ties go to the earlier context.

    All tensors are [F, n]. A latent that fired in fewer than n contexts is padded with 0, -1, -1.

    Attributes:
        values: The latent's maximum activation in the context.
        contexts: Index of the context in the stream.
        positions: Position of that maximum in the context.
    """

    values: Tensor
    contexts: Tensor
    positions: Tensor


@dataclass(frozen=True)
class TypicalTokens:
    """The tokens most informative about each expert being chosen, most informative first.

    The score n_te log(n_te N / (n_t n_e)) is a token's share of the mutual information of token and expert, times N. It
    rewards tokens that are frequent in this expert and rare in others. Only tokens more frequent than by chance are
    listed. All tensors are [E, n], padded with id -1.

    Attributes:
        ids: The token.
        counts: How often it was routed to this expert.
        totals: How often it occurred at all.
    """

    ids: Tensor
    counts: Tensor
    totals: Tensor


class Moments:
    """Squared error and variance of the activations, in float64."""

    def __init__(self, d_in: int) -> None:
        self.n, self.error, self.square = 0, 0.0, 0.0
        self.sum_D = torch.zeros(d_in, dtype=torch.float64)
        self.longest_D = torch.zeros(d_in, dtype=torch.float64)

    def add(self, x_BD: Tensor, x_hat_BD: Tensor) -> None:
        x_BD = x_BD.cpu().double()
        self.n += len(x_BD)
        self.error += float((x_BD - x_hat_BD.cpu().double()).square().sum())
        self.sum_D += x_BD.sum(0)
        square_B = x_BD.square().sum(1)
        self.square += float(square_B.sum())
        if square_B.max() > self.longest_D.square().sum():
            self.longest_D = x_BD[square_B.argmax()].clone()

    @property
    def mse(self) -> float:
        return self.error / self.n

    @property
    def variance(self) -> float:
        return max(0.0, self.square / self.n - float((self.sum_D / self.n).square().sum()))

    @property
    def outlier(self) -> float:
        total = self.n * self.variance
        return float((self.longest_D - self.sum_D / self.n).square().sum()) / total if total else 0.0


class StrongestExamples:
    """The n strongest contexts per latent so far, as flat lists: latent, value, context, position."""

    def __init__(self, d_sae: int, n: int) -> None:
        self.n = n
        self.floor_F = torch.zeros(d_sae, dtype=torch.float64)  # a candidate must exceed this
        self.kept: tuple[Tensor, ...] = ()

    def add(self, latent: Tensor, value: Tensor, context: Tensor, position: Tensor) -> None:
        if self.n == 0:
            return
        value = value.double()
        new = (value > self.floor_F[latent]).nonzero().flatten()
        if not len(new):
            return
        candidates = tuple(t[new] for t in (latent, value, context, position))
        if self.kept:
            candidates = tuple(torch.cat(pair) for pair in zip(self.kept, candidates, strict=True))
        latent, value, context, _ = candidates
        order = _order(latent, context, -value)
        order = order[_rank(latent[order], context[order]) == 0]  # the strongest position per context
        order = order[_order(latent[order], -value[order], context[order])]
        rank = _rank(latent[order])
        order, rank = order[rank < self.n], rank[rank < self.n]
        self.kept = latent, value, *_ = tuple(t[order] for t in candidates)
        full = rank == self.n - 1
        self.floor_F[latent[full]] = value[full]

    def result(self) -> Examples:
        shape = len(self.floor_F), self.n
        values = torch.zeros(shape, dtype=torch.float64)
        contexts, positions = torch.full(shape, -1), torch.full(shape, -1)
        if self.kept:
            latent, value, context, position = self.kept
            rank = _rank(latent)
            values[latent, rank], contexts[latent, rank], positions[latent, rank] = value, context, position
        return Examples(values, contexts, positions)


def _order(*keys: Tensor) -> Tensor:
    """Stable lexicographic argsort; the first key is the primary one."""
    order = torch.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order


def _rank(*groups: Tensor) -> Tensor:
    """0, 1, 2, ... within each run of equal rows."""
    index = torch.arange(len(groups[0]))
    starts = torch.ones(len(index), dtype=torch.bool)
    starts[1:] = torch.stack([group[1:] != group[:-1] for group in groups]).any(0)
    return index - torch.where(starts, index, 0).cummax(0).values


class Routes:
    """Load, gates and probabilities of the router so far."""

    def __init__(self, n_experts: int) -> None:
        self.n, self.entropy, self.gates = 0, 0.0, 0.0
        self.together_EE = torch.zeros(n_experts, n_experts, dtype=torch.int64)
        self.probability_E = torch.zeros(n_experts, dtype=torch.float64)
        self.gate_counts = torch.zeros(GATE_BINS, dtype=torch.int64)

    def add(self, assignment: Assignment) -> None:
        probs_BE, gates_B = assignment.probs_BE.cpu().double(), assignment.gates_BA.cpu().double().flatten()
        self.n += len(probs_BE)
        self.together_EE += coactivation_counts(assignment.experts_BA.cpu(), len(self.together_EE))
        self.probability_E += probs_BE.sum(0)
        self.entropy += float(torch.special.entr(probs_BE).sum())
        self.gates += float(gates_B.sum())
        bins = (gates_B * GATE_BINS).long().clamp(0, GATE_BINS - 1)
        self.gate_counts += torch.bincount(bins, minlength=GATE_BINS)

    def result(self) -> Routing:
        tokens_E = self.together_EE.diag()
        n_choices = int(tokens_E.sum())
        return Routing(
            tokens_E,
            self.probability_E / self.n,
            self.entropy / self.n,
            self.gates / n_choices,
            self.gate_counts,
            against_independence(self.together_EE) if n_choices > self.n else None,
        )


def typical_tokens(counts: LabelCounts, n: int) -> TypicalTokens:
    """The n most informative tokens of each expert, of counted token ids."""
    total_P = counts.of_label_P
    chance_P = total_P.double() * counts.of_expert_E[counts.experts_P] / counts.n
    best = strongest_per_expert(counts, counts.counts_P * (counts.counts_P / chance_P).log(), n)
    return TypicalTokens(taken(counts.labels_P, best, -1), taken(counts.counts_P, best, 0), taken(total_P, best, 0))
