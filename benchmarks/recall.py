"""What a low `encoder_precision` misses, on the activations of a real language model; and what that does to training.

    python benchmarks/recall.py        # about half an hour on two CPU cores, no network

TopK SAEs of several widths are trained; on held-out tokens their latents are then selected in full precision and among
the candidates of each low precision, for several margins. Reported: the share of the exactly selected latents that are
found, by count and by their weight; the share of tokens that miss one, and of those that the check flags. One width is
trained in each precision, on the same batches, and its errors are compared step by step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_lens_switch_kernels.candidates import Selected
    from sae_lens_switch_kernels.inputs import EncoderInputs
    from torch import Tensor

    from sae_lens_switch import SparseTopKTrainingSAE

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

PRECISIONS = ("bfloat16", "float8")
MARGINS = (0, 1 / 8, 1 / 4, 1 / 2, 1)  # in parts of k


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from offline import cached_activations, language_model_folder, text_datasets, token_contexts

    model_folder = language_model_folder(args.models)
    contexts = token_contexts(text_datasets(seed=0)[0], model_folder).shuffle(seed=0)
    x = cached_activations(args.activations, model_folder, contexts, args.tokens + args.held_out, args.layer)
    held_out, train = x[: args.held_out], x[args.held_out :]
    settings = {"tokens": args.tokens, "held_out": args.held_out, "batch": args.batch, "k": args.k, "layer": args.layer}
    report: dict[str, Any] = {"settings": settings, "recall": [], "curves": {}}
    for F in args.widths:
        precisions = ("full", *PRECISIONS) if args.curves_at == F else ("bfloat16",)
        for precision in precisions:
            start = time.perf_counter()
            sae, errors = trained(args, train, F, precision)
            print(f"F {F:,} trained in {precision}: {time.perf_counter() - start:.0f} s", flush=True)
            if len(precisions) > 1:
                report["curves"][precision] = errors
        report["recall"] += [{"d_sae": F, **row} for row in recalls(sae, held_out)]
        print_rows(report["recall"], F)
    report["curves_at"] = args.curves_at
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {args.output}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[2048, 8192, 24576, 65536])
    parser.add_argument("--curves-at", type=int, default=8192, help="the width that is trained in each precision")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--held-out", type=int, default=8_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--models", type=Path, default=Path("runs/models"))
    parser.add_argument("--activations", type=Path, default=Path("runs/activations_6.safetensors"))
    parser.add_argument("--output", type=Path, default=Path("runs/recall.json"))
    return parser.parse_args(argv)


def trained(
    args: argparse.Namespace, train: Tensor, F: int, precision: str
) -> tuple[SparseTopKTrainingSAE, list[float]]:
    """The SAE, and the error of every step."""
    import torch

    from sae_lens_switch import (
        SparseSAETrainer,
        SparseSAETrainerConfig,
        SparseTopKTrainingSAE,
        SparseTopKTrainingSAEConfig,
    )

    torch.manual_seed(0)
    fields: dict[str, Any] = {"d_in": train.shape[1], "d_sae": F, "k": args.k, "encoder_precision": precision}
    sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**fields))
    with torch.no_grad():
        sae.b_dec.copy_(train[: args.batch].mean(0))
    samples = args.tokens // args.batch * args.batch
    trainer = SparseSAETrainer(SparseSAETrainerConfig(samples, args.batch, lr=args.lr), sae, train)
    errors = []
    for batch in train[:samples].split(args.batch):
        errors.append(trainer.step(batch).losses["mse_loss"].item())
        trainer.n_training_steps += 1
    return sae, errors


def recalls(sae: SparseTopKTrainingSAE, x: Tensor) -> list[dict[str, Any]]:
    """One row per precision and margin."""
    import torch
    from sae_lens_switch_kernels.candidates import with_candidates
    from sae_lens_switch_kernels.inputs import EncoderInputs

    rows = []
    with torch.no_grad():
        scale = sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None
        inputs = EncoderInputs(x, sae.W_enc.T, sae.pre_bias, sae.b_enc, scale, None, None, sae.cfg.k, 1, torch.float32)
        exact = selected(inputs)
        for precision in PRECISIONS:
            default = with_candidates(inputs, precision)
            for n in sorted({sae.cfg.k + round(margin * sae.cfg.k) for margin in MARGINS} | {default.n_candidates}):
                found = {"precision": precision, "candidates": n, "is_default": n == default.n_candidates}
                rows.append(found | compared(exact, default._replace(n_candidates=n)))
    return rows


def selected(inputs: EncoderInputs) -> Selected:
    from sae_lens_switch_kernels.operators import encode_sorted

    groups = inputs.groups()
    return encode_sorted(inputs, inputs.centered(groups), groups)


def compared(exact: Selected, inputs: EncoderInputs) -> dict[str, float]:
    values, indices, *_ = exact
    _, found, doubtful, _ = selected(inputs)
    is_active = values > 0
    is_found = (indices.unsqueeze(2) == found.unsqueeze(1)).any(2)
    misses = (is_active & ~is_found).any(1)
    weight = values if inputs.scale_F is None else values * inputs.scale_F[indices]
    return {
        "by_count": (is_found & is_active).sum().item() / is_active.sum().item(),
        "by_weight": ((weight * is_found).sum() / weight.sum()).item(),
        "tokens_that_miss_one": misses.float().mean().item(),
        "tokens_in_doubt": doubtful.float().mean().item(),
        "missed_without_doubt": (misses & ~doubtful).float().mean().item(),
    }


def print_rows(rows: list[dict[str, Any]], F: int) -> None:
    print(f"{'F':>7} {'precision':>10}{'candidates':>11}{'count':>11}{'weight':>11}{'miss one':>10}{'in doubt':>10}")
    for r in rows:
        if r["d_sae"] == F:
            print(
                f"{F:7} {r['precision']:>10}{r['candidates']:10}{'*' if r['is_default'] else ' '}{r['by_count']:11.4%}"
                f"{r['by_weight']:11.4%}{r['tokens_that_miss_one']:10.2%}{r['tokens_in_doubt']:10.2%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
