"""``switch`` under SAELens's own trainer, runners, evaluations and hooked models; and our runner config."""

import copy
import json
import math
import os
import pickle
import signal
from dataclasses import asdict, fields, replace

import pytest
import sae_lens
import sae_lens.llm_sae_training_runner as host_runner
import sae_lens.training.sae_trainer as host_trainer
import torch
from helpers import (
    CONTEXT,
    HOOK,
    HOOK_SHAPES,
    HOOK_Z,
    D,
    E,
    F,
    K,
    M,
    activations,
    random_input,
    randomize,
    run_fields,
    switch_sae,
    tiny_tokenizer,
    trainer,
    training_config,
    training_sae,
)
from sae_lens import (
    SAE,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunner, SyntheticSAERunnerConfig
from sae_lens.training import multi_sae_trainer as multi_trainer_module
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from safetensors.torch import load_file
from torch import Tensor

import sae_lens_switch
from sae_lens_switch import (
    CheckpointError,
    LanguageModelSAERunnerConfig,
    SwitchSAE,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
    TrainerOptions,
    TrainingDivergedError,
    scaling_law_lr,
)
from sae_lens_switch.common.substitution import constructing
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.history import FILENAME, read_history
from sae_lens_switch.training.optim.constrained_adam import constrain_optimizer_steps
from sae_lens_switch.training.runners import _MultiSAETrainer, with_options

pytestmark = [
    pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]
exactly = {"rtol": 0, "atol": 0}
SAE_FIELDS = {"d_in": D, "d_sae": F, "n_experts": E, "k": K}
OURS = {"switch", "sparse_topk"}
STOCK_ARCHITECTURES = sorted(SAE_TRAINING_CLASS_REGISTRY.keys() - OURS)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps(the_trainer, batches: list[Tensor]):
    """What SAELens's ``fit`` does with each batch."""
    for batch in batches:
        yield the_trainer.step(batch)
        the_trainer.n_training_steps += 1


def stock_config(path, **options):
    """SAELens's runner config, with our SAE config inside."""
    own = {name: options.pop(name) for name in list(options) if name in {f.name for f in fields(training_config())}}
    sae = SwitchTrainingSAEConfig(**{**SAE_FIELDS, **own})
    return sae_lens.LanguageModelSAERunnerConfig(sae=sae, **run_fields(path, **options))


def our_config(path, architecture="switch", **options):
    return LanguageModelSAERunnerConfig(architecture=architecture, **{**SAE_FIELDS, **run_fields(path, **options)})


both_configs = pytest.mark.parametrize("make_config", [stock_config, our_config], ids=["stock config", "our config"])


def stored_activations(model, dataset, hook_name: str = HOOK, rows: int = 8) -> Tensor:
    _, cache = model.run_with_cache(torch.tensor(dataset[:rows]["tokens"]))
    return cache[hook_name]


# --- The stock trainer: statistics


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


# --- The stock trainer: learning


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
    config = StandardTrainingSAEConfig(d_in=D, d_sae=F, dtype="float64")
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


# --- The stock trainer: normalisation, metadata, checkpoints


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


# --- The runner


@both_configs
def test_a_full_run_of_the_stock_runner(make_config, tmp_path, model, dataset):
    cfg = make_config(tmp_path, n_checkpoints=2, save_final_checkpoint=True, exclude_special_tokens=[0])
    asked = copy.deepcopy(cfg.sae)
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)
    assert type(runner.sae) is SwitchTrainingSAE
    sae = runner.run()

    assert sae is runner.sae
    assert replace(sae.cfg, metadata=SAEMetadata()) == replace(asked, metadata=SAEMetadata())
    assert cfg.sae == asked  # the user's config is not the SAE's
    metadata = sae.cfg.metadata
    assert (metadata.hook_name, metadata.model_name, metadata.context_size) == (HOOK, "tiny", CONTEXT)
    assert (metadata.dataset_path, metadata.prepend_bos, metadata.training_architecture) == ("none", True, "switch")
    assert metadata.exclude_special_tokens == [0]
    assert 0 < metadata.l0 <= K * (1 + 1e-6)
    assert 0 <= metadata.num_dead_features < F

    output = tmp_path / "output"
    assert {p.name for p in output.iterdir()} == {
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
        "runner_cfg.json",
    }
    loaded = SAE.load_from_disk(output)
    assert type(loaded) is SwitchSAE
    x = stored_activations(model, dataset)
    torch.testing.assert_close(loaded(x), sae(x), **exactly)
    torch.testing.assert_close(loaded.encode(x), sae.encode(x), **exactly)
    plain = json.loads(json.dumps(metadata.to_dict()))
    assert loaded.cfg.metadata.to_dict() == plain
    assert load_file(output / "sparsity.safetensors")["sparsity"].shape == (F,)
    assert json.loads((output / "runner_cfg.json").read_text()) == json.loads(json.dumps(cfg.to_dict()))

    folders = sorted(p for p in (tmp_path / "checkpoints").glob("*/*"))
    assert len(folders) == 3
    for folder in folders:
        assert {"runner_cfg.json", "activations_store_state.safetensors", "trainer_state.pt"} <= {
            p.name for p in folder.iterdir()
        }
        assert type(TrainingSAE.load_from_disk(folder)) is SwitchTrainingSAE
    final = TrainingSAE.load_from_disk(next(p for p in folders if p.name.startswith("final_")))
    assert same_tensors(final.state_dict(), sae.state_dict())
    assert final.cfg.metadata.to_dict() == plain


