"""The penalty on decoder rows of different experts that fire for the same token: its value, gradient and effect."""

import pytest
import torch
from helpers import D, activations, training_sae
from helpers.token_loop import make_batch, make_sae, step_input, variance
from helpers.trainers import our_trainer, run

from sae_lens_switch.analysis import duplicate_latents
from sae_lens_switch.saes.expert_overlap import overlap_penalty


def by_pairs(W, own, other, fires):
    """As it is defined, pair by pair."""
    total = torch.zeros((), dtype=torch.float64)
    for s in range(len(own)):
        for i, a in enumerate(own[s].tolist()):
            for j, b in enumerate(other[s].tolist()):
                if fires[s, i, j]:
                    cosine = W[a] @ W[b] / (W[a].norm() * W[b].norm())
                    total = total + torch.relu(cosine - 0.3) ** 2
    return total / len(own)


@pytest.mark.parametrize(("S", "N", "M", "D"), [(5, 3, 7, 4), (1, 1, 2, 5), (9, 4, 4, 3)], ids=str)
def test_its_value_and_gradient_are_those_of_single_pairs(S, N, M, D):
    generator = torch.Generator().manual_seed(S)
    W = (torch.randn(2 * M, D, generator=generator, dtype=torch.float64) * 2).requires_grad_()
    own = torch.rand(S, M, generator=generator).topk(N).indices
    other = torch.rand(S, M, generator=generator).topk(N).indices + M
    fires = torch.rand(S, N, N, generator=generator) < 0.8
    fires[0, 0, 0] = True
    with torch.no_grad():
        W[own[0, 0]] = 3 * W[other[0, 0]] + 0.2 * W[0]  # one pair for sure
    ours, truth = overlap_penalty(W, own, other, fires), by_pairs(W, own, other, fires)
    assert truth > 0
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(*(torch.autograd.grad(2 * t, W)[0] for t in (ours, truth)))


def test_what_does_not_fire_or_is_not_alike_costs_nothing():
    W = torch.eye(4)[[0, 1, 0, 2]].requires_grad_()
    own, other = torch.tensor([[0, 1]]), torch.tensor([[2, 3]])
    nothing = overlap_penalty(W, own, other, torch.tensor([[[False, True], [True, True]]]))
    assert nothing == 0
    assert not torch.autograd.grad(nothing, W)[0].any()
    assert overlap_penalty(W, own, other, torch.ones(1, 2, 2, dtype=torch.bool)).item() == pytest.approx(0.49)


@pytest.mark.parametrize("fields", [{}, {"n_active_experts": 2}, {"load_balancing": "bias"}], ids=str)
def test_a_step_adds_it_for_its_first_tokens_and_their_next_expert(fields):
    options = {"d_in": 3, "d_sae": 28, "k": 3, "expert_overlap_coefficient": 0.7, **fields}
    sae, x = make_sae(**options), make_batch(40, d_in=3)
    output = sae.training_forward_pass(step_input(x))
    A = sae.cfg.n_active_experts
    latents = sae.encode(x)[:5]  # one in eight
    logits = (x[:5] - sae.b_router) @ sae.W_router + (0 if sae.expert_bias is None else sae.expert_bias)
    total = torch.zeros((), dtype=torch.float64)
    for s in range(5):
        e = int(logits[s].topk(A + 1).indices[A])
        block = slice(4 * e, 4 * e + 4)
        other = ((x[s] - sae.b_dec) @ sae.W_enc[:, block]).topk(3)
        own = latents[s].topk(3)
        fires = (own.values > 0)[:, None] & (other.values > 0)[None]
        total = total + by_pairs(sae.W_dec, own.indices[None], other.indices[None] + 4 * e, fires[None]) / 5
    assert total > 0
    penalty = 0.7 * variance(x) * total
    torch.testing.assert_close(output.losses["expert_overlap_loss"], penalty)
    plain = make_sae(**options | {"expert_overlap_coefficient": 0.0})
    without = plain.training_forward_pass(step_input(x))
    assert "expert_overlap_loss" not in without.losses
    torch.testing.assert_close(output.loss, without.loss + penalty)
    (expected,) = torch.autograd.grad(penalty, sae.W_dec)
    (ours,), (rest,) = (torch.autograd.grad(o.loss, s.W_dec) for o, s in ((output, sae), (without, plain)))
    torch.testing.assert_close(ours, rest + expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_with_it_ends_with_fewer_similar_rows_at_unit_norm(dtype):
    batches = activations(150, batch=128)

    def trained(coefficient: float):
        fields = {"d_sae": 96, "n_experts": 4, "k": 2, "dtype": dtype}
        sae = training_sae(expert_overlap_coefficient=coefficient, **fields)
        run(our_trainer(sae, batches), batches)
        return sae

    without, sae = trained(0.0), trained(0.1)
    similar = [duplicate_latents(s.W_dec.float(), 4, threshold=0.8).share_across for s in (without, sae)]
    assert similar[1] < 0.6 * similar[0], similar
    norms = sae.W_dec.float().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-5 if dtype == "float32" else 1e-2, atol=0)


def test_what_it_cannot_be_combined_with_is_refused():
    with pytest.raises(ValueError, match="expert_overlap_coefficient must be 0 unless n_active_experts=4 is less than"):
        training_sae(expert_overlap_coefficient=0.1, n_active_experts=4)
    with pytest.raises(ValueError, match="expert_overlap_coefficient must be 0 with optimizer='row_sparse_adam'"):
        our_trainer(training_sae(expert_overlap_coefficient=0.1), [torch.zeros(8, D)], optimizer="row_sparse_adam")
    with pytest.raises(ValueError, match="expert_overlap_coefficient must be"):
        training_sae(expert_overlap_coefficient=-0.1)
    with pytest.raises(ValueError, match="must be 0 with shared experts, of which there are 1; got 0.1"):
        training_sae(expert_overlap_coefficient=0.1, n_shared_experts=1, shared_width=4)
