"""Configs with one to three fields set to something nasty: refused by the name of one of them, or trained."""

import re
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import D, E, F, K, activations, run_fields
from sae_lens import LoggingConfig
from sae_lens.config import SAETrainerConfig

from sae_lens_switch import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    SparseAbsTopKTrainingSAE,
    SparseAbsTopKTrainingSAEConfig,
    SparseBatchTopKTrainingSAE,
    SparseBatchTopKTrainingSAEConfig,
    SparseMatryoshkaBatchTopKTrainingSAE,
    SparseMatryoshkaBatchTopKTrainingSAEConfig,
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
    TrainerOptions,
    TrainingDivergedError,
)
from sae_lens_switch.train import main

NUMBERS = [0, -1, 1, 2, 3, 5, 7, 96, 97, 2**31, 2**40, 2**63, -(2**63), 10**400, 10**5000]
NUMBERS += [1e400, -1e400, float("nan"), 1e-300, 1e-40, 1e-30, 1e-8, 0.1, 0.5, 0.999999999, 1.0, 1.5, 2.0]
NUMBERS += [1e30, 1e38, 1e300, -0.5, -0.0, 1 - 2**-53]
TYPES = [True, False, None, [], {}, [1], (1,), [None, None, 2], "false", "true", "3", "", "x", "\0", b"3", 3 + 0j]
TYPES += [np.float32(0.5), np.float64("nan"), np.int64(3), np.bool_(True), np.array([1, 2]), Fraction(1, 2)]
TYPES += [Decimal("0.5"), torch.tensor(3), torch.tensor(0.5), torch.float32, torch.device("cpu"), object(), Path("x")]
NAMES = ["constant", "Constant", "cosineannealing", "cosineannealingwarmrestarts", "float64", "bfloat16", "float16"]
NAMES += ["torch.float32", "float31", "cpu", "cpu:0", "cuda:7", "meta", "none", "layer_norm", "constant_norm_rescale"]
NAMES += ["covariance_whitening", "expected_average_only_in", "hook_z", "one", "mean", "zeros", "d_in", "adam"]
NAMES += ["row_sparse_adam", "reseed", "raise_coefficient", "latest", "no/such", "bos", "with_model"]

DEFAULT_TYPES = {
    f.name: type(f.default)
    for cfg in (SwitchTrainingSAEConfig, LanguageModelSAERunnerConfig, SparseSAETrainerConfig, LoggingConfig)
    for f in fields(cfg)
}
DEFAULT_TYPES |= dict.fromkeys(("lr", "lr_end", "collapse_share", "load_balance_coefficient"), float)
DEFAULT_TYPES |= dict.fromkeys(("d_in", "d_sae", "shared_width", "aux_k", "keep_checkpoints", "lr_decay_steps"), int)

TOO_LONG = [2**31, 2**40]