def test_both_runner_configs_train_the_same_sae_with_the_same_settings(tmp_path, model, dataset):
    weights = []
    for make_config in (stock_config, our_config):
        torch.manual_seed(0)
        cfg = make_config(tmp_path, lr=1e-3, lr_decay_steps=2)
        runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)
        weights.append(runner.run().state_dict())
    assert same_tensors(*weights)


@pytest.mark.parametrize("architecture", [name for name in STOCK_ARCHITECTURES if name != "topk"])
def test_our_runner_config_trains_every_other_architecture_as_stock_does(architecture, tmp_path, model, dataset):
    sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    options = {"k": K} if "k" in {f.name for f in fields(config_class)} else {}
    if architecture == "matryoshka_batchtopk":
        options["matryoshka_widths"] = [F // 2, F]
    sae_cfg = config_class(d_in=D, d_sae=F, **options)
    stock = sae_lens.LanguageModelSAERunnerConfig(sae=sae_cfg, **run_fields(tmp_path / "stock"))
    ours = LanguageModelSAERunnerConfig(
        architecture=architecture, d_in=D, d_sae=F, **options, **run_fields(tmp_path / "ours")
    )
    assert ours.sae == stock.sae
    assert (ours.lr, ours.lr_decay_steps) == (stock.lr, stock.lr_decay_steps)
    weights = []
    for cfg in (stock, ours):
        torch.manual_seed(0)
        runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)
        assert type(runner.sae) is sae_class
        weights.append(runner.run().state_dict())
    assert same_tensors(*weights)


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({}, D),
        ({"hook_name": HOOK_Z, "reshape_activations": "hook_z"}, D),
        ({"hook_name": "blocks.0.attn.hook_q", "hook_head_index": 1}, D // 2),
    ],
    ids=str,
)
def test_our_runner_refuses_a_d_in_that_is_not_the_models_and_trains_as_the_stock_one_otherwise(
    options, width, tmp_path, model, dataset
):
    def runner(runner_class, name: str, d_in: int):
        torch.manual_seed(0)
        cfg = our_config(tmp_path / name, **{**options, "d_in": d_in})
        return runner_class(cfg, override_dataset=dataset, override_model=model)

    hook_name = options.get("hook_name", HOOK)
    with pytest.raises(ValueError, match=f"d_in must be .* at {hook_name}, {width}; got d_in={width + 2}"):
        runner(sae_lens_switch.LanguageModelSAETrainingRunner, "refused", width + 2).run()
    assert not (tmp_path / "refused" / "output").exists()
    ours, stock = (
        runner(runner_class, name, width).run().state_dict()
        for name, runner_class in (
            ("ours", sae_lens_switch.LanguageModelSAETrainingRunner),
            ("stock", LanguageModelSAETrainingRunner),
        )
    )
    assert ours.keys() == stock.keys()
    for name in stock:  # their Adam and ours round differently
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-3, atol=1e-5)


def test_our_runner_saves_when_interrupted_and_goes_on_from_the_latest_checkpoint(
    tmp_path, model, dataset, monkeypatch
):
    def runner(**fields):
        cfg = our_config(tmp_path, training_tokens=20 * 64, keep_checkpoints=2, n_checkpoints=9, **fields)
        return sae_lens_switch.LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)

    interrupted = runner()
    draw = type(interrupted.activations_store).__next__
    drawn = []

    def interrupting(store):
        drawn.append(1)
        if len(drawn) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(store)

    monkeypatch.setattr(type(interrupted.activations_store), "__next__", interrupting)
    with pytest.raises(InterruptedException):
        interrupted.run()
    monkeypatch.undo()
    (run_folder,) = (tmp_path / "checkpoints").iterdir()
    saved = run_folder / str(11 * 64)
    assert sorted(int(p.name) for p in run_folder.iterdir())[-1] == 11 * 64
    assert len(list(run_folder.iterdir())) == 2
    for name in ("runner_cfg.json", "activations_store_state.safetensors", "checkpoint.json"):
        assert (saved / name).exists()
    assert not (tmp_path / "output").exists()

    resumed = runner(resume="latest")
    sae = resumed.run()
    assert resumed.cfg.resume_from_checkpoint == str(saved)
    assert resumed.activations_store.n_dataset_processed > interrupted.activations_store.n_dataset_processed
    assert [p for p in (tmp_path / "checkpoints").iterdir()] == [run_folder]
    assert same_tensors(SAE.load_from_disk(tmp_path / "output").state_dict(), sae.state_dict())
    other = runner(resume="latest", lr=0.123)
    with pytest.raises(CheckpointError, match="lr was .* is 0.123"):
        other.run()


