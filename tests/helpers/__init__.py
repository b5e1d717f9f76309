"""Small things the tests share: configs and SAEs of odd little sizes, activations with structure, a random
language model with its tokenizer and data. Nothing is downloaded."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer, LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens_switch_kernels import huge_pages, torch_tiles
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformer_lens import HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

from sae_lens_switch import SwitchSAE, SwitchSAEConfig, SwitchTrainingSAE, SwitchTrainingSAEConfig

ROOT = Path(__file__).parents[2]
# D and M = F / E are no powers of two, and no two of the four are equal.
D, F, E, K = 12, 40, 4, 3
M = F // E
HOOK, HOOK_Z = "blocks.1.hook_resid_pre", "blocks.0.attn.hook_z"
CONTEXT = 16
WORDS = [f"w{i}" for i in range(29)]
small_run_warnings = [
    pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]
HOOK_SHAPES = {  # the width that each hook of a Switch SAE sees
    "hook_sae_input": D,
    "hook_sae_router_logits": E,
    "hook_sae_router_probs": E,
    "hook_sae_acts_pre": F,
    "hook_sae_acts_post": F,
    "hook_sae_recons": D,
    "hook_sae_output": D,
}


def switch_config(**fields: Any) -> SwitchSAEConfig:
    return SwitchSAEConfig(**{"d_in": D, "d_sae": F, "n_experts": E, "k": K, "dtype": "float64", **fields})


def training_config(**fields: Any) -> SwitchTrainingSAEConfig:
    return SwitchTrainingSAEConfig(**{"d_in": D, "d_sae": F, "n_experts": E, "k": K, "dtype": "float64", **fields})


@torch.no_grad()
def randomize(sae: Any, seed: int = 0) -> Any:
    """Every parameter random, biases too, decoder rows of all norms: nothing cancels by being zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return sae


def switch_sae(seed: int = 0, **fields: Any) -> SwitchSAE:
    return randomize(SwitchSAE(switch_config(**fields)), seed)


def training_sae(seed: int = 0, **fields: Any) -> SwitchTrainingSAE:
    """As a trainer makes it: initialised, not randomised."""
    torch.manual_seed(seed)
    return SwitchTrainingSAE(training_config(**fields))


def random_input(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def activations(n_batches: int, batch: int = 64, seed: int = 2, d_in: int = D, scale: float = 1.0) -> list[Tensor]:
    """Batches of sparse mixtures of a few fixed directions, off centre: something an SAE can learn."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(2 * d_in, d_in, generator=generator)
    centre = 3 * torch.randn(d_in, generator=generator)
    batches = []
    for _ in range(n_batches):
        active = torch.rand(batch, 2 * d_in, generator=generator) < 0.1
        strength = torch.rand(batch, 2 * d_in, generator=generator) + 0.5
        batches.append(scale * ((active * strength) @ directions + centre))
    return batches


def trainer(sae: Any, batches: list[Tensor] | Iterator[Tensor], **fields: Any) -> SAETrainer[Any, Any]:
    """SAELens's own trainer over the given batches."""
    if isinstance(batches, list):
        fields = {
            "total_training_samples": sum(len(b) for b in batches),
            "train_batch_size_samples": len(batches[0]),
            **fields,
        }
        batches = iter(batches)
    cfg = SAETrainerConfig(**{"lr": 1e-2, "lr_end": 1e-3, **fields})
    return SAETrainer(cfg=cfg, sae=sae, data_provider=batches)


def largest_allocation(function: Callable[[], Any]) -> int:
    """Bytes of the largest piece of memory that torch asks for while the function runs, inside operators too."""
    return max(_allocations(function))


def is_that_of_tiles(n_bytes: int, width: int, n_tokens: int) -> bool:
    """Whether it is that of a tile of float32, with all latents of many rows, and less than that of all tokens."""
    rows, latents = torch_tiles.narrow_tile(torch.device("cpu"), torch.float32)
    assert width <= latents
    return 4 * torch_tiles.TILE_ROWS["cpu"] * width <= n_bytes <= 4 * rows * width < 4 * n_tokens * width


def net_allocated(function: Callable[[], Any]) -> int:
    """Bytes that torch allocates while the function runs, less those that it frees, inside operators and graphs too."""
    return sum(_allocations(function))


def _allocations(function: Callable[[], Any]) -> list[int]:
    gc.collect()  # so that garbage of before, such as another test's tensors, is not freed while the function runs
    gc.disable()
    try:
        # What lies in huge pages does not come from torch's allocator.
        unseen = patch.object(huge_pages, "_is_large", lambda *_: False)
        with unseen, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
    finally:
        gc.enable()
    return [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", "<pad>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        add_bos_token=True,
        name_or_path="tiny",
    )


def tiny_model() -> HookedSAETransformer:
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=CONTEXT, d_head=D // 2, n_heads=2, d_mlp=24, act_fn="gelu", d_vocab=32, seed=0
    )
    model = HookedSAETransformer(cfg, tokenizer=tiny_tokenizer())
    with torch.no_grad():  # activations of an interesting size
        model.embed.W_E.mul_(20)
    return model.eval().requires_grad_(False)


def tiny_dataset(n_rows: int = 200) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(3, 3 + len(WORDS), (n_rows, CONTEXT), generator=generator)
    rows[:, 0] = 0
    return Dataset.from_dict({"tokens": rows.tolist()})


def run_fields(path: Any, **fields: Any) -> dict[str, Any]:
    """Runner fields of a run of a few small steps on ``tiny_model``, which writes below ``path``."""
    return {
        "model_name": "tiny",
        "hook_name": HOOK,
        "dataset_path": "none",
        "context_size": CONTEXT,
        "streaming": False,
        "n_batches_in_buffer": 8,
        "store_batch_size_prompts": 4,
        "training_tokens": 6 * 64,
        "train_batch_size_tokens": 64,
        "n_eval_batches": 1,
        "checkpoint_path": str(path / "checkpoints"),
        "output_path": str(path / "output"),
        "logger": LoggingConfig(log_to_wandb=False),
        "verbose": False,
        **fields,
    }