BATCH, STEPS = 8, 12
SAES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "switch": (SwitchTrainingSAE, SwitchTrainingSAEConfig, {"d_in": D, "d_sae": F, "n_experts": E, "k": K}),
    "sparse_topk": (SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig, {"d_in": D, "d_sae": F, "k": K}),
    "sparse_abstopk": (SparseAbsTopKTrainingSAE, SparseAbsTopKTrainingSAEConfig, {"d_in": D, "d_sae": F, "k": K}),
    "sparse_batchtopk": (SparseBatchTopKTrainingSAE, SparseBatchTopKTrainingSAEConfig, {"d_in": D, "d_sae": F, "k": K}),
    "sparse_matryoshka_batchtopk": (
        SparseMatryoshkaBatchTopKTrainingSAE,
        SparseMatryoshkaBatchTopKTrainingSAEConfig,
        {"d_in": D, "d_sae": F, "k": K, "matryoshka_widths": [F // 2, F]},
    ),
}
# Not for a trial to choose: what only speaks to W&B, what compiles, what is of no use to a run.
LEFT_ALONE = {"log_to_wandb", "metadata", "sae", "logger", "compile_llm", "compile_sae", "hook_eval", "verbose"}
LEFT_ALONE |= {"model_kwargs", "use_cached_activations", "from_pretrained_path", "resume_from_checkpoint", "resume"}


def is_too_long(value: Any) -> bool:
    return any(
        value is long or (isinstance(value, int) and value == long) for long in TOO_LONG
    )  # arrays compare by items


def names_of(*configs: type) -> list[str]:
    return sorted({f.name for cfg in configs for f in fields(cfg)} - LEFT_ALONE)


def mutations(rng: Random, names: list[str], values: list[Any]) -> dict[str, Any]:
    """Half of the values are of the type of the field's default: more of these are accepted."""
    given = {}
    for name in rng.sample(names, rng.choice([1, 1, 1, 2, 3])):
        fitting = [v for v in values if type(v) is DEFAULT_TYPES.get(name)]
        given[name] = rng.choice(fitting if fitting and rng.random() < 0.5 else values)
    if is_too_long(given.get("training_tokens")):
        given["training_tokens"] = 97
    return given


def divided(given: dict[str, Any], *configs: type) -> list[dict[str, Any]]:
    """What belongs to which; a field of several goes to all that have it."""
    return [{n: v for n, v in given.items() if n in {f.name for f in fields(cfg)}} for cfg in configs]


@contextmanager
def bounded(seconds: float = 60, gigabytes: float = 4) -> Iterator[None]:
    """A trial that hangs, or asks for much memory, fails."""

    def ring(*_: Any) -> None:
        raise AssertionError(f"still running after {seconds} s")

    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(gigabytes * 2**30), hard))
    handler = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def outcome(name: str, given: dict[str, Any], run: Callable[[], Any]) -> str:
    """ "refused", "diverged" or "trained"; anything else fails with the trial's name."""
    told = f"{name}: { ({n: v if not isinstance(v, int) or abs(v) < 10**500 else 'huge' for n, v in given.items()}) }"
    try:
        with bounded():
            sae = run()
    except TrainingDivergedError:
        return "diverged"
    except ValueError as error:
        refusal = str(error)
    except Exception as error:
        raise AssertionError(f"{told}: {error!r}") from error
    else:
        assert all(p.isfinite().all() for p in sae.parameters()), told
        return "trained"
    assert any(re.search(rf"\b{field}\b", refusal) for field in given), f"{told}: {refusal}"
    return "refused"


def train_alone(rng: Random, given: dict[str, Any]) -> Any:
    """SAE and trainer by hand; fields set before or after their configs are made."""
    architecture = rng.choice(sorted(SAES))
    sae_class, sae_config, sizes = SAES[architecture]
    trainer_config = rng.choice([SparseSAETrainerConfig, SparseSAETrainerConfig, SAETrainerConfig])
    needed = {"total_training_samples": BATCH * STEPS, "train_batch_size_samples": BATCH, "lr": 1e-3}
    needed["n_batches_for_norm_estimate"] = 2
    needed["logger"] = LoggingConfig(log_to_wandb=False)
    of_sae, of_trainer, of_logger = divided(given, sae_config, trainer_config, LoggingConfig)
    if rng.random() < 0.5:
        cfg, trainer_cfg = sae_config(**sizes), trainer_config(**needed)
        vars(cfg).update(of_sae)
        vars(trainer_cfg).update(of_trainer)
    else:
        cfg, trainer_cfg = sae_config(**(sizes | of_sae)), trainer_config(**(needed | of_trainer))
    vars(trainer_cfg.logger).update(of_logger)
    width = cfg.d_in if type(cfg.d_in) is int and 0 < cfg.d_in < 200 else D
    data: Any = activations(STEPS + 4, BATCH, d_in=width)
    endless = is_too_long(given.get("total_training_samples"))  # a tensor would be gone through for days
    data = iter(data) if endless or rng.random() < 0.5 else torch.cat(data)
    torch.manual_seed(0)
    return SparseSAETrainer(trainer_cfg, sae_class(cfg), data).fit()


TRAINER_FIELDS = names_of(SwitchTrainingSAEConfig, SparseTopKTrainingSAEConfig, SparseSAETrainerConfig, LoggingConfig)
RUNNER_FIELDS = names_of(SwitchTrainingSAEConfig, LanguageModelSAERunnerConfig, LoggingConfig)


