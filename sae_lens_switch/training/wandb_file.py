"""Reading the ``.wandb`` file that W&B keeps of every run, online or offline.

W&B documents neither the container nor the records. The container is a LevelDB log; the records are protobuf messages
of wandb's own module ``wandb.proto``, which is private. ``tests/training/test_wandb_offline.py`` and
``tests/report/test_history.py`` read files of the installed version and fail when either changes.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

_HEADER = b":W&B"
_HEADER_LENGTH = 7
_BLOCK = 2**15
_PIECE_HEADER = 7
# Kinds of pieces, as LevelDB numbers them.
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def wandb_rows(file: Path) -> Iterator[dict[str, object]]:
    """Yield what was logged at each step; the names of nested values are joined by "/".

    Raises:
        ValueError: If the file is not W&B's, or is damaged. A file cut short, of a run that was killed, is not damaged.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    for data in _records(file):
        try:
            record = Record.FromString(data)
        except DecodeError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        if record.HasField("history"):
            row: dict[str, object] = {"step": record.history.step.num + 1}  # SAELens counts from 0
            for item in record.history.item:
                value = _value(item.value_json, file)
                name = "/".join(item.nested_key) or item.key
                nested = value.items() if isinstance(value, dict) else ()
                row |= {f"{name}/{key}": number for key, number in nested} or {name: value}
            yield row


def _value(text: str, file: Path) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _records(file: Path) -> Iterator[bytes]:
    """A LevelDB log after seven bytes of header: blocks of 32 KiB holding pieces of records (CRC, length, kind)."""
    data, record, place = file.read_bytes(), b"", _HEADER_LENGTH
    if not data.startswith(_HEADER):
        raise ValueError(f"{file} is not a file of W&B")
    while place + _PIECE_HEADER <= len(data):
        left_in_block = _BLOCK - place % _BLOCK
        if left_in_block < _PIECE_HEADER:
            place += left_in_block
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + _PIECE_HEADER])
        place += _PIECE_HEADER
        piece = data[place : place + length]
        if len(piece) < length or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            return  # the run was killed while writing
        record += piece
        place += length
        if kind in (_FULL, _LAST):
            yield record
            record = b""
