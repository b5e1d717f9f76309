"""Usage errors: wrong flags and files are refused in one line, with exit code 2, before anything is made."""

import re

import pytest
from helpers.command_line import SWITCH, file_of, refusal


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
        ([*SWITCH, "--gate", "two"], "gate must be one of 'probability', 'renormalized', 'one'; got 'two'"),
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
        ([*SWITCH, "--llm-device", "cuda:99"], "llm_device must exist; got 'cuda:99', and torch finds .*"),
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