class Tally:
    """Outcomes counted, and what went wrong, so that one run shows all kinds of fault."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def add(self, trial: Callable[[], str]) -> None:
        try:
            self.counts[trial()] += 1
        except AssertionError as error:
            self.failures.append(str(error))

    def report(self, capsys: pytest.CaptureFixture[str]) -> None:
        with capsys.disabled():
            print(f"\n{dict(self.counts)}")  # noqa: T201
        assert not self.failures, f"{len(self.failures)} of them:\n" + "\n".join(self.failures[:40])
        assert self.counts["refused"]
        assert self.counts["trained"] or self.counts.total() < 100


def test_trainers_of_mutated_configs_refuse_or_train(trials, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tally = Tally()
    for name, rng in trials(7_500):
        given = mutations(rng, TRAINER_FIELDS, NUMBERS + TYPES + NAMES)
        tally.add(lambda: outcome(name, given, lambda: train_alone(rng, given)))  # noqa: B023
    tally.report(capsys)


def runner_config(path: Path, given: dict[str, Any], after: bool) -> LanguageModelSAERunnerConfig:
    known, of_logger = divided(given, LanguageModelSAERunnerConfig, LoggingConfig)
    (of_sae,) = divided(given, SwitchTrainingSAEConfig)
    everything = SAES["switch"][2] | run_fields(path, training_tokens=3 * 64, n_batches_for_norm_estimate=2)
    everything["logger"] = LoggingConfig(log_to_wandb=False)
    if not after:
        vars(everything["logger"]).update(of_logger)
        return LanguageModelSAERunnerConfig(architecture="switch", **(everything | of_sae | known))
    cfg = LanguageModelSAERunnerConfig(architecture="switch", **everything)
    vars(cfg.logger).update(of_logger)
    vars(cfg).update(known)
    vars(cfg.sae).update(of_sae)
    return cfg


def test_runners_of_mutated_configs_refuse_or_train(trials, tmp_path, monkeypatch, capsys, model, dataset):
    monkeypatch.chdir(tmp_path)
    tally = Tally()
    for name, rng in trials(1_500):
        given = mutations(rng, RUNNER_FIELDS, NUMBERS + TYPES + NAMES)
        after = rng.random() < 0.3

        def run(given: dict[str, Any] = given, after: bool = after) -> Any:
            torch.manual_seed(0)
            cfg = runner_config(tmp_path, given, after)
            return LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=dataset).run()

        tally.add(lambda: outcome(name, given, run))  # noqa: B023
    tally.report(capsys)


def test_what_passes_a_dry_run_trains(trials, tmp_path, monkeypatch, capsys, model, dataset):
    """Flags and files, by ``--dry-run`` first: a refusal is one line with exit code 2, and what passes is run."""
    monkeypatch.chdir(tmp_path)
    tally = Tally()
    plain = [v for v in NUMBERS + TYPES + NAMES if type(v) in (int, float, bool, str, list, dict, type(None))]
    plain = [v for v in plain if not isinstance(v, int) or abs(v) < 10**4000]
    settings = (
        SAES["switch"][2]
        | run_fields(tmp_path, training_tokens=3 * 64, n_batches_for_norm_estimate=2)
        | {"architecture": "switch"}
    )
    settings["logger"] = {"log_to_wandb": False}
    names = [n for n in RUNNER_FIELDS if n not in ("wandb_id", "dataset_path")]

    def trial(name: str, rng: Random) -> str:
        given = mutations(rng, names, plain)
        told = f"{name}: {given}"
        in_file, as_flags = (given, {}) if rng.random() < 0.5 else ({}, given)
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(settings | in_file))
        argv = ["--config", str(file), *(f"--{n}={v}" for n, v in as_flags.items())]
        with bounded():
            code = main([*argv, "--dry-run"])
        err = capsys.readouterr().err
        if code == 2:
            assert any(re.search(rf"\b{field}\b", err.replace("-", "_")) for field in given), f"{told}: {err}"
            assert err.count("\n") == 1, f"{told}: {err}"
            return "refused"
        assert code == 0, f"{told}: {err}"
        with bounded():
            code = main(argv, override_model=model, override_dataset=dataset)
        err = capsys.readouterr().err
        if code == 0:
            return "trained"
        if "were skipped because" in err:
            return "diverged"
        # What a dry run cannot know: the model, and whether torchrun will start the processes.
        unknown = ("hook_name", "hook_head_index", "d_in", "context_size", "expert_parallel", "latent_parallel")
        assert [n for n in unknown if n in given and n in err], f"{told}: {err[-1000:]}"
        return "refused by the model or for want of processes"

    for name, rng in trials(1_000):
        tally.add(lambda: trial(name, rng))  # noqa: B023
    tally.report(capsys)


@pytest.mark.parametrize("architecture", sorted(SAES))
def test_the_unmutated_configs_train(architecture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sae_class, sae_config, sizes = SAES[architecture]
    cfg = SparseSAETrainerConfig(total_training_samples=BATCH * STEPS, train_batch_size_samples=BATCH)
    sae = SparseSAETrainer(cfg, sae_class(sae_config(**sizes)), iter(activations(STEPS, BATCH))).fit()
    assert all(p.isfinite().all() for p in sae.parameters())


def test_every_option_of_the_trainer_is_among_the_mutated():
    assert {f.name for f in fields(TrainerOptions)} - {"resume"} <= set(TRAINER_FIELDS)
