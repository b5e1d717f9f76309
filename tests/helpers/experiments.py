"""What the tests of the experiments share: a tiny language model, text of three kinds, and a plan of two cells and
two seeds."""

import os
from dataclasses import replace
from pathlib import Path

import activations
import cells
import numpy as np
import plans
import texts
import torch
import worker
from transformers import GPT2Config, GPT2LMHeadModel

from helpers import tiny_tokenizer

D_IN, CONTEXT = 24, 32
HOOK = "transformer.h.{layer}"
PLAN = replace(
    plans.PLANS["tiny"],
    **{"tokens": 1920, "budgets": (640, 1280, 1920), "sweep_tokens": 640, "batch": 32, "middle": (2,)},
    **{"middle_tokens": 640, "learning_rates": (2e-3, 4e-3)},
)


def write_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=128, n_embd=D_IN, n_layer=3, n_head=2, initializer_range=0.5)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def write_text(folder: Path) -> None:
    """Three kinds of text; a document repeats a paragraph of another one."""
    random = np.random.default_rng(0)
    for kind, n_documents in (("letters", 30), ("lists", 30), ("plays", 8)):
        (folder / kind).mkdir(parents=True)
        for i in range(n_documents):
            paragraphs = [" ".join(f"w{w}" for w in random.integers(0, 29, 130)) for _ in range(6)]
            (folder / kind / f"{i}.txt").write_text("\n\n".join(paragraphs))
    (folder / "letters" / "again.txt").write_text((folder / "letters" / "0.txt").read_text())


def contexts(folder: Path, kept_out: str | None = None) -> texts.Contexts:
    wanted = {"train": 64, "held_out": 8, "other": 4}
    return texts.contexts(texts.folder_kinds(folder / "text"), folder / "model", CONTEXT, wanted, kept_out)


def cache_of(folder: Path, found: texts.Contexts, output: Path, second: int = 22) -> activations.Cache:
    """Layers 0 and 1, the second one for fewer contexts."""
    source = activations.Source(str(folder / "model"), "AutoModelForCausalLM", HOOK, {0: 64, 1: second}, D_IN)
    cache = activations.Cache(output / "activations", source, found, contexts_per_part=10)
    cache.reserve(0)
    return cache


def results_of(output: Path) -> worker.Results:
    return worker.Results(output / "cells", {"of": "a test"})


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder but locks."""
    found = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def say_who(folder: Path, what: str) -> None:
    """Note that this process does a piece of work."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{os.getpid()}", "a") as file:
        file.write(what + "\n")


# Rows of results.csv


def swept(architecture: str, E: int, errors: dict[float, float], F: int = 2048, name: str = "fvu") -> list[dict]:
    return [
        {"experiment": plans.SWEEP, "architecture": architecture, "d_sae": F, "n_experts": E, "lr": lr, name: e}
        for lr, e in errors.items()
    ]


def measured(**fields) -> dict:
    """A row of results.csv."""
    plain = cells.Cell("matched FLOPs", "switch", 2048, lr=1e-3).settings | {"tokens": 3e6}
    plain |= dict.fromkeys(("l0", "mse", "fvu", "fvu_other", "final_loss", "ce_recovered", "steps", "step_ms"), 1.0)
    plain |= {"dead_latents": 0.0, "load_max": 1.0, "load_min": 1.0, "flops_per_activation": 1.0}
    found = plain | fields
    return {n: float(v) if isinstance(v, int) else v for n, v in found.items()}