def test_when_one_of_many_saes_diverges_all_are_saved(tmp_path):
    bad = torch.full((8, D), torch.nan)
    saes = {name: training_sae(dtype="float32") for name in "ab"}
    cfg = SAETrainerConfig(80, 8, lr=1e-3, lr_end=1e-4, checkpoint_path=str(tmp_path))
    with constructing(multi_trainer_module, "SAETrainer", with_options(TrainerOptions(max_skipped_steps=2))):
        trainer_ = _MultiSAETrainer(cfg, saes, dict.fromkeys("ab", HOOK), iter([{HOOK: bad}] * 10))
    with pytest.raises(TrainingDivergedError, match="2 steps in a row"):
        trainer_.fit()
    (saved,) = tmp_path.iterdir()
    assert saved.name.startswith("diverged_")
    checkpoints.verify(saved)
    assert {p.parent.name for p in saved.rglob("sae_weights.safetensors")} == {"a", "b"}


def test_our_multi_sae_runner_saves_whole_checkpoints_and_resumes(tmp_path, model, dataset):
    known = {f.name for f in fields(MultiSAETrainingRunnerConfig)}

    def runner(resume=None, **options):
        cfg = MultiSAETrainingRunnerConfig(
            saes={"a": training_config(dtype="float32"), "b": training_config(n_experts=2, dtype="float32")},
            hook_names={"a": HOOK, "b": HOOK},
            **{n: v for n, v in run_fields(tmp_path, **options).items() if n in known},
        )
        return sae_lens_switch.MultiSAETrainingRunner(
            cfg,
            override_dataset=dataset,
            override_model=model,
            options=TrainerOptions(optimizer="row_sparse_adam", keep_checkpoints=1, resume=resume),
        )

    first = runner(n_checkpoints=3)
    saes = first.run()
    assert set(saes) == {"a", "b"}
    (saved,) = [p for p in (tmp_path / "checkpoints").rglob("checkpoint.json")]
    checkpoints.verify(saved.parent)
    assert (saved.parent / "b" / "sae_weights.safetensors").exists()
    histories = {name: read_history(tmp_path / "output" / name / FILENAME) for name in "ab"}
    assert [[row["step"] for row in history] for history in histories.values()] == 2 * [[1, 2, 3, 4, 5, 6]]
    assert histories["a"] != histories["b"]
    resumed = runner(resume_from_checkpoint=str(saved.parent), n_checkpoints=0).run()
    assert read_history(tmp_path / "output" / "b" / FILENAME)[:4] == histories["b"][:4]
    assert all(torch.isfinite(p).all() for sae in resumed.values() for p in sae.parameters())
    again = runner(resume="latest", n_checkpoints=0)
    again.run()
    assert again.cfg.resume_from_checkpoint == str(saved.parent)
    (saved.parent / "b" / "cfg.json").unlink()
    with pytest.raises(CheckpointError, match="b/cfg.json is missing"):
        runner(resume_from_checkpoint=str(saved.parent)).run()


@pytest.mark.parametrize(
    "options",
    [
        {"normalize_activations": "expected_average_only_in", "n_batches_for_norm_estimate": 2},
        {"normalize_activations": "covariance_whitening", "n_batches_for_norm_estimate": 2},
        {"normalize_activations": "layer_norm"},
        {"normalize_activations": "constant_norm_rescale"},
        {"autocast": True},
        {"dtype": "bfloat16", "sae_kwargs": {"dtype": "bfloat16"}},
        {"dtype": "float64"},
        {"prefetch_llm_batches": True},
        {"hook_name": HOOK_Z, "reshape_activations": "hook_z"},
        {"hook_name": "blocks.0.attn.hook_q", "hook_head_index": 1, "d_in": D // 2},
        {"gate": "one", "load_balance_coefficient": 0.0},
        {"lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": 2},
        {"lr_scheduler_name": "cosineannealing", "lr_end": 0.0},
        {"seqpos_slice": (2, -2)},
    ],
    ids=str,
)
def test_runs_of_every_kind_end_in_a_loadable_sae(options, tmp_path, model, dataset):
    cfg = our_config(tmp_path, **options)
    sae = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()
    loaded = SAE.load_from_disk(tmp_path / "output")
    assert all(torch.isfinite(p).all() for p in loaded.parameters())
    assert loaded.cfg.normalize_activations == sae.cfg.normalize_activations
    x = stored_activations(model, dataset, cfg.hook_name)
    if cfg.hook_head_index is not None:
        x = x[:, :, cfg.hook_head_index]
    out = loaded(x)
    assert out.shape == x.shape
    if cfg.hook_name == HOOK_Z:
        torch.testing.assert_close(out.flatten(-2), sae(x.flatten(-2)), **exactly)
    else:
        torch.testing.assert_close(out, sae(x), **exactly)


@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo")
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "runner_class",
    [LanguageModelSAETrainingRunner, sae_lens_switch.LanguageModelSAETrainingRunner],
    ids=["stock", "ours"],
)
def test_a_compiled_run_trains_the_same_sae(backend, runner_class, tmp_path, model, dataset, monkeypatch):
    constrain_optimizer_steps(another := training_sae())  # as in a notebook where one was trained before
    compile_with_stock_backend = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_with_stock_backend(function, backend=backend))
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        cfg = our_config(tmp_path, lr=1e-3, compile_sae=compiled)
        runner = runner_class(cfg, override_dataset=dataset, override_model=model)
        weights.append(runner.run().state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weights[1]["W_dec"].norm(dim=1), torch.ones(F))
    assert another is not None


