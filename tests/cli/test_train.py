"""The command line: flags, files of settings, help, messages, exit codes; real runs, in this process and in others."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import HOOK, WORDS, D, E, F, K, run_fields, tiny_dataset, tiny_tokenizer
from sae_lens import SAE, LoggingConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.topk_sae import TopKSAE
from transformers import GPT2Config, GPT2LMHeadModel

from sae_lens_switch import LanguageModelSAERunnerConfig, SparseSAETrainer, SwitchSAE, TrainerOptions, train
from sae_lens_switch.train import main
from sae_lens_switch.training import checkpoints

SWITCH = ["--architecture", "switch", "--d-in", str(D), "--d-sae", str(F), "--n-experts", str(E), "--k", str(K)]


def shown(capsys, *argv: str) -> dict[str, Any]:
    """The settings that a command would run with."""
    assert main([*argv, "--dry-run"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def refusal(capsys, *argv: str) -> str:
    """What a command that is refused says: one line, and nothing else."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").rstrip()


def file_of(path: Path, table: Any) -> str:
    path.write_text(table if isinstance(table, str) else yaml.safe_dump(table))
    return str(path)


def arguments(path: Path, **given: Any) -> list[str]:
    table = {name: value for name, value in run_fields(path, **given).items() if name != "logger"}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in table.items()]
    return [*(part for pair in pairs for part in pair), "--log-to-wandb", "false"]


# Settings


@pytest.mark.parametrize("architecture", sorted(SAE_TRAINING_CLASS_REGISTRY))
def test_every_field_has_a_flag_and_every_flag_of_saelens_is_one(capsys, architecture):
    settings = train._settings(architecture)
    _, sae_config = SAE_TRAINING_CLASS_REGISTRY[architecture]
    for cls in (sae_config, LanguageModelSAERunnerConfig, TrainerOptions, LoggingConfig):
        assert {f.name for f in fields(cls)} - {"sae", "logger", "metadata"} <= settings.keys()
    known = train._parser(architecture, settings)._option_string_actions
    assert "-k" in known or "k" not in settings
    with pytest.raises(SystemExit):
        _parse_cfg_args(["--architecture", architecture, "--help"])
    usage = capsys.readouterr().out.split("options:")
    theirs = set(re.findall(r"(?<![\w-])--?[a-z][\w.]*", usage[0] + usage[1].replace("\n", " \n")))
    theirs = {flag for flag in theirs if flag.startswith("--") or flag in ("-k", "-h")}
    assert len(theirs) > 80
    unknown = {flag for flag in theirs if train._with_dashes([flag])[0] not in known}
    assert unknown == {"--sae", "--metadata"}  # the first is their other name for --architecture


