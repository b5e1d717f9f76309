"""The analysis against dense, brute-force references in float64, on odd shapes."""

import math
from collections import Counter

import pytest
import torch
from helpers import D, E, F, K, M, largest_allocation, random_input, randomize, switch_sae, training_sae
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from sae_lens_switch import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig, analysis
from sae_lens_switch.analysis import activations_of, duplicate_latents, observe, router_geometry
from sae_lens_switch.analysis import activity as activity_module

CONTEXTS, POSITIONS = 11, 7
N = CONTEXTS * POSITIONS
SAES = {
    "switch": lambda: switch_sae(),
    "switch, gate one": lambda: switch_sae(gate="one"),
    "switch, layer_norm": lambda: switch_sae(normalize_activations="layer_norm"),
    "switch in training": lambda: training_sae(),
    "topk": lambda: randomize(TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=K, dtype="float64"))),
    "sparse_topk in training": lambda: randomize(
        SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, dtype="float64"))
    ),
    "standard": lambda: randomize(StandardSAE(StandardSAEConfig(d_in=D, d_sae=F, dtype="float64"))),
}


@pytest.fixture
def contexts():
    return random_input(CONTEXTS, POSITIONS, D)


@pytest.fixture
def ids():
    return torch.randint(0, 6, (CONTEXTS, POSITIONS), generator=torch.Generator().manual_seed(5)) * 50_000


def strongest(acts_F: torch.Tensor, latent: int, n: int) -> list[tuple[float, int, int]]:
    """Of dense [contexts, positions, F], by sorting everything."""
    best = []
    for context in range(len(acts_F)):
        values = acts_F[context, :, latent].tolist()
        if max(values) > 0:
            best.append((max(values), context, values.index(max(values))))
    return sorted(best, key=lambda b: (-b[0], b[1]))[:n]


@pytest.mark.parametrize("name", SAES)
@pytest.mark.parametrize("at_once", [1, 4, CONTEXTS])
def test_activity_is_that_of_the_dense_latents(name, at_once, contexts, monkeypatch):
    sae = SAES[name]().eval()
    monkeypatch.setattr(activity_module, "_DENSE_AT_ONCE", 5 * F)  # no multiple of a context
    activity = observe(sae, contexts.split(at_once), n_examples=3)
    with torch.no_grad():
        acts = sae.encode(contexts)
        x_hat = sae.decode(acts)
    acts_NF = acts.reshape(N, F)
    assert activity.n_tokens == N
    assert torch.equal(activity.fired_F, (acts_NF > 0).sum(0))
    torch.testing.assert_close(activity.sum_F, acts_NF.sum(0))
    torch.testing.assert_close(
        activity.density_F.double(), (acts_NF > 0).double().mean(0), check_dtype=False, atol=1e-7, rtol=1e-6
    )
    expected_mean = torch.stack([a[a > 0].mean() if (a > 0).any() else a.sum() for a in acts_NF.T])
    torch.testing.assert_close(activity.mean_F, expected_mean)
    assert activity.mse == pytest.approx(((contexts - x_hat) ** 2).sum(-1).mean().item())
    x_ND = contexts.reshape(N, D)
    assert activity.variance == pytest.approx(((x_ND - x_ND.mean(0)) ** 2).sum(1).mean().item())
    from_mean_N = ((x_ND - x_ND.mean(0)) ** 2).sum(1)
    assert activity.outlier == pytest.approx((from_mean_N[x_ND.norm(dim=1).argmax()] / from_mean_N.sum()).item())
    assert activity.explained_variance == pytest.approx(1 - activity.mse / activity.variance)
    assert activity.l0 == pytest.approx((acts_NF > 0).sum(1).double().mean().item())
    n_experts = getattr(sae.cfg, "n_experts", 1)
    dead = [
        sum(not (acts_NF[:, f] > 0).any() for f in range(e * F // n_experts, (e + 1) * F // n_experts))
        for e in range(n_experts)
    ]
    assert activity.dead_E.tolist() == dead
    for latent in range(F):
        expected = strongest(acts, latent, 3)
        for i in range(3):
            value, context, position = expected[i] if i < len(expected) else (0, -1, -1)
            assert activity.examples.values[latent, i].item() == pytest.approx(value)
            assert activity.examples.contexts[latent, i] == context
            assert activity.examples.positions[latent, i] == position


@pytest.mark.parametrize("at_once", [1, 4, CONTEXTS])
def test_the_first_of_equal_examples_is_kept(at_once):
    """Small whole numbers: values are exact, and tie often, within contexts and between them."""
    sae = SAES["standard"]()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=generator))
    x = torch.randint(-1, 2, (CONTEXTS, POSITIONS, D), generator=generator).double()
    activity = observe(sae, x.split(at_once), n_examples=3)
    acts = sae.encode(x)
    for latent in range(F):
        expected = strongest(acts, latent, 3)
        assert activity.examples.contexts[latent, : len(expected)].tolist() == [c for _, c, _ in expected]
        assert activity.examples.positions[latent, : len(expected)].tolist() == [p for _, _, p in expected]