class Wandb:
    """Stands in for wandb: remembers what is logged."""

    def __init__(self) -> None:
        self.logged: list[dict] = []

    def log(self, values: dict, step: int | None = None) -> None:  # noqa: ARG002
        self.logged.append(dict(values))

    def init(self, **options) -> None:
        json.dumps(options["config"])

    def finish(self) -> None: ...

    def Histogram(self, values):  # noqa: N802
        return values


def test_a_logged_run_evaluates_in_training_and_logs_router_and_losses(tmp_path, model, dataset, monkeypatch):
    wandb = Wandb()
    for module in (host_trainer, host_runner):
        monkeypatch.setattr(module, "wandb", wandb)
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=1, eval_every_n_wandb_logs=3)
    monkeypatch.setattr(logger, "log", lambda *_, **__: None)
    cfg = our_config(tmp_path, logger=logger, feature_sampling_window=4)
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)
    sae = runner.run()
    assert sae.training
    trained = [entry for entry in wandb.logged if "losses/load_balance_loss" in entry]
    evaluated = [entry for entry in wandb.logged if "weights/W_router_norms" in entry]
    assert len(trained) == 6
    assert len(evaluated) == 2
    assert all("metrics/expert_load_entropy" in entry for entry in trained)
    for entry in evaluated:
        assert entry["model_performance_preservation"]["ce_loss_with_sae"] > 0
        assert 0 < entry["sparsity"]["l0"] <= K
        assert entry["weights/W_dec_norms"].shape == (F,)
    assert any("sparsity/below_1e-5" in entry for entry in wandb.logged)


# --- Resuming


@both_configs
def test_a_run_resumed_from_its_checkpoint_goes_on_from_there(make_config, tmp_path, model, dataset):
    cfg = make_config(tmp_path, n_checkpoints=1, training_tokens=8 * 64)
    LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*")
    state = torch.load(checkpoint / "trainer_state.pt")
    assert 0 < state["n_training_steps"] < 8

    seen = []

    class Recording(host_trainer.SAETrainer):
        def fit(self):
            optimizer = copy.deepcopy(self.optimizer.state_dict())
            seen.append((self.n_training_steps, self.n_training_samples, optimizer, copy.deepcopy(self.sae)))
            return super().fit()

    resumed = make_config(tmp_path / "second", resume_from_checkpoint=str(checkpoint), training_tokens=8 * 64)
    runner = LanguageModelSAETrainingRunner(resumed, override_dataset=dataset, override_model=model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_runner, "SAETrainer", Recording)
        sae = runner.run()
    ((n_steps, n_samples, optimizer, at_start),) = seen
    assert (n_steps, n_samples) == (state["n_training_steps"], state["n_training_samples"])
    for index, saved in state["optimizer"]["state"].items():
        assert same_tensors(optimizer["state"][index], saved)
    assert same_tensors(at_start.state_dict(), TrainingSAE.load_from_disk(checkpoint).state_dict())
    x = stored_activations(model, dataset).reshape(-1, D)
    assert ((sae.b_dec - x.mean(0)).norm() < (torch.zeros(D) - x.mean(0)).norm()).item()
    torch.testing.assert_close(SAE.load_from_disk(tmp_path / "second" / "output")(x), sae(x), **exactly)


def test_a_run_can_start_from_a_saved_sae_without_moving_its_biases(tmp_path, model, dataset):
    saved = randomize(SwitchTrainingSAE(SwitchTrainingSAEConfig(**SAE_FIELDS, normalize_decoder=False)))
    saved.save_model(tmp_path / "saved")
    cfg = our_config(tmp_path, from_pretrained_path=str(tmp_path / "saved"), lr=1e-30, lr_end=0.0, lr_decay_steps=0)
    sae = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()
    assert same_tensors(sae.state_dict(), saved.state_dict())


