"""Counts, mutual information, over-represented tokens and co-activation against loops over tokens."""

import itertools
import math
from collections import Counter

import pytest
import torch
from helpers import D, E, random_input, switch_sae

from sae_lens_switch.analysis import coactivation, count_labels, mutual_information, observe, over_represented
from sae_lens_switch.analysis.accumulators import Routes
from sae_lens_switch.saes.router import Assignment

N = 203


def choices(A: int = 1, n: int = N, n_experts: int = 5, seed: int = 0) -> torch.Tensor:
    """A different experts of each of n tokens, some more often than others."""
    weights = torch.arange(1.0, n_experts + 1).expand(n, -1)
    return torch.multinomial(weights, A, generator=torch.Generator().manual_seed(seed))


def labels(n: int = N, seed: int = 1) -> torch.Tensor:
    """Labels of which most are rare."""
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed)).exp() * 3).long() * 70_000


@pytest.mark.parametrize("A", [1, 2, 5])
def test_labels_are_counted_exactly(A):
    experts, of_tokens = choices(A), labels()
    found = count_labels(experts[:, 0] if A == 1 else experts, of_tokens, 5)
    pairs = Counter((e, t) for row, t in zip(experts.tolist(), of_tokens.tolist(), strict=True) for e in row)
    assert list(zip(found.experts_P.tolist(), found.labels_P.tolist(), strict=True)) == sorted(pairs)
    assert found.counts_P.tolist() == [pairs[pair] for pair in sorted(pairs)]
    assert found.n == N * A
    assert found.of_expert_E.tolist() == [int((experts == e).sum()) for e in range(5)]
    assert found.of_label_P.tolist() == [A * int((of_tokens == t).sum()) for _, t in sorted(pairs)]


def plug_in(experts: list[int], of_tokens: list[int]) -> float:
    together, of_expert, of_label = Counter(zip(experts, of_tokens, strict=True)), Counter(experts), Counter(of_tokens)
    n = len(experts)
    return sum(c / n * math.log2(c * n / (of_expert[e] * of_label[t])) for (e, t), c in together.items())


def test_mutual_information_is_that_of_the_definition():
    experts, of_tokens = choices().flatten(), labels()
    found = mutual_information(count_labels(experts, of_tokens, 7), n_shuffles=400)  # two experts are never chosen
    expected = plug_in(experts.tolist(), of_tokens.tolist())
    assert found.bits == pytest.approx(expected)
    m_joint = len({*zip(experts.tolist(), of_tokens.tolist(), strict=True)})
    m = len({*experts.tolist()}) + len({*of_tokens.tolist()}) - m_joint - 1
    assert found.miller_madow == pytest.approx(expected + m / (2 * N * math.log(2)))
    shares = torch.bincount(experts) / N
    assert found.expert_entropy == pytest.approx(-(shares * shares.log2()).nansum().item(), abs=1e-6)
    generator = torch.Generator().manual_seed(9)
    shuffled = torch.tensor(
        [plug_in(experts.tolist(), of_tokens[torch.randperm(N, generator=generator)].tolist()) for _ in range(400)]
    )
    assert found.shuffled == pytest.approx(shuffled.mean().item(), abs=4 * shuffled.std().item() / 20 * 2**0.5)
    assert found.shuffled_std == pytest.approx(shuffled.std().item(), rel=0.2)
    assert abs(found.corrected) < 3 * found.shuffled_std  # they are independent
    assert found.bits > 3 * abs(found.corrected)


def test_large_tables_are_shuffled_as_small_ones(monkeypatch):
    counts = count_labels(choices().flatten(), labels(), 5)
    dense = mutual_information(counts)
    monkeypatch.setattr("sae_lens_switch.analysis.information._DENSE", 0)
    assert mutual_information(counts).shuffled == pytest.approx(dense.shuffled)


