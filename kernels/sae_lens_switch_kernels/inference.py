"""The public encoder that only inference needs: it checks its arguments, and takes no gradient."""

import torch
from torch import Tensor

from sae_lens_switch_kernels import torch_inference
from sae_lens_switch_kernels.arguments import check_vector, checked
from sae_lens_switch_kernels.inputs import EncoderInputs


@torch.no_grad()
def threshold_encode(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    threshold_F: Tensor,
    *,
    bias_F: Tensor | None = None,
    expert_B: Tensor | None = None,
    n_experts: int = 1,
    n_shared: int = 0,
    gates_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every pre-activation ``x W_enc^T + bias`` that exceeds its latent's threshold (arXiv 2407.14435).

    With experts, of those that ``switch_encode`` chooses from, each compared once it is scaled by the gate of its
    expert.

    Never makes a [B, F] tensor; what is active takes 12 bytes a latent in float32, twice that for a moment. A GPU is
    waited for once per tile. No gradient. Under autocast as ``topk_encode``.

    Args:
        x_BD: Tokens.
        W_enc_FD: Encoder weights, in either memory order.
        threshold_F: What a latent's pre-activation must exceed. A pre-activation that is NaN exceeds everything.
        bias_F: Added to the pre-activations; without experts.
        expert_B: The expert of each token, or its experts, as in ``switch_encode``; None: one owns all latents.
        n_experts: Number of experts.
        n_shared: Latents of no expert, as in ``switch_encode``.
        gates_B: Gates, of the shape of ``expert_B``.

    Returns:
        values [S], without the gate; indices [S], int64, ascending within a token; and offsets [B + 1], as in
        ``sparse_decode``.

    Raises:
        ValueError: If shapes, dtypes or devices do not match.
    """
    inputs = EncoderInputs(
        x_BD.contiguous(), W_enc_FD, None, bias_F, None, expert_B, gates_B, 0, n_experts, W_enc_FD.dtype
    )
    inputs = checked(inputs._replace(n_shared=n_shared, over_batch=True), "full")
    check_vector("threshold_F", threshold_F, len(W_enc_FD), W_enc_FD)
    with torch.autocast(x_BD.device.type, enabled=False):
        if expert_B is None:
            return torch_inference.threshold_encode(inputs.x_BD, W_enc_FD, threshold_F, bias_F, inputs.dtype)
        return torch_inference.routed_threshold_encode(inputs, threshold_F)
