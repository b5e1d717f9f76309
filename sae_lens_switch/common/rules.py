"""What a field of a config must be: rules, and checking a config against a table of them, one rule per field.

Configs are checked when they are made, and again before training, since fields can be set in between.
"""

import ctypes
import difflib
import math
import numbers
import os
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from sae_lens.constants import DTYPE_MAP

_INT32, _INT64 = 2**31 - 1, 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """What a value must be. ``plain`` gives it as it is kept, or raises ValueError; ``expected`` says what it is."""

    optional: bool = False

    @abstractmethod
    def plain(self, value: object) -> object: ...

    @abstractmethod
    def expected(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Whole(Rule):
    """An int, numpy's too; no bool, and no float that happens to be whole."""

    at_least: int = 0
    at_most: int = _INT64

    def plain(self, value: object) -> int:
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

    def plain(self, value: object) -> float:
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
    def plain(self, value: object) -> bool:
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

    def plain(self, value: object) -> str:
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

    def plain(self, value: object) -> str:
        if not isinstance(value, str) or (value.lower() if self.any_case else value) not in self.names:
            raise ValueError
        return str(value)

    def expected(self) -> str:
        return f"one of {', '.join(map(repr, self.names))}"


@dataclass(frozen=True, kw_only=True)
class Device(Rule):
    """A device name that torch can parse; whether the machine has it is checked when something is put there."""

    also: tuple[str, ...] = ()

    def plain(self, value: object) -> object:
        if not isinstance(value, str | torch.device):
            raise ValueError
        if value not in self.also:
            try:
                torch.device(value)
            except RuntimeError as error:
                raise ValueError from error
        return str(value)

    def expected(self) -> str:
        return "one that torch knows, as cpu, cuda or cuda:1"


@dataclass(frozen=True, kw_only=True)
class Dtype(Rule):
    def plain(self, value: object) -> object:
        if str(value) not in DTYPE_MAP or not isinstance(value, str | torch.dtype):
            raise ValueError
        return value if isinstance(value, str) else str(value).removeprefix("torch.")

    def expected(self) -> str:
        return f"one of {', '.join(name for name in DTYPE_MAP if '.' not in name)}"


@dataclass(frozen=True)
class Each(Rule):
    """A list or tuple, each member by a rule; kept as what it is, or as a list."""

    member: Rule
    at_most: int = _INT64
    as_list: bool = False

    def plain(self, value: object) -> object:
        if not isinstance(value, list | tuple) or type(value) not in (list, tuple) or len(value) > self.at_most:
            raise ValueError
        kind = list if self.as_list else type(value)
        return kind(_plain(self.member, item) for item in value)

    def expected(self) -> str:
        return f"a list, each {_expected(self.member)}"


@dataclass(frozen=True)
class Either(Rule):
    rules: tuple[Rule, ...]

    def plain(self, value: object) -> object:
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

    def plain(self, value: object) -> object:
        if not isinstance(value, self.kinds):
            raise ValueError
        return value

    def expected(self) -> str:
        return f"a {' or '.join(kind.__name__ for kind in self.kinds)}"


@dataclass(frozen=True, kw_only=True)
class Anything(Rule):
    """Any value; checked elsewhere, if at all."""

    def plain(self, value: object) -> object:
        return value

    def expected(self) -> str:
        return "anything"


def _plain(rule: Rule, value: object) -> object:
    return None if value is None and rule.optional else rule.plain(value)


def _expected(rule: Rule) -> str:
    return rule.expected() + (" or None" if rule.optional else "")


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


def check_value(name: str, value: object, rule: Rule) -> Any:
    """The value as it is kept. Raises ValueError."""
    try:
        plain = _plain(rule, value)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} must be {_expected(rule)}; got {shown(value)}") from None
    if isinstance(rule, Kind) and rule.table is not None and plain is not None:
        check(plain, rule.table, f"{name}.")
    return plain


def shown(value: object) -> str:
    """A value in a message: short, whatever it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no int of more than some thousand digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def _rule_by_hint(hint: Any) -> Rule:
    simple: dict[Any, Rule] = {
        int: Whole(at_least=-_INT64),
        float: Number(),
        bool: Flag(),
        str: Text(may_be_empty=True),
    }
    if get_origin(hint) is Literal:
        return Choice(get_args(hint)) if all(isinstance(name, str) for name in get_args(hint)) else Anything()
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return Either(tuple(map(_rule_by_hint, kinds)), optional=len(kinds) < len(get_args(hint)))
    return simple.get(hint, Anything())


class UnknownFieldError(ValueError, TypeError):
    """An unknown keyword: a ValueError like all bad input here, a TypeError as Python's own."""


def reject_unknown(given: Iterable[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise UnknownFieldError(f"unknown field {name!r}{nearest_name(name, known)}")


def nearest_name(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
