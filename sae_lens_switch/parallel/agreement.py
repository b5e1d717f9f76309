"""What all processes must decide alike: whether to go on, from where, and whether they run the same training."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar, cast

import torch

import sae_lens_switch
from sae_lens_switch.common.types import Json
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.training.interruption import Interruption

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
    """What it returns on the first process, for all.

    Raises:
        ValueError: On every process, if it does there.
    """
    result, error = None, None
    if ranks.is_first:
        try:
            result = action()
        except ValueError as failure:
            error = failure
    result, error = ranks.first_says((result, error))
    if error is not None:
        raise error
    return cast(T, result)


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
