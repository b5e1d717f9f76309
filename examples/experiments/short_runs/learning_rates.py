"""The learning rate that a sweep of the short runs chose."""

from __future__ import annotations

import math
from collections.abc import Sequence

from csv_rows import Row

L1_ARCHITECTURES = ("standard", "gated")


def best_lr(swept: Sequence[Row], architecture: str, d_sae: int, n_experts: int) -> float:
    """The best of a sweep; for other shapes, that of the nearest, in log width and log experts."""

    def distance(row: Row) -> float:
        return abs(math.log(row["d_sae"] / d_sae)) + abs(math.log(row["n_experts"] / n_experts))

    def judged(row: Row) -> float:
        # With an L1 coefficient, the error alone would favour a larger L0.
        return row["final_loss"] if architecture in L1_ARCHITECTURES else row["fvu"]

    mine = [r for r in swept if r["architecture"] == architecture]
    nearest = min(map(distance, mine))
    return min((r for r in mine if distance(r) == nearest), key=judged)["lr"]


def growing(d_sae: int) -> int:
    """The number of experts with 256 latents each."""
    return max(2, d_sae // 256)
