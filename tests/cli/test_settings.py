"""Settings from flags and files: every field has a flag, flags override files, a dry run prints a file."""

import json
import re
from dataclasses import asdict, fields

import pytest
import yaml
from helpers import D, E, F, K, run_fields
from helpers.command_line import SWITCH, arguments, file_of, shown
from sae_lens import LoggingConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_switch import LanguageModelSAERunnerConfig, TrainerOptions
from sae_lens_switch.cli import run
from sae_lens_switch.cli.flags import request_parser, settings_parser, with_dashes
from sae_lens_switch.cli.run import Request
from sae_lens_switch.cli.settings import settings_of


def configure(argv: list[str]) -> LanguageModelSAERunnerConfig:
    """The config of the run that a command asks for."""
    asked, rest = request_parser().parse_known_args(with_dashes(argv))
    return Request(asked.architecture, rest, None, {}).config()


@pytest.mark.parametrize("architecture", sorted(SAE_TRAINING_CLASS_REGISTRY))
def test_every_field_has_a_flag_and_every_flag_of_saelens_is_one(capsys, architecture):
    settings = settings_of(architecture)
    _, sae_config = SAE_TRAINING_CLASS_REGISTRY[architecture]
    for cls in (sae_config, LanguageModelSAERunnerConfig, TrainerOptions, LoggingConfig):
        assert {f.name for f in fields(cls)} - {"sae", "logger", "metadata"} <= settings.keys()
    known = settings_parser(architecture, SAE_TRAINING_CLASS_REGISTRY, settings.values())._option_string_actions
    assert "-k" in known or "k" not in settings
    with pytest.raises(SystemExit):
        _parse_cfg_args(["--architecture", architecture, "--help"])
    usage = capsys.readouterr().out.split("options:")
    theirs = set(re.findall(r"(?<![\w-])--?[a-z][\w.]*", usage[0] + usage[1].replace("\n", " \n")))
    theirs = {flag for flag in theirs if flag.startswith("--") or flag in ("-k", "-h")}
    assert len(theirs) > 80
    unknown = {flag for flag in theirs if with_dashes([flag])[0] not in known}
    assert unknown == {"--sae", "--metadata"}  # the first is their other name for --architecture


