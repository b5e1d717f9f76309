"""Train a Switch SAE on GPT-2 small and OpenWebText: the setting of arXiv 2410.08201.

    python examples/train_gpt2.py --tokens 100_000_000

Needs the Hugging Face Hub and, in practice, a GPU. The paper's own runs used 819 million tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_lens_switch import LanguageModelSAERunnerConfig


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = make_config(args)
    import torch

    from sae_lens_switch import LanguageModelSAETrainingRunner

    torch.manual_seed(args.seed)  # SAELens does not use its config's seed
    LanguageModelSAETrainingRunner(cfg).run()
    print(f"Saved in {args.output}: import sae_lens_switch, then sae_lens.SAE.load_from_disk({args.output!r})")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", default="runs/gpt2", help="folder for the trained SAE")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="training tokens")
    parser.add_argument("--n-experts", type=int, default=32, help="experts; must divide --d-sae")
    parser.add_argument("--d-sae", type=int, default=24_576, help="latents, over all experts")
    parser.add_argument("--k", type=int, default=32, help="active latents per token")
    parser.add_argument("--hook", default="blocks.8.hook_resid_post", help="hook of the activations")
    parser.add_argument("--device", default="auto", help="of model and SAE; auto: cuda if available, else cpu")
    parser.add_argument("--wandb", metavar="PROJECT", default=None, help="log to this project on Weights & Biases")
    parser.add_argument("--checkpoints", type=int, default=0, help="checkpoints to save during training")
    parser.add_argument("--seed", type=int, default=0, help="seed of the SAE's weights and of the order of activations")
    args = parser.parse_args(argv)
    if args.device == "auto":
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def make_config(args: argparse.Namespace) -> LanguageModelSAERunnerConfig:
    from sae_lens import LoggingConfig

    from sae_lens_switch import LanguageModelSAERunnerConfig

    logger = LoggingConfig(log_to_wandb=args.wandb is not None)
    if args.wandb is not None:
        logger.wandb_project = args.wandb
    return LanguageModelSAERunnerConfig(
        # The SAE. Learning rate and decay are not given, and so follow the paper's scaling law
        architecture="switch",
        d_in=768,
        d_sae=args.d_sae,
        n_experts=args.n_experts,
        k=args.k,
        # What it is trained on
        model_name="gpt2",
        hook_name=args.hook,
        dataset_path="Skylion007/openwebtext",
        is_dataset_tokenized=False,
        streaming=True,
        context_size=128,
        # <|endoftext|> starts every context and separates documents. Its activations are twenty times as large as all
        # others, and would dominate the loss.
        exclude_special_tokens=True,
        store_batch_size_prompts=128,
        n_batches_in_buffer=2048,  # times context_size: a buffer of 262,144 activations
        # How
        training_tokens=args.tokens,
        train_batch_size_tokens=8192,
        lr_warm_up_steps=1000,
        device=args.device,
        seed=args.seed,
        # Where to
        output_path=args.output,
        checkpoint_path=f"{args.output}/checkpoints" if args.checkpoints else None,
        n_checkpoints=args.checkpoints,
        logger=logger,
    )


if __name__ == "__main__":
    main()