def test_tokens_without_contexts_are_contexts_of_one_token(contexts):
    sae = switch_sae()
    x_ND = contexts.reshape(N, D)
    activity = observe(sae, x_ND.split(10), n_examples=2)
    acts = sae.encode(x_ND)
    for latent in range(F):
        found = [c for c in activity.examples.contexts[latent].tolist() if c >= 0]
        assert found == [context for _, context, _ in strongest(acts[:, None], latent, 2)]
    assert activity.examples.positions.max() == 0


@pytest.mark.parametrize("at_once", [2, CONTEXTS])
def test_routing_and_typical_tokens_are_counted_exactly(at_once, contexts, ids):
    sae = switch_sae(seed=3)
    activity = observe(sae, zip(contexts.split(at_once), ids.split(at_once), strict=True), n_typical_tokens=4)
    probs_NE = ((contexts - sae.b_router) @ sae.W_router).softmax(-1).reshape(N, E).detach()
    experts = probs_NE.argmax(1).tolist()
    routing = activity.routing
    assert routing.tokens_E.tolist() == [experts.count(e) for e in range(E)]
    assert routing.load_E.sum() == pytest.approx(1)
    torch.testing.assert_close(routing.probability_E, probs_NE.mean(0))
    assert routing.entropy == pytest.approx(-(probs_NE * probs_NE.log()).sum(1).mean().item())
    gates = probs_NE.amax(1)
    assert routing.gate_mean == pytest.approx(gates.mean().item())
    bins = Counter(int(gate * analysis.GATE_BINS) for gate in gates.tolist())
    assert routing.gate_counts.tolist() == [bins[b] for b in range(analysis.GATE_BINS)]

    tokens = ids.flatten().tolist()
    together, of_token = Counter(zip(experts, tokens, strict=True)), Counter(tokens)
    for e in range(E):
        scores = {
            t: together[e, t] * math.log(together[e, t] * N / (of_token[t] * experts.count(e)))
            for t in of_token
            if together[e, t]
        }
        expected = sorted((t for t in scores if scores[t] > 0), key=lambda t: (-scores[t], t))[:4]
        expected += [-1] * (4 - len(expected))
        assert activity.typical_tokens.ids[e].tolist() == expected
        assert activity.typical_tokens.counts[e].tolist() == [together[e, t] for t in expected]
        assert activity.typical_tokens.totals[e].tolist() == [of_token[t] for t in expected]


def test_ignored_tokens_are_as_if_they_had_not_been(contexts, ids):
    sae = switch_sae()
    kept = ~torch.isin(ids, torch.tensor([0, 100_000]))
    activity = observe(sae, [(contexts, ids)], ignore_tokens=[0, 100_000], n_examples=2)
    alone = observe(sae, [contexts[kept]])
    assert activity.n_tokens == kept.sum() < N
    assert torch.equal(activity.fired_F, alone.fired_F)
    assert torch.equal(activity.routing.tokens_E, alone.routing.tokens_E)
    assert activity.mse == pytest.approx(alone.mse)
    assert activity.variance == pytest.approx(alone.variance)
    assert not torch.isin(activity.typical_tokens.ids, torch.tensor([0, 100_000])).any()
    acts = sae.encode(contexts) * kept[..., None]  # places in the context are those of the whole context
    for latent in range(F):
        expected = strongest(acts, latent, 2)
        assert activity.examples.contexts[latent, : len(expected)].tolist() == [c for _, c, _ in expected]
        assert activity.examples.positions[latent, : len(expected)].tolist() == [p for _, _, p in expected]


