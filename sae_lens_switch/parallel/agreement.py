"""What all processes must decide alike: whether to go on, from where, and whether they run the same training."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch

import sae_lens_switch
from sae_lens_switch.common.types import Json
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.interruption import Interruption
from sae_lens_switch.training.manifest import CheckpointError, check_files

T = TypeVar("T")

_MOST_NAMED = 8


class AgreedInterruption(Interruption):
    """A signal to one process stops all of them, before the same step, once they have agreed on it."""

    def __init__(self) -> None:
        super().__init__()
        self._agreed: int | None = None

    @property
    def received(self) -> int | None:
        """The number of a signal that has arrived here."""
        return self._pending

    def agree(self, signum: int | None) -> None:
        """From now on ``check`` raises this signal, and no other."""
        self._agreed = signum

    def agree_among(self, ranks: Ranks) -> None:
        """On a signal that any process has received. Every process must take part."""
        self.agree(next((signum for signum in ranks.gather_objects(self.received) if signum is not None), None))

    def __exit__(self, kind: object, *_: object) -> None:
        self._agreed = self._agreed or self._pending
        super().__exit__(kind, *_)

    def check(self) -> None:
        if self._agreed is not None:
            signum, self._agreed = self._agreed, None
            self._raise(signum)

    def waiting(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """As anywhere else: where one process stopped at once, the others would wait for it."""
        return nullcontext()


def first_does(ranks: Ranks, action: Callable[[], T]) -> T:
    """What it returns on the first process, for all, which share the work where it verifies checkpoints.

    Raises:
        ValueError: On every process, if it does there.
    """
    if ranks.is_first:
        with checkpoints.checking_files_by(partial(_check_files_together, ranks)):
            told = ranks.first_says(_outcome(action))
    else:
        nothing = cast(Any, None)
        while isinstance(told := ranks.first_says(nothing), _Files):
            _first_damage(ranks, told)
    result, error = told
    if error is not None:
        raise error
    return cast(T, result)


def _outcome(action: Callable[[], T]) -> tuple[T | None, ValueError | None]:
    try:
        return action(), None
    except ValueError as failure:
        return None, failure


class _Files(NamedTuple):
    """Of a checkpoint, to be compared with its manifest."""

    path: Path
    expected: Json


def _check_files_together(ranks: Ranks, path: Path, manifest: Json) -> None:
    """``check_files`` by all processes; called by the first, in ``first_does``."""
    files = ranks.first_says(_Files(path, manifest["files"]))
    damage = _first_damage(ranks, files)
    if damage is not None:
        raise CheckpointError(damage)


def _first_damage(ranks: Ranks, files: _Files) -> str | None:
    """What is wrong with the first damaged file.

    Each process reads one file between two messages, so that none waits longer than that takes.
    """
    names = list(files.expected)
    for i in range(ranks.rank, len(names) + ranks.rank, ranks.size):
        mine, damage = {name: files.expected[name] for name in names[i : i + 1]}, None
        try:
            check_files(files.path, {"files": mine})
        except CheckpointError as error:
            damage = str(error)
        found = [told for told in ranks.gather_objects(damage) if told is not None]
        if found:
            return found[0]
    return None


def refuse_differences(ranks: Ranks, settings: Json) -> None:
    """Compare settings between the processes.

    Raises:
        ValueError: On every process, if one has another value than the first; names both.
    """
    versions = {"torch": torch.__version__, "sae_lens_switch": sae_lens_switch.__version__}
    everybodys = ranks.gather_objects(json.dumps(settings | {"version": versions}, sort_keys=True, default=str))
    first = _flat(json.loads(everybodys[0]))
    differences = [
        f"{name} is {first.get(name)!r} on rank 0, {other.get(name)!r} on rank {rank}"
        for rank, other in enumerate(map(_flat, map(json.loads, everybodys)))
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    if differences:
        more = f", and {len(differences) - _MOST_NAMED} more" if len(differences) > _MOST_NAMED else ""
        raise ValueError(f"settings must be the same on all processes; {'; '.join(differences[:_MOST_NAMED])}{more}")


def _flat(table: Json, prefix: str = "") -> Json:
    flat: Json = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
