"""A run's settings that cannot be: refused before a language model is loaded or training begins."""

from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import HOOK, run_fields
from helpers.settings import SIZES, trainer_config
from sae_lens import LoggingConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.synthetic.synthetic_sae_runner import SyntheticSAERunnerConfig

from sae_lens_switch import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    SwitchTrainingSAEConfig,
)
from sae_lens_switch.common import machine
from sae_lens_switch.saes.weight_files import INDEX_FILENAME
from sae_lens_switch.train import main
from sae_lens_switch.training import runners as runner
from sae_lens_switch.training.hooks import check_hook_name
from sae_lens_switch.training.synthetic import SyntheticSAERunner


def run_config(path: Path, **given: Any) -> LanguageModelSAERunnerConfig:
    return LanguageModelSAERunnerConfig(architecture="switch", **(SIZES | run_fields(path) | given))


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
        (["--output-path", f"{__file__}/sae"], "output_path must be a writable folder"),
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


def many_config(path: Path, hook_names: dict[str, str], **given: Any) -> MultiSAETrainingRunnerConfig:
    common = {f.name for f in fields(MultiSAETrainingRunnerConfig)}
    shared = {n: v for n, v in run_fields(path, **given).items() if n in common}
    saes = {name: SwitchTrainingSAEConfig(**SIZES) for name in hook_names}
    return MultiSAETrainingRunnerConfig(saes=saes, hook_names=hook_names, **shared)


def test_weights_in_several_files_where_a_run_would_save_are_found_before_a_model_is_loaded(tmp_path, monkeypatch):
    for base in ("LanguageModelSAETrainingRunner", "MultiSAETrainingRunner"):
        monkeypatch.setattr(getattr(runner.sae_lens, base), "__init__", lambda *_: pytest.fail("loaded"))
    for folder, make in (
        ("one/output", lambda: LanguageModelSAETrainingRunner(run_config(tmp_path / "one"))),
        ("many/output/b", lambda: MultiSAETrainingRunner(many_config(tmp_path / "many", {"a": HOOK, "b": HOOK}))),
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / INDEX_FILENAME).write_text("{}")
        with pytest.raises(ValueError, match=f"output_path must be a folder without {INDEX_FILENAME}.*{folder}"):
            make()


def test_saes_at_one_hook_share_the_memory_of_their_activations(tmp_path, monkeypatch):
    n_contexts = 10_000
    one_hook = 4 * SIZES["d_in"] * n_contexts * run_fields(tmp_path)["context_size"]
    monkeypatch.setattr(machine, "_memory", lambda _: one_hook)
    for hook, fits in ((HOOK, True), ("blocks.0.hook_resid_pre", False)):
        cfg = many_config(tmp_path, {"a": HOOK, "b": hook}, n_batches_in_buffer=n_contexts)
        with nullcontext() if fits else pytest.raises(ValueError, match="n_batches_in_buffer=10000: its activations"):
            machine.check_run_fits(cfg, *cfg.saes.values())
