"""Settings that cannot be: refused when a config is made or used, with the field, its value and what was expected."""

import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import HOOK, D, E, F, K, activations, run_fields
from sae_lens import LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.saes.standard_sae import StandardTrainingSAEConfig
from sae_lens.synthetic.synthetic_sae_runner import SyntheticSAERunnerConfig

from sae_lens_switch import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAEConfig,
    SwitchSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
    TrainerOptions,
)
from sae_lens_switch.common import validation
from sae_lens_switch.train import main
from sae_lens_switch.training import runners as runner
from sae_lens_switch.training.hooks import check_hook_name
from sae_lens_switch.training.synthetic import SyntheticSAERunner

SIZES = {"d_in": D, "d_sae": F, "n_experts": E, "k": K}
LENGTH = {"total_training_samples": 96, "train_batch_size_samples": 8}
NAN, INF = math.nan, math.inf
TABLES: dict[type, dict[str, validation.Rule]] = {
    SwitchSAEConfig: validation.SWITCH,
    SwitchTrainingSAEConfig: validation.SWITCH,
    SparseTopKTrainingSAEConfig: validation.SPARSE_TOPK,
    TrainerOptions: validation.OPTIONS,
    SAETrainerConfig: validation.STOCK_TRAINER,
    SparseSAETrainerConfig: validation.TRAINER,
    LoggingConfig: validation.LOGGING,
    LanguageModelSAERunnerConfig: validation.RUNNER,
    MultiSAETrainingRunnerConfig: validation.MULTI_RUNNER,
    SyntheticSAERunnerConfig: validation.SYNTHETIC_RUNNER,
}


def trainer_config(**given: Any) -> SparseSAETrainerConfig:
    return SparseSAETrainerConfig(**(LENGTH | given))


def run_config(path: Path, **given: Any) -> LanguageModelSAERunnerConfig:
    return LanguageModelSAERunnerConfig(architecture="switch", **(SIZES | run_fields(path) | given))


@pytest.mark.parametrize("config", TABLES, ids=lambda config: config.__name__)
def test_every_field_of_every_config_has_a_rule(config):
    without = {f.name for f in fields(config)} - TABLES[config].keys()
    assert not without, f"add them to the table of {config.__name__} in validation.py"


@pytest.mark.parametrize("config", TABLES, ids=lambda config: config.__name__)
def test_the_rules_take_every_default_and_follow_the_annotations(config):
    hints = get_type_hints(config)
    for field in fields(config):
        rule = TABLES[config][field.name]
        if isinstance(field.default, str | bool | int | float | None | tuple):
            validation.check_value(field.name, field.default, rule)
        if hints[field.name] in (int, bool, str):
            with pytest.raises(ValueError, match=rf"{field.name} must be .*; got None"):
                validation.check_value(field.name, None, rule)
        if isinstance(rule, validation.Choice) and all(isinstance(name, str) for name in get_args(hints[field.name])):
            assert set(get_args(hints[field.name])) <= set(rule.names)


