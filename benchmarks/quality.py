"""The effect of single training options on quality, on the activations of a real language model.

    python benchmarks/quality.py        # about ten minutes on two CPU cores, no network

The same Switch SAE on the same activations in the same order, with one option changed at a time: lazy instead of dense
Adam, low precision instead of float32, AuxK instead of none, several active experts instead of one, and other ways to
balance the load. Reports the fraction of variance unexplained and the busiest expert's load (1 is even) on held-out
tokens, and dead latents.
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
    from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

# Per group: the variants compared, with their settings; the first is the baseline.
BIAS = {"load_balancing": "bias"}
TWO = {"n_active_experts": 2, "gate": "renormalized"}
AUX = {"k": 8, "d_sae": 16384}
AUX_OF_SAELENS = AUX | {"aux_k": 576 // 2}  # half of SmolLM2's d_in
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "optimiser": {
        "dense Adam": {},
        "row-sparse Adam": {"optimizer": "row_sparse_adam"},
        "dense Adam, bfloat16 moments": {"moments_dtype": "bfloat16"},
        "row-sparse, bfloat16 moments": {"optimizer": "row_sparse_adam", "moments_dtype": "bfloat16"},
    },
    "precision": {
        "float32": {},
        "bfloat16 autocast": {"autocast": True},
        "bfloat16 weights": {"dtype": "bfloat16"},
    },
    "active experts": {
        "1 of 16, probability": {},
        "2 of 16, probability": {"n_active_experts": 2},
        "2 of 16, renormalised": {"n_active_experts": 2, "gate": "renormalized"},
        "2 of 16, no gate": {"n_active_experts": 2, "gate": "one"},
        "4 of 16, renormalised": {"n_active_experts": 4, "gate": "renormalized"},
    },
    "shared experts": {
        f"{which}, {gate}": {"gate": gate, **fields}
        for gate in ("probability", "one")
        for which, fields in (("none", {}), ("768 shared latents", {"n_shared_experts": 1, "shared_width": 768}))
    },
    "load balancing": {
        "1 of 16, loss, 0.3": {},
        "1 of 16, loss, 0.1": {"load_balance_coefficient": 0.1},
        "1 of 16, none": {"load_balance_coefficient": 0.0},
        "1 of 16, bias, 0.001": BIAS | {"load_balance_bias_rate": 1e-3},
        "1 of 16, bias, 0.01": BIAS,
        "1 of 16, bias, 0.03": BIAS | {"load_balance_bias_rate": 0.03},
        "1 of 16, loss, 0.3, z 0.01": {"router_z_loss_coefficient": 0.01},
        "2 of 16, loss, 0.3": TWO,
        "2 of 16, loss, 0.1": TWO | {"load_balance_coefficient": 0.1},
        "2 of 16, none": TWO | {"load_balance_coefficient": 0.0},
        "2 of 16, bias, 0.01": TWO | BIAS,
        "2 of 16, bias, 0.03": TWO | BIAS | {"load_balance_bias_rate": 0.03},
    },
    "dead latents at k = 8": {
        "no AuxK": AUX,
        "AuxK of d_in / 2, 1/32": AUX_OF_SAELENS | {"aux_loss_coefficient": 1 / 32},
        "AuxK of d_in / 2, 1": AUX_OF_SAELENS | {"aux_loss_coefficient": 1.0},
        "AuxK of k, 1/32": AUX | {"aux_loss_coefficient": 1 / 32},
        "AuxK of k, 1/4": AUX | {"aux_loss_coefficient": 1 / 4},
        "AuxK of k, 1": AUX | {"aux_loss_coefficient": 1.0},
    },
}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from offline import cached_activations, language_model_folder, text_datasets, token_contexts

    model_folder = language_model_folder(args.models)
    contexts = token_contexts(text_datasets(seed=0)[0], model_folder).shuffle(seed=0)
    x = cached_activations(args.activations, model_folder, contexts, args.tokens + args.held_out, args.layer)
    held_out, train = x[: args.held_out], x[args.held_out :]
    report: dict[str, Any] = {"arguments": {name: str(value) for name, value in vars(args).items()}, "results": []}
    done: dict[str, dict[str, Any]] = {}
    for group, ways in GROUPS.items():
        if args.only and group not in args.only:
            continue
        print(f"\n{group}\n{'':28}{'seed':>6}{'FVU':>9}{'load':>7}{'dead':>8}{'last loss':>11}{'seconds':>9}")
        for name, options in ways.items():
            for seed in args.seeds:
                key = json.dumps([options, seed], sort_keys=True)
                row = done[key] = done.get(key) or train_one(args, train, held_out, options, seed)
                report["results"].append({"group": group, "way": name, "seed": seed, **row})
                numbers = f"{row['fvu']:9.4f}{row['load_max']:7.2f}{row['dead']:8,}{row['last_loss']:11.1f}"
                print(f"{name:28}{seed:6}{numbers}{row['seconds']:9.0f}", flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {args.output}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--held-out", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=12288)
    parser.add_argument("--n-experts", type=int, default=16)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=list(GROUPS))
    parser.add_argument("--models", type=Path, default=Path("runs/models"))
    parser.add_argument("--activations", type=Path, default=Path("runs/activations.safetensors"))
    parser.add_argument("--output", type=Path, default=Path("runs/quality.json"))
    return parser.parse_args(argv)


def train_one(
    args: argparse.Namespace, train: Tensor, held_out: Tensor, options: dict[str, Any], seed: int
) -> dict[str, float]:
    import torch

    from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig, SwitchTrainingSAE, SwitchTrainingSAEConfig

    torch.manual_seed(seed)
    of_trainer = {n: v for n, v in options.items() if n in ("optimizer", "moments_dtype", "autocast")}
    of_sae = {"d_sae": args.d_sae, "k": args.k} | {n: v for n, v in options.items() if n not in of_trainer}
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=train.shape[1], n_experts=args.n_experts, **of_sae))
    samples = args.epochs * args.tokens // args.batch * args.batch
    cfg = SparseSAETrainerConfig(samples, args.batch, lr=args.lr, dead_feature_window=200, **of_trainer)
    trainer = SparseSAETrainer(cfg, sae, train)
    losses: list[float] = []
    step = trainer._train_step
    trainer._train_step = lambda **inputs: remember(step(**inputs), losses)  # type: ignore[method-assign]
    start = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        error = (sae(held_out).float() - held_out).square().sum()
        experts = sae.encode_routed(held_out)[1].experts_BA.flatten()
    return {
        "fvu": (error / (held_out - held_out.mean(0)).square().sum()).item(),
        "load_max": args.n_experts * (experts.bincount().max() / len(experts)).item(),
        "dead": int(trainer.dead_neurons.sum()),
        "last_loss": sum(losses[-50:]) / 50,
        "seconds": seconds,
    }


def remember(output: Any, losses: list[float]) -> Any:
    losses.append(output.losses["mse_loss"].item())
    return output


if __name__ == "__main__":
    main()
