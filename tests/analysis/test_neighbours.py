"""Nearest neighbours against a double loop in float64, and the search in bfloat16 against that in float32."""

import math

import pytest
import torch
from helpers import E, F, M, largest_allocation, random_input

from sae_lens_switch.analysis import Neighbours, duplicate_latents, nearest_neighbours
from sae_lens_switch.analysis.cosines import BFLOAT16_ERROR, cosine_tiles


def planted() -> torch.Tensor:
    """Rows of all lengths; a twin in the same expert and in another; opposites; two rows of zeros."""
    W = random_input(F, 12, seed=6)
    W[3], W[21], W[12] = 2 * W[1], 0.5 * W[1] + 0.01 * W[2], -W[11]
    W[17] = W[31] = 0
    return W


def by_hand(W: torch.Tensor, n_experts: int) -> list[list[tuple[float, int]]]:
    """For each latent, the nearest in its own expert and in another."""
    size, found = len(W) // n_experts, []
    for i in range(len(W)):
        best = [(-math.inf, -1), (-math.inf, -1)]
        for j in range(len(W)):
            if j != i and W[i].norm() > 0 and W[j].norm() > 0:
                kind = int(i // size != j // size)
                cosine = (W[i] @ W[j] / (W[i].norm() * W[j].norm())).item()
                best[kind] = max(best[kind], (cosine, j), key=lambda b: b[0])
        found.append(best)
    return found


def assert_same(found: Neighbours, expected: list[list[tuple[float, int]]]) -> None:
    kinds = ((found.within_F, found.within_index_F), (found.across_F, found.across_index_F))
    for kind, (cosine_F, index_F) in enumerate(kinds):
        for f, best in enumerate(expected):
            cosine, index = best[kind]
            assert index_F[f] == index
            assert cosine_F[f].item() == pytest.approx(cosine if index >= 0 else math.nan, nan_ok=True)


@pytest.mark.parametrize("block", [1, 7, M, F, 100])
@pytest.mark.parametrize("n_experts", [1, 2, E, F])
def test_neighbours_are_those_of_all_cosines(n_experts, block):
    W = planted()
    assert_same(nearest_neighbours(W, n_experts, block=block), by_hand(W, n_experts))
    assert_same(duplicate_latents(W, n_experts, block=block).nearest, by_hand(W, n_experts))


@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.9])
def test_shares_are_those_of_the_duplicates(threshold):
    found = duplicate_latents(planted(), E, threshold=threshold)
    assert found.nearest.share_within(threshold) == found.share_within > 0
    assert found.nearest.share_across(threshold) == found.share_across > 0


def test_tiles_cover_every_pair_once_beside_the_diagonal():
    W, seen = random_input(F, 12), torch.zeros(F, F)
    for tile in cosine_tiles(W, 7):
        rows, columns = tile.cosine_IJ.shape
        seen[tile.i : tile.i + rows, tile.j : tile.j + columns] += tile.cosine_IJ.isfinite()
    assert torch.equal(seen.triu(1), torch.ones(F, F).triu(1))
    assert seen.diag().sum() == 0


def close_pairs() -> torch.Tensor:
    """300 rows in 6 experts with many cosines close to 0.9, on either side."""
    W = random_input(300, 24, seed=8, dtype=torch.float32)
    W[150:] = W[:150] + 0.09 * torch.linspace(0.9, 1.1, 150)[:, None] * random_input(150, 24, seed=9).float() * 5
    return W


def test_duplicates_found_in_bfloat16_are_those_of_float32():
    W = close_pairs()
    exact, fast = (duplicate_latents(W, 6, block=64, bfloat16=bfloat16) for bfloat16 in (False, True))
    near = (exact.nearest.across_F - 0.9).abs() < BFLOAT16_ERROR
    assert near.sum() > 10
    assert exact.n_pairs > 50
    assert {*map(tuple, fast.pairs_P2.tolist())} == {*map(tuple, exact.pairs_P2.tolist())}
    torch.testing.assert_close(fast.cosines_P, exact.cosines_P)
    assert torch.equal(fast.n_pairs_EE, exact.n_pairs_EE)
    assert torch.equal(fast.across_F, exact.across_F)


def test_neighbours_found_in_bfloat16_are_nearly_the_nearest():
    W = close_pairs()
    exact, fast = (nearest_neighbours(W, 6, block=64, bfloat16=bfloat16) for bfloat16 in (False, True))
    unit = torch.nn.functional.normalize(W.double(), dim=1)
    for least, cosine_F, index_F in (
        (exact.within_F, fast.within_F, fast.within_index_F),
        (exact.across_F, fast.across_F, fast.across_index_F),
    ):
        torch.testing.assert_close(cosine_F.double(), (unit * unit[index_F]).sum(1), atol=1e-5, rtol=0)
        assert (least - cosine_F).max() <= 2 * BFLOAT16_ERROR
        assert (least - cosine_F).min() > -1e-6


def test_the_error_of_a_cosine_in_bfloat16_is_bounded():
    torch.manual_seed(0)
    worst = 0.0
    for d in (1, 2, 3, 12, 100):
        W = torch.randn(200, d).abs()
        exact, fast = (next(cosine_tiles(W, 200, bfloat16=bfloat16)).cosine_IJ for bfloat16 in (False, True))
        finite = exact.isfinite()
        worst = max(worst, (exact[finite] - fast[finite].float()).abs().max().item())
    assert 2**-9 < worst < BFLOAT16_ERROR


def test_memory_is_that_of_tiles_not_of_all_cosines():
    wide = 12_000
    W = random_input(wide, 16, dtype=torch.float32)
    assert largest_allocation(lambda: nearest_neighbours(W, 3, block=1000)) < wide * wide / 8  # bytes


def test_bad_arguments_of_neighbours_are_refused():
    W = planted()
    for arguments, message in (
        ((W[0], 1), r"W must be \[d_sae, d_in\]; got shape \(12,\)"),
        ((W, 7), "n_experts must divide d_sae=40; got 7"),
        ((W, 0), "n_experts must divide d_sae=40; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            nearest_neighbours(*arguments)
    with pytest.raises(ValueError, match="block must be at least 1; got 0"):
        nearest_neighbours(W, block=0)