WHOLE, POSITIVE = "a whole number, at least", "a positive finite number"
WRONG: dict[str, tuple[str, list[Any]]] = {
    "total_training_samples": (f"{WHOLE} 1", [0, -5, NAN, None, "96", True, 96.0]),
    "train_batch_size_samples": (f"{WHOLE} 1", [0, -1, None, 10**400]),
    "lr": (f"{POSITIVE}, at most 1000", [True, -1, 0, INF, NAN, "1e-3", 1e-300, 1e300, []]),
    "lr_end": ("a finite number, at least 0 or None", [-1, INF, "0"]),
    "adam_beta1": ("a finite number, at least 0 and below 1", [1, -0.1, NAN, None]),
    "adam_beta2": ("a finite number, at least 0 and below 1", [1, "0.9"]),
    "lr_warm_up_steps": (f"{WHOLE} 0", [-1, 1.5, "2", None]),
    "lr_decay_steps": (f"{WHOLE} 0", [-1, 1.5]),
    "n_checkpoints": (f"{WHOLE} 0", [-1, INF, False]),
    "dead_feature_window": (f"{WHOLE} 0 and at most 2147483647", [-1, 2**40]),  # is compared with int32 counts
    "feature_sampling_window": (f"{WHOLE} 1", [0, -3]),
    "n_restart_cycles": (f"{WHOLE} 1", [0]),
    "n_batches_for_norm_estimate": (f"{WHOLE} 1", [0, None]),
    "max_skipped_steps": (f"{WHOLE} 1", [0, -1]),
    "collapse_patience": (f"{WHOLE} 1", [0, 2.5]),
    "autocast": ("True or False", ["false", 0, None]),
    "save_final_checkpoint": ("True or False", ["False", 1]),
    "collapse_share": (f"{POSITIVE}, at most 1 or None", [1.5, 0, NAN, "1"]),
    "max_grad_norm": (f"{POSITIVE} or None", [INF, NAN, True, -1]),
    "lr_scheduler_name": ("one of 'constant', 'cosineannealing', 'cosineannealingwarmrestarts'", ["cosine", None]),
    "optimizer": ("one of 'adam', 'row_sparse_adam'", [None, "sgd"]),
    "device": ("one that torch knows", ["cqu", None, 3]),
    "checkpoint_path": ("a path or None", [3, "", "a\0b"]),
    "keep_checkpoints": (f"{WHOLE} 1 or None", [True, 0]),
    "logger": ("a LoggingConfig", [None, {}]),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (_, values) in WRONG.items() for value in values])
def test_a_trainers_settings_are_refused_when_made_and_when_changed(name, value):
    message = f"{name} must be {re.escape(WRONG[name][0])}.*; got {re.escape(validation.shown(value))}"
    with pytest.raises(ValueError, match=message):
        trainer_config(**{name: value})
    for cfg in (trainer_config(), SAETrainerConfig(**LENGTH)):
        if hasattr(cfg, name):
            setattr(cfg, name, value)
            with pytest.raises(ValueError, match=message):
                SparseSAETrainer(cfg, SwitchTrainingSAE(SwitchTrainingSAEConfig(**SIZES)), iter([]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"d_sae": True}, f"d_sae must be {WHOLE} 1; got True"),
        ({"d_in": "12"}, "d_in must be .*; got '12'"),
        ({"load_balance_coefficient": INF}, "load_balance_coefficient must be a finite number, .*; got inf"),
        ({"aux_loss_coefficient": INF}, "aux_loss_coefficient must be a finite number, at least 0; got inf"),
        ({"aux_loss_coefficient": None}, "aux_loss_coefficient must be .*; got None"),
        ({"load_balance_warm_up_steps": -1}, f"load_balance_warm_up_steps must be {WHOLE} 0; got -1"),
        ({"load_balance_warm_up_steps": "3"}, "load_balance_warm_up_steps must be .*; got '3'"),
        ({"normalize_decoder": "false"}, "normalize_decoder must be True or False; got 'false'"),
        ({"tie_router_bias": 1}, "tie_router_bias must be True or False; got 1"),
        ({"router_start_std": True}, "router_start_std must be .*; got True"),
        ({"dtype": "float31"}, "dtype must be one of float32, .*; got 'float31'"),
        ({"normalize_activations": []}, r"normalize_activations must be one of .*; got \[\]"),
        ({"reshape_activations": "hook_q"}, "reshape_activations must be one of .*; got 'hook_q'"),
        ({"metadata": None}, "metadata must be a SAEMetadata or dict; got None"),
    ],
)
def test_an_saes_settings_are_refused_when_made_and_when_changed(given, message):
    with pytest.raises(ValueError, match=message):
        SwitchTrainingSAEConfig(**(SIZES | given))
    cfg = SwitchTrainingSAEConfig(**SIZES)
    vars(cfg).update(given)
    with pytest.raises(ValueError, match=message):
        SwitchTrainingSAE(cfg)
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(**SIZES))
    vars(sae.cfg).update(given)
    with pytest.raises(ValueError, match=message):
        SparseSAETrainer(trainer_config(), sae, iter([]))


