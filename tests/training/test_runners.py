"""Whole runs, by SAELens's runners and by ours."""

import copy
import json
import os
import signal
from dataclasses import fields, replace

import pytest
import sae_lens
import torch
from helpers import CONTEXT, HOOK, HOOK_Z, D, F, K, run_fields, small_run_warnings, training_config, training_sae
from helpers.runs import (
    STOCK_ARCHITECTURES,
    both_configs,
    exactly,
    our_config,
    same_tensors,
    stock_config,
    stored_activations,
)
from sae_lens import SAE, LanguageModelSAETrainingRunner
from sae_lens.config import SAETrainerConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from sae_lens.training import multi_sae_trainer as multi_trainer_module
from sae_lens.training._interruption import InterruptedException
from safetensors.torch import load_file

import sae_lens_switch
from sae_lens_switch import (
    CheckpointError,
    LanguageModelSAERunnerConfig,
    SwitchSAE,
    SwitchTrainingSAE,
    TrainerOptions,
    TrainingDivergedError,
)
from sae_lens_switch.common.substitution import constructing
from sae_lens_switch.saes.decoder_constraint import constrain_optimizer_steps
from sae_lens_switch.saes.registration import OVERRIDABLE
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.history import FILENAME, read_history
from sae_lens_switch.training.multi_sae_trainer import MultiSAETrainer
from sae_lens_switch.training.runners import with_options

pytestmark = small_run_warnings


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


@pytest.mark.parametrize("architecture", [name for name in STOCK_ARCHITECTURES if name not in OVERRIDABLE])
def test_our_runner_config_trains_every_other_architecture_as_stock_does(architecture, tmp_path, model, dataset):
    sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    options = {"k": K} if "k" in {f.name for f in fields(config_class)} else {}
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
        trainer_ = MultiSAETrainer(cfg, saes, dict.fromkeys("ab", HOOK), iter([{HOOK: bad}] * 10))
    with pytest.raises(
        TrainingDivergedError, match=f"2 steps in a row .* weights are saved: {tmp_path}/diverged_"
    ) as error:
        trainer_.fit()
    (saved,) = tmp_path.iterdir()
    assert str(error.value).endswith(str(saved))
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
