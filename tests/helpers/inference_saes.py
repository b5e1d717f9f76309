"""SAELens's SAEs for inference, of every architecture that ``encode_sparse`` takes, with random weights."""

from collections.abc import Callable
from typing import Any

import torch
from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)

from helpers import D, randomize

F, TOPK_K, D_OUT = 43, 5, D + 3
_TRANSCODES = {"d_out": D_OUT, "apply_b_dec_to_input": False}


def _of(sae_class: Any, config: Any, **options: Any) -> Callable[..., Any]:
    def make(seed: int = 0, **more: Any) -> Any:
        fields = {"d_in": D, "d_sae": F, "dtype": "float64", **options, **more}
        return randomize(sae_class(config(**fields)), seed)

    return make


SAES = {
    "standard": _of(StandardSAE, StandardSAEConfig),
    "gated": _of(GatedSAE, GatedSAEConfig),
    "jumprelu": _of(JumpReLUSAE, JumpReLUSAEConfig),
    "topk": _of(TopKSAE, TopKSAEConfig, k=TOPK_K),
    "topk, rescaling": _of(TopKSAE, TopKSAEConfig, k=TOPK_K, rescale_acts_by_decoder_norm=True),
    "abstopk": _of(AbsTopKSAE, AbsTopKSAEConfig, k=TOPK_K),
    "abstopk, rescaling": _of(AbsTopKSAE, AbsTopKSAEConfig, k=TOPK_K, rescale_acts_by_decoder_norm=True),
}
TRANSCODERS = {
    "transcoder": _of(Transcoder, TranscoderConfig, **_TRANSCODES),
    "skip_transcoder": _of(SkipTranscoder, SkipTranscoderConfig, **_TRANSCODES),
    "jumprelu_transcoder": _of(JumpReLUTranscoder, JumpReLUTranscoderConfig, **_TRANSCODES),
    "jumprelu_skip_transcoder": _of(JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig, **_TRANSCODES),
}
ALL = SAES | TRANSCODERS


@torch.no_grad()
def with_few_active(sae: Any) -> Any:
    """The same, with an eighth of its latents active at random inputs; of no effect where k says how many."""
    for name in ("b_enc", "b_gate"):
        bias = getattr(sae, name, None)
        if bias is not None:
            bias.sub_(1.15 * sae.W_enc.norm(dim=0))
    return sae
