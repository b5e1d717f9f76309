"""The flags of the command line as argparse takes them, and the texts of its help.

Nothing here imports torch or SAELens: ``--help`` answers at once.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

PROGRAM = "python -m sae_lens_switch.train"
# Accepted, not shown.
HIDDEN = {"hook_eval", "sae_lens_version", "sae_lens_training_version"}
DESCRIPTION = """\
Train an SAE on a language model's activations, configured by flags, by a file of settings, or by both.

    python -m sae_lens_switch.train --architecture switch --d-in 768 --d-sae 24576 --n-experts 32 --k 32 \\
        --model-name gpt2 --hook-name blocks.8.hook_resid_post --training-tokens 100_000_000 \\
        --dataset-path Skylion007/openwebtext --is-dataset-tokenized false --device cuda
    python -m sae_lens_switch.train --config run.yaml --lr 1e-3
    python -m sae_lens_switch.train --architecture switch --help

Every flag is a field of ``LanguageModelSAERunnerConfig``: of SAELens's runner or its logger, of the SAE's own config,
or of ``TrainerOptions``. A file has the same names, in YAML or JSON, like the ``runner_cfg.json`` of a finished run;
flags override it. Exit codes: 0 for success, 2 for usage errors, 1 for a failed run; 130, 143 and 129 after SIGINT,
SIGTERM and SIGHUP, once a checkpoint is saved. A signal that is ignored, as SIGHUP is under nohup, stays ignored."""


@dataclass(frozen=True)
class Flag:
    """One flag, as the help shows it."""

    name: str  # of the field
    subject: str
    metavar: str
    takes: Literal["one", "several", "switch"]
    default: str
    doc: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """Reports usage errors as ValueError."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def request_parser() -> Parser:
    """The parser of the flags that say what to do, whatever the architecture."""
    parser = Parser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--architecture", "--sae")
    parser.add_argument("--config")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    return parser


def settings_parser(architecture: str, architectures: Iterable[str], flags: Iterable[Flag]) -> Parser:
    """The parser of an architecture's flags; its namespace holds only those that were given."""
    parser = Parser(
        prog=PROGRAM,
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        usage=f"{PROGRAM} --architecture {architecture} [--config FILE] [flags]",
        description=DESCRIPTION,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
    )
    what = parser.add_argument_group("what to do")
    what.add_argument("--architecture", metavar="NAME", help=f"one of {', '.join(sorted(architectures))}")
    what.add_argument("--config", metavar="FILE", help="settings in YAML or JSON, named as below; flags override it")
    what.add_argument("--dry-run", action="store_true", help="print all settings, as a file for --config, and stop")
    what.add_argument("--help", "-h", action="store_true", help="this text")
    groups: dict[str, argparse._ArgumentGroup] = {}  # pyright: ignore[reportPrivateUsage]
    for flag in flags:
        if flag.subject not in groups:
            groups[flag.subject] = parser.add_argument_group(flag.subject)
        _add(groups[flag.subject], flag)
    return parser


# argparse has no public name for the type of its groups.
def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:  # pyright: ignore[reportPrivateUsage]
    default = f"(default: {flag.default})" if flag.default else "(required)"
    text = f"{flag.doc} {default}".strip().replace("%", "%%")
    shown = argparse.SUPPRESS if flag.name in HIDDEN else text
    names = [flag.flag, *([f"-{flag.name}"] if len(flag.name) == 1 else [])]
    if flag.takes == "several":
        group.add_argument(*names, dest=flag.name, help=shown, metavar=flag.metavar, nargs="+")
    elif flag.takes == "switch":
        group.add_argument(*names, dest=flag.name, help=shown, metavar=flag.metavar, nargs="?", const="true")
        no = [f"--no-{flag.flag[2:]}", f"--no{flag.flag[2:]}"]  # SAELens writes --nostreaming
        group.add_argument(*no, dest=flag.name, action="store_const", const="false", help=argparse.SUPPRESS)
    else:
        group.add_argument(*names, dest=flag.name, help=shown, metavar=flag.metavar)


def overview(architectures: Mapping[str, str]) -> str:
    """The help without an architecture: what the command does, and the architectures with a line on each."""
    lines = [f"usage: {PROGRAM} --architecture NAME [--config FILE] [flags]", "", DESCRIPTION, "", "architectures:"]
    width = max(map(len, architectures)) + 2
    lines += [f"  {name:{width}}{doc}" for name, doc in architectures.items()]
    lines += ["", "The flags of one architecture, with meanings and defaults:"]
    return "\n".join([*lines, f"  {PROGRAM} --architecture switch --help"])


def with_dashes(argv: Sequence[str]) -> list[str]:
    """Flags spelled with dashes; SAELens spells them with underscores."""
    dashed = []
    for token in argv:
        head, equals, tail = token.partition("=")
        dashed.append(head.replace("_", "-") + equals + tail if token.startswith("--") else token)
    return dashed
