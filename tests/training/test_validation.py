"""Settings that cannot be: refused when a config is made or used, with the field, its value and what was expected."""

import math
import re
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from helpers import D, F, activations, run_fields
from helpers.settings import LENGTH, SIZES, trainer_config
from sae_lens import LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.saes.standard_sae import StandardTrainingSAEConfig
from sae_lens.synthetic.synthetic_sae_runner import SyntheticSAERunnerConfig

from sae_lens_switch import (
    LanguageModelSAERunnerConfig,
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAEConfig,
    SwitchSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
    TrainerOptions,
)
from sae_lens_switch.common import rules
from sae_lens_switch.saes import field_rules as sae_rules
from sae_lens_switch.training import field_rules

NAN, INF = math.nan, math.inf
TABLES: dict[type, dict[str, rules.Rule]] = {
    SwitchSAEConfig: sae_rules.SWITCH,
    SwitchTrainingSAEConfig: sae_rules.SWITCH,
    SparseTopKTrainingSAEConfig: sae_rules.SPARSE_TOPK,
    TrainerOptions: field_rules.OPTIONS,
    SAETrainerConfig: field_rules.STOCK_TRAINER,
    SparseSAETrainerConfig: field_rules.TRAINER,
    LoggingConfig: field_rules.LOGGING,
    LanguageModelSAERunnerConfig: field_rules.RUNNER,
    MultiSAETrainingRunnerConfig: field_rules.MULTI_RUNNER,
    SyntheticSAERunnerConfig: field_rules.SYNTHETIC_RUNNER,
}


@pytest.mark.parametrize("config", TABLES, ids=lambda config: config.__name__)
def test_every_field_of_every_config_has_a_rule(config):
    without = {f.name for f in fields(config)} - TABLES[config].keys()
    assert not without, f"add them to the table of {config.__name__} in field_rules.py"


@pytest.mark.parametrize("config", TABLES, ids=lambda config: config.__name__)
def test_the_rules_take_every_default_and_follow_the_annotations(config):
    hints = get_type_hints(config)
    for field in fields(config):
        rule = TABLES[config][field.name]
        if isinstance(field.default, str | bool | int | float | None | tuple):
            rules.check_value(field.name, field.default, rule)
        if hints[field.name] in (int, bool, str):
            with pytest.raises(ValueError, match=rf"{field.name} must be .*; got None"):
                rules.check_value(field.name, None, rule)
        if isinstance(rule, rules.Choice) and all(isinstance(name, str) for name in get_args(hints[field.name])):
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
    message = f"{name} must be {re.escape(WRONG[name][0])}.*; got {re.escape(rules.shown(value))}"
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
        ({"metadata": None}, "metadata must be a SAEMetadata or dict with names as keys; got None"),
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
