"""Shared experts under SAELens's trainer and runners, when experts are reseeded, and when an SAE grows."""

import json

import pytest
import torch
from helpers import D, E, F, K, activations, small_run_warnings, trainer, training_sae
from helpers.runs import our_config, steps, stock_config
from helpers.trainers import our_trainer, run
from sae_lens import SAE
from sae_lens import LanguageModelSAETrainingRunner as StockRunner

from sae_lens_switch import LanguageModelSAETrainingRunner, SwitchSAE, SwitchTrainingSAE, grow, split_topk
from sae_lens_switch.training.collapse_response import reseed

S, M = 16, (F - 16) // E
SHARED = {"n_shared_experts": 1, "shared_width": S}
pytestmark = small_run_warnings


def test_saelens_own_trainer_trains_it_as_it_does_dense_latents():
    batches = activations(40)
    sparse, dense = (trainer(training_sae(**SHARED), batches, dead_feature_window=2) for _ in range(2))
    dense.sae.add_hook("hook_sae_acts_post", lambda acts, hook: None)  # noqa: ARG005
    losses = []
    for a, b in zip(steps(sparse, batches), steps(dense, batches), strict=True):
        torch.testing.assert_close(a.feature_acts.to_dense(), b.feature_acts, rtol=1e-6, atol=1e-6)
        losses.append(a.losses["mse_loss"].item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert torch.equal(sparse.dead_neurons, dense.dead_neurons)
    assert sparse.act_freq_scores[:S].any()


@pytest.mark.parametrize("runner", ["ours", "SAELens's"])
def test_runners_train_it_and_save_what_it_is(runner, tmp_path, model, dataset):
    make, class_ = (our_config, LanguageModelSAETrainingRunner) if runner == "ours" else (stock_config, StockRunner)
    sae = class_(make(tmp_path, **SHARED), override_dataset=dataset, override_model=model).run()
    assert isinstance(sae, SwitchTrainingSAE)
    (cfg,) = tmp_path.rglob("cfg.json")
    assert {n: json.loads(cfg.read_text())[n] for n in SHARED} == SHARED
    loaded = SAE.load_from_disk(cfg.parent)
    assert isinstance(loaded, SwitchSAE)
    x = torch.cat(activations(1))
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert loaded.encode(x)[:, :S].any()


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
def test_a_reseeded_expert_is_a_twin_and_the_shared_part_stays(optimizer):
    batches = activations(10)
    sae = training_sae(dtype="float32", bias_start="mean", **SHARED)
    trainer_ = our_trainer(sae, batches, optimizer=optimizer, lr=1e-3)
    run(trainer_, batches)
    shared = sae.W_enc[:, :S].clone(), sae.W_dec[:S].clone()
    chosen = torch.bincount(sae.encode_routed(batches[0])[1].experts_BA.flatten(), minlength=E)
    least, most = int(chosen.argmin()), int(chosen.argmax())
    assert reseed(sae, trainer_.optimizer, batches[0], [least]) == [(least, most)]
    twin, source = (slice(S + e * M, S + (e + 1) * M) for e in (least, most))
    assert torch.equal(sae.W_dec[twin], sae.W_dec[source])
    assert torch.equal(sae.W_enc[:, twin], sae.W_enc[:, source])
    assert torch.equal(sae.W_enc[:, :S], shared[0])
    assert torch.equal(sae.W_dec[:S], shared[1])


@pytest.mark.parametrize("gate", ["probability", "one"])
def test_a_grown_one_has_the_same_shared_part_and_nearly_the_same_error(gate):
    batches = activations(40)
    sae = training_sae(dtype="float32", gate=gate, **SHARED)
    run(our_trainer(sae, batches, lr=3e-3), batches)
    x = torch.cat(batches)
    grown = grow(sae, E + 2, x)
    assert (grown.cfg.d_sae, grown.cfg.layout.shared_width, grown.cfg.layout.expert_width) == (F + 2 * M, S, M)
    assert torch.equal(grown.W_enc[:, :S], sae.W_enc[:, :S])
    assert torch.equal(grown.W_dec[:F], sae.W_dec)
    before, after = (((s(x) - x).square().sum() / (x - x.mean(0)).square().sum()).item() for s in (sae, grown))
    assert after < before + 0.1


def test_one_as_wide_as_its_experts_stays_so_when_it_grows():
    batches = activations(10)
    sae = training_sae(dtype="float32", d_sae=45, n_shared_experts=1)
    run(our_trainer(sae, batches), batches)
    layout = grow(sae, E + 2, torch.cat(batches)).cfg.layout
    assert (layout.d_sae, layout.shared_width, layout.expert_width) == (63, 9, 9)


@pytest.mark.parametrize("field", SHARED)
def test_a_topk_sae_is_not_split_into_shared_experts(field):
    sae = SAE.from_dict({"architecture": "topk", "d_in": D, "d_sae": F, "k": K, "dtype": "float32", "device": "cpu"})
    with pytest.raises(ValueError, match=f"switch_fields must not hold {field}: the SAE that is split decides them"):
        split_topk(sae, E, torch.randn(50, D), switch_fields={field: 1})
