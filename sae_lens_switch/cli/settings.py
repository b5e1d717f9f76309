"""The settings of a run: every field of its configs, found by introspection, and the tables that hold their values."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Literal, get_type_hints

import sae_lens
import yaml
from sae_lens import LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAEConfig
from simple_parsing.docstring import get_attribute_docstring

from sae_lens_switch.cli.flags import HIDDEN, Flag
from sae_lens_switch.cli.values import alternatives, convert, is_list, metavar, short
from sae_lens_switch.common.rules import reject_unknown
from sae_lens_switch.saes.config import SwitchTrainingSAEConfig
from sae_lens_switch.saes.registration import OVERRIDABLE
from sae_lens_switch.training.config import TrainerOptions
from sae_lens_switch.training.runner_config import LanguageModelSAERunnerConfig, training_config_class

# SAELens declares its runner's fields in this order; each of these begins a new subject.
_SUBJECTS = {
    "model_name": "model and data",
    "device": "devices and precision",
    "train_batch_size_tokens": "training",
    "n_eval_batches": "evaluation",
    "n_checkpoints": "checkpoints and output",
    "verbose": "more",
}
_MISSING_DOCS = {
    "d_in": "Width of the activations at hook_name.",
    "d_sae": "Number of latents.",
    "apply_b_dec_to_input": "Whether b_dec is subtracted before encoding.",
    "normalize_activations": "How activations are scaled before encoding.",
    "reshape_activations": 'Whether heads are joined: "hook_z" for hooks on z.',
    "decoder_init_norm": "Norm of the decoder rows at initialisation.",
}
_RECIPE = {"lr": "2e-4 / sqrt(d_sae / 2^14)", "lr_decay_steps": "the last 20 %, of a constant schedule"}


@dataclass(frozen=True)
class Setting(Flag):
    """A flag with the field behind it."""

    home: Literal["run", "sae", "logger"]
    hint: object


Settings = Mapping[str, Setting]


def architectures() -> dict[str, str]:
    """Every registered architecture by name, with one line about it."""
    found = {}
    for name, (sae, _) in sorted(SAE_TRAINING_CLASS_REGISTRY.items()):
        ours = sae.__module__.startswith("sae_lens_switch")
        doc = (sae.__doc__ or "").strip().split("\n")[0] if ours else f"SAELens's {sae.__name__}"
        found[name] = f"the same as sparse_{name}" if name in OVERRIDABLE else doc
    return found


def settings_of(architecture: str) -> dict[str, Setting]:
    """Every field of a run of this architecture by its flat name; ``sae.dtype`` where the SAE has the runner's too.

    Raises:
        ValueError: If there is no such architecture.
    """
    sae = training_config_class(architecture)
    stock = sae_lens.LanguageModelSAERunnerConfig
    shared = {f.name for f in fields(stock)} & {f.name for f in fields(sae)}
    recipe = _RECIPE if issubclass(sae, SwitchTrainingSAEConfig) else {}
    found: dict[str, Setting] = {}

    def add(cls: type, field: Field[object], home: Literal["run", "sae", "logger"], subject: str) -> None:
        default = (recipe.get(field.name) if home == "run" else None) or _default(field)
        found[field.name] = _setting(
            field.name, home, subject, get_type_hints(cls)[field.name], default, _doc(cls, field)
        )

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
        of_run = found[name]
        found[f"sae.{name}"] = _setting(f"sae.{name}", "sae", "more", of_run.hint, f"as {of_run.flag}", "")
    return found


def _setting(
    name: str, home: Literal["run", "sae", "logger"], subject: str, hint: object, default: str, doc: str
) -> Setting:
    kinds = alternatives(hint)
    takes = "several" if any(map(is_list, kinds)) else "switch" if bool in kinds else "one"
    return Setting(name, subject, metavar(hint), takes, default, doc, home, hint)


def _doc(cls: type, field: Field[object]) -> str:
    doc = get_attribute_docstring(cls, field.name).desc_from_cls_docstring or _MISSING_DOCS.get(field.name, "")
    return " ".join(doc.split())


def _default(field: Field[object]) -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return ""
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    return "none" if value in (None, "") else str(value).lower() if isinstance(value, bool) else str(value)


def converted(values: Mapping[str, object], settings: Settings) -> dict[str, object]:
    """The values of all known settings, each as its field's type.

    Raises:
        ValueError: If one does not fit; the message names the field.
    """
    return {name: convert(name, value, settings[name].hint) for name, value in values.items() if name in settings}


def flattened(table: Mapping[str, object], settings: Settings) -> dict[str, object]:
    """The settings of a file by flat name: ``logger``, ``sae`` and ``sae_kwargs`` may be tables of their own.

    Raises:
        ValueError: If one of those is no table, or a name is unknown; the message has the nearest known name.
    """
    inner = {"logger": "logger", "sae": "sae", "sae_kwargs": "sae"}
    flat: dict[str, object] = {}
    for name, value in table.items():
        if name not in inner:
            flat[name] = value
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a table of settings; got {short(value)}")
        allowed = {s.name.removeprefix("sae.") for s in settings.values() if s.home == inner[name]}
        own = {n: v for n, v in value.items() if name != "sae" or n not in ("architecture", "metadata")}
        reject_unknown(map(str, own), allowed)
        flat |= {f"sae.{n}" if name != "logger" and f"sae.{n}" in settings else n: v for n, v in own.items()}
    flat.pop("architecture", None)
    reject_unknown(map(str, flat), [*settings, *inner, "architecture"])
    return flat


def as_file(
    architecture: str, cfg: LanguageModelSAERunnerConfig, given: Mapping[str, object], settings: Settings
) -> str:
    """All settings of a run as a YAML file that ``--config`` reads back into the same run."""
    table: dict[str, object] = {"architecture": architecture}
    logger: dict[str, object] = {}
    own: dict[str, object] = {}
    for s in settings.values():
        if s.name in HIDDEN:
            continue
        if s.name.startswith("sae."):
            if s.name in given:
                own[s.name.removeprefix("sae.")] = given[s.name]
        elif s.home == "logger":
            logger[s.name] = vars(cfg.logger)[s.name]
        else:
            table[s.name] = vars(cfg.sae if s.home == "sae" else cfg)[s.name]
    if own:
        table["sae_kwargs"] = own
    # What the config derives is left as it was given: a name for the run, and a folder below checkpoint_path.
    logger["run_name"] = given.get("run_name")
    table["checkpoint_path"] = given.get("checkpoint_path", sae_lens.LanguageModelSAERunnerConfig.checkpoint_path)
    table["logger"] = logger
    plain = json.loads(json.dumps(table))  # tuples as lists
    return yaml.safe_dump(plain, sort_keys=False)
