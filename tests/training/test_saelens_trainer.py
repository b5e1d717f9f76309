"""``switch`` under SAELens's own trainer: its statistics, its learning, its checkpoints."""

import copy
import math

import pytest
import torch
from helpers import HOOK, D, E, F, K, M, activations, small_run_warnings, trainer, training_sae
from helpers.runs import exactly, same_tensors, steps
from sae_lens import StandardTrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.multi_sae_trainer import MultiSAETrainer

from sae_lens_switch import SwitchTrainingSAE

pytestmark = small_run_warnings


# The stock trainer: statistics


@pytest.mark.parametrize("k", [K, M])
def test_the_trainers_statistics_are_those_of_the_dense_activations(k):
    batches = activations(8)
    sparse = trainer(training_sae(k=k), batches, dead_feature_window=2)
    dense = trainer(training_sae(k=k), batches, dead_feature_window=2)
    dense.sae.add_hook("hook_sae_acts_post", lambda acts, hook: None)  # noqa: ARG005
    counted, since = torch.zeros(F), torch.zeros(F)
    for a, b in zip(steps(sparse, batches), steps(dense, batches), strict=True):
        assert a.feature_acts.is_sparse
        assert not b.feature_acts.is_sparse
        assert a.feature_acts.shape == b.feature_acts.shape == (64, F)
        torch.testing.assert_close(a.feature_acts.to_dense(), b.feature_acts, rtol=1e-9, atol=1e-9)
        fired = (a.feature_acts.to_dense() != 0).sum(0)
        counted, since = counted + fired, torch.where(fired > 0, 0.0, since + 1)
        for t in (sparse, dense):
            torch.testing.assert_close(t.act_freq_scores, counted, **exactly)
            torch.testing.assert_close(t.n_forward_passes_since_fired, since, **exactly)
    assert sparse.n_frac_active_samples == 8 * 64
    assert k == M or 0 < sparse.dead_neurons.sum() < F
    assert torch.equal(sparse.dead_neurons, dense.dead_neurons)


def test_explicit_zeros_of_a_token_with_fewer_than_k_positive_latents_count_as_not_fired():
    batches = activations(3)
    the_trainer = trainer(training_sae(k=M), batches)
    for output in steps(the_trainer, batches):
        coo = output.feature_acts.coalesce()
        assert (coo.values() == 0).any()
    assert the_trainer.act_freq_scores.sum() < 0.9 * 3 * 64 * M


def test_the_activations_given_to_the_trainer_are_those_before_its_step():
    batches = activations(4)
    the_trainer = trainer(training_sae(), batches)
    next(steps(the_trainer, batches[:1]))
    for batch in batches[1:]:
        with torch.no_grad():
            expected = the_trainer.sae.encode(batch)
        (output,) = steps(the_trainer, [batch])
        torch.testing.assert_close(output.feature_acts.to_dense(), expected, rtol=1e-9, atol=1e-12)


def test_the_log_of_a_step_holds_losses_metrics_and_dense_statistics():
    batches = activations(4)
    the_trainer = trainer(training_sae(load_balance_warm_up_steps=8), batches, dead_feature_window=1)
    outputs = list(steps(the_trainer, batches))
    log = the_trainer.build_train_step_log_dict(outputs[-1], n_training_samples=256)
    assert all(isinstance(value, float | int) and math.isfinite(value) for value in log.values()), log
    assert log.keys() == {
        "losses/overall_loss",
        "losses/mse_loss",
        "losses/load_balance_loss",
        "metrics/explained_variance_legacy",
        "metrics/explained_variance_legacy_std",
        "metrics/explained_variance",
        "metrics/l0",
        "sparsity/mean_passes_since_fired",
        "sparsity/dead_features",
        "details/current_learning_rate",
        "details/n_training_samples",
        "details/load_balance_coefficient",
        "metrics/load_balance",
        "metrics/expert_load_max",
        "metrics/expert_load_min",
        "metrics/expert_load_entropy",
        "metrics/gate_mean",
        *(f"metrics/dead_latents_expert_{e}" for e in range(E)),
    }
    acts = outputs[-1].feature_acts.to_dense()
    assert log["metrics/l0"] == pytest.approx((acts != 0).sum(1).double().mean().item())
    assert log["losses/overall_loss"] == pytest.approx(log["losses/mse_loss"] + log["losses/load_balance_loss"])
    assert log["details/load_balance_coefficient"] == pytest.approx(0.3 * 4 / 8)
    tokens_E = (acts.view(-1, E, M) != 0).any(2).sum(0)
    assert log["metrics/expert_load_max"] == pytest.approx(tokens_E.max().item() / 64)
    assert log["metrics/expert_load_min"] == pytest.approx(tokens_E.min().item() / 64)
    assert log["metrics/gate_mean"] > 1 / E
    assert any(callable(metric) for metric in outputs[-1].metrics.values())


