"""How good an SAE is on held-out text: reconstruction error, and the language model's loss with its reconstructions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sae_lens import SAE, TrainingSAE
    from sae_lens.load_model import HookedProxyLM

    from sae_lens_switch import SparseCodes


@dataclass
class HeldOut:
    """Activations, codes and metrics of the n held-out tokens, without the first ones of each context."""

    activations: Tensor  # [n, D]
    codes: SparseCodes  # [n, K]
    metrics: dict[str, Any]


def evaluate(sae: SAE[Any], model: HookedProxyLM, contexts: Tensor, hook: str, skipped: int) -> HeldOut:
    """Reconstruction error and CE loss at ``hook``; the first ``skipped`` tokens of each context are left as they are.

    SAELens's own evaluation cannot skip first tokens.
    """
    activations: list[Tensor] = []
    losses: dict[str, list[Tensor]] = {"without_sae": [], "with_sae": [], "with_ablation": []}
    for batch in contexts.split(8):
        (_, loss), cache = model.run_with_cache(
            batch, names_filter=[hook], return_type="both", loss_per_token=True, prepend_bos=False
        )
        losses["without_sae"].append(loss[:, skipped:])  # the loss at a token is that of predicting the next one
        x = cache[hook][:, skipped:]
        activations.append(x.flatten(0, 1))
        for name, x_new in {"with_sae": sae(x), "with_ablation": torch.zeros_like(x)}.items():
            hooks = [(hook, lambda acts, x_new=x_new, **_: torch.cat([acts[:, :skipped], x_new], dim=1))]
            _, loss = model.run_with_hooks(batch, fwd_hooks=hooks, return_type="both", loss_per_token=True)
            losses[name].append(loss[:, skipped:])

    x = torch.cat(activations)
    codes = sae.encode_sparse(x)
    mse = (sae.decode(codes) - x).square().sum(1).mean().item()  # summed over dimensions, averaged over tokens
    expert = sae.cfg.layout.experts_of(codes.indices[:, 0])
    ce = {name: torch.cat(parts).mean().item() for name, parts in losses.items()}
    metrics = {
        "explained_variance": 1 - mse / variance(x),
        "mse": mse,
        "l0": (codes.values > 0).sum(1).float().mean().item(),
        **{f"ce_loss_{name}": value for name, value in ce.items()},
        "ce_loss_recovered": (ce["with_ablation"] - ce["with_sae"]) / (ce["with_ablation"] - ce["without_sae"]),
        "expert_load": (torch.bincount(expert, minlength=sae.cfg.n_experts) / len(expert)).tolist(),
    }
    return HeldOut(x, codes, metrics)


def variance(x: Tensor) -> float:
    return (x - x.mean(0)).square().sum(1).mean().item()


def assert_same(trained: TrainingSAE[Any], loaded: SAE[Any], x: Tensor) -> None:
    """Check that the loaded SAE computes exactly what the trained one does."""
    trained.eval()
    acts = trained.encode(x)
    if not torch.equal(acts, loaded.encode(x)):
        raise RuntimeError(f"the loaded SAE encodes differently, by up to {(acts - loaded.encode(x)).abs().max():.3g}")
    out = trained.decode(acts)
    if not torch.equal(out, loaded.decode(acts)):
        raise RuntimeError(
            f"the loaded SAE decodes differently, by up to {(out - loaded.decode(acts)).abs().max():.3g}"
        )
