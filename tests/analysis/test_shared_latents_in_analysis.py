"""What the analysis says of an SAE with shared experts: they are a part of their own, and of no expert."""

import copy

import pytest
import torch
from helpers import D, random_input, randomize, switch_sae, training_sae
from helpers.token_loop import make_batch, make_sae

from sae_lens_switch.analysis import (
    duplicate_latents,
    nearest_neighbours,
    observe,
    router_alignment,
    router_geometry,
)

SHARED = {"n_shared_experts": 1, "shared_width": 16}  # of 40 latents; 4 experts have 6 each


def owners(n: int, n_shared: int, width: int) -> list[int]:
    return [-1 if i < n_shared else (i - n_shared) // width for i in range(n)]


@pytest.mark.parametrize("block", [7, 16, 2048])
def test_neighbours_and_duplicates_are_within_or_across_parts(block):
    W = random_input(40, 3, seed=4)
    W[3], W[21], W[20] = 2 * W[1], 0.5 * W[1], 0.5 * W[18]  # shared twice and in an expert; an expert's own
    owner = owners(40, 16, 6)
    cosines = torch.nn.functional.cosine_similarity(W[:, None], W[None], dim=2).fill_diagonal_(-2)
    same = torch.tensor([[a == b for b in owner] for a in owner])
    found = nearest_neighbours(W, 4, n_shared=16, block=block)
    torch.testing.assert_close(found.within_F, cosines.masked_fill(~same, -2).amax(1))
    torch.testing.assert_close(found.across_F, cosines.masked_fill(same, -2).amax(1))

    pairs = duplicate_latents(W, 4, n_shared=16, threshold=0.95, block=block)
    counts = torch.zeros(5, 5, dtype=torch.int64)
    for i in range(40):
        for j in range(i):
            if cosines[i, j] > 0.95:
                counts[owner[i], owner[j]] += 1  # -1: the last
                counts[owner[j], owner[i]] += owner[i] != owner[j]
    assert torch.equal(pairs.n_pairs_EE, counts)
    assert counts[4].count_nonzero() > 1
    assert torch.equal(pairs.within_F, ((cosines > 0.95) & same).any(1))
    assert torch.equal(pairs.nearest.across_index_F, found.across_index_F)


def test_a_number_of_rows_that_experts_cannot_share_is_refused():
    W = torch.randn(40, 3)
    for function in (nearest_neighbours, duplicate_latents):
        with pytest.raises(ValueError, match="n_experts must divide d_sae=40, less n_shared=15; got 4"):
            function(W, 4, n_shared=15)


def test_activity_counts_dead_latents_of_experts_without_the_shared_ones():
    sae = switch_sae(**SHARED)
    with torch.no_grad():
        sae.W_enc[:, [2, 3, 16, 17, 39]] = 0
    activity = observe(sae, [random_input(300, D)])
    latents = sae.encode(random_input(300, D))
    assert torch.equal(activity.fired_F, (latents > 0).sum(0))
    dead = activity.fired_F == 0
    assert torch.equal(activity.dead_E, dead[16:].view(4, 6).sum(1))
    assert activity.layout.shared(dead).sum() == dead[:16].sum() >= 2
    assert activity.routing.tokens_E.sum() == 300


def test_the_router_is_compared_with_routed_latents_alone():
    sae = make_sae(n_experts=7, n_shared_experts=1, shared_width=9, d_sae=65)
    bare = make_sae()
    with torch.no_grad():
        bare.W_enc.copy_(sae.W_enc[:, 9:])
        bare.W_dec.copy_(sae.W_dec[9:])
        bare.W_router.copy_(sae.W_router)
    for a, b in zip(vars(router_geometry(sae)).values(), vars(router_geometry(bare)).values(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = (router_alignment(s, n_permutations=5) for s in (sae, bare))
    assert torch.equal(ours.encoder.cosine_E, theirs.encoder.cosine_E)
    assert torch.equal(ours.decoder.null_cosine_PE, theirs.decoder.null_cosine_PE)


def test_codes_of_a_copy_in_training_are_those_of_the_original():
    sae = randomize(training_sae(**SHARED))
    twin = copy.deepcopy(sae)
    x = make_batch(20, D)
    assert torch.equal(twin.encode(x), sae.encode(x))
