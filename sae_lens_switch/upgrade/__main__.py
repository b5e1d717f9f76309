"""``python -m sae_lens_switch.upgrade split|grow``: upgrade an SAE in a folder."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import SAE_CFG_FILENAME
from safetensors import SafetensorError
from safetensors.torch import load_file

from sae_lens_switch.common.printable import say
from sae_lens_switch.saes.registration import register
from sae_lens_switch.saes.serialization import fold_saved_scaler
from sae_lens_switch.saes.switch_training_sae import SwitchTrainingSAE
from sae_lens_switch.saes.weight_files import sharded_safetensors
from sae_lens_switch.training.activations import ActivationSource
from sae_lens_switch.upgrade.growing import grow
from sae_lens_switch.upgrade.splitting import split


def main(argv: Sequence[str] | None = None) -> None:
    """Write the upgraded SAE; exits with status 2 if the arguments cannot be met."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    register()
    try:
        say(_upgraded(arguments))
    except (ValueError, OSError) as error:
        say(f"{parser.prog}: {error}", error=True)
        parser.exit(2)


def _upgraded(arguments: argparse.Namespace) -> str:
    output: Path = arguments.output
    if output.exists():
        raise ValueError(f"--output must be a new folder; {output} exists")
    sae = _load(arguments.sae, arguments.device)
    activations = _activations(arguments.activations)
    if arguments.command == "grow":
        if not isinstance(sae, SwitchTrainingSAE):
            raise ValueError(f"SAE must be a switch SAE in training, such as a checkpoint; got {type(sae).__name__}")
        grow(sae, arguments.n_experts, activations, n_tokens=arguments.n_tokens).save_model(output)
        return f"{output}: {sae.cfg.n_experts} experts before, {arguments.n_experts} now"
    made = split(sae, arguments.n_experts, activations, k=arguments.k, n_tokens=arguments.n_tokens)
    made.sae.save_model(output)
    r = made.report
    return (
        f"{output}: FVU {r.fvu_before:.4f} before, {r.fvu_after:.4f} now, on {r.n_tokens:,} tokens; "
        f"{r.captured:.0%} of the strength in the token's expert; busiest expert {r.load_max:.2f}x; "
        f"encoder bias: {r.encoder_bias}. To be fine-tuned: from_pretrained_path={str(output)!r}"
    )


def _load(folder: Path, device: str) -> SAE:
    """The SAE in a folder, in training if it was saved so; what a checkpoint scaled is folded into the weights."""
    try:
        is_training = "decoder_init_norm" in json.loads((folder / SAE_CFG_FILENAME).read_text(encoding="utf-8"))
        sae: SAE = (TrainingSAE if is_training else SAE).load_from_disk(
            folder, device=device, converter=sharded_safetensors
        )
        fold_saved_scaler(sae, folder)
    except Exception as error:  # a damaged config or weights can fail in any way
        raise ValueError(f"SAE must be a folder with an SAE; {folder}: {error!r}") from error
    return sae


def _activations(path: Path) -> ActivationSource:
    if path.is_dir():
        return path
    try:
        tensors = load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"--activations must be a folder or a .safetensors file; {path}: {error}") from error
    if len(tensors) != 1:
        raise ValueError(f"--activations must hold one tensor; {path} holds {sorted(tensors)}")
    return next(iter(tensors.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sae_lens_switch.upgrade",
        description="Make a Switch SAE from a trained TopK SAE (split), or one with more experts (grow).",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("split", "a trained topk, sparse_topk, batchtopk or jumprelu (from batchtopk) SAE into a Switch SAE"),
        ("grow", "add whole experts to a Switch SAE"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("sae", type=Path, metavar="SAE", help="folder of the SAE, or a checkpoint")
        command.add_argument("--output", type=Path, required=True, help="new folder for the upgraded SAE")
        command.add_argument("--n-experts", type=int, required=True, help="experts of the upgraded SAE")
        command.add_argument(
            "--activations",
            type=Path,
            required=True,
            help="folder by SAELens's CacheActivationsRunner, or .safetensors file with one tensor [..., d_in]",
        )
        command.add_argument("--n-tokens", type=int, default=100_000, help="the most tokens to use (default: 100000)")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if name == "split":
            command.add_argument("--k", type=int, help="active latents per token (default: the SAE's)")
    return parser


if __name__ == "__main__":
    main()
