"""One HTML page about a trained SAE: ``python -m sae_lens_switch.report RUN``."""

from sae_lens_switch.report.texts import (
    Run,
    Texts,
    find_sae,
    load_run,
    main,
    open_model,
    read_texts,
    token_texts,
    write_report,
)

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
