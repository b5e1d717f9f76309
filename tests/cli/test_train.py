"""Runs from the command line, in this process and in others: what they leave, what they say, their exit codes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import HOOK, WORDS, D, E, F, K, tiny_dataset, tiny_tokenizer
from helpers.command_line import SWITCH, arguments, file_of
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopKSAE
from transformers import GPT2Config, GPT2LMHeadModel

from sae_lens_switch import SparseSAETrainer, SwitchSAE
from sae_lens_switch.train import main
from sae_lens_switch.training import checkpoints


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
