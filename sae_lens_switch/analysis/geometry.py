"""The geometry of a Switch SAE's router, compared with the weights of its experts."""

from dataclasses import dataclass

import torch
from sae_lens import SAE
from torch import Tensor

from sae_lens_switch.saes.switch_sae import SwitchBase


@dataclass(frozen=True)
class RouterGeometry:
    """Cosines between router directions, and between these and the mean encoder and decoder directions per expert.

    Attributes:
        router_EE: Cosine of ``W_router[:, i]`` and ``W_router[:, j]``.
        encoder_EE: Cosine of ``W_router[:, i]`` and the mean of expert j's columns of ``W_enc``.
        decoder_EE: Cosine of ``W_router[:, i]`` and the mean of expert j's rows of ``W_dec``.
        norms_E: Norm of ``W_router[:, i]``.
    """

    router_EE: Tensor
    encoder_EE: Tensor
    decoder_EE: Tensor
    norms_E: Tensor


@torch.no_grad()
def router_geometry(sae: SAE, *, centered: bool = False) -> RouterGeometry:
    """Compare the router directions of a Switch SAE with each other and with the experts, in float64.

    Args:
        sae: A Switch SAE, for training or inference.
        centered: Subtract from every direction its mean over the experts first. A softmax is invariant to what all
            its logits share, so that component of the router decides nothing.

    Raises:
        ValueError: If the SAE has no router.
    """
    if not isinstance(sae, SwitchBase):
        raise ValueError(f"sae must have a router; a {sae.cfg.architecture()} SAE has none")
    by_expert = sae.cfg.layout.by_expert
    router_ED = sae.W_router.cpu().double().T
    encoder_ED = torch.stack([block.cpu().double().mean(0) for block in by_expert(sae.W_enc.T)])
    decoder_ED = torch.stack([block.cpu().double().mean(0) for block in by_expert(sae.W_dec)])
    norms_E = router_ED.norm(dim=1)
    if centered:
        router_ED, encoder_ED, decoder_ED = (t - t.mean(0) for t in (router_ED, encoder_ED, decoder_ED))
    router, encoder, decoder = (torch.nn.functional.normalize(t, dim=1) for t in (router_ED, encoder_ED, decoder_ED))
    return RouterGeometry(router @ router.T, router @ encoder.T, router @ decoder.T, norms_E)