def test_flags_mean_what_they_mean_to_saelens():
    flags = "--architecture sparse_topk --d_in 12 --d_sae 40 -k 3 --nostreaming --verbose False --autocast --lr 1e-3"
    flags += " --seqpos_slice 1 -1 --sequence_separator_token 5 --exclude_special_tokens True --hook_head_index 2"
    flags += " --prefetch_llm_batches 3 --log_to_wandb False --run_name mine --sae.dtype float64 --dtype bfloat16"
    flags += " --aux_loss_coefficient 0.5 --checkpoint_path elsewhere --wandb_id x --n_batches_in_buffer 64"
    argv = [*flags.split(), "--model_kwargs", '{"a": [1]}', "--model_from_pretrained_kwargs", '{"b": null}']
    theirs, ours = _parse_cfg_args(argv), train._configure(train._with_dashes(argv))
    assert ours is not None
    assert asdict(ours.logger) == asdict(theirs.logger)
    assert ours.sae.to_dict() == theirs.sae.to_dict()
    for field in fields(theirs):
        if field.name not in ("sae", "logger"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_the_config_is_the_one_that_python_would_make(tmp_path):
    """What is not given follows the paper, and ``device`` and ``dtype`` go to both."""
    argv = [*SWITCH, "--dtype", "float64", "--optimizer", "row_sparse_adam", "--max-grad-norm", "none"]
    argv += ["--on-collapse=reseed", *arguments(tmp_path), "--wandb-id", "x"]
    from_flags = train._configure(argv)
    logger = LoggingConfig(log_to_wandb=False, wandb_id="x")
    in_python = LanguageModelSAERunnerConfig(
        architecture="switch",
        **{"d_in": D, "d_sae": F, "n_experts": E, "k": K, "dtype": "float64"},
        **{"optimizer": "row_sparse_adam", "max_grad_norm": None, "on_collapse": "reseed"},
        **run_fields(tmp_path, logger=logger),
    )
    assert from_flags is not None
    assert from_flags.to_dict() == in_python.to_dict()
    assert from_flags.sae.dtype == "float64"
    assert from_flags.lr == pytest.approx(2e-4 / (F / 2**14) ** 0.5)


@pytest.mark.parametrize("architecture", sorted(SAE_TRAINING_CLASS_REGISTRY))
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_what_a_dry_run_prints_is_a_file_that_gives_the_same_run(tmp_path, capsys, architecture, suffix):
    argv = ["--architecture", architecture, "--d-in", str(D), "--d-sae", str(F), "--sae.dtype", "float64"]
    argv += ["--seqpos-slice", "1", "-1", "--training-tokens", "1e6", "--optimizer", "row_sparse_adam"]
    if architecture == "matryoshka_batchtopk":
        argv += ["--matryoshka-widths", "10", "20", str(F)]
    own = {"switch": ["--n-experts", "4", "-k", "3"], "topk": ["-k", "3"], "sparse_topk": ["-k", "3"]}
    argv += own.get(architecture, [])
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


# Help


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_architectures_and_says_where_their_flags_are(capsys, flag):
    assert main([flag]) == 0
    text = capsys.readouterr().out
    for name in SAE_TRAINING_CLASS_REGISTRY:
        assert re.search(rf"^  {name} +\S", text, re.MULTILINE)
    assert "--architecture switch --help" in text
    assert "--n-experts 32" in text  # of the example


def test_help_of_an_architecture_explains_every_flag(capsys):
    assert main(["--architecture", "switch", "--help"]) == 0
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    for expected in (
        "--n-experts int Experts E; must divide d_sae.",
        "--d-in int Width of the activations at hook_name. (required)",
        "--resume str|none A checkpoint to go on from",
        "--load-balance-scale variance|d_in",
        "(default: 2e-4 / sqrt(d_sae / 2^14))",
        "--streaming [true|false]",
    ):
        assert expected in flat
    assert "hook-eval" not in text  # deprecated: accepted, not shown
    assert max(map(len, text.splitlines())) <= 120
    settings = [s for s in train._settings("switch").values() if s.name not in train._HIDDEN]
    assert all(s.flag in text for s in settings)
    assert [s.name for s in settings if not s.doc and s.home != "logger" and not s.name.startswith("sae.")] == []
    assert main(["--architecture", "topk", "--help"]) == 0
    assert "n-experts" not in capsys.readouterr().out.split("what to do:")[1]


# What is asked wrongly


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--architecture is missing; python -m sae_lens_switch.train --help lists them"),
        (["--architecture"], "argument --architecture/--sae: expected one argument"),
        (["--architecture", "swich"], "architecture must be one of .*; got 'swich'; did you mean 'switch'?"),
        ([*SWITCH, "--n-expert", "3"], "unknown flag --n-expert; did you mean --n-experts?"),
        ([*SWITCH, "--modelname=gpt2"], "unknown flag --modelname; did you mean --model-name?"),
        ([*SWITCH, "--xyzzy"], "unknown flag --xyzzy"),
        ([*SWITCH, "--l1-coefficient", "3"], "--l1-coefficient is a flag of standard, gated, not of switch"),
        ([*SWITCH, "stray"], "unexpected argument 'stray'"),
        ([*SWITCH, "--lr"], "argument --lr: expected one argument"),
        ([*SWITCH, "--lr", "fast"], "lr must be a number; got 'fast'"),
        ([*SWITCH, "--lr", "nan"], "lr must be a number; got 'nan'"),
        ([*SWITCH, "--k", "2.5"], "k must be a whole number; got '2.5'"),
        ([*SWITCH, "--streaming", "maybe"], "streaming must be true or false; got 'maybe'"),
        ([*SWITCH, "--gate", "two"], "gate must be one of 'probability', 'one'; got 'two'"),
        ([*SWITCH, "--hook-head-index", "x"], "hook_head_index must be a whole number or none; got 'x'"),
        ([*SWITCH, "--seqpos-slice", "1", "x"], "seqpos_slice must be a list, each a whole number or none; got .*"),
        ([*SWITCH, "--model-kwargs", "[1]"], "model_kwargs must be a table; got '\\[1\\]'"),
        ([*SWITCH, "--k", "99"], "k must be at most d_sae / n_experts = 40 / 4 = 10, .* got k=99"),
        ([*SWITCH, "--n-experts", str(10**9)], "d_sae must be a multiple of n_experts=1000000000; got d_sae=40"),
        ([*SWITCH, "--keep-checkpoints", "0"], "keep_checkpoints must be a whole number, at least 1 or None; got 0"),
        (
            [*SWITCH, "--train-batch-size-tokens", "0"],
            "train_batch_size_tokens must be a whole number, at least 1; got 0",
        ),
        ([*SWITCH, "--dtype", "float31"], "dtype must be one of float32, .*; got 'float31'"),
        ([*SWITCH, "--device", "cqu"], "device must be one that torch knows, .*; got 'cqu'"),
        ([*SWITCH, "--llm-device", "cuda:99"], "llm_device must be there; got 'cuda:99', and torch finds .*"),
        (["--architecture", "switch", "--d-in", "12"], "architecture='switch' needs d_sae"),
        ([*SWITCH, "--config", "no/such/file.yaml"], "--config no/such/file.yaml cannot be read: .*"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(capsys, argv, message):
    assert re.fullmatch(message.replace("?", r"\?"), refusal(capsys, *argv))


def test_weights_that_no_memory_holds_are_refused_before_anything_is_made(capsys):
    sizes = ["--d-sae", str(10**9), "--n-experts", str(10**9), "--k", "1", "--d-in", "12288"]
    message = refusal(capsys, "--architecture", "switch", *sizes)
    assert re.fullmatch(r"d_in=12288, d_sae=10+: the weights alone take 147,456 GB; cpu has [\d,]+ GB", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_expert: 3", "unknown field 'n_expert'; did you mean 'n_experts'?"),
        ("logger: {wandb_projekt: a}", "unknown field 'wandb_projekt'; did you mean 'wandb_project'?"),
        ("sae: {lr: 1}", "unknown field 'lr'"),
        ("sae: 3", "sae must be a table of settings; got 3"),
        ("3: 4", "unknown field '3'"),
        ("n_experts: [4]", "n_experts must be a whole number; got [4]"),
        ("n_experts: {}", "n_experts must be a whole number; got {}"),
        ("n_experts: true", "n_experts must be a whole number; got True"),
        ("n_experts: null", "n_experts must be a whole number; got None"),
        ("model_name: 3", "model_name must be text; got 3"),
        ("model_name: 2020-01-01", "model_name must be text; got datetime.date(2020, 1, 1)"),
        ("lr: .inf", "lr must be a number; got inf"),
        (f"training_tokens: 1{'0' * 400}", "training_tokens must be a whole number; got 1000000"),
        ("normalize_decoder: 1", "normalize_decoder must be true or false; got 1"),
        ("model_kwargs: {1: 2}", "model_kwargs must be a table; got {1: 2}"),
    ],
)
def test_wrong_settings_in_a_file_are_refused_with_its_name(tmp_path, capsys, text, message):
    file = file_of(tmp_path / "run.yaml", text)
    assert refusal(capsys, *SWITCH, "--config", file).startswith(f"{file}: {message}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "model_name: !!python/object/apply:os.mkdir [trace]"),
        ("run.yaml", "model_name: !!python/object/new:os.mkdir [trace]"),
        ("run.yaml", "model_name: !!python/name:os.system"),
        ("run.yaml", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]"),
        ("run.yaml", "a: [" + "[" * 100_000),
        ("run.yaml", "a: b: c"),
        ("run.json", "{"),
        ("run.json", "[" * 100_000),
        ("run.json", "{'lr': 1}"),
        ("run.yaml", "- 1"),
        ("run.yaml", ""),
        ("run.yaml", "architecture: [switch]"),
    ],
)
def test_hostile_files_are_refused_and_nothing_is_run(tmp_path, capsys, monkeypatch, name, text):
    monkeypatch.chdir(tmp_path)
    message = refusal(capsys, "--d-in", "12", "--config", file_of(tmp_path / name, text))
    assert "--config" in message or message == "architecture must be a name; got ['switch']"
    assert not (tmp_path / "trace").exists()
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(capsys, "--config", str(tmp_path / "binary.yaml"))