def test_a_label_that_decides_the_expert_tells_all_of_it_and_none_tells_nothing():
    of_tokens = labels()
    decided = mutual_information(count_labels(of_tokens // 70_000 % 5, of_tokens, 5))
    assert decided.normalized == pytest.approx(1)
    assert decided.bits == pytest.approx(decided.expert_entropy)
    same = mutual_information(count_labels(choices().flatten(), torch.zeros(N, dtype=torch.int64), 5))
    assert same.bits == pytest.approx(0, abs=1e-12)
    assert math.isnan(mutual_information(count_labels(torch.zeros(N, dtype=torch.int64), of_tokens, 1)).normalized)


@pytest.mark.parametrize("prior", [0.5, 100.0])
def test_over_represented_labels_are_those_of_the_equations(prior):
    experts, of_tokens = choices().flatten().tolist(), labels().tolist()
    found = over_represented(count_labels(torch.tensor(experts), torch.tensor(of_tokens), 6), n=4, prior=prior)
    together, of_label = Counter(zip(experts, of_tokens, strict=True)), Counter(of_tokens)
    for e in range(6):
        n_e, rows = experts.count(e), []
        for t, total in of_label.items():
            y, a = together[e, t], prior * total / N
            own = math.log((y + a) / (n_e + prior - y - a))
            others = math.log((total - y + a) / (N - n_e + prior - (total - y) - a))
            z = (own - others) / math.sqrt(1 / (y + a) + 1 / (total - y + a))
            if y and z > 0:
                rows.append((-z, t, y, total, own - others))
        rows = sorted(rows)[:4]
        n = len(rows)
        assert found.ids[e].tolist() == [r[1] for r in rows] + [-1] * (4 - n)
        assert found.counts[e].tolist() == [r[2] for r in rows] + [0] * (4 - n)
        assert found.totals[e].tolist() == [r[3] for r in rows] + [0] * (4 - n)
        assert found.z[e, :n].tolist() == pytest.approx([-r[0] for r in rows])
        assert found.log_odds[e, :n].tolist() == pytest.approx([r[4] for r in rows])


def test_a_frequent_token_of_one_expert_comes_before_a_rare_one():
    experts = torch.tensor([0] * 100 + [1] * 100)
    of_tokens = torch.tensor([7] * 50 + [8] * 49 + [9] + [8] * 100)
    found = over_represented(count_labels(experts, of_tokens, 2), n=3)
    assert found.ids.tolist() == [[7, 9, -1], [8, -1, -1]]


@pytest.mark.parametrize("A", [1, 2, 3, 5])
def test_experts_are_counted_together_and_apart(A):
    experts = choices(A)
    found = coactivation(experts, 5)
    for i in range(5):
        for j in range(5):
            both = sum(i in row and j in row for row in experts.tolist())
            assert found.counts_EE[i, j] == both
    off = ~torch.eye(5, dtype=torch.bool)
    expected_EE = found.expected_EE.where(off, 0)
    torch.testing.assert_close(expected_EE.sum(1), (found.counts_EE * off).sum(1).double())
    torch.testing.assert_close(expected_EE, expected_EE.T)
    assert found.expected_EE.diag().isnan().all()
    if A == 5:
        torch.testing.assert_close(found.lift_EE[off], torch.ones(20, dtype=torch.float64))


def test_independent_pairs_have_a_lift_of_one_and_planted_ones_more():
    """Pairs as frequent as the product of their experts' weights, which is what independence means for A = 2."""
    weights = [1, 2, 3, 5]
    rows = [(i, j) for i, j in itertools.combinations(range(4), 2) for _ in range(weights[i] * weights[j])]
    found = coactivation(torch.tensor(rows), 4)
    off = ~torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(found.lift_EE[off], torch.ones(12, dtype=torch.float64))
    planted = coactivation(torch.tensor([*rows, *[(0, 1)] * 20]), 4)
    assert planted.lift_EE[0, 1] > 1.5
    assert planted.lift_EE[2, 3] > 1
    assert planted.lift_EE[0, 3] < 1


def test_an_expert_of_all_tokens_or_of_none_leaves_no_infinity():
    always = torch.stack([torch.zeros(30, dtype=torch.int64), torch.arange(30) % 3 + 1], dim=1)
    found = coactivation(always, 5)
    assert found.lift_EE[0, 1:4].tolist() == pytest.approx([1, 1, 1], abs=1e-2)
    assert found.lift_EE[4].isnan().all()
    assert not found.lift_EE.isinf().any()


def test_routes_of_several_experts_are_counted():
    experts, routes = choices(2), Routes(5)
    for some in experts.split(50):
        probs = torch.full((len(some), 5), 0.2)
        routes.add(Assignment(probs.log(), probs, some, torch.full((len(some), 2), 0.25)))
    found = routes.result()
    assert torch.equal(found.coactivation.counts_EE, coactivation(experts, 5).counts_EE)
    assert found.gate_mean == pytest.approx(0.25)
    assert found.load_E.sum() == pytest.approx(1)


def test_activity_counts_tokens_and_positions():
    sae, x = switch_sae(seed=3), random_input(11, 7, D)
    ids = torch.arange(77).view(11, 7) % 6
    activity = observe(sae, zip(x.split(4), ids.split(4), strict=True), ignore_tokens=[2])
    experts = ((x - sae.b_router) @ sae.W_router).argmax(-1)
    kept = ids != 2
    positions = torch.arange(7).expand(11, 7)
    for found, expected in ((activity.token_counts, ids), (activity.position_counts, positions)):
        by_hand = count_labels(experts[kept], expected[kept], E)
        assert torch.equal(found.dense(7), by_hand.dense(7))
        assert found.n == kept.sum()
    alone = observe(sae, [x.reshape(-1, D)])
    assert alone.token_counts is None
    assert alone.position_counts is None
    assert alone.routing.coactivation is None


def test_what_cannot_be_counted_is_refused():
    experts, of_tokens = choices().flatten(), labels()
    for bad, message in (
        ((experts, of_tokens[1:], 5), "same tokens; got 203 and 202"),
        ((experts, of_tokens, 4), "experts must be between 0 and 3; got 4"),
        ((experts, of_tokens - 1, 5), r"labels must be in \[0, 2\^32\); got -1 to"),
    ):
        with pytest.raises(ValueError, match=message):
            count_labels(*bad)
    counts = count_labels(experts, of_tokens, 5)
    with pytest.raises(ValueError, match="n_shuffles must be at least 2; got 1"):
        mutual_information(counts, n_shuffles=1)
    with pytest.raises(ValueError, match="at least one token; got none"):
        mutual_information(count_labels(experts[:0], of_tokens[:0], 5))
    with pytest.raises(ValueError, match=r"prior above 0; got 20 and 0\.0"):
        over_represented(counts, prior=0.0)
    with pytest.raises(ValueError, match=r"experts must be \[tokens, A\]; got shape \(203,\)"):
        coactivation(experts, 5)
    with pytest.raises(ValueError, match="experts must be between 0 and 3; got 0 to 4"):
        coactivation(choices(2), 4)
    with pytest.raises(ValueError, match="some have one twice"):
        coactivation(torch.ones(3, 2, dtype=torch.int64), 4)