def test_dead_latents_are_logged_by_the_expert_that_owns_them():
    batches = activations(4)
    the_trainer = trainer(training_sae(), batches, dead_feature_window=1)
    list(steps(the_trainer, batches[:3]))
    the_trainer.n_forward_passes_since_fired = torch.arange(F) % M + 3.0 * (torch.arange(F) // M == 2) - 1
    expected = the_trainer.dead_neurons.view(E, M).sum(1)
    (output,) = steps(the_trainer, batches[3:])
    log = the_trainer.build_train_step_log_dict(output, n_training_samples=1)
    assert [log[f"metrics/dead_latents_expert_{e}"] for e in range(E)] == expected.tolist()
    assert len(set(expected.tolist())) > 1


# The stock trainer: learning


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"gate": "one"}, {"tie_router_bias": True}, {"n_experts": 1}], ids=str)
def test_the_loss_on_one_batch_falls_with_every_step_and_decoder_rows_stay_unit_norm(autocast, dtype, options):
    (batch,) = activations(1)
    sae = training_sae(dtype=dtype, **options)
    half = dtype == "bfloat16"
    the_trainer = trainer(sae, [batch] * 8, lr=2e-3, autocast=autocast)
    losses = []
    for output in steps(the_trainer, [batch] * 8):
        losses.append(output.loss.item())
        torch.testing.assert_close(output.loss, sum(output.losses.values()))
        norms = sae.W_dec.detach().float().norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(F), rtol=0, atol=1e-2 if half else 1e-6)
        assert sae.W_dec.dtype == getattr(torch, dtype)
        assert sae.W_router.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    if half:
        assert losses[-1] < losses[0]
    else:
        assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False)), losses


def test_training_learns_the_data():
    batches = activations(250)
    the_trainer = trainer(training_sae(dtype="float32"), batches)
    losses = [output.losses["mse_loss"].item() for output in steps(the_trainer, batches)]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_without_normalize_decoder_the_rows_are_left_to_the_optimiser():
    batches = activations(5)
    sae = training_sae(normalize_decoder=False)
    list(steps(trainer(sae, batches), batches))
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() > 1e-3


def test_a_trainer_of_another_sae_is_left_alone():
    batches = activations(4)
    torch.manual_seed(0)
    config = StandardTrainingSAEConfig(d_in=D, d_sae=F, dtype="float32")  # its loss in float64 fails with torch 2.11
    alone = SAE_TRAINING_CLASS_REGISTRY["standard"][0](config)
    beside = copy.deepcopy(alone)
    list(steps(trainer(alone, batches), batches))
    ours, theirs = trainer(training_sae(), batches), trainer(beside, batches)
    for batch in batches:
        list(steps(ours, [batch]))
        list(steps(theirs, [batch]))
    assert same_tensors(alone.state_dict(), beside.state_dict())


