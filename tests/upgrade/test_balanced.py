"""Balanced assignment against all assignments there are; clusters of equal size; the router's fit."""

from itertools import permutations

import pytest
import torch

from sae_lens_switch.upgrade.balanced import balanced_assignment
from sae_lens_switch.upgrade.latent_clusters import cluster_latents, strength_by_expert
from sae_lens_switch.upgrade.router_fit import fit_router


def best_total(score_RE: torch.Tensor, capacity: int) -> float:
    R, E = score_RE.shape
    seats = [e for e in range(E) for _ in range(capacity)]
    choices = set(permutations(seats, R))
    return max(float(score_RE[range(R), list(choice)].sum()) for choice in choices)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("R", "E", "capacity"), [(6, 2, 3), (6, 3, 2), (5, 3, 2), (4, 1, 4)])
def test_it_is_close_to_the_best_of_all_assignments(seed, R, E, capacity):
    score_RE = torch.rand(R, E, generator=torch.Generator().manual_seed(seed))
    column_R = balanced_assignment(score_RE, capacity)
    assert torch.bincount(column_R, minlength=E).max() <= capacity
    best = best_total(score_RE, capacity)
    assert float(score_RE[range(R), column_R].sum()) >= (best if E <= 2 else 0.9 * best) - 1e-6


def test_large_problems_are_balanced_and_better_than_first_come_first_served():
    score_RE = torch.randn(20_000, 7, generator=torch.Generator().manual_seed(0)) + torch.arange(7) / 2
    column_R = balanced_assignment(score_RE, 2858)
    assert torch.bincount(column_R, minlength=7).max() <= 2858
    total = float(score_RE.gather(1, column_R.unsqueeze(1)).sum())
    # No two rows would gain by changing places, but for a few that were placed late.
    rows = torch.randperm(20_000, generator=torch.Generator().manual_seed(1))
    a, b = rows.split(10_000)
    gain = score_RE[a, column_R[b]] + score_RE[b, column_R[a]] - score_RE[a, column_R[a]] - score_RE[b, column_R[b]]
    assert float((gain > 1e-4).float().mean()) < 0.02
    assert total > 0.999 * float(total + gain.clamp_min(0).sum())


def test_equal_scores_are_no_trouble():
    assert torch.bincount(balanced_assignment(torch.zeros(12, 4), 3)).tolist() == [3, 3, 3, 3]


def test_too_little_room_is_refused():
    with pytest.raises(ValueError, match="capacity must be at least 3, for 2 columns to hold 5 rows; got 2"):
        balanced_assignment(torch.zeros(5, 2), 2)


def test_clusters_are_equal_even_if_most_latents_never_fire():
    indices_NK = torch.arange(3).expand(50, 3) + 3 * (torch.arange(50) % 2).unsqueeze(1)
    expert_F = cluster_latents(torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) + 0.1, indices_NK, 24, 2)
    assert torch.bincount(expert_F).tolist() == [12, 12]
    assert [len(set(expert_F[:3].tolist())), len(set(expert_F[3:6].tolist()))] == [1, 1]


def test_noisy_groups_of_latents_are_found():
    """Nine of ten active latents are of the token's own group."""
    generator = torch.Generator().manual_seed(0)
    group_F = torch.randperm(60, generator=generator) % 5
    token_N = torch.randint(5, (3000,), generator=generator)
    weight_NF = torch.where(group_F == token_N.unsqueeze(1), 9.0, 0.25)
    indices_NK = torch.multinomial(weight_NF, 6, generator=generator)
    expert_F = cluster_latents(torch.rand(3000, 6, generator=generator) + 0.5, indices_NK, 60, 5)
    counts = torch.zeros(5, 5).index_put_((group_F, expert_F), torch.ones(60), accumulate=True)
    assert counts.max(dim=1).values.tolist() == [12] * 5


def test_strength_by_expert_is_a_sum_over_the_latents_of_each():
    strength_NK, indices_NK = torch.rand(7, 3), torch.stack([torch.randperm(10)[:3] for _ in range(7)])
    expert_F = torch.arange(10) % 4
    expected = torch.zeros(7, 4)
    for n in range(7):
        for j in range(3):
            expected[n, expert_F[indices_NK[n, j]]] += strength_NK[n, j]
    torch.testing.assert_close(strength_by_expert(strength_NK, indices_NK, expert_F, 4), expected)


@pytest.mark.parametrize("E", [3, 20])
def test_the_router_learns_what_is_separable_with_unequal_classes_far_from_the_origin(E):
    """20 classes in 12 dimensions: more columns than b_router can shift."""
    generator = torch.Generator().manual_seed(0)
    centres_ED = 6 * torch.nn.functional.normalize(torch.randn(E, 12, generator=generator), dim=1)
    label_N = (torch.rand(4000, generator=generator).square() * E).long()
    x_ND = centres_ED[label_N] + 0.3 * torch.randn(4000, 12, generator=generator) + 50
    router = fit_router(x_ND, torch.nn.functional.one_hot(label_N, E).float(), torch.ones(4000))
    assert (router.probs(x_ND).argmax(dim=1) == label_N).float().mean() > 0.98


def test_a_bias_of_the_logits_becomes_a_shift_of_b_router():
    """Two classes told apart by a threshold far from the mean: without a bias of its own the router must move it."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(5000, 6, generator=generator)
    label_N = (x_ND[:, 0] > 1.3).long()
    router = fit_router(x_ND, torch.nn.functional.one_hot(label_N, 2).float(), torch.ones(5000))
    assert (router.probs(x_ND).argmax(dim=1) == label_N).float().mean() > 0.98