@pytest.mark.parametrize("name", ["switch", "topk", "standard"])
def test_activations_of_some_latents_are_columns_of_all(name, contexts, monkeypatch):
    monkeypatch.setattr(activity_module, "_DENSE_AT_ONCE", 5 * F)
    sae, latents = SAES[name](), [31, 2, 17]
    torch.testing.assert_close(activations_of(sae, contexts, latents), sae.encode(contexts)[..., latents].detach())
    assert activations_of(sae, contexts, []).shape == (CONTEXTS, POSITIONS, 0)


def test_sae_without_a_router_has_no_routing(contexts, ids):
    activity = observe(SAES["topk"](), [(contexts, ids)], n_examples=0)
    assert activity.routing is None
    assert activity.typical_tokens is None
    assert activity.n_experts == 1
    assert activity.examples.values.shape == (F, 0)


@pytest.mark.parametrize("name", ["switch", "topk", "standard"])
def test_no_tensor_of_all_tokens_and_latents(name, monkeypatch):
    wide = 400
    make = {
        "switch": lambda: switch_sae(d_sae=wide),
        "topk": lambda: randomize(TopKSAE(TopKSAEConfig(d_in=D, d_sae=wide, k=K, dtype="float64"))),
        "standard": lambda: randomize(StandardSAE(StandardSAEConfig(d_in=D, d_sae=wide, dtype="float64"))),
    }
    monkeypatch.setattr(activity_module, "_DENSE_AT_ONCE", 2000)
    sae, x = make[name](), random_input(64, 16, D)
    assert largest_allocation(lambda: observe(sae, [x], n_examples=2)) < 64 * 16 * wide * 8 / 4


def test_bad_activations_are_refused(contexts, ids):
    sae = switch_sae()
    with pytest.raises(ValueError, match=r"d_in=12; got shape \(11, 7, 13\)"):
        observe(sae, [random_input(CONTEXTS, POSITIONS, D + 1)])
    with pytest.raises(ValueError, match=r"token ids must have shape \(11, 7\); got \(11, 6\)"):
        observe(sae, [(contexts, ids[:, :6])])
    with pytest.raises(ValueError, match="ignore_tokens needs token ids"):
        observe(sae, [contexts], ignore_tokens=[1])
    with pytest.raises(ValueError, match="n_examples must be at least 0; got -1"):
        observe(sae, [contexts], n_examples=-1)
    with pytest.raises(ValueError, match="got none"):
        observe(sae, [])


@pytest.mark.parametrize("centered", [False, True])
def test_router_geometry_is_that_of_single_cosines(centered):
    sae = switch_sae(seed=4)
    geometry = router_geometry(sae, centered=centered)
    router = [sae.W_router[:, e].detach() for e in range(E)]
    encoder = [sae.W_enc[:, e * M : (e + 1) * M].detach().mean(1) for e in range(E)]
    decoder = [sae.W_dec[e * M : (e + 1) * M].detach().mean(0) for e in range(E)]
    assert geometry.norms_E.tolist() == pytest.approx([r.norm().item() for r in router])
    if centered:
        router, encoder, decoder = ([v - sum(vs) / E for v in vs] for vs in (router, encoder, decoder))
    for i in range(E):
        for j in range(E):
            for found, other in (
                (geometry.router_EE, router),
                (geometry.encoder_EE, encoder),
                (geometry.decoder_EE, decoder),
            ):
                expected = torch.dot(router[i], other[j]) / (router[i].norm() * other[j].norm())
                assert found[i, j].item() == pytest.approx(expected.item())


def test_centered_router_geometry_does_not_see_what_a_softmax_does_not():
    sae, moved = switch_sae(seed=4), switch_sae(seed=4)
    with torch.no_grad():
        moved.W_router += random_input(D, 1)
    expected, found = router_geometry(sae, centered=True), router_geometry(moved, centered=True)
    torch.testing.assert_close(found.router_EE, expected.router_EE)
    assert not torch.allclose(router_geometry(moved).router_EE, router_geometry(sae).router_EE)


