"""RSA and CKA against loops over pairs and quadruples of tokens, in float64."""

import itertools

import pytest
import torch
from helpers import D, F, K, largest_allocation, random_input, randomize, switch_sae
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from sae_lens_switch import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
from sae_lens_switch.analysis import activity as activity_module
from sae_lens_switch.analysis import compare_saes, similarity

N = 7


def representations() -> dict[str, torch.Tensor]:
    codes = random_input(N, F, seed=3).relu() * (random_input(N, F, seed=4) > 1.2)
    codes[4] = 0  # a token on which nothing is active
    return {"x": random_input(N, D), "other": random_input(N, 5, seed=2), "codes": codes}


def hsic(K: torch.Tensor, L: torch.Tensor) -> float:
    """As a U-statistic: the mean over all ordered quadruples of different tokens (Song et al. 2012, theorem 2)."""
    total = n = 0
    for i, j, q, r in itertools.permutations(range(len(K)), 4):
        total += (K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])).item()
        n += 1
    return total / n


def ranks(values: list[float]) -> list[float]:
    return [sum(w < v for w in values) + (1 + sum(w == v for w in values)) / 2 for v in values]


def spearman(a: torch.Tensor, b: torch.Tensor, kind: str) -> float:
    def distances(x: torch.Tensor) -> list[float]:
        found = []
        for i, j in itertools.combinations(range(len(x)), 2):
            lengths = (x[i].norm() * x[j].norm()).item()
            cosine = (x[i] @ x[j]).item() / lengths if lengths else 0.0
            found.append(round(1 - cosine if kind == "cosine" else (x[i] - x[j]).norm().item(), 9))
        return found

    return torch.corrcoef(torch.tensor([ranks(distances(a)), ranks(distances(b))], dtype=torch.float64))[0, 1].item()


@pytest.mark.parametrize("kind", ["euclidean", "cosine"])
def test_similarity_is_that_of_loops_over_tokens(kind):
    dense = representations()
    sparse = {**dense, "codes": dense["codes"].to_sparse()}
    found = similarity(sparse, distance=kind)
    assert found.names == ("x", "other", "codes")
    assert found.n_tokens == N
    for (a, first), (b, second) in itertools.product(enumerate(dense.values()), repeat=2):
        grams = first @ first.T, second @ second.T
        expected = hsic(*grams) / (hsic(grams[0], grams[0]) * hsic(grams[1], grams[1])) ** 0.5
        assert found.cka_RR[a, b].item() == pytest.approx(expected)
        assert found.rsa_RR[a, b].item() == pytest.approx(spearman(first, second, kind))


def test_similarity_is_blind_to_rotation_scale_and_shift():
    x = random_input(60, D)
    rotation = torch.linalg.qr(random_input(D, D, seed=5)).Q
    found = similarity({"x": x, "moved": 3 * x @ rotation + random_input(D, seed=6)})
    torch.testing.assert_close(found.cka_RR, torch.ones(2, 2, dtype=torch.float64))
    torch.testing.assert_close(found.rsa_RR, torch.ones(2, 2, dtype=torch.float64))


def test_independent_representations_have_no_similarity_in_the_mean_though_wider_than_the_sample():
    cka = [
        similarity({"a": random_input(30, 200, seed=2 * s), "b": random_input(30, 200, seed=2 * s + 1)}).cka_RR[0, 1]
        for s in range(20)
    ]
    assert abs(sum(cka) / 20) < 0.05  # the plain estimator would say 0.87


SAES = {
    "switch": lambda: switch_sae(),
    "topk": lambda: randomize(TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=K, dtype="float64")), seed=7),
    "sparse_topk": lambda: randomize(
        SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, dtype="float64")), seed=8
    ),
    "standard": lambda: randomize(StandardSAE(StandardSAEConfig(d_in=D, d_sae=F + 3, dtype="float64")), seed=9),
}


def test_saes_are_compared_by_their_dense_codes_and_reconstructions(monkeypatch):
    monkeypatch.setattr(activity_module, "_DENSE_AT_ONCE", 5 * F)
    saes = {name: make() for name, make in SAES.items()}
    x = random_input(7, 5, D)
    found = compare_saes(saes, x)
    expected = {"activations": x.reshape(-1, D)}
    for name, sae in saes.items():
        acts = sae.encode(x.reshape(-1, D)).detach()
        expected |= {f"{name} codes": acts, f"{name} reconstruction": sae.decode(acts).detach()}
    dense = similarity(expected)
    assert found.names == dense.names == tuple(expected)
    torch.testing.assert_close(found.cka_RR, dense.cka_RR)
    torch.testing.assert_close(found.rsa_RR, dense.rsa_RR, atol=1e-3, rtol=0)  # ties may fall either way


def test_a_sample_is_drawn_by_its_seed_without_replacement():
    x, sae = random_input(50, D), {"switch": switch_sae()}
    some = compare_saes(sae, x, n_tokens=11, seed=3)
    chosen = torch.randperm(50, generator=torch.Generator().manual_seed(3))[:11]
    assert some.n_tokens == 11
    torch.testing.assert_close(some.cka_RR, compare_saes(sae, x[chosen]).cka_RR)


def test_codes_stay_sparse():
    sae = {"switch": switch_sae(d_sae=40_000, k=3)}
    assert largest_allocation(lambda: compare_saes(sae, random_input(600, D))) < 600 * 40_000 * 8 / 4


def test_what_cannot_be_compared_is_refused():
    x = random_input(N, D)
    for bad, message in (
        ({}, r"same four or more tokens; got \{\}"),
        ({"x": x, "y": x[:5]}, r"got \{'x': 7, 'y': 5\}"),
        ({"x": x[:3]}, r"got \{'x': 3\}"),
    ):
        with pytest.raises(ValueError, match=message):
            similarity(bad)
    with pytest.raises(ValueError, match="distance must be 'euclidean' or 'cosine'; got 'l1'"):
        similarity({"x": x}, distance="l1")
    with pytest.raises(ValueError, match=r"activations must have d_in=12 of switch; got shape \(7, 13\)"):
        compare_saes({"switch": switch_sae()}, random_input(N, D + 1))
    assert similarity({"x": x, "same": torch.ones(N, 2)}).cka_RR[0, 1].isnan()
