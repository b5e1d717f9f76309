"""Reloading a module within a test."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def reloaded(*modules: ModuleType) -> Iterator[None]:
    """The modules reloaded. Afterwards their names are as before: other tests compare them with the package's."""
    before = [dict(vars(module)) for module in modules]
    try:
        for module in modules:
            importlib.reload(module)
        yield
    finally:
        for module, names in zip(modules, before, strict=True):
            vars(module).update(names)
