"""The help of every architecture, made in advance: SAELens takes five seconds to import, and most of it is SAELens's.

``help.json`` holds what introspection of the configs finds, and a digest of the SAELens sources in which they are
defined. With other sources, or in a process that has imported SAELens anyhow, and may have registered architectures of
its own, it is left aside. A test compares it with the configs; to write it anew:

    python -m sae_lens_switch.cli.help
"""

import hashlib
import json
import sys
from dataclasses import astuple, fields
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from sae_lens_switch.cli.flags import Flag, overview, settings_parser

_FILE = Path(__file__).with_name("help.json")


class KnownHelp(NamedTuple):
    """The help as far as it depends on the configs."""

    architectures: dict[str, str]  # a line about each
    flags: dict[str, list[Flag]]  # of each


def help_text(architecture: str | None) -> str:
    """The help of an architecture, or the overview.

    Raises:
        ValueError: If there is no such architecture.
    """
    known = None if "sae_lens" in sys.modules else known_help()
    if known is None or architecture not in {None, *known.flags}:
        known = _introspected(architecture)
    if architecture is None:
        return overview(known.architectures)
    return settings_parser(architecture, known.architectures, known.flags[architecture]).format_help().rstrip("\n")


def known_help() -> KnownHelp | None:
    """What ``help.json`` says; None if it was made from other sources of SAELens than are installed."""
    table = json.loads(_FILE.read_text(encoding="utf-8"))
    if table["sae_lens"] != sources_digest():
        return None
    rows = [Flag(*row) for row in table["flags"]]
    flags = {name: [rows[i] for i in numbers] for name, numbers in table["flags_of"].items()}
    return KnownHelp(table["architectures"], flags)


def sources_digest() -> str:
    """Of the SAELens sources that define its configs and register its architectures; its version is left out."""
    spec = find_spec("sae_lens")
    if spec is None or spec.origin is None:
        return ""
    init = Path(spec.origin)
    lines = [line for line in init.read_bytes().splitlines() if not line.startswith(b"__version__")]
    digest = hashlib.sha256(b"\n".join(lines))
    for file in [init.with_name("config.py"), *sorted((init.parent / "saes").glob("*.py"))]:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def write_known_help(file: Path = _FILE) -> None:
    """Write ``help.json`` for the SAELens that is installed."""
    from sae_lens_switch.cli.settings import architectures

    names = architectures()
    flags = {name: _introspected(name).flags[name] for name in names}
    rows = list(dict.fromkeys(flag for found in flags.values() for flag in found))
    flags_of = {name: [rows.index(flag) for flag in found] for name, found in flags.items()}
    table = {"sae_lens": sources_digest(), "architectures": names, "flags_of": flags_of}
    parts = [f'"{name}": {json.dumps(value)}' for name, value in table.items()]
    lines = ",\n".join(json.dumps(astuple(row)) for row in rows)
    file.write_text("{\n" + ",\n".join(parts) + f',\n"flags": [\n{lines}\n]\n}}\n', encoding="utf-8")


def _introspected(architecture: str | None) -> KnownHelp:
    from sae_lens_switch.cli.settings import architectures, settings_of
    from sae_lens_switch.saes.registration import register

    register()
    found = [] if architecture is None else settings_of(architecture).values()
    names = [field.name for field in fields(Flag)]
    flags = [Flag(**{name: vars(setting)[name] for name in names}) for setting in found]
    return KnownHelp(architectures(), {} if architecture is None else {architecture: flags})


if __name__ == "__main__":
    write_known_help()
