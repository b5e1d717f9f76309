"""A language model and text for tools that take both by name: a tiny GPT-2 that is found where the hub's would be."""

import json
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from helpers import CONTEXT, WORDS, D, tiny_tokenizer

MODEL_NAME = "gpt2"  # a name that TransformerLens knows; a folder of this name is looked at before the hub


def write_model_and_text(folder: Path) -> None:
    """``gpt2/`` and ``text/`` in the folder, which must be the working directory when they are asked for."""
    torch.manual_seed(0)
    cfg = GPT2Config(
        vocab_size=32,
        n_positions=CONTEXT,
        n_ctx=CONTEXT,
        n_embd=D,
        n_layer=2,
        n_head=2,
        initializer_range=0.4,  # activations of an interesting size
        bos_token_id=0,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel(cfg)
    model.save_pretrained(folder / MODEL_NAME)
    tiny_tokenizer().save_pretrained(folder / MODEL_NAME)
    words = torch.randint(len(WORDS), (200, 3 * CONTEXT), generator=torch.Generator().manual_seed(4))
    (folder / "text").mkdir()
    with open(folder / "text" / "train.jsonl", "w") as file:
        for row in words.tolist():
            file.write(json.dumps({"text": " ".join(WORDS[i] for i in row)}) + "\n")