def test_many_trainers_at_once_equal_each_alone_bit_for_bit():
    batches = activations(6)
    names = {"a": {"k": 2}, "b": {"n_experts": 5, "gate": "one"}}
    alone = {}
    for name, options in names.items():
        alone[name] = trainer(training_sae(**options), batches)
        alone[name].fit()
    single = alone["a"].cfg
    multi = MultiSAETrainer(
        cfg=single,
        saes={name: training_sae(**options) for name, options in names.items()},
        hook_names={name: HOOK for name in names},
        data_provider=iter([{HOOK: batch} for batch in batches]),
    )
    multi.fit()
    for name, the_trainer in alone.items():
        assert same_tensors(multi.saes[name].state_dict(), the_trainer.sae.state_dict())
        states = [t.optimizer.state_dict()["state"] for t in (multi.trainers[name], the_trainer)]
        assert all(same_tensors(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


# The stock trainer: normalisation, metadata, checkpoints


@pytest.mark.parametrize("normalize_activations", ["expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fit_folds_what_it_scaled_by_the_router_included(normalize_activations, dtype, monkeypatch):
    batches = activations(30, scale=20.0)
    sae = training_sae(normalize_activations=normalize_activations, dtype=dtype)
    the_trainer = trainer(sae, batches, total_training_samples=20 * 64, n_batches_for_norm_estimate=10)
    before_fold = []

    def recording(fold):
        def record_then_fold(*args, **kwargs):
            before_fold.append((copy.deepcopy(sae), copy.deepcopy(the_trainer.activation_scaler)))
            return fold(*args, **kwargs)

        return record_then_fold

    for name in ("fold_activation_norm_scaling_factor", "fold_activation_whitening"):
        monkeypatch.setattr(sae, name, recording(getattr(sae, name)))
    the_trainer.fit()

    ((unfolded, scaler),) = before_fold
    x = batches[0].to(sae.dtype)
    tolerance = {"rtol": 1e-3, "atol": 1e-2} if dtype == "float32" else {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(sae(x), scaler.unscale(unfolded(scaler(x))), **tolerance)
    expert, before = sae.encode_sparse(x).indices // M, unfolded.encode_sparse(scaler(x)).indices // M
    assert torch.equal(expert, before)
    assert sae.cfg.normalize_activations == "none"
    assert the_trainer.activation_scaler == ActivationScaler()
    variance = (x - x.mean(0)).square().sum()
    assert (sae(x) - x).square().sum() < variance


@pytest.mark.parametrize("normalize_activations", ["layer_norm", "constant_norm_rescale"])
def test_run_time_normalisation_trains_under_the_stock_trainer(normalize_activations):
    batches = activations(30, scale=20.0)
    the_trainer = trainer(training_sae(normalize_activations=normalize_activations), batches)
    losses = [output.losses["mse_loss"].item() for output in steps(the_trainer, batches)]
    assert losses[-1] < losses[0]


def test_fit_records_l0_and_the_number_of_dead_latents():
    batches = activations(8)
    the_trainer = trainer(training_sae(), batches, dead_feature_window=2)
    sae = the_trainer.fit()
    assert sae.cfg.metadata.l0 == pytest.approx(the_trainer.act_freq_scores.sum().item() / (8 * 64))
    assert K - 1 < sae.cfg.metadata.l0 <= K * (1 + 1e-6)
    assert sae.cfg.metadata.num_dead_features == the_trainer.dead_neurons.sum().item() > 0


def test_training_continued_from_a_checkpoint_equals_training_in_one_go_bit_for_bit(tmp_path):
    batches = activations(12)
    options = {"load_balance_warm_up_steps": 9, "normalize_activations": "expected_average_only_in"}
    fields_ = {"total_training_samples": 10 * 64, "n_batches_for_norm_estimate": 2, "lr_decay_steps": 4}
    whole = trainer(training_sae(**options), batches, **fields_)
    whole.fit()

    def provider_that_is_interrupted():
        yield from batches[:7]
        raise KeyboardInterrupt

    first = trainer(training_sae(**options), provider_that_is_interrupted(), **fields_, train_batch_size_samples=64)
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    assert first.n_training_steps == 5
    first.save_checkpoint("interrupted", base_path=tmp_path)
    assert {p.name for p in (tmp_path / "interrupted").iterdir()} == {
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
        "trainer_state.pt",
        "activation_scaler.json",
    }

    second = trainer(training_sae(seed=6, **options), iter(batches[7:]), **fields_, train_batch_size_samples=64)
    second.load_trainer_state(tmp_path / "interrupted")
    second.sae.load_weights_from_checkpoint(tmp_path / "interrupted")
    assert second.n_training_steps == 5
    assert second.get_coefficients() == first.get_coefficients()
    assert second.activation_scaler.scaling_factor == first.activation_scaler.scaling_factor
    second.fit()
    assert same_tensors(second.sae.state_dict(), whole.sae.state_dict())
    states = [t.optimizer.state_dict()["state"] for t in (second, whole)]
    assert all(same_tensors(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert torch.equal(second.act_freq_scores, whole.act_freq_scores)
    assert second.sae.cfg.metadata.l0 == whole.sae.cfg.metadata.l0


def test_checkpoints_come_when_due_and_each_loads(tmp_path):
    batches = activations(12)
    the_trainer = trainer(
        training_sae(), batches, n_checkpoints=3, checkpoint_path=str(tmp_path), save_final_checkpoint=True
    )
    the_trainer.fit()
    names = {p.name for p in tmp_path.iterdir()}
    assert len(names) == 4
    assert f"final_{12 * 64}" in names
    loaded = {name: TrainingSAE.load_from_disk(tmp_path / name) for name in names}
    assert all(type(sae) is SwitchTrainingSAE for sae in loaded.values())
    assert same_tensors(loaded[f"final_{12 * 64}"].state_dict(), the_trainer.sae.state_dict())
    assert len({sae.W_enc.sum().item() for sae in loaded.values()}) == 4
    for sae in loaded.values():
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F).double())


def test_a_batch_that_is_not_finite_leaves_the_last_checkpoint_good(tmp_path):
    batches = activations(6)
    batches[4][7, 2] = math.nan
    the_trainer = trainer(training_sae(), batches, n_checkpoints=2, checkpoint_path=str(tmp_path))
    with pytest.raises(ValueError, match="activations must be finite; training step 4 got 1 NaN"):
        the_trainer.fit()
    folders = list(tmp_path.iterdir())
    assert (
        len(folders) == 1
    )  # due once more than 128 and 256 samples are seen: after the third batch, and after the bad one
    saved = TrainingSAE.load_from_disk(folders[0])
    untouched = trainer(training_sae(), activations(6))
    for _ in zip(range(3), steps(untouched, activations(6)), strict=False):
        pass
    assert same_tensors(saved.state_dict(), untouched.sae.state_dict())