def test_json_numbers_that_are_none_are_refused(tmp_path, capsys):
    file = file_of(tmp_path / "run.json", '{"lr": NaN}')
    assert refusal(capsys, *SWITCH, "--config", file) == f"{file}: lr must be a number; got nan"


# Runs


def test_a_run_trains_saves_and_says_where(tmp_path, capsys, model, dataset):
    argv = [*SWITCH, *arguments(tmp_path, n_checkpoints=1)]
    assert main(argv, override_model=model, override_dataset=dataset) == 0
    saved, checkpointed = re.findall(r"^(?:saved|checkpoints): (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert saved == str(tmp_path / "output")
    assert Path(checkpointed).parent == tmp_path / "checkpoints"
    assert len(list(Path(checkpointed).glob("*/checkpoint.json"))) == 1
    sae = SAE.load_from_disk(saved)
    assert isinstance(sae, SwitchSAE)
    assert (sae.cfg.n_experts, sae.cfg.k, sae.cfg.metadata.hook_name) == (E, K, HOOK)


def test_topk_runs_on_sparse_kernels_and_without_output(tmp_path, capsys, model, dataset, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--architecture", "topk", "--d-in", str(D), "--d-sae", str(F), "-k", str(K)]
    argv += arguments(tmp_path, checkpoint_path=None)
    assert main(argv, override_model=model, override_dataset=dataset) == 0
    assert isinstance(SAE.load_from_disk(tmp_path / "output"), TopKSAE)
    assert json.loads((tmp_path / "output" / "runner_cfg.json").read_text())["sae"]["architecture"] == "sparse_topk"
    capsys.readouterr()
    assert main([*argv, "--output-path", "none"], override_model=model, override_dataset=dataset) == 0
    assert capsys.readouterr().out == "saved: nowhere, since output_path is none\n"


def test_an_interrupted_run_goes_on_and_its_saved_config_is_a_file_of_settings(
    tmp_path, capsys, model, dataset, monkeypatch
):
    steps = []
    original = SparseSAETrainer._train_step

    def interrupting(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.n_training_samples)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SparseSAETrainer, "_train_step", interrupting)
    argv = [*SWITCH, *arguments(tmp_path)]
    assert main(argv, override_model=model, override_dataset=dataset) == 130
    out, err = capsys.readouterr()
    assert "interrupted" in err
    assert "--resume latest" in out
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*")
    assert checkpoint.name == str(3 * 64)
    assert not (tmp_path / "output").exists()
    resumed = ["--config", str(checkpoint / "runner_cfg.json"), "--resume", "latest"]
    assert main(resumed, override_model=model, override_dataset=dataset) == 0
    assert steps == [64 * (i + 1) for i in range(6)]  # none twice, none left out
    assert SAE.load_from_disk(tmp_path / "output").cfg.architecture() == "switch"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--d-in", "13", "--d-sae", "40"],
            "d_in must be the width of tiny's activations at blocks.1.hook_resid_pre, 12",
        ),
        (["--resume", "no/such"], "no checkpoint at no/such: there is no such folder"),
    ],
)
def test_a_run_that_fails_says_why_without_a_traceback(tmp_path, capsys, model, dataset, flags, message):
    argv = [*SWITCH, *arguments(tmp_path), *flags]
    assert main(argv, override_model=model, override_dataset=dataset) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert f"error: {message}" in err
    assert "Traceback" not in err


