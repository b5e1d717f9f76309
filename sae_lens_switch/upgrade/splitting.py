"""From a TopK SAE to a Switch SAE with the same latents, to be fine-tuned."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor

from sae_lens_switch.common import rules
from sae_lens_switch.common.printable import logger
from sae_lens_switch.saes.config import SwitchTrainingSAEConfig
from sae_lens_switch.saes.field_rules import SWITCH
from sae_lens_switch.saes.switch_training_sae import SwitchTrainingSAE
from sae_lens_switch.training.activations import ActivationSource
from sae_lens_switch.upgrade.encoder_fit import ExpertFit, fvu, with_bias_folded
from sae_lens_switch.upgrade.latent_clusters import cluster_latents, strength_by_expert
from sae_lens_switch.upgrade.router_fit import FittedRouter, fit_router
from sae_lens_switch.upgrade.sources import TopK, check_architecture, sampled_inputs, topk_of

_COPIED = ("d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations", "reshape_activations")
_DECIDED = {*_COPIED, "n_experts", "k", "metadata", "decoder_init_norm", "tie_router_bias"}
_DECIDED |= {"n_shared_experts", "shared_width"}  # none is: TopK does not say which latents all experts would need
_DECIDED |= {"n_active_experts", "activation"}  # router and encoders are fitted for k latents of one expert


@dataclass(frozen=True)
class SplitReport:
    """What a split did to the reconstruction of the activations it was made on, before any fine-tuning.

    Attributes:
        architecture: Of the SAE that was split.
        fvu_before: Fraction of variance unexplained of the TopK SAE (with k latents per token).
        fvu_after: The same of the Switch SAE.
        captured: Share of the strength (squared latents) of TopK's codes in the expert that the router chooses.
        agreement: Share of the tokens that the router sends to the expert with most of their strength.
        load_max: Share of the tokens of the busiest expert, times E: 1 is even.
        encoder_bias: "none": there was none. "folded" or "dropped": see ``split_topk``.
        n_tokens: Number of tokens.
    """

    architecture: str
    fvu_before: float
    fvu_after: float
    captured: float
    agreement: float
    load_max: float
    encoder_bias: str
    n_tokens: int


class Split(NamedTuple):
    """A Switch SAE; ``latents_F[j]``, which of TopK's latents became its latent j; and what it cost."""

    sae: SwitchTrainingSAE
    latents_F: Tensor
    report: SplitReport


def split_topk(
    sae: SAE,
    n_experts: int,
    activations: ActivationSource,
    *,
    k: int | None = None,
    n_tokens: int = 100_000,
    seed: int = 0,
    switch_fields: Mapping[str, Any] | None = None,
) -> SwitchTrainingSAE:
    """Turn a trained TopK SAE into a Switch SAE of the same width, whose encoder costs E times less.

    - Latents that fire together are put into the same expert, F / E in each (``cluster_latents``).
    - The router is fitted to send each token to the expert with most of its code's strength, sum_j z_j^2 ||W_dec_j||^2.
    - Decoder norms are moved to the encoder if the SAE selects by rescaled latents or all norms are equal. Otherwise
      rows keep their norms, and ``normalize_decoder`` is off.
    - The gate p_e scales latents, and TopK's had none: the encoder of each expert is multiplied by
      s_e = <x - b_dec, p_e y> / ||p_e y||^2, summed over its tokens, y being the decoded latents: the factor of least
      squared error. It changes neither the selection nor the norms of the decoder.
    - A Switch SAE has no encoder bias. b_enc is folded: as the tokens of an expert lie to one side of b_dec, some v_e
      has <x - b_dec, v_e> near 1 on them, by ridge regression, and b_enc_f v_e is added to latent f's encoder. Or it
      is dropped, whichever has the lower error.

    The result decodes and routes at once, with more error than TopK, and is meant to be fine-tuned, as any SAE that
    is not fresh. The error before and after is logged, and kept as ``cfg.metadata.split``.

    Args:
        sae: "topk" (trained or in training), "sparse_topk", "batchtopk", "sparse_batchtopk", or "jumprelu" with one
            non-negative threshold for all latents, as saved from batchtopk. Activation normalisation must be none, per
            token ("constant_norm_rescale", "layer_norm"), or folded. It is not changed.
        n_experts: E, which divides d_sae.
        activations: As for SparseSAETrainer: a tensor [..., d_in], a folder of cached activations, or batches.
        k: Active latents per token, at most d_sae / E. None: TopK's own; BatchTopK's average, rounded; for jumprelu,
            the average number over the threshold.
        n_tokens: The most tokens to use, chosen by ``seed`` from a tensor. They are held in memory, [N, D] in float32.
        seed: Of all that is random. The same arguments give the same SAE, bit for bit.
        switch_fields: Fields of SwitchTrainingSAEConfig for the training to come, such as load_balance_coefficient.

    Returns:
        A SwitchTrainingSAE with the dtype, device and metadata of ``sae``.

    Raises:
        ValueError: For other architectures, thresholds that differ, normalisation not yet folded, weights or
            activations that are not finite, an impossible n_experts or k, and fields that the split decides itself.
    """
    return split(sae, n_experts, activations, k=k, n_tokens=n_tokens, seed=seed, switch_fields=switch_fields).sae


