"""Trains an SAE on a language model's activations, as told by flags, by a file of settings, or by both.

    python -m sae_lens_switch.train --architecture switch --d-in 768 --d-sae 24576 --n-experts 32 --k 32 \\
        --model-name gpt2 --hook-name blocks.8.hook_resid_post --training-tokens 100_000_000 \\
        --dataset-path Skylion007/openwebtext --is-dataset-tokenized false --device cuda
    python -m sae_lens_switch.train --config run.yaml --lr 1e-3
    python -m sae_lens_switch.train --architecture switch --help

A flag is a field of ``LanguageModelSAERunnerConfig``: of SAELens's runner, its logger, the SAE's own config, or
``TrainerOptions``. A file has the same names, in YAML or JSON, as ``runner_cfg.json`` of a finished run has; flags
override it. Exit codes: 0, 2 for what was asked wrongly, 1 for a failure; 130, 143 and 129 after SIGINT, SIGTERM and
SIGHUP, once a checkpoint is saved. A signal that is ignored, as SIGHUP under nohup, stays ignored.
"""

import argparse
import json
import math
import reprlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import sae_lens
import yaml
from sae_lens import LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAEConfig
from simple_parsing.docstring import get_attribute_docstring

from sae_lens_switch.common.machine import check_run_fits
from sae_lens_switch.common.printable import printable_logs, say
from sae_lens_switch.common.rules import nearest_name, reject_unknown
from sae_lens_switch.saes.config import SwitchTrainingSAEConfig
from sae_lens_switch.training.config import TrainerOptions
from sae_lens_switch.training.hooks import check_hook_name
from sae_lens_switch.training.interruption import INTERRUPTIONS, exit_code
from sae_lens_switch.training.runner_config import LanguageModelSAERunnerConfig, training_config_class
from sae_lens_switch.training.runners import LanguageModelSAETrainingRunner
from sae_lens_switch.training.trainer import TrainingDivergedError

_PROGRAM = "python -m sae_lens_switch.train"
# SAELens declares its runner's fields in this order; each of these begins a new subject.
_SUBJECTS = {
    "model_name": "model and data",
    "device": "devices and precision",
    "train_batch_size_tokens": "training",
    "n_eval_batches": "evaluation",
    "n_checkpoints": "checkpoints and output",
    "verbose": "more",
}
_HIDDEN = {"hook_eval", "sae_lens_version", "sae_lens_training_version"}
_MISSING_DOCS = {
    "d_in": "Width of the activations at hook_name.",
    "d_sae": "Number of latents.",
    "apply_b_dec_to_input": "Whether b_dec is subtracted before encoding.",
    "normalize_activations": "How activations are scaled before encoding.",
    "reshape_activations": 'Whether heads are joined: "hook_z" for hooks on z.',
    "decoder_init_norm": "Norm of the decoder rows at the start.",
}
_RECIPE = {"lr": "2e-4 / sqrt(d_sae / 2^14)", "lr_decay_steps": "the last 20 %, of a constant schedule"}


