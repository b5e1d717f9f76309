"""Values as flags and files spell them, converted to what a field's type asks for."""

import json
import math
import reprlib
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def convert(name: str, value: object, hint: object) -> object:
    """Convert ``value`` to the type of a field.

    Args:
        name: The field, for the error message.
        value: The value from a file, or the text of a flag.
        hint: The field's type.

    Raises:
        ValueError: If the value fits none of the types in ``hint``; the message names the field.
    """
    for kind in sorted(alternatives(hint), key=lambda kind: kind is not NoneType):  # "none" is None before it is text
        for converted in _as_kind(value, kind):
            return converted
    raise ValueError(f"{name} must be {_description_of(hint)}; got {short(value)}")


def alternatives(hint: object) -> tuple[object, ...]:
    """The members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def is_list(kind: object) -> bool:
    """Whether a type is a list or a tuple."""
    return get_origin(kind) in (list, tuple)


def short(value: object) -> str:
    """``repr``, of limited length."""
    return reprlib.repr(value)


def metavar(hint: object) -> str:
    """How the help abbreviates a type: ``int|none``."""

    def of(kind: object) -> str:
        if get_origin(kind) is Literal:
            return "|".join(map(str, get_args(kind)))
        return metavar(get_args(kind)[0]) if is_list(kind) else _KINDS.get(kind, ("", "JSON"))[1]

    return "|".join(dict.fromkeys(map(of, alternatives(hint))))


def _as_kind(value: object, kind: object) -> Iterator[object]:
    """Yield the value as this type, or nothing if it does not fit."""
    origin = get_origin(kind)
    if is_list(kind):
        yield from _as_list(value, kind)
        return
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]  # from a flag that takes several values
    text = value.strip().lower() if isinstance(value, str) else None
    if kind is NoneType:
        if value is None or text in ("none", "null"):
            yield None
    elif origin is Literal:
        yield from (choice for choice in get_args(kind) if choice == value)
    elif origin is dict or kind is dict:
        yield from _as_table(value)
    elif kind is bool:
        if isinstance(value, bool):
            yield value
        elif text in ("true", "yes", "on", "false", "no", "off"):
            yield text in ("true", "yes", "on")
    elif kind is str:
        if text is not None:
            yield value
    elif kind in (int, float) and not isinstance(value, bool) and isinstance(value, int | float | str):
        yield from _as_number(value, is_float=kind is float)
    elif kind is Any:
        yield value


def _as_table(value: object) -> Iterator[object]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        yield value


def _as_number(value: int | float | str, *, is_float: bool) -> Iterator[int | float]:
    try:
        exact = int(value) if isinstance(value, int | str) else None
    except ValueError:
        exact = None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return
    if is_float:
        if math.isfinite(number):
            yield number
    elif exact is not None:
        yield exact
    elif number.is_integer():  # 1e8 tokens
        yield int(number)


def _as_list(value: object, kind: object) -> Iterator[object]:
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, str):
        value = value.strip("[]() ").replace(",", " ").split()
    if not isinstance(value, list | tuple):
        return
    member = get_args(kind)[0]
    try:
        items = [convert("each", item, member) for item in value]
    except ValueError:
        return
    yield items if get_origin(kind) is list else tuple(items)


# What messages and help call a type.
_KINDS: dict[object, tuple[str, str]] = {
    int: ("a whole number", "int"),
    float: ("a number", "float"),
    bool: ("true or false", "true|false"),
    str: ("text", "str"),
    NoneType: ("none", "none"),
    Any: ("anything", "value"),
}


def _description_of(hint: object) -> str:
    def of(kind: object) -> str:
        if get_origin(kind) is Literal:
            return f"one of {', '.join(map(repr, get_args(kind)))}"
        if is_list(kind):
            return f"a list, each {_description_of(get_args(kind)[0])}"
        return "a table" if get_origin(kind) is dict else _KINDS[kind][0]

    return " or ".join(map(of, alternatives(hint)))
