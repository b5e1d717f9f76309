"""Balanced assignment: rows to columns, for a high total score, with no column over its capacity."""

import torch
from torch import Tensor

# Prices are found for demand softened by a temperature, in units of the scores' spread, that falls in these steps.
_TEMPERATURES = (1.0, 0.3, 0.1, 0.03)
_STEPS = 10
# There are as many prices as columns: this many rows, evenly spaced, are enough to find them.
_ROWS_PRICED = 8192


@torch.no_grad()
def balanced_assignment(score_RE: Tensor, capacity: int) -> Tensor:
    """Assign each of R rows to one of E columns, at most ``capacity`` rows each, with a high sum of scores.

    Sinkhorn's iteration finds a price per column at which demand is even. Each row then takes its best column at
    these prices; where too many want the same one, those that lose least elsewhere move on. Deterministic; O(R E)
    memory.

    Args:
        score_RE: Finite scores.
        capacity: The most rows of a column, at least R / E.

    Returns:
        The column of each row, [R], int64.

    Raises:
        ValueError: If the columns have no room for all rows.
    """
    R, E = score_RE.shape
    if capacity * E < R:
        raise ValueError(f"capacity must be at least {-(-R // E)}, for {E} columns to hold {R} rows; got {capacity}")
    net_RE = score_RE.float() - _prices(score_RE.float())
    column_R = torch.full((R,), -1, device=score_RE.device)
    room, waiting = [capacity] * E, torch.arange(R, device=score_RE.device)
    while len(waiting):
        wanted, loss = _first_choice(net_RE[waiting])
        for e in range(E):
            mine = (wanted == e).nonzero().flatten()
            if len(mine) > room[e]:
                mine = mine[loss[mine].argsort(descending=True, stable=True)[: room[e]]]
            column_R[waiting[mine]] = e
            room[e] -= len(mine)
            if room[e] == 0:
                net_RE[:, e] = -torch.inf
        waiting = waiting[column_R[waiting] < 0]
    return column_R


def _prices(score_RE: Tensor) -> Tensor:
    """[E], what to subtract from each column's scores for an even demand."""
    score_RE = score_RE[:: -(-len(score_RE) // _ROWS_PRICED)]
    price_E = score_RE.new_zeros(score_RE.shape[1])
    spread = (score_RE - score_RE.mean(dim=1, keepdim=True)).square().mean().sqrt().clamp_min(1e-30)
    for temperature in _TEMPERATURES:
        for _ in range(_STEPS):
            demand_E = ((score_RE - price_E) / (temperature * spread)).softmax(dim=1).mean(dim=0)
            price_E += temperature * spread * (demand_E * len(demand_E)).clamp_min(1e-30).log()
    return price_E


def _first_choice(net_RE: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's best column, and what its second best would cost it."""
    best = net_RE.topk(min(2, net_RE.shape[1]), dim=1)
    return best.indices[:, 0], best.values[:, 0] - best.values[:, -1]