def test_an_sae_that_no_memory_holds_is_refused_before_it_is_made():
    with pytest.raises(ValueError, match="d_sae=4398046511104: the weights alone take"):
        SwitchTrainingSAE(SwitchTrainingSAEConfig(**(SIZES | {"d_sae": 2**42})))


def test_fields_of_another_architecture_are_checked_by_their_annotations(tmp_path):
    sae = StandardTrainingSAEConfig(d_in=D, d_sae=F, l1_coefficient=NAN)
    with pytest.raises(ValueError, match="l1_coefficient must be a finite number; got nan"):
        LanguageModelSAERunnerConfig(sae=sae, **run_fields(tmp_path))


def test_numbers_of_numpy_and_paths_are_kept_as_plain_ones(tmp_path):
    cfg = trainer_config(
        lr=np.float32(0.5), n_checkpoints=np.int64(3), autocast=np.bool_(False), checkpoint_path=tmp_path
    )
    kept = cfg.lr, cfg.n_checkpoints, cfg.autocast, cfg.checkpoint_path
    assert kept == (0.5, 3, False, str(tmp_path))
    assert [type(value) for value in kept] == [float, int, bool, str]


COSINE = {"lr_scheduler_name": "cosineannealing"}
RESTARTS = {"lr_scheduler_name": "cosineannealingwarmrestarts"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"total_training_samples": 7},
            "total_training_samples must be at least train_batch_size_samples, 8, .*; got 7",
        ),
        ({"lr_warm_up_steps": 13}, "lr_warm_up_steps and .* fit into the 12 training steps .*; got 13 and 0"),
        ({"lr_warm_up_steps": 6, "lr_decay_steps": 7}, "lr_decay_steps must fit .*; got 6 and 7"),
        ({**COSINE, "lr_warm_up_steps": 6, "lr_decay_steps": 6}, "leave 1 for .*'cosineannealing'; got 6 and 6"),
        ({**RESTARTS, "n_restart_cycles": 13}, "leave 13 for .* with n_restart_cycles=13"),
        ({**COSINE, "lr": 1e-3, "lr_end": 1e-2}, "lr_end must be at most lr=0.001 with cosineannealing; got 0.01"),
        ({**COSINE, "lr_end": 0, "lr_decay_steps": 2}, "lr_end must be positive with .*lr_decay_steps=2; got 0"),
        ({"n_checkpoints": 13}, "n_checkpoints must be at most the 12 training steps; got 13"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        trainer_config(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"lr_warm_up_steps": 12},
        {"lr_warm_up_steps": 5, "lr_decay_steps": 7},
        {**COSINE, "lr_warm_up_steps": 5, "lr_decay_steps": 6},
        {**RESTARTS, "n_restart_cycles": 12},
        {"lr_scheduler_name": "Constant"},
        {"total_training_samples": 8, "n_checkpoints": 1},
    ],
)
def test_schedules_that_just_fit_train(given):
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(**SIZES))
    trainer = SparseSAETrainer(trainer_config(**given), sae, iter(activations(12, 8)))
    trainer.fit()
    assert trainer.n_training_samples == trainer.cfg.total_training_samples
    assert all(p.isfinite().all() for p in sae.parameters())


