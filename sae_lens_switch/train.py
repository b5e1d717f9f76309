"""``python -m sae_lens_switch.train``: train an SAE on a language model's activations from the command line.

``--help`` says how; the parts are in ``cli/``. SAELens is imported once it is clear that something is to be trained.
"""

import sys
from collections.abc import Sequence
from typing import Any

from sae_lens_switch.cli.files import architecture_of, read
from sae_lens_switch.cli.flags import PROGRAM, request_parser, with_dashes
from sae_lens_switch.cli.help import help_text
from sae_lens_switch.common.printable import say


def main(argv: Sequence[str] | None = None, **overrides: Any) -> int:
    """Run the command.

    Args:
        argv: The arguments; those of the process by default.
        **overrides: Keyword arguments of the runner: ``override_model``, ``override_dataset``.

    Returns:
        The exit code: 0 for success, 2 for usage errors, 1 for a failed run; 130, 143 and 129 after SIGINT, SIGTERM
        and SIGHUP.
    """
    try:
        asked, rest = request_parser().parse_known_args(with_dashes(sys.argv[1:] if argv is None else argv))
        table = {} if asked.config is None else read(asked.config)
        architecture = asked.architecture or architecture_of(table)
        if asked.help:
            say(help_text(architecture))
            return 0
        if architecture is None:
            raise ValueError(f"--architecture is missing; {PROGRAM} --help lists them")
        from sae_lens_switch.cli import run

        request = run.Request(architecture, rest, asked.config, table)
        cfg = request.config()
    except ValueError as error:
        say(f"error: {error}", error=True)
        return 2
    if asked.dry_run:
        say(request.as_file(cfg), end="")
        return 0
    return run.train(cfg, overrides)


if __name__ == "__main__":
    sys.exit(main())