def test_a_fresh_run_starts_its_biases_in_the_data(tmp_path, model, dataset):
    cfg = our_config(tmp_path, lr=1e-12)
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)
    seen = []
    runner.sae.add_hook("hook_sae_input", lambda x, hook: seen.append(x.detach().clone()))  # noqa: ARG005
    sae = runner.run()

    def summed_distance(point: Tensor) -> float:
        return (seen[0] - point).norm(dim=1).sum().item()

    at_start = summed_distance(sae.b_dec)
    assert at_start < summed_distance(seen[0].mean(0)) < summed_distance(torch.zeros(D))
    for seed in range(20):
        aside = random_input(D, seed=seed, dtype=torch.float32)
        assert at_start < summed_distance(sae.b_dec + 0.5 * aside)
    torch.testing.assert_close(sae.b_dec, sae.b_router, rtol=1e-4, atol=1e-4)


# --- Other runners of SAELens


def test_the_multi_sae_runner_trains_switch_beside_other_architectures(tmp_path, model, dataset):
    cfg = MultiSAETrainingRunnerConfig(
        saes={
            "switch": SwitchTrainingSAEConfig(**SAE_FIELDS),
            "whitened": SwitchTrainingSAEConfig(**SAE_FIELDS, normalize_activations="covariance_whitening"),
            "standard": StandardTrainingSAEConfig(d_in=D, d_sae=F),
        },
        hook_names={"switch": HOOK, "whitened": "blocks.0.hook_resid_pre", "standard": HOOK},
        n_batches_for_norm_estimate=2,
        **{
            name: value
            for name, value in run_fields(tmp_path).items()
            if name in {f.name for f in fields(MultiSAETrainingRunnerConfig)}
        },
    )
    saes = MultiSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()
    x = stored_activations(model, dataset)
    for name in ("switch", "whitened"):
        loaded = SAE.load_from_disk(tmp_path / "output" / name)
        assert type(loaded) is SwitchSAE
        torch.testing.assert_close(loaded(x), saes[name](x), **exactly)


