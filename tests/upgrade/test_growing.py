"""grow: a Switch SAE with more experts."""

import pytest
import torch
from helpers import D, E, F, K, M, activations, random_input, switch_sae, training_sae
from helpers.trainers import our_trainer

from sae_lens_switch import SwitchTrainingSAE, grow
from sae_lens_switch.saes.router import router_logits


def trained(**fields) -> SwitchTrainingSAE:
    """After a few steps, with unequal loads."""
    sae = training_sae(dtype="float32", **fields)
    trainer = our_trainer(sae, BATCHES, lr=3e-3)
    for batch in BATCHES:
        trainer.step(batch)
        trainer.n_training_steps += 1
    return sae


BATCHES = activations(40)
X = torch.cat(BATCHES)


def experts(sae: SwitchTrainingSAE, x: torch.Tensor) -> torch.Tensor:
    return sae.encode_routed(x)[1].experts_BA.flatten()


def fvu(sae: SwitchTrainingSAE, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())


def test_old_experts_keep_their_place_and_new_ones_are_copies_of_busy_ones_up_to_a_factor():
    sae = trained()
    grown = grow(sae, E + 2, X)
    assert (grown.cfg.n_experts, grown.cfg.d_sae, grown.cfg.k) == (E + 2, F + 2 * M, K)
    assert torch.equal(grown.W_dec[:F], sae.W_dec)
    blocks = sae.W_dec.view(E, M, D)
    busiest = torch.bincount(experts(sae, X), minlength=E).argmax()
    for e in range(E + 2):
        new = grown.W_dec.view(E + 2, M, D)[e]
        source = int((blocks - new).abs().sum((1, 2)).argmin())
        assert source == e if e < E else torch.equal(blocks[source], new)
        if e == E:
            assert source == busiest
        ratio = grown.W_enc.T.reshape(E + 2, M, D)[e] / sae.W_enc.T.reshape(E, M, D)[source]
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-4, atol=1e-4)


def test_twins_share_the_tokens_of_the_busiest_about_evenly():
    sae = trained()
    busiest = int(torch.bincount(experts(sae, X), minlength=E).argmax())
    after = experts(grow(sae, E + 1, X), X)[experts(sae, X) == busiest]
    counts = torch.bincount(after, minlength=E + 1)
    assert counts[busiest] + counts[E] == len(after)
    assert 0.2 < counts[E] / len(after) < 0.8


def test_with_gates_of_one_only_tokens_that_change_expert_are_changed():
    sae = trained(gate="one")
    grown = grow(sae, E + 2, X)
    old, new = experts(sae, X), experts(grown, X)
    moved = new != old
    source = {e: e for e in range(E)}
    for e in (E, E + 1):
        block = grown.W_dec[e * M : (e + 1) * M]
        (source[e],) = {s for s in range(E) if torch.equal(block, sae.W_dec[s * M : (s + 1) * M])}
    same = torch.tensor([source[int(n)] == int(o) for n, o in zip(new, old, strict=True)])
    assert moved.any()
    assert same.float().mean() > 0.95
    torch.testing.assert_close(grown(X)[same], sae(X)[same])


@pytest.mark.parametrize("fields", [{}, {"tie_router_bias": True}, {"normalize_activations": "layer_norm"}])
def test_the_error_hardly_rises_and_training_lowers_it(fields):
    sae = trained(**fields)
    grown = grow(sae, E + 2, X)
    before, at_first = fvu(sae, X), fvu(grown, X)
    assert at_first < before + 0.1
    assert not grown.is_fresh
    trainer = our_trainer(grown, BATCHES, lr=3e-3)
    for batch in BATCHES:
        trainer.step(batch)
        trainer.n_training_steps += 1
    assert fvu(grown, X) < min(before, at_first)


def test_the_router_adds_nothing_on_average_over_the_tokens_that_are_shared():
    sae = trained()
    busiest = int(torch.bincount(experts(sae, X), minlength=E).argmax())
    mine = X[experts(sae, X) == busiest]
    grown = grow(sae, E + 1, X)
    before = router_logits(mine, sae.W_router, sae.b_router)[:, busiest]
    after = router_logits(mine, grown.W_router, grown.b_router)
    torch.testing.assert_close((after[:, busiest] + after[:, E]) / 2, before, rtol=1e-3, atol=1e-3)
    difference = after[:, busiest] - after[:, E]
    assert difference.mean().abs().item() < 0.01 * difference.std().item()


def test_saved_and_loaded_it_is_the_same_and_two_runs_give_the_same_bits(tmp_path):
    sae = trained()
    weights = {name: p.clone() for name, p in sae.named_parameters()}
    first, second = grow(sae, E + 1, X), grow(sae, E + 1, X)
    assert all(torch.equal(p, weights[name]) for name, p in sae.named_parameters())
    assert all(torch.equal(p, second.get_parameter(name)) for name, p in first.named_parameters())
    first.save_model(tmp_path)
    assert torch.equal(SwitchTrainingSAE.load_from_disk(tmp_path)(X), first(X))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sae": switch_sae()}, "sae must be a SwitchTrainingSAE; got SwitchSAE"),
        ({"n_experts": E}, f"n_experts must be more than the {E} there are"),
        ({"n_experts": 2.5}, "n_experts must be a whole number"),
        ({"sae": training_sae()}, "sae must be trained"),
        ({"sae": training_sae(n_active_experts=2)}, "n_active_experts must be 1 for an SAE that grows; got 2"),
        ({"activations": random_input(5, D + 1)}, "d_in must be the width"),
        ({"activations": torch.full((5, D), torch.inf)}, "activations must be finite"),
        ({"activations": X[:1]}, "at least two tokens per expert; got 1"),
        ({"n_tokens": 0}, "n_tokens must be"),
    ],
)
def test_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        grow(**{"sae": trained(), "n_experts": E + 1, "activations": X, **arguments})


def test_it_refuses_activations_whose_scale_is_not_in_the_weights():
    with pytest.raises(ValueError, match="normalize_activations must be folded"):
        grow(trained(normalize_activations="expected_average_only_in"), E + 1, X)
