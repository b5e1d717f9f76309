"""The command ``python -m sae_lens_switch.report``. torch and SAELens are imported after the arguments are parsed."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page that the arguments ask for; exits with status 2 if they cannot be met."""
    parser = _parser()
    arguments = parser.parse_args(argv)

    import torch

    from sae_lens_switch.common.printable import say
    from sae_lens_switch.report.write import write_report
    from sae_lens_switch.saes.registration import register

    register()

    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        file = write_report(**vars(arguments))
    except (ValueError, OSError) as error:
        say(f"{parser.prog}: {error}", error=True)
        parser.exit(2)
    size = file.stat().st_size / 2**20
    say(f"{file} ({size:.1f} MB)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sae_lens_switch.report",
        description="Write one self-contained HTML page about a trained SAE. Reading it needs no network.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of a run, a checkpoint, or an SAE")
    parser.add_argument("--output", type=Path, help="path of the page (default: RUN/report.html)")
    parser.add_argument(
        "--history", type=Path, help="history.jsonl, or W&B's run-....wandb, if RUN has no history.jsonl"
    )
    parser.add_argument("--model", help="name or folder of the language model (default: from the SAE's metadata)")
    parser.add_argument("--model-class", help="HookedTransformer, AutoModelForCausalLM, ...")
    parser.add_argument(
        "--dataset",
        help="text: a name on the Hub, a folder or a file (default: RUN/held_out, or the training dataset)",
    )
    parser.add_argument(
        "--contexts", type=int, default=256, help="contexts of text to read (default: 256); 0: no language model"
    )
    parser.add_argument("--latents", type=int, nargs="+", default=(), help="latents to show in any case")
    parser.add_argument(
        "--n-latents", type=int, default=64, help="number of latents to show, spread over the experts (default: 64)"
    )
    parser.add_argument("--n-examples", type=int, default=6, help="texts per latent (default: 6)")
    parser.add_argument(
        "--threshold", type=float, default=0.9, help="cosine above which two latents are duplicates (default: 0.9)"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="RUN", help="another run or SAE, of the same activations, to compare with"
    )
    parser.add_argument(
        "--trust-model-kwargs",
        action="store_true",
        help="load the language model as the SAE's metadata say even if that can run code, as trust_remote_code does",
    )
    parser.add_argument("--device", help="device of SAE and language model (default: cuda if available, else cpu)")
    return parser


if __name__ == "__main__":
    main()
