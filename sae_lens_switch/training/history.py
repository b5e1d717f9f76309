"""The history of a training run: what is logged, kept as lines of JSON beside the weights, with W&B or without."""

import json
import math
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sae_lens_switch.common.printable import logger

FILENAME = "history.jsonl"
# A run keeps at most this many steps: enough for a curve, and too few to cost anything.
_POINTS = 200
# A hundred times what such a run writes with a thousand experts.
_LARGEST = 1 << 28


class History:
    """Rows of SAELens's and our metrics, under the names that W&B gets; numbers per expert as one list.

    every: a step out of this many is kept
    rows:  what was kept, oldest first
    """

    def __init__(self, total_steps: int) -> None:
        self.every = max(1, -(-total_steps // _POINTS))
        self.rows: list[dict[str, Any]] = []

    def is_due(self, step: int) -> bool:
        """Whether to keep this step, counted from 1."""
        return step % self.every == 0

    def add(self, step: int, log: dict[str, Any]) -> None:
        self.rows.append({"step": step, **_row(log)})

    def save(self, folder: str | Path) -> Path:
        """Write ``history.jsonl``, whole or not at all."""
        file = Path(folder) / FILENAME
        unfinished = file.with_suffix(".unfinished")
        try:
            unfinished.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)
        return file

    def load(self, folder: str | Path) -> None:
        """Go on from the history in a checkpoint, if it has one; a broken one ends no run."""
        file = Path(folder) / FILENAME
        try:
            self.rows = read_history(file) if file.exists() else []
        except (ValueError, OSError) as error:
            logger.warning(f"the curves begin anew: {error}")
            self.rows = []


def read_history(file: str | Path) -> list[dict[str, Any]]:
    """Rows of a ``history.jsonl``, or of the ``.wandb`` file that W&B keeps of a run, online or offline.

    A row holds numbers and lists of numbers, None for those that are not finite; whatever else is there is left out.
    Raises ValueError for a file that is neither.
    """
    file = Path(file)
    if file.suffix == ".wandb":
        return [_row(row) for row in _wandb_rows(file)]
    if file.stat().st_size > _LARGEST:
        raise ValueError(f"{file}: expected at most {_LARGEST:,} bytes; got {file.stat().st_size:,}")
    rows = []
    # At line feeds alone: a name may hold others of what Python takes for the end of a line.
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n"), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}: expected one JSON object a line ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: expected a JSON object; got {line[:40]!r}")
        rows.append(numbers_of(row))
    return rows


def numbers_of(table: dict[str, Any]) -> dict[str, Any]:
    """What of it is a number, a list of numbers, or None, with None for what no float can hold."""

    def number(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise TypeError
        if isinstance(value, int):
            return value if abs(value) < 2**1023 else None
        return value if value is not None and math.isfinite(value) else None

    found = {}
    for name, value in table.items():
        with suppress(TypeError):
            found[name] = [number(v) for v in value] if isinstance(value, list) else number(value)
    return found


def _row(log: dict[str, Any]) -> dict[str, Any]:
    """Numbers, to six digits, None where not finite; ``name_expert_0``, ``name_expert_1``, ... as one list ``name``."""
    row: dict[str, Any] = {}
    lists: dict[str, dict[int, float | None]] = {}
    for name, value in log.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        number = numbers_of({name: value})[name]
        number = float(f"{number:.6g}") if isinstance(number, float) else number
        stem, found, expert = name.rpartition("_expert_")
        if found and expert.isdigit():
            lists.setdefault(stem, {})[int(expert)] = number
        else:
            row[name] = number
    return row | {stem: [numbers[e] for e in sorted(numbers)] for stem, numbers in lists.items()}


def _wandb_rows(file: Path) -> Iterator[dict[str, Any]]:
    """What was logged, step by step; names of nested values joined by "/"."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    for data in _wandb_records(file):
        try:
            record = Record.FromString(data)
        except DecodeError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        if record.HasField("history"):
            row: dict[str, Any] = {"step": record.history.step.num + 1}  # SAELens counts from 0
            for item in record.history.item:
                value = _value(item.value_json, file)
                name = "/".join(item.nested_key) or item.key
                nested = value.items() if isinstance(value, dict) else ()
                row |= {f"{name}/{key}": number for key, number in nested} or {name: value}
            yield row


def _value(text: str, file: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _wandb_records(file: Path) -> Iterator[bytes]:
    """A LevelDB log behind seven bytes of header: blocks of 32 KiB, in them pieces of records (CRC, length, kind)."""
    data, whole, place = file.read_bytes(), b"", 7
    if data[:4] != b":W&B":
        raise ValueError(f"{file} is not a file of W&B")
    while place + 7 <= len(data):
        left_in_block = 2**15 - place % 2**15
        if left_in_block < 7:
            place += left_in_block
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        piece = data[place + 7 : place + 7 + length]
        if len(piece) < length or kind not in (1, 2, 3, 4):
            return  # the run was killed while it wrote
        whole += piece
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield whole
            whole = b""
