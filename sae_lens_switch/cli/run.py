"""The run that a command line asks for: its config, and its course with messages and an exit code."""

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sae_lens import LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_switch.cli.flags import settings_parser
from sae_lens_switch.cli.settings import Settings, as_file, converted, flattened, settings_of
from sae_lens_switch.common.machine import check_run_fits
from sae_lens_switch.common.printable import printable_logs, say
from sae_lens_switch.common.rules import nearest_name
from sae_lens_switch.parallel.ranks import RankLostError, leave_process_group
from sae_lens_switch.parallel.runner import ParallelLanguageModelSAETrainingRunner, is_parallel, use_local_devices
from sae_lens_switch.saes.registration import register
from sae_lens_switch.training.hooks import check_hook_name
from sae_lens_switch.training.interruption import INTERRUPTIONS, exit_code
from sae_lens_switch.training.runner_config import LanguageModelSAERunnerConfig
from sae_lens_switch.training.runners import LanguageModelSAETrainingRunner
from sae_lens_switch.training.skipped_steps import TrainingDivergedError


class Request:
    """A run as asked for: the architecture, the flags, and the table of the file given with ``--config``."""

    def __init__(self, architecture: str, argv: list[str], file: str | None, table: Mapping[str, object]) -> None:
        register()
        self.architecture = architecture
        self.settings = settings_of(architecture)
        parser = settings_parser(architecture, SAE_TRAINING_CLASS_REGISTRY, self.settings.values())
        flags, unknown = parser.parse_known_args(argv)
        if unknown:
            raise ValueError(_about_unknown(unknown, architecture, self.settings))
        try:
            self.values = converted(flattened(table, self.settings), self.settings)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        for name in vars(flags):
            self.values.pop(f"sae.{name}", None)  # a flag for both counts more than what a file says of one
        self.values |= converted(vars(flags), self.settings)

    def config(self) -> LanguageModelSAERunnerConfig:
        """The runner's config, checked as far as it can be without a model.

        Raises:
            ValueError: If a value is not allowed, or the machine cannot hold the run.
        """
        for name, value in self.values.items():
            if self.values.get("log_to_wandb", True) and isinstance(value, str) and not _is_unicode(value):
                raise ValueError(f"{name} must be Unicode text, since W&B takes no other; got {value!r}")
        logger: dict[str, Any] = {}
        own: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for name, value in self.values.items():
            if name.startswith("sae."):
                own[name.removeprefix("sae.")] = value
            else:
                (logger if self.settings[name].home == "logger" else others)[name] = value
        cfg = LanguageModelSAERunnerConfig(
            architecture=self.architecture, logger=LoggingConfig(**logger), sae_kwargs=own, **others
        )
        here = _as_computed_here(cfg)
        check_run_fits(here, here.sae)
        if cfg.model_class_name == "HookedTransformer" and not cfg.use_cached_activations:
            check_hook_name(cfg.hook_name)
        return cfg

    def as_file(self, cfg: LanguageModelSAERunnerConfig) -> str:
        """All settings of the run, as a file for ``--config``."""
        return as_file(self.architecture, cfg, self.values, self.settings)


def train(cfg: LanguageModelSAERunnerConfig, overrides: Mapping[str, Any]) -> int:
    """Train, report where the results are, and return the exit code.

    Args:
        cfg: The run.
        overrides: Keyword arguments of the runner: ``override_model``, ``override_dataset``.
    """
    is_first = int(os.environ.get("RANK", "0")) == 0
    try:
        with printable_logs():
            if is_parallel(cfg):
                ParallelLanguageModelSAETrainingRunner(cfg, **overrides).run()
                leave_process_group()
            else:
                LanguageModelSAETrainingRunner(cfg, **overrides).run()
    except INTERRUPTIONS as interruption:
        code = exit_code(interruption)
        say("interrupted", error=True)
    except (ValueError, OSError, TrainingDivergedError, RankLostError) as error:
        code = 1
        say(f"error: {error}", error=True)
    else:
        code = 0
        where = "nowhere, since output_path is none" if cfg.output_path is None else cfg.output_path
        if is_first:
            say(f"saved: {where}")
    if is_first and cfg.checkpoint_path is not None and Path(cfg.checkpoint_path).is_dir():
        again = "" if code == 0 else "; to resume, run the same command with --resume latest"
        say(f"checkpoints: {cfg.checkpoint_path}{again}")
    return code


def _as_computed_here(cfg: LanguageModelSAERunnerConfig) -> LanguageModelSAERunnerConfig:
    """The config with the devices of this process, where torchrun has started several on one machine."""
    here = copy.copy(cfg)
    here.sae = copy.copy(cfg.sae)
    if is_parallel(cfg):
        use_local_devices(here)
    return here


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _about_unknown(unknown: list[str], architecture: str, settings: Settings) -> str:
    flag = next((token.partition("=")[0] for token in unknown if token.startswith("-")), None)
    if flag is None:
        return f"unexpected argument {unknown[0]!r}"
    name = flag.lstrip("-").replace("-", "_")
    others: Iterable[str] = [other for other in SAE_TRAINING_CLASS_REGISTRY if name in settings_of(other)]
    if others:
        return f"{flag} is a flag of {', '.join(others)}, not of {architecture}"
    known = [s.flag for s in settings.values()] + ["--architecture", "--config", "--dry-run", "--help"]
    return f"unknown flag {flag}{nearest_name(flag, known).replace(chr(39), '')}"
