"""Small transcoders of every kind, and dense references for them in float64."""

from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from helpers import randomize
from sae_lens_switch import (
    SparseBatchTopKTrainingTranscoder,
    SparseBatchTopKTrainingTranscoderConfig,
    SparseTopKTrainingTranscoder,
    SparseTopKTrainingTranscoderConfig,
    SwitchTrainingTranscoder,
    SwitchTrainingTranscoderConfig,
)

# Narrower and wider outputs; no two sizes are equal.
D, F, E, K = 12, 40, 4, 3
WIDTHS = (7, 17)
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "switch_transcoder": (SwitchTrainingTranscoder, SwitchTrainingTranscoderConfig, {"n_experts": E}),
    "sparse_topk_transcoder": (SparseTopKTrainingTranscoder, SparseTopKTrainingTranscoderConfig, {}),
    "sparse_batchtopk_transcoder": (SparseBatchTopKTrainingTranscoder, SparseBatchTopKTrainingTranscoderConfig, {}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_width = pytest.mark.parametrize("d_out", WIDTHS)
with_and_without_skip = pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])


def fresh_transcoder(kind: str, **fields: Any) -> Any:
    """As a trainer makes it."""
    sae_class, config_class, own = KINDS[kind]
    torch.manual_seed(0)
    return sae_class(config_class(**{"d_in": D, "d_sae": F, "k": K, "d_out": 7, "dtype": "float64", **own, **fields}))


def transcoder(kind: str, **fields: Any) -> Any:
    """Every parameter random."""
    made = randomize(fresh_transcoder(kind, **fields))
    if kind == "switch_transcoder":
        made.is_fresh = False
    return made


def pairs(n: int = 30, d_out: int = 7, seed: int = 1) -> Tensor:
    """Rows of inputs and targets."""
    return torch.randn(n, D + d_out, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def step_input(rows: Tensor, dead_F: Tensor | None = None) -> TrainStepInput:
    return TrainStepInput(
        sae_in=rows,
        coefficients={"load_balance": 0.7},
        dead_neuron_mask=dead_F,
        n_training_steps=3,
        is_logging_step=False,
    )


def latents(sae: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dense latents, pre-activations that are eligible, -inf elsewhere, and the gate of each token."""
    if not isinstance(sae, SwitchTrainingTranscoder):
        pre = x @ sae.W_enc + sae.b_enc
        scale = sae.W_dec.norm(dim=1) if sae.cfg.rescale_acts_by_decoder_norm else torch.ones(F).double()
        ranked = (pre * scale).relu()
        k = sae.cfg.k * len(x) if isinstance(sae, SparseBatchTopKTrainingTranscoder) else sae.cfg.k
        ranked = ranked.flatten() if isinstance(sae, SparseBatchTopKTrainingTranscoder) else ranked
        mask = torch.zeros_like(ranked).scatter(-1, ranked.topk(int(k), dim=-1).indices, 1.0).view_as(pre)
        return pre.relu() * mask, pre, torch.ones(len(x)).double()
    probs = router_probs(sae, x)
    pre = (x - sae.b_in) @ sae.W_enc
    expert = probs.argmax(1)
    own = torch.arange(F) // (F // E) == expert[:, None]
    pre = pre.masked_fill(~own, -torch.inf)
    chosen = pre.topk(sae.cfg.k, dim=1).indices
    gate = probs.gather(1, expert[:, None])
    acts = gate * torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen)).relu()
    return acts, pre, gate.flatten()


def router_probs(sae: Any, x: Tensor) -> Tensor:
    return ((x - sae.b_router) @ sae.W_router).softmax(1)


def reference_losses(sae: Any, rows: Tensor, dead_F: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and losses by the formulas, dense."""
    x, y = rows[:, :D], rows[:, D:]
    acts, pre, gate = latents(sae, x)
    out = acts @ sae.W_dec + sae.b_dec
    out = out if sae.W_skip is None else out + x @ sae.W_skip.T
    losses = {"mse_loss": (out - y).square().sum(1).mean()}
    if isinstance(sae, SwitchTrainingTranscoder):
        probs = router_probs(sae, x)
        load = torch.bincount(probs.argmax(1), minlength=E).double() / len(x)
        spread = (y - y.mean(0)).square().sum(1).mean().detach()
        losses["load_balance_loss"] = 0.7 * spread * E * (load * probs.mean(0)).sum()
    if dead_F is not None:
        aux_k = K if isinstance(sae, SwitchTrainingTranscoder) else y.shape[1] // 2
        n_dead = (dead_F & torch.isfinite(pre)).sum(1)
        scaled = pre * (sae.W_dec.norm(dim=1) if not isinstance(sae, SwitchTrainingTranscoder) else 1.0)
        of_dead = scaled.masked_fill(~dead_F, -torch.inf)
        best = of_dead.topk(min(aux_k, int(n_dead.max())), dim=1)
        mask = torch.zeros_like(pre).scatter(1, best.indices, (best.values > -torch.inf).double()) > 0
        aux = (gate.detach()[:, None] * torch.where(mask, pre, torch.zeros_like(pre))) @ sae.W_dec
        error = (aux - (y - out).detach()).square().sum(1)
        losses["auxiliary_reconstruction_loss"] = (
            sae.cfg.aux_loss_coefficient * ((n_dead / aux_k).clamp(max=1) * error).mean()
        )
    return out, losses
