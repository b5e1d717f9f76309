"""Checkpoints and saved SAEs as they lie on disk."""

import os
from pathlib import Path
from typing import Any

from helpers import switch_sae
from sae_lens_switch.training.checkpoints import Session, whole_folder

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def save(base: Path, name: str, n: int, session: Session | None = None, content: str = "x") -> Path:
    facts: dict[str, Any] = {"n_training_samples": n, "config": {}}
    with whole_folder(base / name, facts | (session.facts(base) if session else {})) as folder:
        (folder / CFG).write_text(content)
        (folder / "trainer_state.pt").write_text(content)
    return base / name


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def saved_sae(path: Path, **metadata: Any) -> Path:
    sae = switch_sae(dtype="float32")
    for name, value in metadata.items():
        setattr(sae.cfg.metadata, name, value)
    sae.save_model(path)
    return path