# Runners


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"training_tokens": 63}, "training_tokens must be at least train_batch_size_tokens, 64, .*; got 63"),
        ({"lr": "fast"}, "lr must be .*; got 'fast'"),
        ({"training_tokens": "many"}, "training_tokens must be .*; got 'many'"),
        ({"context_size": 0}, "context_size must be .*; got 0"),
        ({"context_size": 2**40}, "context_size must be .* at most 16777216; got 1099511627776"),
        ({"n_batches_in_buffer": 3}, r"n_batches_in_buffer must be at least 4, .* train_batch_size_tokens=64; got 3"),
        ({"seqpos_slice": (16, None)}, "seqpos_slice must leave tokens of context_size=16"),
        ({"seqpos_slice": ()}, r"seqpos_slice must be .*; got \(\)"),
        ({"seqpos_slice": ("1",)}, "seqpos_slice must be a list, each a whole number or None"),
        ({"activations_mixing_fraction": 1.5}, "activations_mixing_fraction must be .* at most 1; got 1.5"),
        ({"streaming": "false"}, "streaming must be True or False; got 'false'"),
        ({"hook_name": ""}, "hook_name must be text that is not empty; got ''"),
        ({"prefetch_llm_batches": -1}, "prefetch_llm_batches must be .*; got -1"),
        ({"exclude_special_tokens": ["a"]}, "exclude_special_tokens must be True or False or a list"),
        ({"model_kwargs": None}, "model_kwargs must be a dict; got None"),
        ({"logger": LoggingConfig(log_to_wandb=False, wandb_log_frequency=0)}, "logger.wandb_log_frequency must be"),
        ({"collapse_share": 2}, "collapse_share must be"),
        ({"dataset_path": None}, "dataset_path must be a path; got None"),
    ],
)
def test_a_runs_settings_are_refused_when_made_and_before_a_model_is_loaded(tmp_path, monkeypatch, given, message):
    with pytest.raises(ValueError, match=message):
        run_config(tmp_path, **given)
    monkeypatch.setattr(runner.sae_lens.LanguageModelSAETrainingRunner, "__init__", lambda *_: pytest.fail("loaded"))
    cfg = run_config(tmp_path)
    vars(cfg).update(given)
    with pytest.raises(ValueError, match=message):
        LanguageModelSAETrainingRunner(cfg)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset_path": ""}, "dataset_path must name a dataset where none is passed in; got ''"),
        ({"from_pretrained_path": "no/such"}, "from_pretrained_path must be a folder with an SAE; got 'no/such'"),
        ({"hook_name": "blocks.7.hook_resid_pots"}, "did you mean 'blocks.7.hook_resid_post'"),
        ({"llm_device": "cuda:99"}, "llm_device must exist; got 'cuda:99'"),
    ],
)
def test_what_a_run_does_not_find_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, given, message):
    monkeypatch.setattr(runner.sae_lens.LanguageModelSAETrainingRunner, "__init__", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        LanguageModelSAETrainingRunner(run_config(tmp_path, **given))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "-1"], "lr must be a positive finite number"),
        (["--collapse-share", "1.5"], "collapse_share must be"),
        (
            ["--lr-scheduler-name", "cosineannealing", "--lr-warm-up-steps", "488"],
            "lr_warm_up_steps and lr_decay_steps",
        ),
        (["--training-tokens", "100"], "training_tokens must be at least train_batch_size_tokens, 4096"),
        (["--n-batches-in-buffer", "20"], "n_batches_in_buffer must be at least 32"),
        (["--n-batches-in-buffer", str(10**15)], "n_batches_in_buffer=1000000000000000: its activations alone take"),
        (["--aux-loss-coefficient", "1", "--normalize-activations", "layer_norm"], "aux_loss_coefficient must be 0"),
        (
            ["--hook-name", "blocks.7.hook_resid_pots"],
            "hook_name must be a hook of TransformerLens; got 'blocks.7.hook",
        ),
        (["--device", "meta"], "device must be a device that this machine has; got 'meta'"),
        (["--output-path", "a" * 300], "output_path must be a writable folder, or one that can be created; got 'aaa"),
        (["--output-path", f"{__file__}/sae"], "output_path must be a folder"),
    ],
)
def test_a_dry_run_refuses_what_would_fail_later(capsys, flags, message):
    sizes = [part for name, value in SIZES.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["--architecture", "switch", *sizes, *flags, "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"error: {message}" in err


def test_the_default_buffer_holds_the_default_batch():
    """SAELens's defaults, 20 contexts of 128 tokens for batches of 4096, fail when the model is loaded."""
    cfg = LanguageModelSAERunnerConfig(architecture="switch", **SIZES)
    assert cfg.n_batches_in_buffer * cfg.context_size == 2 * cfg.train_batch_size_tokens
    fits = LanguageModelSAERunnerConfig(architecture="switch", **SIZES, train_batch_size_tokens=2560)
    assert fits.n_batches_in_buffer == 20


@pytest.mark.parametrize(
    "name", ["blocks.11.hook_resid_post", "blocks.0.ln2_post.hook_scale", "blocks.3.attn.hook_z", "hook_embed", "mine"]
)
def test_hook_names_without_a_slip_pass_without_the_model(name):
    check_hook_name(name)


def test_a_slip_in_a_hook_name_is_refused_without_the_model():
    with pytest.raises(ValueError, match="got 'blocks.7.hook_resid_pots'; did you mean 'blocks.7.hook_resid_post'"):
        check_hook_name("blocks.7.hook_resid_pots")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hook_name": "blocks.1.hook_resid_pree"}, "hook_name must be .*'blocks.1.hook_resid_pree'; did you mean .*"),
        ({"hook_name": "blocks.9.hook_resid_pre"}, "hook_name must be .*; did you mean 'blocks.[01].hook_resid_pre'"),
        ({"hook_name": "blocks.0.hook_attn_in"}, "hook_name must be a hook that tiny reaches as it is configured"),
        ({"hook_head_index": 0}, "hook_head_index must be None or one of the heads"),
        ({"hook_name": "blocks.0.attn.hook_q", "hook_head_index": 2}, "hook_head_index must be .*; got 2"),
    ],
)
def test_a_hook_that_the_model_does_not_have_is_refused_before_training(tmp_path, model, dataset, given, message):
    one = LanguageModelSAETrainingRunner(run_config(tmp_path, **given), override_model=model, override_dataset=dataset)
    with pytest.raises(ValueError, match=message):
        one.run()
    own = {"hook_name": HOOK, "hook_head_index": None} | given
    names = {"hook_names": own.pop("hook_name"), "hook_head_indices": own.pop("hook_head_index")}
    common = {f.name for f in fields(MultiSAETrainingRunnerConfig)}
    shared = {n: v for n, v in (run_fields(tmp_path) | own).items() if n in common}
    cfg = MultiSAETrainingRunnerConfig(saes={"a": SwitchTrainingSAEConfig(**SIZES)}, **names, **shared)
    many = MultiSAETrainingRunner(cfg, override_model=model, override_dataset=dataset)
    with pytest.raises(ValueError, match=message):
        many.run()


