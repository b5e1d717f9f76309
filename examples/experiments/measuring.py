"""How good an SAE is on held-out text: its error, and the language model's loss with its reconstructions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from activations import SKIPPED, Layer, hidden_states, load_model
from torch import Tensor


@torch.no_grad()
def error(sae: Any, x: Tensor) -> dict[str, float]:
    """L0, squared error per activation, and the fraction of the variance unexplained, on x [n, d_in]."""
    residual, l0 = 0.0, 0.0
    for part in x.split(2048):
        if hasattr(sae, "encode_sparse"):
            codes = sae.encode_sparse(part)
            values, x_hat = codes.values, sae.decode(codes)
        else:
            values = sae.encode(part)
            x_hat = sae.decode(values)
        residual += (x_hat - part).square().sum().item()
        l0 += (values != 0).sum().item()
    return {"l0": l0 / len(x), "mse": residual / len(x), "fvu": residual / (x - x.mean(0)).square().sum().item()}


class LanguageModelLoss:
    """The share of the CE loss that an SAE recovers, between the model with mean-ablated activations and as it is."""

    @torch.no_grad()
    def __init__(self, layer: Layer, n_contexts: int) -> None:
        self.layer, source = layer, layer.cache.source
        self.model = load_model(source)
        self.hook_name = source.hook_name.format(layer=layer.number)
        tokens = layer.cache.contexts.tokens["held_out"][-n_contexts:].astype(np.int64)
        self.tokens = torch.from_numpy(tokens)
        self.hidden = hidden_states(self.model, source.hook_name, [layer.number], self.tokens)[layer.number]
        self.clean = self.cross_entropy(self.hidden)
        self.kept = layer.is_massive(self.hidden)
        self.kept[:, :SKIPPED] = True
        self.ablated = self.cross_entropy(torch.where(self.kept[..., None], self.hidden, layer.centre))

    @torch.no_grad()
    def cross_entropy(self, hidden: Tensor) -> float:
        """The CE loss of the language model with its activations replaced by these."""
        parts = [
            self.model.run_with_hooks(
                t,
                return_type="both",
                fwd_hooks=[(self.hook_name, lambda _x, hook, h=h: h)],  # noqa: ARG005
            )[1].item()
            * len(t)
            for t, h in zip(self.tokens.split(8), hidden.split(8), strict=True)
        ]
        return sum(parts) / len(self.tokens)

    @torch.no_grad()
    def recovered(self, sae: Any) -> float:
        """(ablated - with SAE) / (ablated - model); massive activations and first tokens are left as they are."""
        hidden = self.hidden.clone()
        x_hat = sae(self.layer.scaled(hidden[~self.kept]))
        hidden[~self.kept] = x_hat / self.layer.scale + self.layer.centre
        return (self.ablated - self.cross_entropy(hidden)) / (self.ablated - self.clean)
