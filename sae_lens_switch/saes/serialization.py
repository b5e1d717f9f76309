"""What weights go through on their way to and from files."""

from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from sae_lens_switch.common.types import StateDict

# In a weights file: present only if the SAE is as it was initialised.
FRESH = "fresh"


def fold_saved_scaler(sae: Any, checkpoint: Path) -> None:
    """Fold into a checkpoint's weights what training did to the activations, as ``fit`` does at its end."""
    if (checkpoint / ACTIVATION_SCALER_CFG_FILENAME).is_file():
        scaler = ActivationScaler()
        scaler.load(checkpoint / ACTIVATION_SCALER_CFG_FILENAME)
        fold_activation_scaler(sae, scaler)


def fold_activation_scaler(sae: Any, scaler: ActivationScaler) -> None:
    """Fold into the weights what the scaler does to activations; from then on it does nothing."""
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        scaler.scaling_factor = None
    if scaler.whitening is not None:
        w, scaler.whitening = scaler.whitening, None
        sae.fold_activation_whitening(w.mean, w.matrix, w.inverse_matrix)


def thresholds_after_training(state_dict: StateDict) -> StateDict:
    """The thresholds of a Switch SAE under the name and in the dtype that they have in inference; changes the dict."""
    if "topk_threshold" in state_dict:
        state_dict["threshold"] = state_dict.pop("topk_threshold").to(state_dict["W_dec"].dtype)
    return state_dict


def latent_major(W_DF: Tensor) -> Tensor:
    """The same [D, F] matrix as the transpose of contiguous [F, D] storage."""
    return W_DF.T.contiguous().T


def digits(t: Tensor) -> Tensor:
    """[4, ...] float32: three digits to the base 256 and an exponent for each float32 number of t.

    All are whole numbers of at most 8 bits, so that a cast to bfloat16 or float16 and back leaves them as they are,
    however small the numbers themselves.
    """
    mantissa, exponent = torch.frexp(t.float())
    rest, parts = mantissa.double(), []
    for _ in range(3):
        rest = rest * 256
        parts.append(rest.trunc())
        rest = rest - parts[-1]
    return torch.stack([*parts, exponent]).float()


def from_digits(parts: Tensor) -> Tensor:
    """float32 [...], the numbers whose ``digits`` these are, bit-identical."""
    high, middle, low, exponent = parts.double()
    return torch.ldexp(((low / 256 + middle) / 256 + high) / 256, exponent).float()


def take_exact(state_dict: StateDict, key: str) -> Tensor | None:
    """The float32 numbers of a router's parameter, of whatever dtype its file was loaded in; taken from the dict."""
    parts = state_dict.pop(f"{key}_digits", None)
    if parts is not None:
        return from_digits(parts)
    sum_of = state_dict.pop(f"{key}_parts", None)  # as version 0.1 wrote them
    return None if sum_of is None else sum_of.float().sum(0)