def test_flags_mean_what_they_mean_to_saelens():
    flags = "--architecture sparse_topk --d_in 12 --d_sae 40 -k 3 --nostreaming --verbose False --autocast --lr 1e-3"
    flags += " --seqpos_slice 1 -1 --sequence_separator_token 5 --exclude_special_tokens True --hook_head_index 2"
    flags += " --prefetch_llm_batches 3 --log_to_wandb False --run_name mine --sae.dtype float64 --dtype bfloat16"
    flags += " --aux_loss_coefficient 0.5 --checkpoint_path elsewhere --wandb_id x --n_batches_in_buffer 64"
    argv = [*flags.split(), "--model_kwargs", '{"a": [1]}', "--model_from_pretrained_kwargs", '{"b": null}']
    theirs, ours = _parse_cfg_args(argv), configure(argv)
    assert asdict(ours.logger) == asdict(theirs.logger)
    assert ours.sae.to_dict() == theirs.sae.to_dict()
    for field in fields(theirs):
        if field.name not in ("sae", "logger"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_the_config_is_the_one_that_python_would_make(tmp_path):
    """What is not given follows the paper, and ``device`` and ``dtype`` go to both."""
    argv = [*SWITCH, "--dtype", "float64", "--optimizer", "row_sparse_adam", "--max-grad-norm", "none"]
    argv += ["--on-collapse=reseed", *arguments(tmp_path), "--wandb-id", "x"]
    from_flags = configure(argv)
    logger = LoggingConfig(log_to_wandb=False, wandb_id="x")
    in_python = LanguageModelSAERunnerConfig(
        architecture="switch",
        **{"d_in": D, "d_sae": F, "n_experts": E, "k": K, "dtype": "float64"},
        **{"optimizer": "row_sparse_adam", "max_grad_norm": None, "on_collapse": "reseed"},
        **run_fields(tmp_path, logger=logger),
    )
    assert from_flags.to_dict() == in_python.to_dict()
    assert from_flags.sae.dtype == "float64"
    assert from_flags.lr == pytest.approx(2e-4 / (F / 2**14) ** 0.5)


@pytest.mark.parametrize("architecture", sorted(SAE_TRAINING_CLASS_REGISTRY))
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_what_a_dry_run_prints_is_a_file_that_gives_the_same_run(tmp_path, capsys, architecture, suffix):
    argv = ["--architecture", architecture, "--d-in", str(D), "--d-sae", str(F), "--sae.dtype", "float64"]
    argv += ["--seqpos-slice", "1", "-1", "--training-tokens", "1e6", "--optimizer", "row_sparse_adam"]
    if "matryoshka" in architecture:
        argv += ["--matryoshka-widths", "10", "20", str(F)]
    argv += ["--n-experts", "4", "-k", "3"] if architecture.startswith("switch") else []
    argv += ["-k", "3"] if "topk" in architecture else []
    table = shown(capsys, *argv)
    text = json.dumps(table) if suffix == "json" else yaml.safe_dump(table)
    file = file_of(tmp_path / f"run.{suffix}", text)
    assert shown(capsys, "--config", file) == table
    assert table["architecture"] == architecture
    assert table["seqpos_slice"] == [1, -1]
    assert table["training_tokens"] == 1_000_000
    assert table["sae_kwargs"] == {"dtype": "float64"}
    assert table["checkpoint_path"] == "checkpoints"


def test_flags_override_a_file(tmp_path, capsys):
    table = {"architecture": "topk", "d_in": D, "d_sae": F, "k": 5, "lr": 1e-3, "logger": {"wandb_project": "mine"}}
    file = file_of(tmp_path / "run.yaml", table | {"streaming": False, "resume": "latest"})
    from_file = shown(capsys, "--config", file)
    assert [from_file[n] for n in ("k", "lr", "streaming", "resume")] == [5, 1e-3, False, "latest"]
    assert from_file["logger"]["wandb_project"] == "mine"
    flags = ["--k", "3", "--lr=0.5", "--streaming", "--resume", "none", "--wandb-project", "yours"]
    both = shown(capsys, *flags, "--config", file)
    assert [both[n] for n in ("k", "lr", "streaming", "resume")] == [3, 0.5, True, None]
    assert both["logger"]["wandb_project"] == "yours"
    switch = shown(capsys, "--config", file, "--architecture", "switch", "--n-experts", "4")
    assert (switch["architecture"], switch["n_experts"], switch["k"]) == ("switch", 4, 5)


def test_a_flag_for_runner_and_sae_counts_more_than_what_a_file_says_of_the_sae(tmp_path, capsys):
    file = file_of(tmp_path / "run.yaml", {"sae": {"architecture": "switch", "dtype": "float64"}, "dtype": "float64"})
    assert shown(capsys, *SWITCH, "--config", file)["sae_kwargs"] == {"dtype": "float64"}
    table = shown(capsys, *SWITCH, "--config", file, "--dtype", "bfloat16")
    assert table["dtype"] == "bfloat16"
    assert "sae_kwargs" not in table
    table = shown(capsys, *SWITCH, "--config", file, "--dtype", "bfloat16", "--sae.dtype", "float32")
    assert table["sae_kwargs"] == {"dtype": "float32"}


def test_a_file_may_be_nested_as_in_python_or_flat(tmp_path, capsys):
    flat = {"architecture": "switch", "d_in": D, "d_sae": F, "n_experts": E, "k": K, "log_to_wandb": False}
    own = {"architecture": "switch", "d_in": D, "d_sae": F, "n_experts": E, "k": K, "metadata": {"a": 1}}
    nested = {"sae": own, "logger": {"log_to_wandb": False}}
    in_kwargs = {"architecture": "switch", "sae_kwargs": {k: v for k, v in own.items() if k in ("d_in", "d_sae")}}
    in_kwargs |= {"n_experts": E, "k": K, "logger": {"log_to_wandb": False}}
    expected = shown(capsys, *SWITCH, "--log-to-wandb", "false")
    for table in (flat, nested, in_kwargs):
        assert shown(capsys, "--config", file_of(tmp_path / "run.yaml", table)) == expected


def test_numbers_as_yaml_and_people_write_them(tmp_path, capsys):
    file = file_of(tmp_path / "run.yaml", "lr: 1e-3\ntraining_tokens: 1_000_000\nmax_grad_norm: 2\n")  # "1e-3" is text
    table = shown(capsys, *SWITCH, "--config", file)
    assert (table["lr"], table["training_tokens"], table["max_grad_norm"]) == (1e-3, 1_000_000, 2.0)
    assert shown(capsys, *SWITCH, "--training-tokens", "1_000_000")["training_tokens"] == 1_000_000
    assert shown(capsys, *SWITCH, "--exclude-special-tokens", "1", "2")["exclude_special_tokens"] == [1, 2]
    assert shown(capsys, *SWITCH, "--exclude-special-tokens", "true")["exclude_special_tokens"] is True
    assert shown(capsys, *SWITCH, "--seqpos-slice", "none,5")["seqpos_slice"] == [None, 5]


def test_widths_inside_experts_and_the_selection_over_a_batch_by_flags(tmp_path, capsys):
    argv = [*SWITCH, "--activation", "batchtopk", "--topk-threshold-lr", "0.1", "--matryoshka-widths", "4", str(F // E)]
    table = shown(capsys, *argv)
    assert (table["activation"], table["topk_threshold_lr"]) == ("batchtopk", 0.1)
    assert table["matryoshka_widths"] == [4, F // E]
    assert shown(capsys, "--config", file_of(tmp_path / "run.json", json.dumps(table))) == table
    assert shown(capsys, *SWITCH, "--matryoshka-widths", "none")["matryoshka_widths"] is None


def test_each_process_of_torchrun_looks_at_its_own_gpu_alone(monkeypatch):
    """A look at the first GPU would take memory there, on behalf of every process."""
    looked_at: list[str | None] = []

    def look(cfg, sae) -> None:
        looked_at.extend([cfg.device, cfg.llm_device, cfg.act_store_device, sae.device])

    monkeypatch.setattr(run, "check_run_fits", look)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    cfg = configure([*SWITCH, "--device", "cuda"])
    assert looked_at == ["cuda:1"] * 4
    assert (cfg.device, cfg.sae.device) == ("cuda", "cuda")  # which a dry run is to print