def test_a_model_that_is_not_there(tmp_path, capsys):
    argv = [*SWITCH, *arguments(tmp_path, model_class_name="AutoModelForCausalLM", model_name=str(tmp_path / "no"))]
    assert main(argv) == 1
    assert "error: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> list[str]:
    """Flags for a model and a dataset that lie in folders."""
    folder = tmp_path_factory.mktemp("offline")
    cfg = GPT2Config(vocab_size=32, n_positions=16, n_embd=D, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(cfg).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    texts = [" ".join(WORDS[token - 3] for token in row[1:]) for row in tiny_dataset()["tokens"]]
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = arguments(folder, model_name=folder / "model", dataset_path=folder / "data", hook_name="transformer.h.0")
    return [*flags, "--model-class-name", "AutoModelForCausalLM", "--is-dataset-tokenized", "false"]


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def start(processes: list[subprocess.Popen[str]], cwd: Path, *argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sae_lens_switch.train", *argv]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes.append(subprocess.Popen(command, cwd=cwd, text=True, **pipes))
    return processes[-1]


def test_the_command_from_another_folder_and_sigterm(tmp_path, offline, processes):
    """Both at once, since most of either is the import."""
    settings = {"architecture": "switch", "d_in": D, "d_sae": F, "n_experts": E, "k": 9}
    file = file_of(tmp_path / "run.yaml", settings)
    finishing = start(processes, tmp_path, *offline, "--config", file, "--k", str(K), "--output-path", "sae")
    endless = ["--training-tokens", str(64 * 10**6), "--n-checkpoints", str(10**5), "--checkpoint-path", "saved"]
    ended = start(processes, tmp_path, *offline, *endless, "--config", file, "--k", str(K))
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("saved/*/*/checkpoint.json")):
        assert ended.poll() is None, ended.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ended.send_signal(signal.SIGTERM)
    out, err = ended.communicate(timeout=600)
    assert ended.returncode == 143, err
    assert "interrupted" in err
    assert "Traceback" not in err
    newest = checkpoints.latest(tmp_path / "saved")
    assert newest is not None  # whole
    assert str(newest.parent.relative_to(tmp_path)) in out

    out, err = finishing.communicate(timeout=600)
    assert finishing.returncode == 0, err
    assert out.splitlines() == ["saved: sae"]
    sae = SAE.load_from_disk(tmp_path / "sae")
    assert (sae.cfg.architecture(), sae.cfg.k) == ("switch", K)
