"""One HTML page about a trained SAE: ``python -m sae_lens_switch.report RUN``.

RUN is what training left on disk. The page is self-contained, plotly's JavaScript included, and makes no network
requests. Half of it needs only weights and logs; the other half needs the language model and some text.

Names are imported lazily, so that the command's ``--help`` does not wait for SAELens.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_lens_switch.report.__main__ import main
    from sae_lens_switch.report.language_model import open_model
    from sae_lens_switch.report.run import Run, find_sae, load_run
    from sae_lens_switch.report.texts import Texts, read_texts, token_texts
    from sae_lens_switch.report.write import write_report

__all__ = [
    "Run",
    "Texts",
    "find_sae",
    "load_run",
    "main",
    "open_model",
    "read_texts",
    "token_texts",
    "write_report",
]

_MODULES = {
    "Run": "run",
    "Texts": "texts",
    "find_sae": "run",
    "load_run": "run",
    "main": "__main__",
    "open_model": "language_model",
    "read_texts": "texts",
    "token_texts": "texts",
    "write_report": "write",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(f"{__name__}.{_MODULES[name]}"))[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
