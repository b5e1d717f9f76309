"""SAEBench's core evaluation of a saved SAE: reconstruction error, and its effect on the model's loss.

    python examples/saebench.py my-sae --dataset Skylion007/openwebtext
    python examples/saebench.py USER/REPO SAE_ID

Model, hook and BOS token are those in the SAE's config. SAEBench requires numpy 1 and datasets 3, but its core works
without them, so it can be installed beside this package:

    pip install tabulate
    pip install --no-deps sae-bench

Its other evaluations are called in the same way, for example
`sae_bench.evals.sparse_probing.main.run_eval(config, [("my-sae", sae)], device, "results")`, and need an environment
of SAEBench's own:

    python -m venv saebench
    saebench/bin/pip install sae-bench "torchvision<0.26" -e .
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

SHOWN = ("explained_variance", "mse", "cossim", "l0", "l2_ratio", "ce_loss_score", "kl_div_score", "frac_alive")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    from sae_bench.evals.core.main import multiple_evals
    from sae_lens import SAE

    import sae_lens_switch  # noqa: F401  announces our architectures to SAELens

    if args.sae_id is None:
        sae = SAE.load_from_disk(args.sae, device=args.device)
    else:
        sae = SAE.from_pretrained(args.sae, args.sae_id, device=args.device)
    name = args.name or Path(args.sae).name
    results = multiple_evals(
        selected_saes=[(name, sae)],
        n_eval_reconstruction_batches=args.batches,
        n_eval_sparsity_variance_batches=args.batches,
        eval_batch_size_prompts=args.batch_size,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
        dataset=args.dataset,
        context_size=args.context_size,
        output_folder=args.output,
        dtype=args.dtype,
        device=args.device,
        force_rerun=True,
    )
    if not results:  # it logs the error and continues with the next SAE
        raise SystemExit(f"SAEBench could not evaluate {args.sae}: its message is above")
    metrics = {key: value for group in results[0]["metrics"].values() for key, value in group.items()}
    for key in SHOWN:
        print(f"{key:>20} {metrics[key]:.4f}")
    print(f"All of them: {args.output}/{name}_custom_sae_eval_results.json")
    return metrics


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("sae", help="folder of a saved SAE, or a repository on the Hub")
    parser.add_argument("sae_id", nargs="?", help="the SAE within the repository")
    parser.add_argument("--name", help="name in the results; by default the folder's")
    parser.add_argument("--dataset", default="Skylion007/openwebtext", help="dataset on the Hub, or a folder")
    parser.add_argument("--output", default="runs/saebench", help="folder for the results")
    parser.add_argument("--batches", type=int, default=10, help="number of batches of text")
    parser.add_argument("--batch-size", type=int, default=16, help="contexts per batch")
    parser.add_argument("--context-size", type=int, default=128, help="tokens per context")
    parser.add_argument("--dtype", default="float32", help="of model and SAE")
    parser.add_argument("--device", default="auto", help="of model and SAE; auto: cuda if available, else cpu")
    args = parser.parse_args(argv)
    if args.device == "auto":
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


if __name__ == "__main__":
    main()
