"""What weights go through on their way to and from files."""

from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor


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


def latent_major(W_DF: Tensor) -> Tensor:
    """The same [D, F] matrix as the transpose of contiguous [F, D] storage."""
    return W_DF.T.contiguous().T


def bfloat16_parts(t: Tensor) -> Tensor:
    """[3, ...] float32, each part a bfloat16 number: their sum is t to the last bit of float32."""
    parts, rest = [], t.float()
    for _ in range(3):
        parts.append(rest.bfloat16().float())
        rest = rest - parts[-1]
    return torch.stack(parts)
