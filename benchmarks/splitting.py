"""What splitting a TopK SAE costs: its error, that of the Switch SAE right after the split and after fine-tuning, and
that of a Switch SAE trained from scratch on the same tokens.

    python benchmarks/splitting.py        # minutes on two CPU cores, no network

The residual stream of SmolLM2-135M after a layer; errors are on held-out tokens. Fine-tuning and training from scratch
are run with each learning rate of the list, and all are reported.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_lens import TrainingSAE
    from torch import Tensor

    from sae_lens_switch import SparseTopKTrainingSAE

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

_CACHED = 208_000  # tokens in the file, which is that of benchmarks/recall.py


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    import torch
    from offline import cached_activations, language_model_folder, text_datasets, token_contexts

    from sae_lens_switch import SwitchTrainingSAE, SwitchTrainingSAEConfig
    from sae_lens_switch.upgrade import split

    model_folder = language_model_folder(args.models)
    contexts = token_contexts(text_datasets(seed=0)[0], model_folder).shuffle(seed=0)
    x = cached_activations(args.activations, model_folder, contexts, _CACHED, args.layer)
    held_out, train_x = x[: args.held_out], x[args.held_out :][: args.tokens]
    results: dict[str, object] = {"settings": {k: str(v) for k, v in vars(args).items()}}

    def report(name: str, **numbers: object) -> None:
        results[name] = numbers
        print(
            f"{name}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
        )
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1))

    topk = trained_topk(args, train_x)
    report("topk", fvu=fvu(topk, held_out))
    start = time.perf_counter()
    made = split(topk, args.n_experts, train_x)
    report("split", fvu=fvu(made.sae, held_out), seconds=time.perf_counter() - start, **vars(made.report))
    for n_tokens in args.tune_tokens:
        for lr in args.lr:
            torch.manual_seed(0)
            cfg = SwitchTrainingSAEConfig(d_in=x.shape[1], d_sae=args.d_sae, n_experts=args.n_experts, k=args.k)
            scratch = SwitchTrainingSAE(cfg)
            train(scratch, train_x, n_tokens, lr)
            tuned = copy.deepcopy(made.sae)
            train(tuned, train_x, n_tokens, lr)
            errors = {"from_scratch": fvu(scratch, held_out), "fine_tuned": fvu(tuned, held_out)}
            report(f"{n_tokens} tokens, lr {lr:g}", **errors)


def trained_topk(args: argparse.Namespace, x: Tensor) -> SparseTopKTrainingSAE:
    """Trained once, then read from its folder."""
    import torch
    from sae_lens import TrainingSAE

    from sae_lens_switch import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig

    if args.topk.is_dir():
        return TrainingSAE.load_from_disk(args.topk)
    torch.manual_seed(0)
    fields = {"aux_loss_coefficient": 0.03, "decoder_init_norm": 1.0}
    sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=x.shape[1], d_sae=args.d_sae, k=args.k, **fields))
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
    train(sae, x, args.topk_tokens, 2e-3, dead_feature_window=100)
    sae.save_model(args.topk)
    return sae


def train(sae: TrainingSAE, x: Tensor, n_tokens: int, lr: float, **fields: int) -> None:
    from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig

    cfg = SparseSAETrainerConfig(
        total_training_samples=n_tokens, train_batch_size_samples=1024, lr=lr, checkpoint_path=None, **fields
    )
    SparseSAETrainer(cfg, sae, x).fit()


def fvu(sae: TrainingSAE, x: Tensor) -> float:
    """Fraction of variance unexplained."""
    import torch

    with torch.no_grad():
        errors = [(sae.decode(sae.encode_sparse(part)) - part).square().sum() for part in x.split(4096)]
    return float(sum(errors) / (x - x.mean(0)).square().sum())


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=150_000, help="tokens to train on")
    parser.add_argument("--held-out", type=int, default=20_000)
    parser.add_argument("--topk-tokens", type=int, default=450_000, help="samples of TopK's training")
    parser.add_argument("--tune-tokens", type=int, nargs="+", default=[50_000, 150_000])
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--n-experts", type=int, default=8)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--models", type=Path, default=Path("runs/models"))
    parser.add_argument("--activations", type=Path, default=Path("runs/activations_6.safetensors"))
    parser.add_argument("--topk", type=Path, default=Path("runs/splitting/topk"), help="folder of the trained TopK SAE")
    parser.add_argument("--output", type=Path, default=Path("runs/splitting/results.json"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
