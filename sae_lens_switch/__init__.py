"""Switch SAEs for SAELens, with conditional computation that is real; and its TopK SAE on sparse kernels.

Importing this package registers its architectures with SAELens and changes nothing else.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_COMMANDS = {"train", "cost", "report", "dashboard"}


def _is_starting_a_command() -> bool:
    """Whether this import is the first step of ``python -m sae_lens_switch.<command>``.

    Such a process imports SAELens when it needs it, after ``--help``: that takes seconds. Until Python has located the
    module of ``-m``, ``sys.argv[0]`` is "-m"; the module's name is the item of ``sys.orig_argv`` in its place.
    """
    if sys.argv[:1] != ["-m"]:
        return False
    place = len(sys.orig_argv) - len(sys.argv)
    return any(sys.orig_argv[place : place + 1] == [f"{__name__}.{command}"] for command in _COMMANDS)


if TYPE_CHECKING or not _is_starting_a_command():
    from sae_lens_switch._public import *  # noqa: F403
    from sae_lens_switch._public import __all__ as __all__
else:

    def __getattr__(name: str) -> object:
        is_public = name == "__all__" or not name.startswith("__")
        names = vars(import_module("sae_lens_switch._public")) if is_public else {}
        if name not in names:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return names[name]

    def __dir__() -> list[str]:
        return [*globals(), *import_module("sae_lens_switch._public").__all__]
