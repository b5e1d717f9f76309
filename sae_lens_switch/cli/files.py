"""Files of settings, YAML or JSON: read without running anything in them."""

import json
from pathlib import Path

import yaml

from sae_lens_switch.cli.values import short

_MAX_DEPTH = 20


def read(path: str) -> dict[str, object]:
    """Read the table of settings in a file; JSON if its name ends in ``.json``, YAML otherwise.

    Raises:
        ValueError: If the file cannot be read or holds no table.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            table = json.loads(text)
        else:
            _refuse_bombs(text)
            table = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(table, dict):
        raise ValueError(f"--config {path} must hold a table of settings; got {short(table)}")
    return table


def architecture_of(table: dict[str, object]) -> str | None:
    """The architecture a file names, at the top or in its ``sae`` table.

    Raises:
        ValueError: If it is not a string.
    """
    sae = table.get("sae")
    found = table.get("architecture", sae.get("architecture") if isinstance(sae, dict) else None)
    if found is not None and not isinstance(found, str):
        raise ValueError(f"architecture must be a name; got {short(found)}")
    return found


def _refuse_bombs(text: str) -> None:
    """Ten lines of aliases expand to a billion values, and a thousand brackets keep PyYAML busy for minutes."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _MAX_DEPTH:
            raise ValueError(f"aliases (*name) and tables nested more than {_MAX_DEPTH} deep are not allowed")