def test_sae_without_a_router_has_no_router_geometry():
    with pytest.raises(ValueError, match="sae must have a router; a topk SAE has none"):
        router_geometry(SAES["topk"]())


def planted() -> torch.Tensor:
    """Rows of all lengths; a triple over experts 0, 0, 2; a pair in expert 3; an opposite; a row of zeros."""
    W = random_input(F, D, seed=6)
    W[3], W[21] = 2 * W[1], 0.5 * W[1] + 0.01 * W[2]
    W[35] = 3 * W[32]
    W[12] = -W[11]
    W[17] = 0
    return W


@pytest.mark.parametrize("block", [1, 7, F, 100])
@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_duplicates_are_those_of_all_cosines(block, threshold):
    W = planted()
    duplicates = duplicate_latents(W, E, threshold=threshold, block=block)
    expected = {}
    for i in range(F):
        for j in range(i + 1, F):
            cosine = (W[i] @ W[j] / (W[i].norm() * W[j].norm())).item()
            if cosine > threshold:
                expected[i, j] = cosine
    assert {(1, 3), (1, 21), (3, 21), (32, 35)} <= expected.keys()
    found = dict(zip(map(tuple, duplicates.pairs_P2.tolist()), duplicates.cosines_P.tolist(), strict=True))
    assert found.keys() == expected.keys()
    assert all(found[pair] == pytest.approx(expected[pair]) for pair in expected)
    assert duplicates.cosines_P.tolist() == sorted(found.values(), reverse=True)
    assert duplicates.n_pairs == len(expected)
    within = {f for pair in expected for f in pair if pair[0] // M == pair[1] // M}
    across = {f for pair in expected for f in pair if pair[0] // M != pair[1] // M}
    assert set(duplicates.within_F.nonzero().flatten().tolist()) == within
    assert set(duplicates.across_F.nonzero().flatten().tolist()) == across
    assert duplicates.share_within == pytest.approx(len(within) / F)
    assert duplicates.share_across == pytest.approx(len(across) / F)
    between = Counter(frozenset((i // M, j // M)) for i, j in expected)
    for a in range(E):
        for b in range(E):
            assert duplicates.n_pairs_EE[a, b] == between[frozenset((a, b))]


@pytest.mark.parametrize("max_pairs", [0, 1, 5])
def test_the_most_similar_pairs_are_kept_and_all_are_counted(max_pairs):
    W = planted()
    every = duplicate_latents(W, E, threshold=0.3)
    some = duplicate_latents(W, E, threshold=0.3, max_pairs=max_pairs, block=6)
    assert len(every.pairs_P2) > 12
    torch.testing.assert_close(some.cosines_P, every.cosines_P[:max_pairs])
    assert torch.equal(some.n_pairs_EE, every.n_pairs_EE)
    assert torch.equal(some.across_F, every.across_F)


def test_bfloat16_duplicates_are_found_in_float32():
    W = planted().bfloat16()
    assert duplicate_latents(W, E).n_pairs == duplicate_latents(W.double(), E).n_pairs > 3


def test_duplicates_of_many_latents_fit_in_memory():
    wide = 12_000
    W = random_input(wide, 16, dtype=torch.float32)
    W[11_999] = W[0]
    found = []
    used = largest_allocation(lambda: found.append(duplicate_latents(W, 3, threshold=0.95, block=1000)))
    assert used < wide * wide / 8  # bytes; all cosines would be 32 times as many
    assert (0, 11_999) in map(tuple, found[0].pairs_P2.tolist())


def test_bad_arguments_of_duplicates_are_refused():
    W = planted()
    for arguments, message in (
        ({"n_experts": 7}, "n_experts must divide d_sae=40; got 7"),
        ({"threshold": 1.5}, "threshold must be between 0 and 1; got 1.5"),
        ({"block": 0}, "block must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            duplicate_latents(W, **arguments)
    with pytest.raises(ValueError, match=r"W_dec must be \[d_sae, d_in\]"):
        duplicate_latents(W[0])
