"""The study beyond one active expert: what each of its cells changes of a Switch SAE with one expert per token.

All but the split cells have 8 W latents in all, W the width of the TopK SAE. Those of "same FLOPs" encode a token with
W of them: two of 16 experts half as wide, four of 32 a quarter as wide, one of 15 half as wide beside a shared one,
three of 31 a quarter as wide beside a shared one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from cells import Cell, with_experts

EXPERTS, SPLIT_EXPERTS = 8, 4
STUDY = "study: "

_SAME_FLOPS: tuple[dict[str, Any], ...] = (
    {"n_experts": 16, "n_active_experts": 2},
    {"n_experts": 16, "n_active_experts": 2, "gate": "renormalized"},
    {"n_experts": 32, "n_active_experts": 4, "gate": "renormalized"},
    {"n_experts": 15, "n_shared_experts": 1},
)
# A shared expert has a gate of 1, beside which those of experts that sum to 1 are smaller if there are several.
_SHARED_BESIDE_SEVERAL = {"n_experts": 31, "n_active_experts": 3, "n_shared_experts": 1, "gate": "renormalized"}
_CHANGES: dict[str, tuple[dict[str, Any], ...]] = {
    "several experts, same FLOPs": (*_SAME_FLOPS, _SHARED_BESIDE_SEVERAL),
    "several experts, as wide": tuple({"n_active_experts": A, "gate": "renormalized"} for A in (2, 4)),
    "load balance": (
        {"load_balance_coefficient": 0.0},
        {"load_balance_coefficient": 0.1},
        {"load_balancing": "bias"},
        {"router_z_loss_coefficient": 0.01},
    ),
    "duplicates": ({"expert_overlap_coefficient": 0.1},),
}
_MIDDLE = {"several experts, same FLOPs": _SAME_FLOPS[1:], "load balance": ({"load_balancing": "bias"},)}


def studied(topk: Cell, layers: tuple[int, int], tokens: tuple[int, int]) -> Iterator[Cell]:
    """Every cell of one seed, without learning rates, the baseline of each experiment first.

    Args:
        topk: The TopK SAE.
        layers: The early and the middle layer.
        tokens: How many tokens of each.
    """
    for layer, n, changes in zip(layers, tokens, (_CHANGES, _MIDDLE), strict=True):
        base = replace(with_experts(topk, EXPERTS, matched=True), layer=layer, budgets=(n,))
        where = "" if layer == layers[0] else f", layer {layer}"
        for name, of_one in changes.items() if n else ():
            for change in ({}, *of_one):
                yield replace(base, experiment=f"{STUDY}{name}{where}", **change)
    split = replace(with_experts(topk, SPLIT_EXPERTS, matched=False), budgets=(tokens[0],), experiment=f"{STUDY}split")
    yield from (split, replace(split, start="split"))


def baseline(cell: Cell) -> Cell:
    """The cell of the study whose learning rate this one takes: of as many latents, with one expert per token."""
    n_experts = SPLIT_EXPERTS if cell.experiment.endswith("split") else EXPERTS
    return replace(cell, n_experts=n_experts)
