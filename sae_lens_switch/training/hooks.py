"""Check that a language model has the hook an SAE is to be trained on, with activations of the SAE's width."""

import difflib
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from transformer_lens import HookedRootModule, HookedTransformer, HookedTransformerConfig

# An unknown name this similar to one of TransformerLens's is a typo.
_TYPO = 0.9


def check_hook_name(hook_name: str, field: str = "hook_name") -> None:
    """Check the name of a TransformerLens hook, which ``field`` holds, as far as possible without the model.

    Raises:
        ValueError: If the name is unknown and looks like a typo of a known one.
    """
    name = re.sub(r"^blocks\.\d+\.", "blocks.0.", hook_name)
    if name not in _names_of_transformer_lens():
        close = difflib.get_close_matches(name, _names_of_transformer_lens(), n=3, cutoff=_TYPO)
        if close:
            layer = hook_name.removesuffix(name.removeprefix("blocks.0."))
            close = [other.replace("blocks.0.", layer, 1) for other in close]
            raise ValueError(f"{field} must be a hook of TransformerLens; got {hook_name!r}{_did_you_mean(close)}")


@cache
def _names_of_transformer_lens() -> frozenset[str]:
    """The hooks of five models with one block, which between them have every kind."""
    sizes = {"n_layers": 1, "d_model": 2, "n_ctx": 2, "d_head": 2, "n_heads": 1, "d_vocab": 2, "d_mlp": 2}
    kinds: list[dict[str, Any]] = [
        {},
        {"positional_embedding_type": "rotary", "rotary_dim": 2, "gated_mlp": True, "normalization_type": "RMS"},
        {"use_normalization_before_and_after": True, "normalization_type": "RMS"},
        {"parallel_attn_mlp": True},
        {"positional_embedding_type": "shortformer"},
    ]
    names: set[str] = set()
    with torch.random.fork_rng(devices=[]):
        for kind in kinds:
            cfg = HookedTransformerConfig(**sizes, **kind, act_fn="gelu", device="cpu")
            names |= HookedTransformer(cfg).hook_dict.keys()
    return frozenset(names)


@torch.no_grad()
def check_hook(
    model: HookedRootModule,
    cfg: Any,
    hook_name: str,
    head_index: int | None,
    d_in: int,
    fields: tuple[str, str] = ("hook_name", "d_in"),
) -> None:
    """Check that the model has the hook and the SAE its width, by running two tokens.

    Args:
        model: The language model: TransformerLens's, or any other with ``hook_dict`` and ``run_with_cache``.
        cfg: The runner's config.
        hook_name: The hook.
        head_index: The attention head, if the SAE is trained on a single one.
        d_in: The width of the SAE.
        fields: The config's names for the hook and the width.

    Raises:
        ValueError: If the hook does not exist or is never reached, or contexts, head or width do not fit.
    """
    of_hook, of_width = fields
    if hook_name not in model.hook_dict:
        close = difflib.get_close_matches(hook_name, list(model.hook_dict), n=3)
        raise ValueError(f"{of_hook} must be a hook of {cfg.model_name}; got {hook_name!r}{_did_you_mean(close)}")
    longest = getattr(getattr(model, "cfg", None), "n_ctx", None)
    if isinstance(longest, int) and cfg.context_size > longest:
        raise ValueError(
            f"context_size must be at most {longest}, the longest context of {cfg.model_name}; got {cfg.context_size}"
        )
    _, cache = model.run_with_cache(
        torch.zeros(1, 2, dtype=torch.long, device=cfg.llm_device),
        names_filter=[hook_name],
        stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(hook_name),
        prepend_bos=False,
        **cfg.model_kwargs,
    )
    if hook_name not in cache:
        raise ValueError(
            f"{of_hook} must be a hook that {cfg.model_name} reaches as it is configured; got {hook_name!r}"
        )
    activations = cache[hook_name]
    if head_index is not None and not (activations.ndim == 4 and head_index < activations.shape[2]):
        raise ValueError(
            f"hook_head_index must be None or one of the heads at {hook_name}, whose activations have shape "
            f"{tuple(activations.shape)}; got {head_index}"
        )
    width = activations.shape[-1] if head_index is not None else activations[0, 0].numel()
    if width != d_in:
        raise ValueError(
            f"{of_width} must be the width of {cfg.model_name}'s activations at {hook_name}, {width}; "
            f"got {of_width}={d_in}"
        )


def _did_you_mean(close: Iterable[str]) -> str:
    names = ", ".join(map(repr, close))
    return f"; did you mean {names}?" if names else ""