def test_the_synthetic_runner_trains_and_evaluates_switch(tmp_path):
    cfg = SyntheticSAERunnerConfig(
        synthetic_model=SyntheticModelConfig(num_features=20, hidden_dim=D, seed=0),
        sae=SwitchTrainingSAEConfig(**SAE_FIELDS),
        training_samples=10 * 64,
        batch_size=64,
        eval_samples=128,
        output_path=str(tmp_path / "output"),
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    result = SyntheticSAERunner(cfg).run()
    assert 0 < result.final_eval.sae_l0 <= K
    assert 0 <= result.final_eval.mcc <= 1
    assert type(SAE.load_from_disk(tmp_path / "output")) is SwitchSAE


# --- Evaluations and hooked models


def sae_for(hook_name: str, kind: str = "inference", **options):
    metadata = SAEMetadata(hook_name=hook_name, context_size=CONTEXT, prepend_bos=True)
    if hook_name == HOOK_Z:
        options["reshape_activations"] = "hook_z"
    if kind == "training":
        return training_sae(metadata=metadata, dtype="float32", **options)
    return switch_sae(metadata=metadata, dtype="float32", **options)


def store_for(model, sae, dataset) -> ActivationsStore:
    return ActivationsStore.from_sae(
        model,
        sae,
        dataset,
        streaming=False,
        store_batch_size_prompts=4,
        n_batches_in_buffer=4,
        train_batch_size_tokens=32,
        total_tokens=1024,
    )


@pytest.mark.parametrize("kind", ["inference", "training"])
@pytest.mark.parametrize("hook_name", [HOOK, HOOK_Z])
@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
def test_run_evals_measures_everything(kind, hook_name, normalize_activations, model, dataset):
    sae = sae_for(hook_name, kind, normalize_activations=normalize_activations)
    reshaping = sae.hook_z_reshaping_mode
    store = store_for(model, sae, dataset)
    metrics, featurewise = run_evals(
        sae, store, model, ActivationScaler(), get_eval_everything_config(4, 2, 2), exclude_special_tokens=[0]
    )
    assert sae.hook_z_reshaping_mode == reshaping
    flat = [value for group in metrics.values() for value in group.values()]
    assert all(math.isfinite(value) for value in flat), metrics
    assert 0 < metrics["sparsity"]["l0"] <= K
    assert len(featurewise["feature_density"]) == len(featurewise["encoder_norm"]) == F


def test_run_evals_scores_a_perfect_sae_as_perfect(model, dataset):
    sae = sae_for(HOOK, n_experts=1, d_sae=2 * D, k=D)
    with torch.no_grad():  # x = relu(x) - relu(-x)
        for parameter in sae.parameters():
            parameter.zero_()
        sae.W_dec.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
        sae.W_enc.copy_(sae.W_dec.T)
    store = store_for(model, sae, dataset)
    metrics, _ = run_evals(sae, store, model, ActivationScaler(), get_eval_everything_config(4, 1, 1))
    assert metrics["reconstruction_quality"]["explained_variance"] == pytest.approx(1, abs=1e-5)
    assert metrics["reconstruction_quality"]["mse"] == pytest.approx(0, abs=1e-6)
    assert metrics["model_performance_preservation"]["ce_loss_score"] == pytest.approx(1, abs=1e-3)
    assert metrics["sparsity"]["l0"] == pytest.approx(D)


@pytest.fixture
def tokens(dataset) -> Tensor:
    return torch.tensor(dataset[:3]["tokens"])


def direct(model, sae, tokens: Tensor, edit=lambda acts: acts) -> Tensor:
    """The model's logits with the hook's activations replaced by hand."""
    return model.run_with_hooks(
        tokens,
        fwd_hooks=[(sae.cfg.metadata.hook_name, lambda x, hook: sae.decode(edit(sae.encode(x))))],  # noqa: ARG005
    )


@pytest.mark.parametrize("hook_name", [HOOK, HOOK_Z])
@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
def test_a_hooked_transformer_runs_with_the_sae_and_caches_its_hooks(hook_name, normalize_activations, model, tokens):
    sae = sae_for(hook_name, normalize_activations=normalize_activations)
    plain = model(tokens)
    expected = direct(model, sae, tokens)
    torch.testing.assert_close(model.run_with_saes(tokens, saes=[sae]), expected, **exactly)
    logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for name, width in HOOK_SHAPES.items():
        assert cache[f"{hook_name}.{name}"].shape[:2] == (3, CONTEXT)
        assert cache[f"{hook_name}.{name}"][0, 0].numel() == width  # hook_z's output is split into heads again
    assert (cache[f"{hook_name}.hook_sae_acts_post"].count_nonzero(dim=-1) <= K).all()
    with_error = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    torch.testing.assert_close(with_error, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(tokens), plain, **exactly)
    assert not torch.allclose(expected, plain)


def test_interventions_on_latents_and_router_reach_the_models_logits(model, tokens):
    sae = sae_for(HOOK)

    def steer(acts, hook):  # noqa: ARG001
        acts[..., 7] += 3

    out = model.run_with_hooks_with_saes(tokens, saes=[sae], fwd_hooks=[(f"{HOOK}.hook_sae_acts_post", steer)])
    expected = direct(
        model, sae, tokens, lambda acts: acts.index_add(-1, torch.tensor([7]), torch.full((3, CONTEXT, 1), 3.0))
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

    def only_expert_one(logits, hook):  # noqa: ARG001
        return logits.index_fill(-1, torch.tensor(1), 1e4)

    _, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    with model.saes(saes=[sae]), model.hooks([(f"{HOOK}.hook_sae_router_logits", only_expert_one)]):
        _, forced = model.run_with_cache(tokens)
    name = f"{HOOK}.hook_sae_acts_post"
    used = [(c[name].view(-1, E, M) != 0).any(2).any(0).tolist() for c in (cache, forced)]
    assert sum(used[0]) > 1
    assert used[1] == [False, True, False, False]


def test_attached_saes_can_be_added_replaced_and_reset(model, tokens):
    plain, first, second = model(tokens), sae_for(HOOK), randomize(sae_for(HOOK), seed=4)
    model.add_sae(first)
    torch.testing.assert_close(model(tokens), expected_first := model(tokens), **exactly)
    with model.saes(saes=[second]):
        assert model.acts_to_saes == {HOOK: second}
        assert not torch.allclose(model(tokens), expected_first)
    assert model.acts_to_saes == {HOOK: first}
    torch.testing.assert_close(model(tokens), expected_first, **exactly)
    model.reset_saes()
    torch.testing.assert_close(model(tokens), plain, **exactly)
    assert not torch.allclose(expected_first, plain)


def test_gradients_flow_from_the_models_loss_through_the_sae(model, tokens):
    sae = sae_for(HOOK)
    seen = {}

    def keep(acts, hook):  # noqa: ARG001
        acts.retain_grad()
        seen["acts"] = acts

    model.run_with_hooks_with_saes(
        tokens, saes=[sae], fwd_hooks=[(f"{HOOK}.hook_sae_acts_post", keep)]
    ).square().mean().backward()
    assert seen["acts"].grad.shape == (3, CONTEXT, F)
    assert seen["acts"].grad.count_nonzero() > (seen["acts"] != 0).sum()  # latents not active have theirs too
    assert all(p.grad is not None and p.grad.any() for p in sae.parameters())


def test_a_transformer_bridge_runs_with_the_sae(tokens):
    transformers = pytest.importorskip("transformers")
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=32, n_positions=CONTEXT, n_embd=D, n_layer=2, n_head=2)
    ).eval()
    bridge = SAETransformerBridge.boot_transformers("gpt2", hf_model=gpt2, tokenizer=tiny_tokenizer())
    sae = sae_for(HOOK)
    with torch.no_grad():
        plain = bridge(tokens)
        replaced = bridge.run_with_saes(tokens, saes=[sae])
        torch.testing.assert_close(
            bridge.run_with_saes(tokens, saes=[sae], use_error_term=True), plain, rtol=1e-4, atol=1e-4
        )
        _, cache = bridge.run_with_cache_with_saes(tokens, saes=[sae])
        torch.testing.assert_close(bridge(tokens), plain, **exactly)
    assert not torch.allclose(replaced, plain)
    acts = cache[bridge.get_sae_hook_name(sae)]
    assert acts.shape == (3, CONTEXT, F)
    assert cache[bridge.get_sae_hook_name(sae, "hook_sae_router_probs")].shape == (3, CONTEXT, E)


