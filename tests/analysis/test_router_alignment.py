"""The router's alignment with its experts against loops in float64, and against routers made to have it or not."""

import pytest
import torch
from helpers import D, E, F, M, randomize, switch_sae
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from sae_lens_switch.analysis import router_alignment, router_geometry


def by_hand(router: torch.Tensor, W: torch.Tensor, experts: list[int]) -> tuple[list[float], float]:
    """Cosine per expert, and r_squared as one minus the residual of a regression through the origin."""
    means = []
    for e in range(E):
        members = [W[f] for f in range(F) if experts[f] == e]
        means.append(sum(members) / len(members))
    centre_r, centre_c = sum(router) / E, sum(means) / E
    r, c = [v - centre_r for v in router], [v - centre_c for v in means]
    cosines = [(r[e] @ c[e] / (r[e].norm() * c[e].norm())).item() for e in range(E)]
    r, c = torch.cat(r), torch.cat(c)
    factor = torch.linalg.lstsq(c[:, None], r[:, None]).solution.item()
    return cosines, (1 - (r - factor * c).square().sum() / r.square().sum()).item()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_alignment_is_that_of_loops_over_experts(part):
    sae = switch_sae(seed=4)
    router, W = sae.W_router.detach().T, (sae.W_enc.T if part == "encoder" else sae.W_dec).detach()
    found = getattr(router_alignment(sae, n_permutations=5, seed=3), part)
    cosines, r_squared = by_hand(router, W, [f // M for f in range(F)])
    assert found.cosine_E.tolist() == pytest.approx(cosines)
    assert found.r_squared == pytest.approx(r_squared)
    geometry = router_geometry(sae, centered=True)
    assert torch.allclose(getattr(geometry, f"{part}_EE").diag(), found.cosine_E)
    generator = torch.Generator().manual_seed(3)
    for i in range(5):
        order = torch.randperm(F, generator=generator).tolist()
        cosines, r_squared = by_hand(router, W, [f // M for f in order])
        assert found.null_cosine_PE[i].tolist() == pytest.approx(cosines)
        assert found.null_r_squared_P[i].item() == pytest.approx(r_squared)


def test_z_and_p_are_those_of_the_null():
    found = router_alignment(switch_sae(seed=4), n_permutations=50).encoder
    for e in range(E):
        null = found.null_cosine_PE[:, e].tolist()
        mean = sum(null) / 50
        deviation = (sum((v - mean) ** 2 for v in null) / 49) ** 0.5
        assert found.z_E[e].item() == pytest.approx((found.cosine_E[e].item() - mean) / deviation)
        assert found.p_E[e].item() == pytest.approx((1 + sum(abs(v) >= abs(found.cosine_E[e]) for v in null)) / 51)
    null = found.null_r_squared_P
    assert found.z == pytest.approx(((found.r_squared - null.mean()) / null.std()).item())
    assert found.p == pytest.approx((1 + int((null >= found.r_squared).sum())) / 51)


def test_a_router_of_the_encoders_means_is_found_and_a_random_one_is_not():
    aligned, random = switch_sae(seed=4), switch_sae(seed=4)
    with torch.no_grad():
        aligned.W_router.copy_(3 * aligned.W_enc.view(D, E, M).mean(2) + 7)  # a common shift decides nothing
    found = router_alignment(aligned, n_permutations=200)
    assert found.encoder.r_squared == pytest.approx(1)
    assert found.encoder.cosine_E.tolist() == pytest.approx([1] * E)
    assert found.encoder.p == pytest.approx(1 / 201)
    assert found.encoder.z > 4
    assert router_alignment(random, n_permutations=200).encoder.p > 0.02
    assert found.decoder.p > 0.02


def test_a_router_against_its_encoders_is_no_less_aligned():
    sae = switch_sae(seed=4)
    with torch.no_grad():
        sae.W_router.copy_(-sae.W_enc.view(D, E, M).mean(2))
    found = router_alignment(sae, n_permutations=200).encoder
    assert found.cosine_E.tolist() == pytest.approx([-1] * E)
    assert found.p_E.tolist() == pytest.approx([1 / 201] * E)
    assert found.p == pytest.approx(1 / 201)


def test_the_p_value_is_uniform_where_there_is_nothing():
    values = [router_alignment(switch_sae(seed=s), n_permutations=19, seed=s).encoder.p for s in range(40)]
    assert 0.3 < sum(values) / 40 < 0.75
    assert sum(p <= 0.1 for p in values) < 12


def test_what_has_no_experts_to_shuffle_is_refused():
    with pytest.raises(ValueError, match="sae must have a router; a topk SAE has none"):
        router_alignment(randomize(TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=3))))
    with pytest.raises(ValueError, match="n_experts must be at least 2 to compare experts; got 1"):
        router_alignment(switch_sae(n_experts=1))
    with pytest.raises(ValueError, match="n_permutations must be at least 2; got 1"):
        router_alignment(switch_sae(), n_permutations=1)
