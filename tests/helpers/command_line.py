"""What the tests of the command line share: commands, files of settings, and what a command shows or refuses."""

from pathlib import Path
from typing import Any

import yaml

from helpers import D, E, F, K, run_fields
from sae_lens_switch.train import main

SWITCH = ["--architecture", "switch", "--d-in", str(D), "--d-sae", str(F), "--n-experts", str(E), "--k", str(K)]


def shown(capsys, *argv: str) -> dict[str, Any]:
    """The settings that a command would run with."""
    assert main([*argv, "--dry-run"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def refusal(capsys, *argv: str) -> str:
    """What a command that is refused says: one line, and nothing else."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").rstrip()


def file_of(path: Path, table: Any) -> str:
    path.write_text(table if isinstance(table, str) else yaml.safe_dump(table))
    return str(path)


def arguments(path: Path, **given: Any) -> list[str]:
    table = {name: value for name, value in run_fields(path, **given).items() if name != "logger"}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in table.items()]
    return [*(part for pair in pairs for part in pair), "--log-to-wandb", "false"]
