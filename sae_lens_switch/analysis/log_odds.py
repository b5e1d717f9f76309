"""The tokens that an expert gets more often than the others do, with the evidence for it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_lens_switch.analysis.label_counts import LabelCounts, strongest_per_expert, taken


@dataclass(frozen=True)
class OverRepresented:
    """The labels most over-represented in each expert, strongest evidence first; all [E, n], padded with id -1.

    Attributes:
        ids: The label: a token's id.
        counts: How often it was routed to this expert.
        totals: How often it was routed at all.
        log_odds: Difference of the log odds of the label in this expert and in all the others, with the prior.
        z: The same in estimated standard deviations, by which the labels are sorted. Above 2 is more than noise
            for a label chosen beforehand, of the many listed here about 4.
    """

    ids: Tensor
    counts: Tensor
    totals: Tensor
    log_odds: Tensor
    z: Tensor


def over_represented(counts: LabelCounts, *, n: int = 20, prior: float = 100.0) -> OverRepresented:
    """List the labels over-represented in each expert, by log odds with an informative Dirichlet prior.

    The method of Monroe, Colaresi and Quinn 2008 ("Fightin' words"), equations 16 to 22: with counts y_e of a label in
    expert e and y_o in the others, of n_e and n_o tokens, and ``a = prior * (label's share of all tokens)``::

        log_odds = log((y_e + a) / (n_e + prior - y_e - a)) - log((y_o + a) / (n_o + prior - y_o - a))
        z = log_odds / sqrt(1 / (y_e + a) + 1 / (y_o + a))

    Rare labels need no threshold: their variance is large.

    Args:
        counts: As ``count_labels`` returns them, or of an ``Activity``.
        n: Number of labels to list per expert.
        prior: Weight of the prior, in tokens.

    Raises:
        ValueError: Unless ``n`` is at least 0 and ``prior`` positive.
    """
    if n < 0 or not prior > 0:
        raise ValueError(f"n must be at least 0 and prior above 0; got {n} and {prior}")
    total_P = counts.of_label_P
    own_P, own_total_P = counts.counts_P.double(), counts.of_expert_E[counts.experts_P]
    others_P, others_total_P = total_P - own_P, counts.n - own_total_P
    a_P = prior * total_P / max(1, counts.n)

    def log_odds(count_P: Tensor, of_P: Tensor) -> Tensor:
        return ((count_P + a_P) / (of_P + prior - count_P - a_P)).log()

    log_odds_P = log_odds(own_P, own_total_P) - log_odds(others_P, others_total_P)
    z_P = log_odds_P / (1 / (own_P + a_P) + 1 / (others_P + a_P)).sqrt()
    best = strongest_per_expert(counts, z_P, n)
    columns = ((counts.labels_P, -1), (counts.counts_P, 0), (total_P, 0), (log_odds_P, torch.nan), (z_P, torch.nan))
    return OverRepresented(*(taken(values_P, best, missing) for values_P, missing in columns))
