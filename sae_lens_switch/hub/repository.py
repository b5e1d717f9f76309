"""Names and files in a Hub repository of SAEs: one folder per SAE, named by its id, and a model card for all."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_lens_switch.hub.model_card import PICTURE

README = "README.md"
SAELENS_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RUNNER_CFG_FILENAME)
FILES = (*SAELENS_FILES, PICTURE)


def check_hub_name(argument: str, name: object) -> str:
    """Return the name if it is a valid id on the Hub; raises ValueError otherwise."""
    if not _is_hub_name(name):
        raise ValueError(f"{argument} must be an id on the Hub, such as 'gpt2' or 'user/name'; got {name!r}")
    return name


def _is_hub_name(name: object) -> TypeGuard[str]:
    try:
        validate_repo_id(name)  # type: ignore[arg-type]  # which checks the type first
    except HFValidationError:
        return False
    return isinstance(name, str)


def hub_name(name: object) -> str | None:
    """The name if it can be an id on the Hub and is not a path on this machine."""
    return name if _is_hub_name(name) and not Path(name).exists() else None


def base_model_name(name: object) -> str | None:
    """The id on the Hub of a model that TransformerLens may know by another name."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        return get_official_model_name(name) if _is_hub_name(name) else None
    except ValueError:
        return hub_name(name)


def check_sae_id(sae_id: object) -> None:
    """Raise ValueError unless the id is safe as a path, here and on the machine of whoever downloads."""
    if not isinstance(sae_id, str) or not _is_safe_path(sae_id):
        raise ValueError(
            "an SAE's id must be a relative path such as 'blocks.8.hook_resid_post/32_experts': printable, names "
            f"joined by '/', no '..', no backslash; got {sae_id!r}"
        )


def _is_safe_path(path: str) -> bool:
    reserved = ("", ".", "..", ".git", ".cache", *FILES, README)
    return (
        not any(part in reserved or part.strip() != part for part in path.split("/"))
        and all(c != "\\" and c.isprintable() for c in path)
        and not path.startswith("~")
        and re.match("[A-Za-z]:", path) is None
        and len(path) <= 200
    )


def read_config(sae_id: str, path: Path) -> dict[str, object]:
    """Read a ``cfg.json``. Raises ValueError unless it, and its metadata if there are any, are JSON objects."""
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{SAE_CFG_FILENAME} of SAE {sae_id!r} must be JSON: {error}") from error
    if not isinstance(cfg, dict) or not isinstance(cfg.get("metadata") or {}, dict):
        raise ValueError(f"{SAE_CFG_FILENAME} of SAE {sae_id!r} must be a JSON object, and so must its metadata")
    return cfg


def metadata_of(cfg: Mapping[str, object]) -> dict[str, object]:
    """The metadata in a config; empty if it has none."""
    metadata = cfg.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def read_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file. Raises ValueError if that cannot be done."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path.name} must be a safetensors file that holds {name!r}; {path}: {error}") from error
