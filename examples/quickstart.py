"""Train, evaluate and save a Switch SAE on a real language model: a few minutes on two CPU cores, no network.

    python examples/quickstart.py

Trains on the residual stream of SmolLM2-135M over Python's own documentation, with SAELens's stock training runner;
then loads the saved SAE with plain SAELens and shows a table, a figure, and the text that some latents fire on.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported for real in the functions, after prepare_process()
    from held_out import HeldOut
    from rich.console import Console
    from sae_lens import TrainingSAE
    from torch import Tensor

    from sae_lens_switch.history import History

HOOK = "model.layers.12"  # the residual stream after layer 12 of 30, counted from 0
D_IN = 576
CONTEXT = 128
SKIPPED = 2  # first tokens of each context, which the SAE never sees: see offline.token_contexts
BATCH = 256  # small: the language model takes most of the time, so that few tokens suffice
PROMPTS = 16  # contexts per forward pass of the language model
DENSITY_STEPS = 400  # the last training steps, over which firing is counted and latents are considered dead


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    started = time.perf_counter()
    prepare_process()
    import torch
    from held_out import assert_same, evaluate
    from offline import language_model_folder, text_datasets, token_contexts
    from rich.console import Console
    from sae_lens import SAE

    console = Console(highlight=False)
    with working_folder(args.output) as folder:
        console.print("[bold]1/4[/] Language model and text, from installed packages")
        model_folder = language_model_folder(args.models)
        text = text_datasets(seed=args.seed)
        train_contexts, held_out_contexts = (token_contexts(part, model_folder, CONTEXT) for part in text)
        train_contexts = train_contexts.shuffle(seed=args.seed)  # neighbouring contexts come from the same document
        tokens = torch.tensor(held_out_contexts[: args.held_out_contexts]["input_ids"])
        console.print(f"    {model_folder}; {len(train_contexts):,} contexts of {CONTEXT} tokens")

        console.print(
            f"[bold]2/4[/] Training on {args.tokens:,} tokens: {args.n_experts} experts, {args.d_sae:,} latents"
        )
        runner = make_runner(args, model_folder, train_contexts, folder / "sae")
        log = TrainingLog()
        log.attach(runner)
        trained = runner.run()
        log.history.save(folder / "sae")
        held_out_contexts.save_to_disk(folder / "held_out")  # the text that the report reads

        console.print(
            "[bold]3/4[/] Loading the saved SAE with plain SAE.load_from_disk; evaluating it on held-out text"
        )
        sae = SAE.load_from_disk(folder / "sae")
        with torch.no_grad():
            held_out = evaluate(sae, runner.model, tokens, HOOK, SKIPPED)
            assert_same(trained, sae, held_out.activations)
        metrics = held_out.metrics | {
            "dead_latents": int((log.density == 0).sum()),
            "tokens_per_second": log.tokens / log.seconds,
        }

        console.print("[bold]4/4[/] What some latents fire on, in held-out text\n")
        print_latents(console, held_out, sae.cfg, tokens, runner.model.tokenizer)
        draw(folder / "summary.png", args, log, held_out)
        metrics["seconds"] = time.perf_counter() - started
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print_table(console, args, metrics)
    print_next_steps(console, args)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for all results")
    parser.add_argument("--models", type=Path, default=Path("runs/models"), help="where the converted model is cached")
    parser.add_argument("--tokens", type=int, default=200_000, help="training tokens")
    parser.add_argument(
        "--held-out-contexts", type=int, default=48, help=f"contexts for evaluation, {CONTEXT} tokens each"
    )
    parser.add_argument("--n-experts", type=int, default=8, help="experts; must divide --d-sae")
    parser.add_argument("--d-sae", type=int, default=4608, help="latents, over all experts")
    parser.add_argument("--k", type=int, default=32, help="active latents per token")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the text's split and order, and of the SAE")
    return parser.parse_args(argv)


def prepare_process() -> None:
    """Set what libraries read at import, before they are imported, and silence what is expected."""
    # By default OpenMP threads spin while waiting, which makes training 3x slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    warnings.filterwarnings("ignore")  # SAELens counts rows as tokens, and recommends tokenizing the text beforehand
    from sae_lens import logger
    from transformers.utils.logging import disable_progress_bar

    logger.setLevel(logging.ERROR)
    disable_progress_bar()


@contextmanager
def working_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output`, moved there at the end: a killed run leaves nothing half-written."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield folder
        output.mkdir(exist_ok=True)
        for new in sorted(folder.iterdir()):
            old = output / new.name
            if old.is_dir():  # a folder cannot be replaced in one step
                old.rename(folder / f"replaced-{new.name}")
            os.replace(new, old)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_runner(args: argparse.Namespace, model_folder: Path, text: Any, sae_folder: Path) -> Any:
    import torch
    from sae_lens import LanguageModelSAETrainingRunner, LoggingConfig

    from sae_lens_switch import LanguageModelSAERunnerConfig

    steps = args.tokens // BATCH
    contexts = args.tokens / (CONTEXT - SKIPPED)
    cfg = LanguageModelSAERunnerConfig(
        # The SAE
        architecture="switch",
        d_in=D_IN,
        d_sae=args.d_sae,
        n_experts=args.n_experts,
        k=args.k,
        # What it is trained on
        model_name=str(model_folder),
        model_class_name="AutoModelForCausalLM",
        hook_name=HOOK,
        context_size=CONTEXT,
        prepend_bos=False,
        seqpos_slice=(SKIPPED, None),
        store_batch_size_prompts=PROMPTS,
        # Contexts, shuffled in four parts. What is still kept for mixing at the end has been computed for nothing.
        n_batches_in_buffer=max(2 * PROMPTS, math.ceil(contexts / 4)),
        activations_mixing_fraction=0.1,
        # How
        training_tokens=args.tokens,
        train_batch_size_tokens=BATCH,
        lr=args.lr,  # a run this short needs more than the scaling law gives
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=2 * steps // 3,
        dead_feature_window=DENSITY_STEPS,
        feature_sampling_window=steps + 2,  # longer than the run: firing counts are never reset
        seed=args.seed,
        # Where to
        output_path=str(sae_folder),
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    torch.manual_seed(args.seed)  # SAELens does not use its config's seed
    return LanguageModelSAETrainingRunner(cfg, override_dataset=text)


@dataclass
class TrainingLog:
    """What the stock trainer does not keep: the loss of every step, and the recent firing rates."""

    mse: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0  # language model and SAE together
    density: Tensor | None = None  # [F]
    history: History | None = None  # what W&B would be sent, for the report

    def attach(self, runner: Any) -> None:
        from sae_lens_switch.history import History

        stock_fit = runner.run_trainer_with_interruption_handling

        def fit(trainer: Any) -> TrainingSAE[Any]:
            stock_step, stock_bar = trainer.step, trainer._update_pbar
            first_counted_step = max(0, trainer.cfg.total_training_steps - DENSITY_STEPS)
            before: dict[str, Any] = {}
            self.history = History(trainer.cfg.total_training_steps)

            def step(batch: Tensor) -> Any:
                if trainer.n_training_steps == first_counted_step:
                    before.update(fired=trainer.act_freq_scores.clone(), tokens=trainer.n_training_samples)
                output = stock_step(batch)
                self.mse.append(output.losses["mse_loss"].item())
                if self.history.is_due(trainer.n_training_steps + 1):
                    metrics = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
                    self.history.add(trainer.n_training_steps + 1, metrics)
                return output

            trainer.step = step
            # The stock bar updates every 100 steps, which is slow here.
            trainer._update_pbar = lambda output, bar: stock_bar(output, bar, update_interval=4)
            start = time.perf_counter()
            sae = stock_fit(trainer)
            self.seconds = time.perf_counter() - start
            self.tokens = trainer.n_training_samples
            self.density = (trainer.act_freq_scores - before["fired"]) / (self.tokens - before["tokens"])
            return sae

        runner.run_trainer_with_interruption_handling = fit


def print_latents(console: Console, held_out: HeldOut, cfg: Any, tokens: Tensor, tokenizer: Any) -> None:
    """Print, for one latent of each of up to four experts, the held-out contexts in which it is strongest."""
    import torch
    from rich.text import Text

    latents_per_expert = cfg.layout.expert_width
    acts = held_out.codes.to_dense()
    fired = (acts > 0).sum(0)
    # Frequent enough for four examples, rare enough to be specific; of those, the strongest when active.
    clear = (fired >= 6) & (fired <= 0.01 * len(acts))
    strength = torch.where(clear, acts.sum(0) / fired.clamp(min=1), 0).view(cfg.n_experts, latents_per_expert)
    for expert in strength.amax(1).topk(min(4, cfg.n_experts)).indices.sort().values.tolist():
        within = int(strength[expert].argmax())
        latent = expert * latents_per_expert + within
        if not clear[latent]:
            continue
        share = 100 * fired[latent].item() / len(acts)
        console.print(f"[bold]expert {expert}, latent {latent}[/], fires on {share:.2f} % of tokens:")
        for row in acts[:, latent].topk(4).indices.tolist():
            context, position = row // (CONTEXT - SKIPPED), row % (CONTEXT - SKIPPED) + SKIPPED
            before, token, after = (
                "".join("⏎" if c == "\n" else c for c in tokenizer.decode(piece))
                for piece in (
                    tokens[context, max(0, position - 10) : position],
                    tokens[context, position : position + 1],
                    tokens[context, position + 1 : position + 7],
                )
            )
            line = Text.assemble(f"{before[-44:]:>48}", (f"«{token}»", "bold green"), after[:24])
            console.print(line, no_wrap=True, overflow="crop")
        console.print()


def draw(path: Path, args: argparse.Namespace, log: TrainingLog, held_out: HeldOut) -> None:
    from held_out import variance

    from sae_lens_switch.plots import training_summary

    figure = training_summary(
        log.mse,
        held_out.metrics["expert_load"],
        log.density,
        tokens_per_step=BATCH,
        variance=variance(held_out.activations),
        title=f"Switch SAE of SmolLM2-135M, {HOOK}: {args.n_experts} experts, {args.d_sae:,} latents, k = {args.k}",
    )
    figure.savefig(path)


def print_table(console: Console, args: argparse.Namespace, metrics: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{HOOK} of SmolLM2-135M, held-out text, first two tokens excluded")
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("meaning", style="dim")
    counted = min(DENSITY_STEPS * BATCH, args.tokens)
    loads = [f"{100 * share:.1f}" for share in metrics["expert_load"]]
    load = "\n".join(" ".join(loads[i : i + 4]) for i in range(0, len(loads), 4))
    for name, value, meaning in (
        ("explained variance", f"{metrics['explained_variance']:.4f}", "1 - squared error / variance"),
        ("MSE", f"{metrics['mse']:,.0f}", "squared error, summed over d_in"),
        ("L0", f"{metrics['l0']:.1f}", f"active latents per token, of {args.d_sae:,}"),
        ("CE loss without SAE", f"{metrics['ce_loss_without_sae']:.3f}", "the model as it is"),
        ("CE loss with SAE", f"{metrics['ce_loss_with_sae']:.3f}", "activations reconstructed"),
        ("CE loss with ablation", f"{metrics['ce_loss_with_ablation']:.3f}", "activations set to zero"),
        ("CE loss recovered", f"{metrics['ce_loss_recovered']:.4f}", "share of the gap that the SAE closes"),
        ("expert load, %", load, f"share of tokens; uniform is {100 / args.n_experts:.1f}"),
        ("dead latents", f"{metrics['dead_latents']:,}", f"silent over {counted:,} tokens"),
        ("tokens/s", f"{metrics['tokens_per_second']:,.0f}", "training, model included"),
        ("seconds", f"{metrics['seconds']:.0f}", "for the whole run"),
    ):
        table.add_row(name, value, meaning)
    console.print(table)


def print_next_steps(console: Console, args: argparse.Namespace) -> None:
    console.print(
        f"""
Saved in [bold]{args.output}[/]: the SAE in sae/, the figure summary.png, the numbers metrics.json. For a report:

    python -m sae_lens_switch.report {args.output}

To use it:

    import sae_lens_switch  # registers the architecture with SAELens
    from sae_lens import SAE
    sae = SAE.load_from_disk("{args.output / "sae"}")

On a connected machine, for GPT-2 small on OpenWebText, change in make_runner(): model_name="gpt2",
model_class_name="HookedTransformer", hook_name="blocks.8.hook_resid_post", d_in=768, d_sae=24576, n_experts=32,
dataset_path="Skylion007/openwebtext" (instead of override_dataset), and leave lr out, to use the paper's scaling law.
[bold]examples/train_gpt2.py[/] does this."""
    )


if __name__ == "__main__":
    main()
