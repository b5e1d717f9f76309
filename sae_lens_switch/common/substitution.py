"""Make SAELens construct another class than the one it names, in the calling thread alone."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any


class _Name:
    """A substituted name in a module; what it stands for is resolved at each call.

    The original is restored when the last block, in any thread, has ended.
    """

    def __init__(self, module: ModuleType, name: str) -> None:
        self.module, self.name, self.stock = module, name, vars(module)[name]
        self.n_blocks = 0

        def construct(*args: Any, **kwargs: Any) -> Any:
            chosen = [block.ours for block in _blocks.get() if block.of is self and block.is_open]
            return (chosen[-1] if chosen else self.stock)(*args, **kwargs)

        self.construct = construct
        setattr(module, name, construct)

    def restore(self) -> None:
        if vars(self.module)[self.name] is self.construct:  # not if others have replaced it since
            setattr(self.module, self.name, self.stock)


class _Block:
    def __init__(self, of: _Name, ours: Callable[..., Any]) -> None:
        self.of, self.ours, self.is_open = of, ours, True


_lock = threading.Lock()
_names: dict[tuple[str, str], _Name] = {}
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("_blocks", default=())


@contextmanager
def constructing(module: ModuleType, name: str, ours: Callable[..., Any]) -> Iterator[None]:
    """Within the block, ``module.name(...)`` constructs ``ours`` in this thread or asyncio task.

    SAELens's runners hard-code the trainer that they construct. Blocks may overlap in any order; other threads get
    what they have chosen themselves, or SAELens's own.

    Args:
        module: The module whose code does the constructing.
        name: The name under which it does.
        ours: The class to construct instead.
    """
    key = module.__name__, name
    with _lock:
        if key not in _names:
            _names[key] = _Name(module, name)
        of = _names[key]
        of.n_blocks += 1
    block = _Block(of, ours)
    _blocks.set((*_blocks.get(), block))
    try:
        yield
    finally:
        block.is_open = False  # even if the block is closed from another context, as a generator's may be
        _blocks.set(tuple(b for b in _blocks.get() if b.is_open))
        with _lock:
            of.n_blocks -= 1
            if of.n_blocks == 0:
                del _names[key]
                of.restore()
