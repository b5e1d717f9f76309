"""Another class than SAELens's where SAELens names the one that it constructs, for the caller's thread alone."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any


class _Name:
    """A name in a module while it is substituted: what it stands for is asked at each call.

    The module's own value is put back when the last of all blocks, in whatever thread, has ended.
    """

    def __init__(self, module: ModuleType, name: str) -> None:
        self.module, self.name, self.stock = module, name, getattr(module, name)
        self.n_blocks = 0

        def construct(*args: Any, **kwargs: Any) -> Any:
            chosen = [block.ours for block in _blocks.get() if block.of is self and block.is_open]
            return (chosen[-1] if chosen else self.stock)(*args, **kwargs)

        self.construct = construct
        setattr(module, name, construct)

    def put_back(self) -> None:
        if getattr(self.module, self.name) is self.construct:  # not if others have replaced it meanwhile
            setattr(self.module, self.name, self.stock)


class _Block:
    def __init__(self, of: _Name, ours: Callable[..., Any]) -> None:
        self.of, self.ours, self.is_open = of, ours, True


_lock = threading.Lock()
_names: dict[tuple[str, str], _Name] = {}
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("_blocks", default=())


@contextmanager
def constructing(module: ModuleType, name: str, ours: Callable[..., Any]) -> Iterator[None]:
    """Within the block ``module.name(...)`` constructs ``ours``, in this thread or asyncio task.

    SAELens's runners name the trainer they construct, and have no other place to choose it. Blocks may overlap in any
    order; other threads get what they have chosen themselves, or SAELens's own.
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
        block.is_open = False  # also where the block is closed from another context, as a generator's may be
        _blocks.set(tuple(b for b in _blocks.get() if b.is_open))
        with _lock:
            of.n_blocks -= 1
            if of.n_blocks == 0:
                del _names[key]
                of.put_back()