# --- Our runner config


def test_fields_of_the_sae_and_of_the_runner_find_their_places(tmp_path):
    cfg = our_config(tmp_path, gate="one", load_balance_scale="d_in", training_tokens=640, seed=7, dtype="bfloat16")
    assert isinstance(cfg, sae_lens.LanguageModelSAERunnerConfig)
    assert type(cfg.sae) is SwitchTrainingSAEConfig
    assert (cfg.sae.d_in, cfg.sae.d_sae, cfg.sae.n_experts, cfg.sae.k, cfg.sae.gate) == (D, F, E, K, "one")
    assert cfg.sae.load_balance_coefficient == 3.0
    assert (cfg.training_tokens, cfg.seed, cfg.hook_name) == (640, 7, HOOK)
    assert cfg.dtype == cfg.sae.dtype == "bfloat16"
    assert cfg.to_dict()["sae"]["architecture"] == "switch"


def test_device_and_dtype_go_to_both_and_sae_kwargs_win(tmp_path):
    cfg = our_config(tmp_path, device="meta", dtype="float16", sae_kwargs={"dtype": "float64", "k": 2})
    assert (cfg.device, cfg.sae.device, cfg.dtype, cfg.sae.dtype, cfg.sae.k) == (
        "meta",
        "meta",
        "float16",
        "float64",
        2,
    )


def test_what_is_not_given_follows_the_paper():
    tokens, batch = 1_000_000, 1000
    cfg = LanguageModelSAERunnerConfig(
        architecture="switch",
        d_in=D,
        d_sae=2**16,
        n_experts=E,
        training_tokens=tokens,
        train_batch_size_tokens=batch,
        verbose=False,
    )
    assert cfg.lr == scaling_law_lr(2**16) == 1e-4
    assert cfg.lr_end == pytest.approx(1e-5)
    assert cfg.lr_decay_steps == 200
    assert (cfg.adam_beta1, cfg.adam_beta2) == (0.9, 0.999)
    sae = cfg.sae
    assert (sae.bias_start, sae.normalize_decoder, sae.project_decoder_grad, sae.decoder_init_norm) == (
        "geometric_median",
        True,
        True,
        1.0,
    )
    defaults = LanguageModelSAERunnerConfig(architecture="switch", d_in=D, d_sae=F, n_experts=E, k=K, verbose=False)
    assert defaults.lr_decay_steps == defaults.total_training_steps // 5


def test_what_is_given_wins_over_the_paper():
    cfg = LanguageModelSAERunnerConfig(
        architecture="switch",
        **SAE_FIELDS,
        lr=3e-4,
        lr_decay_steps=0,
        adam_beta1=0.0,
        bias_start="zeros",
        normalize_decoder=False,
        decoder_init_norm=0.1,
        load_balance_coefficient=0.0,
        verbose=False,
    )
    assert (cfg.lr, cfg.lr_decay_steps, cfg.adam_beta1) == (3e-4, 0, 0.0)
    assert (cfg.sae.bias_start, cfg.sae.normalize_decoder, cfg.sae.decoder_init_norm) == ("zeros", False, 0.1)
    assert cfg.sae.load_balance_coefficient == 0.0


def test_the_learning_rate_is_constant_and_then_falls_to_zero_over_the_last_fifth(tmp_path):
    cfg = our_config(tmp_path, training_tokens=20 * 64)
    batches = activations(20)
    the_trainer = host_trainer.SAETrainer(cfg.to_sae_trainer_config(), training_sae(), iter(batches))
    rates = []
    for _ in steps(the_trainer, batches):
        rates.append(the_trainer.lr_scheduler.get_last_lr()[0])
    assert rates[:15] == pytest.approx([scaling_law_lr(F)] * 15)
    assert rates[15:] == pytest.approx([scaling_law_lr(F) * (1 - i / 4) for i in range(5)])


def test_it_takes_the_type_of_its_sae_config_in_brackets_as_saelens_config_does(tmp_path):
    sae = SwitchTrainingSAEConfig(**SAE_FIELDS)
    assert LanguageModelSAERunnerConfig[SwitchTrainingSAEConfig](sae=sae, **run_fields(tmp_path)).sae is sae


