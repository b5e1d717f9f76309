"""A Switch SAE with more experts, that computes nearly what it did."""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from sae_lens_switch.common import rules
from sae_lens_switch.common.printable import logger
from sae_lens_switch.saes.field_rules import SWITCH
from sae_lens_switch.saes.router import assign, router_logits
from sae_lens_switch.saes.switch_training_sae import SwitchTrainingSAE
from sae_lens_switch.saes.transcoder_fields import TranscoderFields
from sae_lens_switch.training.activations import ActivationSource
from sae_lens_switch.upgrade.sources import check_folded, sampled_inputs

# What is added to one twin's logits and taken from the other's, root mean square over their tokens, as a share of the
# mean distance between a token's two highest logits: little enough that few tokens of other experts follow.
_TWIN_SPREAD = 0.25


@torch.no_grad()
def grow(
    sae: SwitchTrainingSAE, n_experts: int, activations: ActivationSource, *, n_tokens: int = 100_000, seed: int = 0
) -> SwitchTrainingSAE:
    """Add whole experts of the same width to a Switch SAE, which then goes on training.

    Each new expert is a copy of the one that is busiest by then, encoder and decoder, so that whichever of the two a
    token goes to, the same latents are selected. Their two columns of the router are set apart, by equal amounts in
    opposite directions, along the first principal direction of their tokens: each gets about half. Twins share one
    expert's tokens but no gradient, and so become different. Shared experts stay as they are.
    What is not preserved: a token's gate rises or falls as the probability of the twins is divided, and a few
    tokens of other experts change theirs. Each expert's encoder is multiplied by the factor that makes up for the
    gates best, in the sense of least squares. The share of tokens that select other latents is logged.

    The optimiser is not part of this: continue with a new trainer, whose moments start from zero, as does its count
    of tokens since each latent fired.

    Args:
        sae: As trained so far; it is not changed.
        n_experts: The new number of experts, more than it has.
        activations: As for SparseSAETrainer: a tensor [..., d_in], a folder of cached activations, or batches.
        n_tokens: The most tokens to use.
        seed: Which of a tensor's tokens are used.

    Raises:
        ValueError: If n_experts is not larger, tokens have several experts (both twins would be among them and select
            the same latents), the SAE is still as initialised, or for activations that are too few,
            not finite, or not in the scale of the SAE's weights, which ``normalize_activations`` tells.
    """
    if not isinstance(sae, SwitchTrainingSAE) or isinstance(sae.cfg, TranscoderFields):
        raise ValueError(f"sae must be a SwitchTrainingSAE; got {type(sae).__name__}")
    n_experts = int(rules.check_value("n_experts", n_experts, SWITCH["n_experts"]))
    if n_experts <= sae.cfg.n_experts:
        raise ValueError(f"n_experts must be more than the {sae.cfg.n_experts} there are; got {n_experts}")
    if sae.cfg.n_active_experts != 1:
        raise ValueError(f"n_active_experts must be 1 for an SAE that grows; got {sae.cfg.n_active_experts}")
    if sae.is_fresh:
        raise ValueError("sae must be trained: this one is as initialised, so make it with more experts instead")
    check_folded(sae)
    x_ND = sampled_inputs(sae, activations, n_tokens, seed)
    source_E, W_router_DE = _with_twins(sae, x_ND, n_experts)
    grown = _wider(sae, source_E, W_router_DE)
    old_gates_N, old_N = _gates_and_experts(sae, x_ND)
    gates_N, new_N = _gates_and_experts(grown, x_ND)
    stays_N = source_E[new_N] == old_N
    if sae.cfg.gate == "probability":
        scale_E = _gate_scale(old_gates_N[stays_N], gates_N[stays_N], new_N[stays_N], n_experts)
        routed = grown.W_enc[:, sae.cfg.layout.shared_width :]
        routed.mul_(scale_E.to(grown.W_enc.dtype).repeat_interleave(sae.cfg.layout.expert_width))
    grown.is_fresh = False
    moved = 1 - float(stays_N.double().mean())
    logger.info(
        f"grown from {sae.cfg.n_experts} to {n_experts} experts: {moved:.2%} of the tokens select other latents"
    )
    return grown


