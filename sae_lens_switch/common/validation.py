"""What every field of every config must be: tables of rules, one a field; and what fields must be together.

Configs are checked when they are made, and again by whoever trains with them, since fields can be set in between.
"""

import ctypes
import math
import numbers
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from sae_lens.config import LoggingConfig
from sae_lens.constants import DTYPE_MAP
from sae_lens.saes.sae import SAEMetadata, TrainingSAEConfig

Gate = Literal["probability", "one"]
LoadBalanceScale = Literal["variance", "d_in"]
OptimizerName = Literal["adam", "row_sparse_adam"]
OnCollapse = Literal["report", "raise_coefficient", "reseed"]
BiasStart = Literal["geometric_median", "mean", "zeros"]

_INT32, _INT64 = 2**31 - 1, 2**63 - 1


# Rules


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a value must be. ``plain`` gives it as it is kept, or raises ValueError; ``expected`` says what it is."""

    optional: bool = False

    def plain(self, value: Any) -> Any:
        raise NotImplementedError

    def expected(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Whole(Rule):
    """An int, numpy's too; no bool, and no float that happens to be whole."""

    at_least: int = 0
    at_most: int = _INT64

    def plain(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ValueError
        if not self.at_least <= value <= self.at_most:  # type: ignore[operator]
            raise ValueError
        return int(value)

    def expected(self) -> str:
        least = "" if self.at_least < -_INT32 else f", at least {self.at_least}"
        most = f" and at most {self.at_most}" if self.at_most < _INT64 else ""
        return f"a whole number{least}{most}"


@dataclass(frozen=True, kw_only=True)
class Number(Rule):
    """A finite real number, numpy's too. It must be finite, and positive where it must, in float32 as well."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def plain(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError
        number = float(value)
        single = ctypes.c_float(number).value
        within = (
            (self.above is None or (number > self.above and single > self.above))
            and (self.at_least is None or number >= self.at_least)
            and (self.below is None or number < self.below)
            and (self.at_most is None or number <= self.at_most)
        )
        if not math.isfinite(single) or not within:
            raise ValueError
        return number

    def expected(self) -> str:
        bounds = {"at least": self.at_least, "above": self.above, "below": self.below, "at most": self.at_most}
        if self.above == 0:
            bounds["above"] = None
        limits = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
        return f"a {'positive ' if self.above == 0 else ''}finite number{f', {limits}' if limits else ''}"


@dataclass(frozen=True, kw_only=True)
class Flag(Rule):
    def plain(self, value: Any) -> bool:
        if not isinstance(value, bool | np.bool_):
            raise ValueError
        return bool(value)

    def expected(self) -> str:
        return "True or False"


@dataclass(frozen=True, kw_only=True)
class Text(Rule):
    """A string; with ``path``, or what stands for a path."""

    path: bool = False
    may_be_empty: bool = False

    def plain(self, value: Any) -> str:
        if self.path and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str) or "\0" in value or not (value or self.may_be_empty):
            raise ValueError
        return str(value)

    def expected(self) -> str:
        return "a path" if self.path else "text" if self.may_be_empty else "text that is not empty"


@dataclass(frozen=True)
class Choice(Rule):
    names: tuple[str, ...]
    any_case: bool = False

    def plain(self, value: Any) -> str:
        if not isinstance(value, str) or (value.lower() if self.any_case else value) not in self.names:
            raise ValueError
        return str(value)

    def expected(self) -> str:
        return f"one of {', '.join(map(repr, self.names))}"


@dataclass(frozen=True, kw_only=True)
class Device(Rule):
    """A name that torch can read; whether the machine has it is asked when something is put there."""

    also: tuple[str, ...] = ()

    def plain(self, value: Any) -> Any:
        if value not in self.also:
            try:
                torch.device(_refused_unless(isinstance(value, str | torch.device), value))
            except RuntimeError as error:
                raise ValueError from error
        return str(value)

    def expected(self) -> str:
        return "one that torch knows, as cpu, cuda or cuda:1"


@dataclass(frozen=True, kw_only=True)
class Dtype(Rule):
    def plain(self, value: Any) -> Any:
        if str(value) not in DTYPE_MAP or not isinstance(value, str | torch.dtype):
            raise ValueError
        return value if isinstance(value, str) else str(value).removeprefix("torch.")

    def expected(self) -> str:
        return f"one of {', '.join(name for name in DTYPE_MAP if '.' not in name)}"


@dataclass(frozen=True)
class Each(Rule):
    """A list or tuple, each member by a rule."""

    member: Rule
    at_most: int = _INT64

    def plain(self, value: Any) -> Any:
        if type(value) not in (list, tuple) or len(value) > self.at_most:
            raise ValueError
        return type(value)(_plain(self.member, item) for item in value)

    def expected(self) -> str:
        return f"a list, each {_expected(self.member)}"


@dataclass(frozen=True)
class Either(Rule):
    rules: tuple[Rule, ...]

    def plain(self, value: Any) -> Any:
        for rule in self.rules:
            try:
                return _plain(rule, value)
            except (ValueError, OverflowError):
                continue
        raise ValueError

    def expected(self) -> str:
        return " or ".join(map(_expected, self.rules))


@dataclass(frozen=True)
class Kind(Rule):
    """An instance, whose own fields are checked by ``table``, if there is one."""

    kinds: tuple[type, ...]
    table: Mapping[str, Rule] | None = None

    def plain(self, value: Any) -> Any:
        if not isinstance(value, self.kinds):
            raise ValueError
        return value

    def expected(self) -> str:
        return f"a {' or '.join(kind.__name__ for kind in self.kinds)}"


@dataclass(frozen=True, kw_only=True)
class Anything(Rule):
    """What others have to judge."""

    def plain(self, value: Any) -> Any:
        return value

    def expected(self) -> str:
        return "anything"


def _refused_unless(good: bool, value: Any) -> Any:
    if not good:
        raise ValueError
    return value


def _plain(rule: Rule, value: Any) -> Any:
    return None if value is None and rule.optional else rule.plain(value)


def _expected(rule: Rule) -> str:
    return rule.expected() + (" or None" if rule.optional else "")


# Tables

_count, _size = Whole(), Whole(at_least=1)
_flag, _path, _text = Flag(), Text(path=True, optional=True), Text(optional=True)
_share = Number(at_least=0, at_most=1)
# Adam moves every weight by about this much a step.
_most_lr = 1000
_coefficient = Number(at_least=0)

LOGGING: dict[str, Rule] = {
    **dict.fromkeys(("log_to_wandb", "log_activations_store_to_wandb", "log_optimizer_state_to_wandb"), _flag),
    "log_weights_to_wandb": _flag,
    "wandb_project": Text(),
    **dict.fromkeys(("wandb_id", "run_name", "wandb_entity"), _text),
    **dict.fromkeys(("wandb_log_frequency", "eval_every_n_wandb_logs"), _size),
}

SAE: dict[str, Rule] = {
    **dict.fromkeys(("d_in", "d_sae"), _size),
    "dtype": Dtype(),
    "device": Device(),
    "apply_b_dec_to_input": _flag,
    "normalize_activations": Choice(
        ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "covariance_whitening")
    ),
    "reshape_activations": Choice(("none", "hook_z")),
    "metadata": Kind((SAEMetadata, dict)),  # a dict, in a config that is being read from a file
    "decoder_init_norm": Number(above=0, optional=True),
}
SWITCH: dict[str, Rule] = {
    **SAE,
    **dict.fromkeys(("n_experts", "k"), _size),
    "gate": Choice(get_args(Gate)),
    "load_balance_coefficient": Number(at_least=0, optional=True),
    "load_balance_scale": Choice(get_args(LoadBalanceScale)),
    "load_balance_warm_up_steps": _count,
    **dict.fromkeys(("normalize_decoder", "project_decoder_grad", "tie_router_bias"), _flag),
    "bias_start": Choice(get_args(BiasStart)),
    "router_start_std": Number(above=0, optional=True),
    "aux_loss_coefficient": _coefficient,
    "aux_k": Whole(at_least=1, optional=True),
}
SPARSE_TOPK: dict[str, Rule] = {
    **SAE,
    "k": _size,
    **dict.fromkeys(("use_sparse_activations", "rescale_acts_by_decoder_norm"), _flag),
    "aux_loss_coefficient": _coefficient,
}

OPTIONS: dict[str, Rule] = {
    "optimizer": Choice(get_args(OptimizerName)),
    "gradient_accumulation_steps": _size,
    "cuda_graph": _flag,
    "max_grad_norm": Number(above=0, optional=True),
    "resume": _path,
    "keep_checkpoints": Whole(at_least=1, optional=True),
    "max_skipped_steps": _size,
    "on_collapse": Choice(get_args(OnCollapse)),
    "collapse_share": Number(above=0, at_most=1, optional=True),
    "collapse_patience": _size,
}
# What a trainer's config and a runner's have in common.
_TRAINING: dict[str, Rule] = {
    "lr": Number(above=0, at_most=_most_lr),
    "lr_end": Number(at_least=0, optional=True),
    "lr_scheduler_name": Choice(("constant", "cosineannealing", "cosineannealingwarmrestarts"), any_case=True),
    **dict.fromkeys(("lr_warm_up_steps", "lr_decay_steps"), _count),
    "n_restart_cycles": _size,
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Number(at_least=0, below=1)),
    "device": Device(),
    "autocast": _flag,
    "dead_feature_window": Whole(at_most=_INT32),  # compared with int32 counts
    "feature_sampling_window": _size,
    "n_checkpoints": _count,
    "checkpoint_path": _path,
    "save_final_checkpoint": _flag,
    "logger": Kind((LoggingConfig,), LOGGING),
    "n_batches_for_norm_estimate": _size,
}
STOCK_TRAINER: dict[str, Rule] = {
    **_TRAINING,
    **dict.fromkeys(("total_training_samples", "train_batch_size_samples"), _size),
}
TRAINER: dict[str, Rule] = {
    **STOCK_TRAINER,
    **OPTIONS,
    "lr": Number(above=0, at_most=_most_lr, optional=True),
    "lr_decay_steps": Whole(optional=True),
}

_each_table = Kind((dict,))
RUNNER: dict[str, Rule] = {
    **_TRAINING,
    **OPTIONS,
    "sae": Kind((TrainingSAEConfig,)),
    **dict.fromkeys(("model_name", "model_class_name", "hook_name", "hook_eval"), Text()),
    "hook_head_index": Whole(optional=True),
    "dataset_path": Text(path=True, may_be_empty=True),  # not needed where the dataset itself is given
    **dict.fromkeys(("dataset_trust_remote_code", "streaming", "is_dataset_tokenized"), _flag),
    **dict.fromkeys(("use_chat_formatting", "use_cached_activations", "disable_concat_sequences"), _flag),
    **dict.fromkeys(("prepend_bos", "autocast_lm", "compile_llm", "compile_sae", "verbose"), _flag),
    **dict.fromkeys(("cached_activations_path", "from_pretrained_path"), _path),
    **dict.fromkeys(("output_path", "resume_from_checkpoint"), _path),
    "context_size": Whole(at_least=1, at_most=2**24),  # SAELens makes a list of all positions
    **dict.fromkeys(("n_batches_in_buffer", "store_batch_size_prompts"), _size),
    **dict.fromkeys(("training_tokens", "train_batch_size_tokens", "n_eval_batches"), _size),
    "eval_batch_size_prompts": Whole(at_least=1, optional=True),
    "seqpos_slice": Each(Whole(at_least=-_INT64, optional=True), at_most=3),
    "sequence_separator_token": Either((Whole(), Choice(("bos", "eos", "sep"))), optional=True),
    "activations_mixing_fraction": _share,
    "llm_device": Device(optional=True),
    "act_store_device": Device(also=("with_model",), optional=True),
    "prefetch_llm_batches": Either((_flag, Whole(at_most=_INT32))),
    "seed": _count,
    "dtype": Dtype(),
    **dict.fromkeys(("llm_compilation_mode", "sae_compilation_mode"), _text),
    "dead_feature_threshold": _share,
    "model_kwargs": _each_table,
    "model_from_pretrained_kwargs": Kind((dict,), optional=True),
    **dict.fromkeys(("sae_lens_version", "sae_lens_training_version"), Text()),
    "exclude_special_tokens": Either((_flag, Each(Whole()))),
}
MULTI_RUNNER: dict[str, Rule] = {
    **RUNNER,
    "saes": Kind((Mapping,)),
    "hook_names": Either((Text(), Kind((Mapping,)))),
    "hook_head_indices": Either((Whole(), Kind((Mapping,))), optional=True),
    "evaluator": Anything(),
    **dict.fromkeys(("_hook_names_per_sae", "_hook_head_indices_per_sae"), _each_table),
}
SYNTHETIC_RUNNER: dict[str, Rule] = {
    **_TRAINING,
    "synthetic_model": Anything(),
    "sae": Kind((TrainingSAEConfig,)),
    **dict.fromkeys(("training_samples", "batch_size", "eval_samples"), _size),
    "eval_frequency": _count,
    **dict.fromkeys(("autocast_sae", "autocast_data", "save_synthetic_model", "run_final_eval"), _flag),
    "output_path": _path,
    "sae_lens_version": Text(),
}


# Checks


def check(cfg: Any, table: Mapping[str, Rule], prefix: str = "") -> None:
    """Every field of a config by its rule; kept as a plain Python value where it is numpy's, or a path.

    A field that the table does not have, as of an architecture that is not ours, is checked by its annotation.
    Raises ValueError that names the field, its value and what was expected.
    """
    hints: dict[str, Any] | None = None
    for field in fields(cfg):
        rule = table.get(field.name)
        if rule is None:
            hints = get_type_hints(type(cfg)) if hints is None else hints
            rule = _rule_by_hint(hints[field.name])
        value = getattr(cfg, field.name)
        plain = check_value(prefix + field.name, value, rule)
        if plain is not value and field.name in table:
            setattr(cfg, field.name, plain)


def check_value(name: str, value: Any, rule: Rule) -> Any:
    """The value as it is kept. Raises ValueError."""
    try:
        plain = _plain(rule, value)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} must be {_expected(rule)}; got {shown(value)}") from None
    if isinstance(rule, Kind) and rule.table is not None and plain is not None:
        check(plain, rule.table, f"{name}.")
    return plain


def shown(value: Any) -> str:
    """A value in a message: short, whatever it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no int of more than some thousand digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def _rule_by_hint(hint: Any) -> Rule:
    simple: dict[Any, Rule] = {int: Whole(at_least=-_INT64), float: Number(), bool: _flag, str: Text(may_be_empty=True)}
    if get_origin(hint) is Literal:
        return Choice(get_args(hint)) if all(isinstance(name, str) for name in get_args(hint)) else Anything()
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return Either(tuple(map(_rule_by_hint, kinds)), optional=len(kinds) < len(get_args(hint)))
    return simple.get(hint, Anything())


def check_schedule(cfg: Any, *, total: str = "total_training_samples", batch: str = "train_batch_size_samples") -> None:
    """What SAELens's schedules divide by, and where their parts lie: of fields that are each by their rules.

    ``lr``, ``lr_end`` and ``lr_decay_steps`` may be None still. Raises ValueError.
    """
    samples, size = getattr(cfg, total), getattr(cfg, batch)
    steps = samples // size
    if steps < 1:
        raise ValueError(f"{total} must be at least {batch}, {size}, for one training step; got {samples}")
    warm_up, decay = cfg.lr_warm_up_steps, cfg.lr_decay_steps or 0
    schedule = cfg.lr_scheduler_name.lower()
    own = steps - warm_up - decay  # of the schedule itself, between warm-up and decay
    needed = {"constant": 0, "cosineannealing": 1}.get(schedule, cfg.n_restart_cycles)
    if own < needed:
        of_its_own = f", and leave {needed} for lr_scheduler_name={schedule!r}" if needed else ""
        if schedule == "cosineannealingwarmrestarts":
            of_its_own += f" with n_restart_cycles={needed}"
        raise ValueError(
            f"lr_warm_up_steps and lr_decay_steps must fit into the {steps} training steps ({total} // {batch} = "
            f"{samples} // {size}){of_its_own}; got {warm_up} and {decay}"
        )
    if schedule != "constant" and cfg.lr_end is not None:
        if cfg.lr is not None and cfg.lr_end > cfg.lr:
            raise ValueError(f"lr_end must be at most lr={cfg.lr} with {schedule}; got {cfg.lr_end}")
        if decay and cfg.lr_end == 0:
            raise ValueError(f"lr_end must be positive with {schedule} and lr_decay_steps={decay}; got {cfg.lr_end}")
    if cfg.n_checkpoints > steps:
        raise ValueError(f"n_checkpoints must be at most the {steps} training steps; got {cfg.n_checkpoints}")
