"""Switch SAEs whose tokens go to several experts: against the token loop, a dense TopK, and SAELens's contract."""

import json

import pytest
import torch
from helpers import D, activations
from helpers.token_loop import compare_with_token_loop, make_batch, make_sae, step_input
from helpers.trainers import our_trainer, run
from sae_lens import SAE

from sae_lens_switch import SwitchSAEConfig, SwitchTrainingSAE, SwitchTrainingSAEConfig

GATES = pytest.mark.parametrize("gate", ["probability", "renormalized", "one"])


@GATES
@pytest.mark.parametrize(
    ("n_experts", "n_active", "k"), [(7, 2, 3), (7, 3, 1), (4, 4, 9), (2, 2, 16), (5, 2, 8), (7, 1, 3)]
)
def test_outputs_loss_and_gradients_equal_the_token_loop(n_experts, n_active, k, gate):
    sae = make_sae(n_experts=n_experts, n_active_experts=n_active, d_sae=8 * n_experts, k=k, gate=gate)
    compare_with_token_loop(sae, make_batch(30))


@GATES
def test_experts_without_tokens_and_a_single_token(gate):
    sae = make_sae(n_experts=6, n_active_experts=2, d_sae=30, k=4, gate=gate)
    with torch.no_grad():
        sae.W_router[:, 2:5] = 0
        sae.W_router[0, 2:5] = -100
    x = make_batch()
    x[:, 0] = sae.b_router[0].item() + 5
    assert sae.encode(x)[:, 10:25].count_nonzero() == 0
    compare_with_token_loop(sae, x)
    compare_with_token_loop(sae, x[:1])


def test_all_experts_active_is_a_topk_over_all_latents_with_gates():
    sae = make_sae(n_experts=4, n_active_experts=4, d_sae=40, k=6, gate="one")
    x = make_batch()
    acts = ((x - sae.b_dec) @ sae.W_enc).relu()
    top = acts.topk(6)
    torch.testing.assert_close(sae.encode(x), torch.zeros_like(acts).scatter(1, top.indices, top.values))
    sae.cfg.gate = "renormalized"  # among all experts it is the probability
    renormalized = sae.encode(x)
    sae.cfg.gate = "probability"
    torch.testing.assert_close(renormalized, sae.encode(x))


@GATES
def test_a_hook_on_dense_latents_sees_and_changes_nothing(gate):
    sae = make_sae(n_experts=7, n_active_experts=3, gate=gate)
    x = make_batch()
    plain = sae.training_forward_pass(step_input(x))
    seen = []
    sae.hook_sae_acts_pre.add_hook(lambda pre, hook: seen.append(pre))  # noqa: ARG005
    hooked = sae.training_forward_pass(step_input(x))
    torch.testing.assert_close(hooked.loss, plain.loss)
    torch.testing.assert_close(hooked.feature_acts, plain.feature_acts.to_dense())
    assert seen[0].shape == (40, 56)


@pytest.mark.parametrize("gate", ["probability", "renormalized"])
def test_the_router_learns_from_the_reconstruction(gate):
    sae = make_sae(n_experts=7, n_active_experts=2, gate=gate)
    output = sae.training_forward_pass(step_input(make_batch()))
    (gradient,) = torch.autograd.grad(output.losses["mse_loss"], [sae.W_router])
    assert gradient.norm() > 1e-3


def test_dead_latents_are_those_of_all_of_a_tokens_experts():
    sae = make_sae(n_experts=7, n_active_experts=2, aux_loss_coefficient=1.0, aux_k=5)
    x = make_batch()
    dead = torch.zeros(56, dtype=torch.bool)
    dead[torch.randperm(56, generator=torch.Generator().manual_seed(0))[:21]] = True
    output = sae.training_forward_pass(step_input(x, dead_neuron_mask=dead))
    probs = ((x - sae.b_router) @ sae.W_router).softmax(1)
    error = []
    for x_D, out_D, p_E in zip(x, output.sae_out, probs, strict=True):
        own = [i for i in range(56) if dead[i] and i // 8 in p_E.topk(2).indices.tolist()]
        acts = {i: p_E[i // 8] * ((x_D - sae.b_dec) @ sae.W_enc[:, i]) for i in own}
        chosen = sorted(own, key=lambda i: acts[i].item(), reverse=True)[:5]
        aux = sum((acts[i] * sae.W_dec[i] for i in chosen), start=torch.zeros(10, dtype=torch.float64))
        error.append(min(1, len(own) / 5) * (aux - (x_D - out_D)).square().sum())
    torch.testing.assert_close(output.losses["auxiliary_reconstruction_loss"], torch.stack(error).mean())


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
@pytest.mark.parametrize("n_active", [1, 2])
def test_it_trains_resumes_and_is_saved(optimizer, n_active, tmp_path):
    torch.manual_seed(0)
    fields = {"d_in": D, "d_sae": 96, "n_experts": 4, "n_active_experts": n_active, "k": 4}
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(**fields, gate="renormalized" if n_active > 1 else "probability"))
    batches = activations(60)
    trainer = our_trainer(sae, batches, optimizer=optimizer)
    outputs = run(trainer, batches)
    losses = [o.losses["mse_loss"].item() for o in outputs]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert outputs[-1].routing.load_E.sum().item() == pytest.approx(1)
    assert outputs[-1].routing.gates_B.shape == (64 * n_active,)
    sae.save_inference_model(tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["n_active_experts"] == n_active
    torch.testing.assert_close(SAE.load_from_disk(tmp_path)(batches[0]), sae(batches[0]))


def test_a_file_without_the_field_has_one_active_expert():
    fields = SwitchSAEConfig(d_in=6, d_sae=20, n_experts=2, k=2).to_dict()
    del fields["n_active_experts"]
    assert SwitchSAEConfig.from_dict(fields).n_active_experts == 1


def test_folding_decoder_norms_needs_them_equal_over_all_experts():
    sae = make_sae(n_experts=4, n_active_experts=2, d_sae=20, k=2)
    with torch.no_grad():
        sae.W_dec.copy_(
            torch.nn.functional.normalize(sae.W_dec, dim=1) * torch.arange(1, 5).repeat_interleave(5)[:, None]
        )
    with pytest.raises(NotImplementedError, match="all experts"):
        sae.fold_W_dec_norm()
    sae.cfg.n_active_experts = 1
    before = sae(make_batch())
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae(make_batch()), before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_active_experts": 0}, "n_active_experts must be a whole number, at least 1; got 0"),
        ({"n_active_experts": 8}, "n_active_experts must be at most n_experts=7; got 8"),
        (
            {"n_active_experts": 2, "k": 17},
            r"k must be at most n_active_experts \* d_sae / n_experts = 2 \* 56 / 7 = 16, the latents of 2 experts; "
            "got k=17",
        ),
    ],
)
@pytest.mark.parametrize("config", [SwitchSAEConfig, SwitchTrainingSAEConfig])
def test_bad_configs_are_refused(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**{"d_in": 10, "d_sae": 56, "n_experts": 7, "k": 3, **fields})