def test_without_an_architecture_it_is_saelens_own_config(tmp_path):
    sae = SwitchTrainingSAEConfig(**SAE_FIELDS)
    ours = LanguageModelSAERunnerConfig(sae=sae, **run_fields(tmp_path))
    positional = LanguageModelSAERunnerConfig(sae, **run_fields(tmp_path))
    stock = sae_lens.LanguageModelSAERunnerConfig(sae=sae, **run_fields(tmp_path))
    for cfg in (ours, positional):
        assert cfg.sae is sae
        differing = {n for n, v in asdict(stock).items() if asdict(cfg)[n] != v}
        assert differing == {"checkpoint_path"}


@pytest.mark.parametrize("architecture", [*sorted(OURS), *STOCK_ARCHITECTURES])
@pytest.mark.parametrize("reader", [LanguageModelSAERunnerConfig, sae_lens.LanguageModelSAERunnerConfig])
def test_to_dict_json_from_dict_round_trip_through_our_class_and_stocks(architecture, reader, tmp_path):
    options = {
        "matryoshka_batchtopk": {"matryoshka_widths": [F // 2, F]},
        "switch": {"n_experts": E, "k": K},
        "sparse_topk": {"k": K},
        "topk": {"k": K},
    }
    cfg = LanguageModelSAERunnerConfig(
        architecture=architecture, d_in=D, d_sae=F, **options.get(architecture, {}), **run_fields(tmp_path, seed=5)
    )
    written = json.loads(json.dumps(cfg.to_dict()))
    read = reader.from_dict(written)
    assert type(read) is reader
    assert read.sae == cfg.sae
    assert json.loads(json.dumps(read.to_dict())) == written


def test_our_runner_config_can_be_replaced_pickled_copied_compared_and_printed(tmp_path):
    cfg = our_config(tmp_path, lr=0.5)
    changed = replace(cfg, seed=9)
    assert type(changed) is LanguageModelSAERunnerConfig
    assert (changed.seed, changed.lr, changed.sae) == (9, 0.5, cfg.sae)
    for twin in (pickle.loads(pickle.dumps(cfg)), copy.deepcopy(cfg)):
        assert type(twin) is LanguageModelSAERunnerConfig
        assert twin == cfg
        assert twin.to_dict() == cfg.to_dict()
        assert twin.sae is not cfg.sae
        assert twin.tokens_per_buffer == cfg.tokens_per_buffer
    assert cfg != changed
    assert repr(cfg).startswith("LanguageModelSAERunnerConfig(sae=SwitchTrainingSAEConfig(d_in=12, d_sae=40")
    stock, options = fields(sae_lens.LanguageModelSAERunnerConfig), fields(TrainerOptions)
    assert [f.name for f in fields(cfg)] == [f.name for f in (*stock, *options)]


@pytest.mark.parametrize(
    ("given", "meant"),
    [("swich", "'switch'"), ("Switch", "'switch'"), ("top_k", "'topk'"), ("batchtop", "'batchtopk'")],
)
def test_an_unknown_architecture_is_refused_with_the_nearest_name(given, meant):
    with pytest.raises(ValueError, match=f"got '{given}'; did you mean {meant}"):
        LanguageModelSAERunnerConfig(architecture=given, d_in=D, d_sae=F)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("n_expert", "n_experts"), ("train_batch_size", "train_batch_size_tokens"), ("hook_nam", "hook_name")],
)
def test_an_unknown_field_is_refused_with_the_nearest_name(given, meant):
    for error in (ValueError, TypeError):
        with pytest.raises(error, match=f"'{given}'; did you mean '{meant}'"):
            LanguageModelSAERunnerConfig(architecture="switch", **SAE_FIELDS, **{given: 1})


def test_a_field_of_another_architecture_is_refused():
    with pytest.raises(ValueError, match="n_experts"):
        LanguageModelSAERunnerConfig(architecture="topk", d_in=D, d_sae=F, n_experts=E)
    with pytest.raises(ValueError, match="n_exprts.*n_experts"):
        LanguageModelSAERunnerConfig(architecture="switch", d_in=D, d_sae=F, sae_kwargs={"n_exprts": E})
    with pytest.raises(ValueError, match="k"):
        LanguageModelSAERunnerConfig(sae=SwitchTrainingSAEConfig(**SAE_FIELDS), k=3)


def test_architecture_and_sae_exclude_each_other_and_sizes_are_needed():
    sae = SwitchTrainingSAEConfig(**SAE_FIELDS)
    for bad in ({"sae": sae, "architecture": "switch"}, {}):
        with pytest.raises(ValueError, match="exactly one"):
            LanguageModelSAERunnerConfig(**bad)
    with pytest.raises(ValueError, match="needs d_in and d_sae"):
        LanguageModelSAERunnerConfig(architecture="switch", n_experts=E)
    with pytest.raises(ValueError, match="sae_kwargs"):
        LanguageModelSAERunnerConfig(sae=sae, sae_kwargs={"k": 2})