def test_contexts_longer_than_the_models_are_refused_before_training(tmp_path, model):
    rows = Dataset.from_dict({"tokens": [[0] + [3] * 31] * 50})
    cfg = run_config(tmp_path, context_size=17)
    with pytest.raises(ValueError, match="context_size must be at most 16, the longest context of tiny; got 17"):
        LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=rows).run()


def test_the_other_runners_check_their_configs(tmp_path):
    common = {f.name for f in fields(MultiSAETrainingRunnerConfig)}
    shared = {n: v for n, v in run_fields(tmp_path).items() if n in common}
    many = MultiSAETrainingRunnerConfig(saes={"a": SwitchTrainingSAEConfig(**SIZES)}, hook_names=HOOK, **shared)
    many.lr = -1
    with pytest.raises(ValueError, match="lr must be a positive finite number"):
        MultiSAETrainingRunner(many)
    synthetic = SyntheticSAERunnerConfig("nowhere", SwitchTrainingSAEConfig(**SIZES), training_samples=96, batch_size=0)
    with pytest.raises(ValueError, match="batch_size must be a whole number, at least 1; got 0"):
        SyntheticSAERunner(synthetic)
    synthetic.batch_size = 97
    with pytest.raises(ValueError, match="training_samples must be at least batch_size, 97"):
        SyntheticSAERunner(synthetic)


@pytest.mark.parametrize("value", [10**5000, object(), torch.tensor(3)], ids=lambda value: type(value).__name__)
def test_whatever_is_refused_can_be_shown(value):
    with pytest.raises(ValueError, match="lr must be .*; got"):
        trainer_config(lr=value)
