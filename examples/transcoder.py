"""Train a transcoder of an MLP of a real language model, on a CPU and without network, and evaluate it in the model.

    python examples/transcoder.py
    python examples/transcoder.py --architecture sparse_topk_transcoder --skip-connection

It reads what layer --layer of SmolLM2-135M normalises for its MLP, and reconstructs the MLP's output, both from one
forward pass over Python's own documentation. Prints how much of the output's variance it explains on held-out text, and
the model's loss with the MLP replaced by it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

D_MODEL, CONTEXT, PROMPTS = 576, 128, 16
SKIPPED = 2  # first tokens of each context: see offline.token_contexts
METRICS = {
    "explained_variance": "of the MLP's output, 1 - squared error / variance",
    "mse": "squared error, summed over d_out",
    "l0": "active latents per token",
    "ce_loss_without_sae": "the model as it is",
    "ce_loss_with_sae": "the MLP replaced by the transcoder",
    "ce_loss_with_ablation": "the MLP's output set to zero",
    "ce_loss_score": "share of that gap that the transcoder closes",
}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from quickstart import prepare_process

    prepare_process()
    import torch
    from offline import language_model_folder, text_datasets, token_contexts
    from sae_lens import SAE

    model_folder = language_model_folder(args.models)
    train, held_out = (token_contexts(part, model_folder, CONTEXT) for part in text_datasets(seed=args.seed))
    runner = make_runner(args, model_folder, train.shuffle(seed=args.seed))
    started = time.perf_counter()
    runner.run()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        found = evaluate(SAE.load_from_disk(args.output), runner.model, held_out, args.held_out_contexts)
    for name, meaning in METRICS.items():
        print(f"{name:24}{found[name]:12.4f}    {meaning}")
    print(f"{'seconds':24}{seconds:12.1f}    for training")
    (args.output / "metrics.json").write_text(json.dumps(found | {"seconds": seconds}, indent=2) + "\n")
    print(f"saved in {args.output}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    kinds = [f"{kind}_transcoder" for kind in ("switch", "sparse_topk", "sparse_batchtopk")]
    parser.add_argument("--architecture", choices=kinds, default=kinds[0])
    parser.add_argument("--skip-connection", action="store_true", help="with a dense linear map beside the latents")
    parser.add_argument("--layer", type=int, default=12, help="of the MLP, counted from 0")
    parser.add_argument("--tokens", type=int, default=200_000, help="training tokens")
    parser.add_argument("--held-out-contexts", type=int, default=48, help=f"for evaluation, {CONTEXT} tokens each")
    parser.add_argument("--d-sae", type=int, default=4608, help="latents")
    parser.add_argument("--n-experts", type=int, default=8, help="experts of a switch_transcoder")
    parser.add_argument("--k", type=int, default=32, help="active latents per token")
    parser.add_argument("--batch", type=int, default=512, help="tokens per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, default=Path("runs/models"), help="where the converted model is cached")
    parser.add_argument("--output", type=Path, default=Path("runs/transcoder"))
    return parser.parse_args(argv)


def make_runner(args: argparse.Namespace, model_folder: Path, text: Any) -> Any:
    import torch
    from sae_lens import LoggingConfig

    from sae_lens_switch import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner

    own = {"n_experts": args.n_experts} if args.architecture == "switch_transcoder" else {}
    cfg = LanguageModelSAERunnerConfig(
        architecture=args.architecture,
        hook_name=f"model.layers.{args.layer}.post_attention_layernorm",
        hook_name_out=f"model.layers.{args.layer}.mlp",
        d_in=D_MODEL,
        d_out=D_MODEL,
        d_sae=args.d_sae,
        k=args.k,
        skip_connection=args.skip_connection,
        **own,
        model_name=str(model_folder),
        model_class_name="AutoModelForCausalLM",
        context_size=CONTEXT,
        prepend_bos=False,
        seqpos_slice=(SKIPPED, None),
        store_batch_size_prompts=PROMPTS,
        n_batches_in_buffer=16 * PROMPTS,
        training_tokens=args.tokens,
        train_batch_size_tokens=args.batch,
        lr=args.lr,  # a run this short needs more than the scaling law gives
        lr_warm_up_steps=args.tokens // args.batch // 20,
        lr_decay_steps=args.tokens // args.batch // 2,
        seed=args.seed,
        output_path=str(args.output),
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    torch.manual_seed(args.seed)  # SAELens does not use its config's seed
    return LanguageModelSAETrainingRunner(cfg, override_dataset=text)


def evaluate(transcoder: Any, model: Any, text: Any, n_contexts: int) -> dict[str, float]:
    from sae_lens.evals import EvalConfig
    from sae_lens.training.activations_store import ActivationsStore

    from sae_lens_switch import run_transcoder_evals

    batch = min(PROMPTS, n_contexts)
    store = ActivationsStore.from_sae(model, transcoder, text, streaming=False, store_batch_size_prompts=batch)
    n = max(1, n_contexts // batch)
    cfg = EvalConfig(batch, n, compute_ce_loss=True, n_eval_sparsity_variance_batches=n)
    cfg.compute_sparsity_metrics = cfg.compute_variance_metrics = True
    metrics, _ = run_transcoder_evals(transcoder, store, model, cfg, exclude_special_tokens=False)
    return {name: float(value) for group in metrics.values() for name, value in group.items()}


if __name__ == "__main__":
    main()
