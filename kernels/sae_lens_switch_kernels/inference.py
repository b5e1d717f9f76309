"""The public encoder that only inference needs: it checks its arguments, and takes no gradient."""

import torch
from torch import Tensor

from sae_lens_switch_kernels import torch_inference
from sae_lens_switch_kernels.arguments import check_vector, checked
from sae_lens_switch_kernels.inputs import EncoderInputs


@torch.no_grad()
def threshold_encode(
    x_BD: Tensor, W_enc_FD: Tensor, threshold_F: Tensor, *, bias_F: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Every pre-activation ``x W_enc^T + bias`` that exceeds its latent's threshold (arXiv 2407.14435).

    Never makes a [B, F] tensor; what is active takes 12 bytes a latent in float32, twice that for a moment. Plain torch
    on every device: a GPU is waited for several times per tile. No gradient. Under autocast as ``topk_encode``.

    Args:
        x_BD: Tokens.
        W_enc_FD: Encoder weights, in either memory order.
        threshold_F: What a latent's pre-activation must exceed. A pre-activation that is NaN exceeds everything.
        bias_F: Added to the pre-activations.

    Returns:
        values [S]; indices [S], int64, ascending within a token; and offsets [B + 1], as in ``sparse_decode``.

    Raises:
        ValueError: If shapes, dtypes or devices do not match.
    """
    inputs = EncoderInputs(x_BD, W_enc_FD, None, bias_F, None, None, None, 0, 1, W_enc_FD.dtype)
    dtype = checked(inputs._replace(over_batch=True), "full").dtype
    check_vector("threshold_F", threshold_F, len(W_enc_FD), W_enc_FD)
    with torch.autocast(x_BD.device.type, enabled=False):
        return torch_inference.threshold_encode(x_BD.contiguous(), W_enc_FD, threshold_F, bias_F, dtype)
