"""What a penalty on similar decoder rows of different experts does: duplicate latents against error, by coefficient.

    python benchmarks/duplicates.py        # half an hour on one CPU core, no network

Switch SAEs on the residual stream of SmolLM2-135M after a layer. Reports the fraction of variance unexplained on
held-out tokens, and how many latents have a row of another expert within a cosine, in the decoder and in the encoder,
or fire on the same tokens as one of another expert would.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sae_lens_switch import SwitchTrainingSAE

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

_CACHED = 208_000  # tokens in the file, which is that of benchmarks/recall.py
_COSINES = (0.7, 0.8, 0.9)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from offline import cached_activations, language_model_folder, text_datasets, token_contexts

    model_folder = language_model_folder(args.models)
    contexts = token_contexts(text_datasets(seed=0)[0], model_folder).shuffle(seed=0)
    x = cached_activations(args.activations, model_folder, contexts, _CACHED, args.layer)
    held_out, train_x = x[: args.held_out], x[args.held_out :]
    results: list[dict[str, float]] = []
    settings = {name: str(value) for name, value in vars(args).items()}
    for seed in args.seeds:
        for coefficient in args.coefficients:
            results.append(trained(args, train_x, held_out, coefficient, seed))
            print(", ".join(f"{name} {value:.4g}" for name, value in results[-1].items()), flush=True)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")


def trained(args: argparse.Namespace, x: Tensor, held_out: Tensor, coefficient: float, seed: int) -> dict[str, float]:
    import torch

    from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig, SwitchTrainingSAE, SwitchTrainingSAEConfig

    torch.manual_seed(seed)
    shape = {"d_sae": args.d_sae, "n_experts": args.n_experts, "k": args.k}
    sae = SwitchTrainingSAE(
        SwitchTrainingSAEConfig(d_in=x.shape[1], expert_overlap_coefficient=coefficient, **shape),
    )
    samples = args.epochs * len(x) // args.batch * args.batch
    trainer = SparseSAETrainer(SparseSAETrainerConfig(samples, args.batch, lr=args.lr, dead_feature_window=200), sae, x)
    start = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        error = (sae.decode(sae.encode_sparse(held_out)) - held_out).square().sum()
    return {
        "coefficient": coefficient,
        "seed": seed,
        "fvu": float(error / (held_out - held_out.mean(0)).square().sum()),
        **similar(sae.W_dec, args.n_experts, "decoder"),
        **similar(sae.W_enc.T, args.n_experts, "encoder"),
        **alike(sae, held_out),
        "dead": int(trainer.dead_neurons.sum()),
        "seconds": seconds,
    }


def similar(W_FD: Tensor, n_experts: int, name: str) -> dict[str, float]:
    """How many latents have one in another expert with a cosine above each number."""
    from sae_lens_switch.analysis import duplicate_latents

    found = {c: duplicate_latents(W_FD.detach().contiguous(), n_experts, threshold=c).across_F for c in _COSINES}
    return {f"{name}_{c}": int(across_F.sum()) for c, across_F in found.items()}


def alike(sae: SwitchTrainingSAE, x: Tensor) -> dict[str, float]:
    """How many latents have one in another expert that fires alike, by the correlation of their activations.

    Every expert is given every token, and keeps its k largest latents of it.
    """
    import torch

    with torch.no_grad():
        E = sae.cfg.n_experts
        pre_BEM = ((x - sae.b_dec) @ sae.W_enc).relu().view(len(x), E, -1)
        acts_BF = (pre_BEM * (pre_BEM >= pre_BEM.topk(sae.cfg.k, dim=2).values[..., -1:])).flatten(1)
        acts_BF = acts_BF - acts_BF.mean(0)
        acts_FB = (acts_BF / acts_BF.norm(dim=0).clamp_min(1e-9)).T
        most: list[Tensor] = []
        for e, block_MB in enumerate(acts_FB.chunk(E)):
            correlation_MEM = (block_MB @ acts_FB.T).view(len(block_MB), E, -1)
            correlation_MEM[:, e] = -1
            most.append(correlation_MEM.amax((1, 2)))
    return {f"alike_{c}": int((torch.cat(most) > c).sum()) for c in _COSINES}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coefficients", type=float, nargs="+", default=[0.0, 0.01, 0.03])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--held-out", type=int, default=8_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--n-experts", type=int, default=16)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--models", type=Path, default=Path("runs/models"))
    parser.add_argument("--activations", type=Path, default=Path("runs/activations_6.safetensors"))
    parser.add_argument("--output", type=Path, default=Path("runs/duplicates.json"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
