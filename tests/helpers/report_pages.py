"""Runs on a small random language model whose words are hostile to HTML, and reports of them read as HTML."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from helpers import CONTEXT, D, E, F, K, run_fields, tiny_dataset
from sae_lens_switch import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, SwitchSAE

# What text may hold: each would run, or end the script or attribute it stands in, if it were not escaped.
HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<img/src=x/onerror=window.hacked=1>",
    "\"'><b>&lt;",
    "<!--",
    "\u2028]]>",
]
WORDS = [*(f"w{i}" for i in range(24)), *HOSTILE]
HOOK = "transformer.h.0"
SKIPPED = 1


SECTIONS = ["summary", "curves", "load", "density", "router", "alignment", "neighbours", "choices", "similarity"]
SECTIONS += ["duplicates", "experts", "latents"]


def save_language_model(folder: Path) -> Path:
    """A random GPT-2 with a tokenizer of whole words."""
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", "<pad>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=CONTEXT, n_embd=D, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(40)
    model.save_pretrained(folder)
    return folder


def train(folder: Path, language_model: Path, text: Dataset, **fields: Any) -> Path:
    """A run of six steps; returns its output folder."""
    own = {"model_name": str(language_model), "model_class_name": "AutoModelForCausalLM", "hook_name": HOOK}
    own |= {"d_in": D, "d_sae": F, "lr": 1e-2}
    own |= {"architecture": "switch", "n_experts": E, "k": K} if "architecture" not in fields else {}
    own |= {"seqpos_slice": (SKIPPED, None), "prepend_bos": False, "exclude_special_tokens": [3]}
    cfg = LanguageModelSAERunnerConfig(**run_fields(folder, **{**own, **fields}))
    LanguageModelSAETrainingRunner(cfg, override_dataset=text).run()
    return folder / "output"


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the text outside of tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:  # what has no end tag of its own
            pass

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    @property
    def sections(self) -> list[str | None]:
        return [attributes.get("id") for tag, attributes in self.found if tag == "section"]


def plots_of(page: str) -> dict[str, Any]:
    return json.loads(page.partition('<script type="application/json" id="plots">')[2].partition("</script>")[0])


def dense(output: Path) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """SAE, tokens, activations, which of them count, latents, of the whole held-out text; by hand."""
    sae = SwitchSAE.load_from_disk(output)
    tokens = tiny_dataset(12).with_format("torch")["tokens"][:]
    lm = GPT2LMHeadModel.from_pretrained(sae.cfg.metadata.model_name)
    with torch.no_grad():
        x = lm(tokens, output_hidden_states=True).hidden_states[1]
        acts = sae.encode(x)
    counts = tokens != 3
    counts[:, :SKIPPED] = False
    return sae, tokens, x, counts, acts * counts[..., None]