def _gates_and_experts(sae: SwitchTrainingSAE, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token's first expert."""
    logits_NE = router_logits(x_ND, sae.W_router, sae.effective_router_bias)
    found = assign(logits_NE, logits_NE.softmax(dim=1), bias_E=sae.expert_bias)
    return found.gates_BA.squeeze(1), found.experts_BA.squeeze(1)


def _with_twins(sae: SwitchTrainingSAE, x_ND: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """For each of the new number of experts, the one whose weights it has, [E]; and the router's columns, [D, E]."""
    W_DE, bias_D = sae.W_router.detach().clone(), sae.effective_router_bias.detach()
    source = list(range(sae.cfg.n_experts))
    while len(source) < n_experts:
        logits_NE = router_logits(x_ND, W_DE, bias_D)
        if sae.expert_bias is not None:
            logits_NE = logits_NE + sae.expert_bias[source]
        expert_N = logits_NE.argmax(dim=1)
        counts_E = torch.bincount(expert_N, minlength=len(source))
        busiest = int(counts_E.argmax())
        if counts_E[busiest] < 2:
            raise ValueError(f"activations must hold at least two tokens per expert; got {len(x_ND)} tokens in all")
        direction_D = _splitting_direction((x_ND[expert_N == busiest] - bias_D).to(W_DE.dtype)) * _margin(logits_NE)
        W_DE = torch.cat([W_DE, (W_DE[:, busiest] - direction_D).unsqueeze(1)], dim=1)
        W_DE[:, busiest] += direction_D
        source.append(source[busiest])
    return torch.tensor(source, device=W_DE.device), W_DE


def _splitting_direction(x_BD: Tensor) -> Tensor:
    """What to add to one twin's column of the router and take from the other's, for a margin of 1.

    On average over the tokens, which come without the router's bias, it adds nothing.
    """
    mean_D = x_BD.mean(dim=0)
    along_D = mean_D / mean_D.norm().clamp_min(1e-30)
    centered_BD = x_BD - mean_D
    centered_BD = centered_BD - (centered_BD @ along_D).unsqueeze(1) * along_D
    covariance_DD = (centered_BD.T @ centered_BD).double() / len(centered_BD)
    variance_D, axes_DD = torch.linalg.eigh(covariance_DD)
    axis_D = (
        axes_DD[:, -1] * axes_DD[axes_DD[:, -1].abs().argmax(), -1].sign()
    )  # eigenvectors have no sign of their own
    return (_TWIN_SPREAD * axis_D / variance_D[-1].clamp_min(1e-30).sqrt()).to(x_BD.dtype)


def _margin(logits_NE: Tensor) -> Tensor:
    """Mean distance between a token's two highest logits; 1 where there is only one."""
    if logits_NE.shape[1] == 1:
        return logits_NE.new_ones(())
    highest_N2 = logits_NE.topk(2, dim=1).values
    return (highest_N2[:, 0] - highest_N2[:, 1]).mean()


def _wider(sae: SwitchTrainingSAE, source_E: Tensor, W_router_DE: Tensor) -> SwitchTrainingSAE:
    """A new SAE whose expert e has the weights of expert ``source_E[e]``."""
    E, layout = len(source_E), sae.cfg.layout
    d_sae = layout.shared_width + E * layout.expert_width
    cfg = replace(sae.cfg, d_sae=d_sae, n_experts=E, metadata=copy.deepcopy(sae.cfg.metadata))
    grown = SwitchTrainingSAE(cfg)
    latents_F = layout.latents(source_E)
    grown.W_enc.copy_(sae.W_enc[:, latents_F])
    grown.W_dec.copy_(sae.W_dec[latents_F])
    grown.b_dec.copy_(sae.b_dec)
    grown.b_router.copy_(sae.b_router)
    grown.W_router.copy_(W_router_DE)
    if grown.expert_bias is not None and sae.expert_bias is not None:
        grown.expert_bias.copy_(sae.expert_bias[source_E])
    if grown.topk_threshold is not None and sae.topk_threshold is not None:
        grown.topk_threshold[:-E].copy_(sae.topk_threshold[: -sae.cfg.n_experts])
        grown.cfg.layout.of_experts(grown.topk_threshold).copy_(layout.of_experts(sae.topk_threshold)[source_E])
    return grown


def _gate_scale(old_N: Tensor, new_N: Tensor, expert_N: Tensor, n_experts: int) -> Tensor:
    """[E], the factors that bring the new gates closest to the old, in the sense of least squares."""
    onehot_NE = torch.nn.functional.one_hot(expert_N, n_experts).double()
    old_E, new_E = (onehot_NE.T @ (t.double() * new_N.double()) for t in (old_N, new_N))
    return torch.where(new_E > 0, old_E / new_E.clamp_min(1e-300), 1.0)