@torch.no_grad()
def split(
    sae: SAE,
    n_experts: int,
    activations: ActivationSource,
    *,
    k: int | None = None,
    n_tokens: int = 100_000,
    seed: int = 0,
    switch_fields: Mapping[str, Any] | None = None,
) -> Split:
    """``split_topk``, with the origin of each latent and the report."""
    check_architecture(sae)
    n_experts = int(rules.check_value("n_experts", n_experts, SWITCH["n_experts"]))
    k = k if k is None else int(rules.check_value("k", k, SWITCH["k"]))
    fields = _checked_fields(switch_fields)
    if sae.cfg.d_sae % n_experts:
        raise ValueError(f"n_experts must divide d_sae={sae.cfg.d_sae}; got {n_experts}")
    x_ND = sampled_inputs(sae, activations, n_tokens, seed)
    if len(x_ND) < max(2, n_experts):
        raise ValueError(f"activations must hold at least {max(2, n_experts)} tokens; got {len(x_ND)}")
    topk = topk_of(sae, k, x_ND)
    cfg = _config(sae, topk, n_experts, fields)  # raises where k is more than an expert holds

    values_NK, indices_NK = topk.encode(x_ND)
    strength_NK = values_NK.square() * topk.W_dec_FD.square().sum(dim=1)[indices_NK]
    expert_F = cluster_latents(strength_NK, indices_NK, cfg.d_sae, n_experts, seed)
    share_NE = strength_by_expert(strength_NK, indices_NK, expert_F, n_experts)
    total_N = share_NE.sum(dim=1)
    best_N = share_NE.argmax(dim=1)
    target_NE = torch.nn.functional.one_hot(best_N, n_experts).to(share_NE)
    router = fit_router(x_ND, target_NE, total_N / total_N.mean().clamp_min(1e-30), seed)

    latents_F = expert_F.argsort(stable=True)
    candidates = {"none": topk.permuted(latents_F)}
    probs_NE = router.probs(x_ND)
    if topk.b_enc_F.any():
        dropped = candidates.pop("none")
        candidates = {"dropped": dropped, "folded": with_bias_folded(dropped, x_ND, probs_NE.argmax(dim=1), n_experts)}
    errors = {name: ExpertFit.of(part, x_ND, probs_NE, cfg.gate) for name, part in candidates.items()}
    name = min(errors, key=lambda name: errors[name].fvu)

    chosen_N = probs_NE.argmax(dim=1)
    load_E = torch.bincount(chosen_N, minlength=n_experts) / len(chosen_N)
    captured = share_NE.gather(1, chosen_N.unsqueeze(1)).double().sum() / total_N.double().sum()
    report = SplitReport(
        architecture=sae.cfg.architecture(),
        fvu_before=fvu(topk, x_ND, values_NK, indices_NK),
        fvu_after=errors[name].fvu,
        captured=float(captured),
        agreement=float((chosen_N == best_N).double().mean()),
        load_max=float(load_E.max() * n_experts),
        encoder_bias=name,
        n_tokens=len(x_ND),
    )
    cfg.metadata.split = asdict(report)
    logger.info(f"split into {n_experts} experts: {report}")
    return Split(_switch_sae(cfg, candidates[name], errors[name].scale_E, router), latents_F, report)


def _checked_fields(given: Mapping[str, Any] | None) -> dict[str, Any]:
    fields = dict(given or {})
    rules.reject_unknown(fields, set(SwitchTrainingSAEConfig.__dataclass_fields__))
    decided = sorted(_DECIDED & fields.keys())
    if decided:
        raise ValueError(f"switch_fields must not hold {', '.join(decided)}: the SAE that is split decides them")
    return fields


def _config(sae: SAE, topk: TopK, n_experts: int, fields: dict[str, Any]) -> SwitchTrainingSAEConfig:
    if fields.get("normalize_decoder") and not topk.unit_rows:
        raise ValueError(
            "normalize_decoder must be False for an SAE that selects by latents which are not rescaled and whose "
            "decoder rows differ in norm: unit rows would change what it selects"
        )
    copied = {name: getattr(sae.cfg, name) for name in _COPIED}
    copied |= {"normalize_decoder": topk.unit_rows, "decoder_init_norm": 1.0 if topk.unit_rows else None}
    metadata = copy.deepcopy(sae.cfg.metadata)
    return SwitchTrainingSAEConfig(**{**copied, **fields, "n_experts": n_experts, "k": topk.k, "metadata": metadata})


def _switch_sae(cfg: SwitchTrainingSAEConfig, topk: TopK, scale_E: Tensor, router: FittedRouter) -> SwitchTrainingSAE:
    sae = SwitchTrainingSAE(cfg)
    scale_F = scale_E.to(topk.W_enc_FD).repeat_interleave(cfg.layout.expert_width)
    sae.W_enc.copy_((topk.W_enc_FD * scale_F.unsqueeze(1)).T)
    sae.W_dec.copy_(topk.W_dec_FD)
    sae.b_dec.copy_(topk.b_dec_D)
    sae.W_router.copy_(router.W_router_DE)
    sae.b_router.copy_(router.b_router_D)
    sae.is_fresh = False
    return sae
