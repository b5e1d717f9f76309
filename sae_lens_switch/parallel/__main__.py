"""``python -m sae_lens_switch.parallel CHECKPOINT OUTPUT``: the ordinary SAE of a parallel run's checkpoint."""

import argparse
import sys
from collections.abc import Sequence

from sae_lens_switch.common.printable import say


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 for success, 1 for a checkpoint that cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m sae_lens_switch.parallel",
        description="Write the SAE of a checkpoint of several processes as an ordinary folder, which loads anywhere.",
    )
    parser.add_argument("checkpoint", help="a folder that a parallel run has written")
    parser.add_argument("output", help="the folder of the SAE")
    parser.add_argument("--for-training", action="store_true", help="as a training SAE, to be trained further")
    parser.add_argument(
        "--max-file-gb",
        type=float,
        help="write weights in several files of at most so many gigabytes (10^9 bytes) or one tensor, with an index; "
        "by default in one, which SAELens loads by itself",
    )
    asked = parser.parse_args(argv)
    from sae_lens_switch.parallel.consolidate import consolidate

    try:
        where = consolidate(
            asked.checkpoint,
            asked.output,
            for_training=asked.for_training,
            max_file_bytes=None if asked.max_file_gb is None else asked.max_file_gb * 1e9,
        )
    except (ValueError, OSError) as error:
        say(f"error: {error}", error=True)
        return 1
    say(f"saved: {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
