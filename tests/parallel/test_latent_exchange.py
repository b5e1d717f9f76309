"""Which of everybody's candidates are the best, and what processes with unequal shares of a batch tell each other."""

import pytest
import torch
from helpers.processes import on_processes
from torch import Tensor
from torch.testing import assert_close

from sae_lens_switch.parallel.latent_exchange import RowBatch, border, is_within
from sae_lens_switch.parallel.ranks import Ranks


def ranks_of(P: int, n: int, C: int, n_values: int | None, seed: int) -> Tensor:
    """[P, n, C]; of few values, so that many are equal, or all different."""
    generator = torch.Generator().manual_seed(seed)
    if n_values is None:
        return torch.randn(P, n, C, generator=generator)
    return torch.randint(-1, n_values, (P, n, C), generator=generator).float()


def first_of_equals(ranked: Tensor, k: int) -> Tensor:
    """Which are chosen, one by one: the largest, and of equal ones those of the lower process and place."""
    P, n, C = ranked.shape
    chosen = torch.zeros(P, n, C, dtype=torch.bool)
    for token in range(n):
        of_all = [(-float(ranked[p, token, c]), p, c) for p in range(P) for c in range(C)]
        for _, p, c in sorted(of_all)[:k]:
            chosen[p, token, c] = True
    return chosen


@pytest.mark.parametrize(("P", "n", "C", "k"), [(1, 3, 5, 2), (2, 9, 4, 4), (4, 7, 3, 11), (3, 5, 2, 6), (2, 1, 1, 1)])
@pytest.mark.parametrize("n_values", [None, 1, 2, 5], ids=lambda n: f"{n} values")
def test_the_best_of_all_are_chosen_and_of_equal_ones_the_first(P, n, C, k, n_values):
    for seed in range(5):
        ranked = ranks_of(P, n, C, n_values, seed)
        found = torch.stack([is_within(*of_one) for of_one in zip(ranked, border(ranked, k), strict=True)])
        assert torch.equal(found, first_of_equals(ranked, k))
        assert (found.sum((0, 2)) == k).all()


def test_what_is_missing_is_not_chosen_before_what_is_there():
    ranked = torch.tensor([[[3.0, -torch.inf]], [[-5.0, -7.0]]])
    found = torch.stack([is_within(*of_one) for of_one in zip(ranked, border(ranked, 3), strict=True)])
    assert found.tolist() == [[[True, False]], [[True, True]]]


@pytest.mark.parametrize("sizes", [(4, 4), (5, 3), (1, 6)], ids=str)
def test_shares_of_any_size_are_exchanged_summed_and_differentiated(sizes, tmp_path):
    X = 3

    def numbers(rank: int, n: int) -> Tensor:
        return torch.arange(n * X, dtype=torch.float32).view(n, X) + 100 * rank

    def run() -> dict[str, object]:
        ranks = Ranks(2, "cpu", 60)
        n = sizes[ranks.rank]
        batch = RowBatch.of(n, (7 + ranks.rank, 1), ranks)
        of_all = numbers(ranks.rank, sum(sizes)).requires_grad_()
        (total,) = batch.summed([of_all])
        total.backward(numbers(ranks.rank, n))
        back = torch.stack([numbers(10 * to, n) for to in range(2)])
        return {
            "facts": (batch.n_tokens, batch.sizes, batch.n_dead, batch.n_dead_L, batch.n_home),
            "all": batch.to_all(numbers(ranks.rank, n), "tokens"),
            "home": batch.to_homes(numbers(ranks.rank, sum(sizes)), "candidates"),
            "back": batch.from_homes(back, "borders"),
            "total": total.detach(),
            "grad": of_all.grad,
        }

    found = on_processes(2, run, tmp_path)
    everybodys = torch.cat([numbers(rank, n) for rank, n in enumerate(sizes)])
    for rank, one in enumerate(found):
        home = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        parts = torch.stack([numbers(source, sum(sizes))[home] for source in range(2)])
        assert one["facts"] == (sum(sizes), list(sizes), [(7, 1), (8, 1)], [15, 2], sizes[rank])
        assert_close(one["all"], everybodys)
        assert_close(one["home"], parts)
        assert_close(one["back"], torch.cat([numbers(10 * rank, n) for n in sizes]))
        assert_close(one["total"], parts.sum(0))
        assert_close(one["grad"], everybodys)