@dataclass(frozen=True)
class _Setting:
    """One field of the config."""

    name: str
    home: str  # "run", "sae", "logger"
    subject: str
    hint: Any
    default: str
    doc: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def main(argv: Sequence[str] | None = None, **overrides: Any) -> int:
    """Runs the command; returns its exit code. ``overrides`` go to the runner: override_model, override_dataset."""
    try:
        cfg = _configure(_with_dashes(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        say(f"error: {error}", error=True)
        return 2
    if cfg is None:
        return 0
    try:
        with printable_logs():
            LanguageModelSAETrainingRunner(cfg, **overrides).run()
    except INTERRUPTIONS as interruption:
        code = exit_code(interruption)
        say("interrupted", error=True)
    except (ValueError, OSError, TrainingDivergedError) as error:
        code = 1
        say(f"error: {error}", error=True)
    else:
        code = 0
        where = "nowhere, since output_path is none" if cfg.output_path is None else cfg.output_path
        say(f"saved: {where}")
    if cfg.checkpoint_path is not None and Path(cfg.checkpoint_path).is_dir():
        again = "" if code == 0 else "; go on with the same command and --resume latest"
        say(f"checkpoints: {cfg.checkpoint_path}{again}")
    return code


def _configure(argv: list[str]) -> LanguageModelSAERunnerConfig | None:
    """The config of the run that is asked for; None if it was only to be shown, or help was."""
    first = _Parser()
    first.add_argument("--architecture", "--sae")
    first.add_argument("--config")
    first.add_argument("--dry-run", action="store_true")
    first.add_argument("--help", "-h", action="store_true")
    asked, rest = first.parse_known_args(argv)
    table = {} if asked.config is None else _read(asked.config)
    architecture = asked.architecture or _architecture_of(table)
    if architecture is None:
        if asked.help:
            say(_overview())
            return None
        raise ValueError(f"--architecture is missing; {_PROGRAM} --help lists them")
    settings = _settings(architecture)
    parser = _parser(architecture, settings)
    if asked.help:
        parser.print_help()
        return None
    flags, unknown = parser.parse_known_args(rest)
    if unknown:
        raise ValueError(_about_unknown(unknown, architecture, settings))
    try:
        values = _converted(_flat(table, settings), settings)
    except ValueError as error:
        raise ValueError(f"{asked.config}: {error}") from error
    for name in vars(flags):
        values.pop(f"sae.{name}", None)  # a flag for both counts more than a file's word on one
    values |= _converted(vars(flags), settings)
    cfg = _config(architecture, values, settings)
    if asked.dry_run:
        say(_as_file(architecture, cfg, values, settings), end="")
        return None
    return cfg


def _config(architecture: str, values: dict[str, Any], settings: dict[str, _Setting]) -> LanguageModelSAERunnerConfig:
    for name, value in values.items():
        if values.get("log_to_wandb", True) and isinstance(value, str) and not _is_unicode(value):
            raise ValueError(f"{name} must be Unicode text, or W&B cannot be told; got {value!r}")
    logger = {name: value for name, value in values.items() if settings[name].home == "logger"}
    own = {name: value for name, value in values.items() if name.startswith("sae.")}
    cfg = LanguageModelSAERunnerConfig(
        architecture=architecture,
        logger=LoggingConfig(**logger),
        sae_kwargs={name.removeprefix("sae."): value for name, value in own.items()},
        **{name: value for name, value in values.items() if name not in logger and name not in own},
    )
    check_run_fits(cfg, cfg.sae)
    if cfg.model_class_name == "HookedTransformer" and not cfg.use_cached_activations:
        check_hook_name(cfg.hook_name)
    return cfg


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


# Settings: names, types, documentation


def _settings(architecture: str) -> dict[str, _Setting]:
    """Every field that a run of this architecture has, by its flat name; ``sae.dtype`` where the runner's differs."""
    sae = training_config_class(architecture)
    stock = sae_lens.LanguageModelSAERunnerConfig
    shared = {f.name for f in fields(stock)} & {f.name for f in fields(sae)}
    recipe = _RECIPE if issubclass(sae, SwitchTrainingSAEConfig) else {}
    found: dict[str, _Setting] = {}

    def add(cls: type, field: Field, home: str, subject: str) -> None:
        name = field.name
        doc = get_attribute_docstring(cls, name).desc_from_cls_docstring or _MISSING_DOCS.get(name, "")
        default = (recipe.get(name) if home == "run" else None) or _default(field)
        found[name] = _Setting(name, home, subject, get_type_hints(cls)[name], default, " ".join(doc.split()))

    subject = f"the SAE, {sae.architecture()}"
    inherited = {f.name for f in fields(TrainingSAEConfig)}
    for field in sorted(fields(sae), key=lambda f: (f.name not in ("d_in", "d_sae"), f.name in inherited)):
        if field.name != "metadata" and field.name not in shared:
            add(sae, field, "sae", subject)
    for field in fields(stock):
        if field.name not in ("sae", "logger"):
            subject = _SUBJECTS.get(field.name, subject)
            add(stock, field, "run", subject)
    for field in fields(TrainerOptions):
        add(TrainerOptions, field, "run", "this package's trainer")
    for field in fields(LoggingConfig):
        add(LoggingConfig, field, "logger", "Weights & Biases")
    for name in sorted(shared):
        setting = found[name]
        found[f"sae.{name}"] = _Setting(f"sae.{name}", "sae", "more", setting.hint, f"as {setting.flag}", "")
    return found


def _default(field: Field) -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return ""
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    return "none" if value in (None, "") else str(value).lower() if isinstance(value, bool) else str(value)


def _overview() -> str:
    usage = f"usage: {_PROGRAM} --architecture NAME [--config FILE] [flags]"
    lines = [usage, "", _description(), "", "architectures:"]
    for name, (sae, _) in sorted(SAE_TRAINING_CLASS_REGISTRY.items()):
        ours = sae.__module__.startswith("sae_lens_switch")
        doc = (sae.__doc__ or "").strip().split("\n")[0] if ours else f"SAELens's {sae.__name__}"
        doc = "the same as sparse_topk" if name == "topk" else doc
        lines.append(f"  {name:22}{doc}")
    lines += ["", "The flags of one, with their meanings and defaults:", f"  {_PROGRAM} --architecture switch --help"]
    return "\n".join(lines)


def _description() -> str:
    return (__doc__ or "").strip()


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(prog=_PROGRAM, add_help=False, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser(architecture: str, settings: dict[str, _Setting]) -> _Parser:
    parser = _Parser(
        argument_default=argparse.SUPPRESS,  # only what is given is set
        usage=f"{_PROGRAM} --architecture {architecture} [--config FILE] [flags]",
        description=_description(),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
    )
    what = parser.add_argument_group("what to do")
    what.add_argument("--architecture", metavar="NAME", help=f"one of {', '.join(sorted(SAE_TRAINING_CLASS_REGISTRY))}")
    what.add_argument("--config", metavar="FILE", help="settings in YAML or JSON, named as below; flags override it")
    what.add_argument("--dry-run", action="store_true", help="print all settings, as a file for --config, and stop")
    what.add_argument("--help", "-h", action="store_true", help="this text")
    groups: dict[str, Any] = {}
    for s in settings.values():
        if s.subject not in groups:
            groups[s.subject] = parser.add_argument_group(s.subject)
        group = groups[s.subject]
        default = f"(default: {s.default})" if s.default else "(required)"
        text = f"{s.doc} {default}".strip().replace("%", "%%")
        help_text = argparse.SUPPRESS if s.name in _HIDDEN else text
        names = [s.flag, *([f"-{s.name}"] if len(s.name) == 1 else [])]
        kinds = _alternatives(s.hint)
        options: dict[str, Any] = {"dest": s.name, "help": help_text, "metavar": _metavar(s.hint)}
        if any(get_origin(kind) in (list, tuple) for kind in kinds):
            options["nargs"] = "+"
        elif bool in kinds:
            options |= {"nargs": "?", "const": "true"}
        group.add_argument(*names, **options)
        if bool in kinds:  # SAELens writes --nostreaming
            no = [f"--no-{s.flag[2:]}", f"--no{s.flag[2:]}"]
            group.add_argument(*no, dest=s.name, action="store_const", const="false", help=argparse.SUPPRESS)
    return parser


def _with_dashes(argv: Sequence[str]) -> list[str]:
    """SAELens's flags have underscores."""
    dashed = []
    for token in argv:
        head, equals, tail = token.partition("=")
        dashed.append(head.replace("_", "-") + equals + tail if token.startswith("--") else token)
    return dashed


def _about_unknown(unknown: list[str], architecture: str, settings: dict[str, _Setting]) -> str:
    flag = next((token.partition("=")[0] for token in unknown if token.startswith("-")), None)
    if flag is None:
        return f"unexpected argument {unknown[0]!r}"
    name = flag.lstrip("-").replace("-", "_")
    others = [other for other in SAE_TRAINING_CLASS_REGISTRY if name in _settings(other)]
    if others:
        return f"{flag} is a flag of {', '.join(others)}, not of {architecture}"
    known = [s.flag for s in settings.values()] + ["--architecture", "--config", "--dry-run", "--help"]
    return f"unknown flag {flag}{nearest_name(flag, known).replace(chr(39), '')}"


# Files


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            table = json.loads(text)
        else:
            _refuse_bombs(text)
            table = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(table, dict):
        raise ValueError(f"--config {path} must hold a table of settings; got {_short(table)}")
    return table


def _refuse_bombs(text: str) -> None:
    """Ten lines of aliases make a billion values, and a thousand brackets keep PyYAML busy for minutes."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > 20:
            raise ValueError("aliases (*name) are not allowed, nor tables in tables in tables without end")


def _architecture_of(table: dict[str, Any]) -> str | None:
    sae = table.get("sae")
    found = table.get("architecture", sae.get("architecture") if isinstance(sae, dict) else None)
    if found is not None and not isinstance(found, str):
        raise ValueError(f"architecture must be a name; got {_short(found)}")
    return found


def _flat(table: dict[str, Any], settings: dict[str, _Setting]) -> dict[str, Any]:
    """``logger``, ``sae`` and ``sae_kwargs`` may be tables of their own, as in Python and in ``runner_cfg.json``."""
    inner = {"logger": "logger", "sae": "sae", "sae_kwargs": "sae"}
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if name not in inner:
            flat[name] = value
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a table of settings; got {_short(value)}")
        allowed = {s.name.removeprefix("sae.") for s in settings.values() if s.home == inner[name]}
        own = {n: v for n, v in value.items() if name != "sae" or n not in ("architecture", "metadata")}
        reject_unknown(map(str, own), allowed)
        flat |= {f"sae.{n}" if name != "logger" and f"sae.{n}" in settings else n: v for n, v in own.items()}
    flat.pop("architecture", None)
    reject_unknown(map(str, flat), [*settings, *inner, "architecture"])
    return flat


def _as_file(
    architecture: str, cfg: LanguageModelSAERunnerConfig, given: dict[str, Any], settings: dict[str, _Setting]
) -> str:
    table: dict[str, Any] = {"architecture": architecture}
    logger: dict[str, Any] = {}
    for s in settings.values():
        if s.name in _HIDDEN:
            continue
        if s.name.startswith("sae."):
            if s.name in given:
                table.setdefault("sae_kwargs", {})[s.name[4:]] = given[s.name]
        elif s.home == "logger":
            logger[s.name] = getattr(cfg.logger, s.name)
        else:
            table[s.name] = getattr(cfg.sae if s.home == "sae" else cfg, s.name)
    # The config has made these its own: a name for the run, and one more folder.
    logger["run_name"] = given.get("run_name")
    table["checkpoint_path"] = given.get("checkpoint_path", sae_lens.LanguageModelSAERunnerConfig.checkpoint_path)
    table["logger"] = logger
    plain = json.loads(json.dumps(table))  # tuples as lists
    return yaml.safe_dump(plain, sort_keys=False)


# Values


def _converted(values: dict[str, Any], settings: dict[str, _Setting]) -> dict[str, Any]:
    return {name: _convert(name, value, settings[name].hint) for name, value in values.items() if name in settings}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _convert(name: str, value: Any, hint: Any) -> Any:
    """``value``, from a file or, as text, from a flag, as what the field wants.

    Raises ValueError naming the field.
    """
    for kind in sorted(_alternatives(hint), key=lambda kind: kind is not NoneType):  # a "none" is no text
        for converted in _as_kind(value, kind):
            return converted
    raise ValueError(f"{name} must be {_description_of(hint)}; got {_short(value)}")


def _as_kind(value: Any, kind: Any) -> Iterator[Any]:
    """The value as this type, if it can be."""
    origin = get_origin(kind)
    if origin in (list, tuple):
        yield from _as_list(value, kind, origin)
        return
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]  # of a flag that may have several
    text = value.strip().lower() if isinstance(value, str) else None
    if kind is NoneType:
        if value is None or text in ("none", "null"):
            yield None
    elif origin is Literal:
        yield from (choice for choice in get_args(kind) if choice == value)
    elif origin is dict or kind is dict:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            yield value
    elif kind is bool:
        if isinstance(value, bool):
            yield value
        elif text in ("true", "yes", "on", "false", "no", "off"):
            yield text in ("true", "yes", "on")
    elif kind is str:
        if text is not None:
            yield value
    elif kind in (int, float) and not isinstance(value, bool) and isinstance(value, int | float | str):
        yield from _as_number(value, kind)
    elif kind is Any:
        yield value


def _as_number(value: int | float | str, kind: type) -> Iterator[Any]:
    try:
        exact = int(value) if isinstance(value, int | str) else None
    except ValueError:
        exact = None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return
    if kind is float:
        if math.isfinite(number):
            yield number
    elif exact is not None:
        yield exact
    elif number.is_integer():  # 1e8 tokens
        yield int(number)


def _as_list(value: Any, kind: Any, origin: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, str):
        value = value.strip("[]() ").replace(",", " ").split()
    if not isinstance(value, list | tuple):
        return
    member = get_args(kind)[0]
    try:
        yield origin(_convert("each", item, member) for item in value)
    except ValueError:
        return


_KINDS = {
    int: ("a whole number", "int"),
    float: ("a number", "float"),
    bool: ("true or false", "true|false"),
    str: ("text", "str"),
    NoneType: ("none", "none"),
    Any: ("anything", "value"),
}


def _description_of(hint: Any) -> str:
    def of(kind: Any) -> str:
        if get_origin(kind) is Literal:
            return f"one of {', '.join(map(repr, get_args(kind)))}"
        if get_origin(kind) in (list, tuple):
            return f"a list, each {_description_of(get_args(kind)[0])}"
        return "a table" if get_origin(kind) is dict else _KINDS[kind][0]

    return " or ".join(map(of, _alternatives(hint)))


def _metavar(hint: Any) -> str:
    def of(kind: Any) -> str:
        if get_origin(kind) is Literal:
            return "|".join(map(str, get_args(kind)))
        return _metavar(get_args(kind)[0]) if get_origin(kind) in (list, tuple) else _KINDS.get(kind, ("", "JSON"))[1]

    return "|".join(dict.fromkeys(map(of, _alternatives(hint))))


def _short(value: Any) -> str:
    return reprlib.repr(value)


if __name__ == "__main__":
    sys.exit(main())
