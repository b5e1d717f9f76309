"""What the fields of a Switch SAE's config must be together, beside the rules of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from sae_lens_switch.saes.field_rules import Activation, InferenceActivation
from sae_lens_switch.saes.transcoder_fields import TranscoderFields
from sae_lens_switch.saes.widths import check_widths

if TYPE_CHECKING:
    from sae_lens_switch.saes.config import SwitchSAEConfig, SwitchTrainingSAEConfig


def check_experts(cfg: SwitchSAEConfig | SwitchTrainingSAEConfig, training: SwitchTrainingSAEConfig | None) -> None:
    """``training`` is the same config where it is one for training. Raises ValueError."""
    _check_layout(cfg)
    _check_activation(cfg.activation, is_training=training is not None)
    if cfg.n_active_experts > cfg.n_experts:
        raise ValueError(f"n_active_experts must be at most n_experts={cfg.n_experts}; got {cfg.n_active_experts}")
    S, width, A = cfg.layout.shared_width, cfg.layout.expert_width, cfg.n_active_experts
    if cfg.k > S + A * width:
        several = "" if A == 1 else "n_active_experts * "
        factor, whose = ("", "one expert") if A == 1 else (f"{A} * ", f"{A} experts")
        most = f"{several}d_sae / n_experts = {factor}{cfg.d_sae} / {cfg.n_experts} = {A * width}"
        if S:
            most = (
                f"shared_width + {several}(d_sae - shared_width) / n_experts = {S} + {factor}{width} = {S + A * width}"
            )
            whose += " and the shared ones"
        raise ValueError(f"k must be at most {most}, the latents of {whose}; got k={cfg.k}")
    if cfg.normalize_activations == "covariance_whitening" and not cfg.apply_b_dec_to_input:
        raise ValueError(
            "apply_b_dec_to_input must be True with normalize_activations='covariance_whitening': "
            "a Switch SAE has no encoder bias that could absorb the mean"
        )
    if training is not None:
        _check_training(training)


def _check_activation(activation: str, is_training: bool) -> None:
    names = get_args(Activation if is_training else InferenceActivation)
    if activation not in names:
        when = "in training" if is_training else "after training"
        raise ValueError(f"activation must be one of {', '.join(map(repr, names))} {when}; got {activation!r}")


def _check_training(cfg: SwitchTrainingSAEConfig) -> None:
    if cfg.normalize_decoder and cfg.decoder_init_norm not in (None, 1.0):
        raise ValueError(
            f"decoder_init_norm must be 1.0 or None when normalize_decoder is on; got {cfg.decoder_init_norm!r}"
        )
    if cfg.expert_overlap_coefficient:
        _check_overlap(cfg, cfg.expert_overlap_coefficient)
    if cfg.matryoshka_widths is not None:
        width = cfg.layout.expert_width
        check_widths(cfg.matryoshka_widths, width, "the width of an expert", cfg.normalize_activations)
        if isinstance(cfg, TranscoderFields) and cfg.skip_connection:
            raise ValueError(
                "skip_connection must be False with matryoshka_widths, whose reconstructions are without it; got True"
            )


def _check_overlap(cfg: SwitchTrainingSAEConfig, overlap: float) -> None:
    if cfg.n_active_experts == cfg.n_experts:
        raise ValueError(
            f"expert_overlap_coefficient must be 0 unless n_active_experts={cfg.n_active_experts} is less than "
            f"n_experts={cfg.n_experts}; got {overlap}"
        )
    if cfg.n_shared_experts:
        raise ValueError(
            f"expert_overlap_coefficient must be 0 with shared experts, of which there are {cfg.n_shared_experts}; "
            f"got {overlap}"
        )
    if cfg.activation == "batchtopk":
        raise ValueError(
            "expert_overlap_coefficient must be 0 with activation='batchtopk', whose tokens differ in number of "
            f"latents; got {overlap}"
        )


def _check_layout(cfg: SwitchSAEConfig | SwitchTrainingSAEConfig) -> None:
    E, n, S = cfg.n_experts, cfg.n_shared_experts, cfg.shared_width
    if n == 0 and S is not None:
        raise ValueError(f"shared_width must be None without shared experts, n_shared_experts=0; got {S}")
    if n == 0 and cfg.d_sae % E:
        raise ValueError(f"d_sae must be a multiple of n_experts={E}; got d_sae={cfg.d_sae}")
    if n and S is None and cfg.d_sae % (E + n):
        raise ValueError(
            f"d_sae must be a multiple of n_experts + n_shared_experts = {E + n} unless shared_width is given; "
            f"got d_sae={cfg.d_sae}"
        )
    if n and S is not None and not cfg.layout.is_possible:
        raise ValueError(
            f"shared_width must leave a multiple of n_experts={E} of the d_sae={cfg.d_sae} latents; "
            f"got shared_width={S}"
        )
