"""What is upgraded: the weights of a TopK SAE as its Switch SAE will need them, and a sample of its activations."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.topk_sae import TopKSAE, TopKTrainingSAE
from sae_lens_switch_kernels import topk_encode
from torch import Tensor

from sae_lens_switch.common import rules
from sae_lens_switch.saes.router import router_dtype
from sae_lens_switch.saes.step import activation_rows
from sae_lens_switch.training.activations import ActivationSource, activation_batches, cached_rows

ROWS_AT_ONCE = 4096
ACCEPTED = ("topk", "sparse_topk", "batchtopk", "sparse_batchtopk", "jumprelu")
_NOT_FOLDED = ("expected_average_only_in", "covariance_whitening")
_TOKENS_COUNTED = 8192


@dataclass(frozen=True)
class TopK:
    """``z = TopK_k(relu((x - pre_bias) @ W_enc.T + b_enc))``, ``x_hat = z @ W_dec + b_dec``, float32 at least.

    Attributes:
        unit_rows: Whether W_dec has rows of unit norm. They were given them, with the norms moved to the encoder,
            wherever this leaves the selection as it is.
    """

    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    b_dec_D: Tensor
    pre_bias_D: Tensor | None
    k: int
    unit_rows: bool

    def encode(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Values and indices, [N, k], in the order of the tokens."""
        parts = [
            topk_encode(x_BD, self.W_enc_FD, self.k, pre_bias_D=self.pre_bias_D, bias_F=self.b_enc_F)
            for x_BD in x_ND.split(ROWS_AT_ONCE)
        ]
        return torch.cat([values for values, _ in parts]), torch.cat([indices for _, indices in parts])

    def permuted(self, latents_F: Tensor) -> "TopK":
        return replace(
            self,
            W_enc_FD=self.W_enc_FD[latents_F],
            b_enc_F=self.b_enc_F[latents_F],
            W_dec_FD=self.W_dec_FD[latents_F],
        )


def check_architecture(sae: SAE) -> None:
    """Raise ValueError for what ``split_topk`` does not accept."""
    architecture = sae.cfg.architecture()
    if architecture not in ACCEPTED or not isinstance(sae, TopKSAE | TopKTrainingSAE | JumpReLUSAE):
        raise ValueError(f"sae must be one of {', '.join(ACCEPTED)}; got {architecture!r} ({type(sae).__name__})")
    check_folded(sae)
    bad = [name for name, p in sae.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise ValueError(f"sae must have finite weights; {', '.join(bad)} {'have' if len(bad) > 1 else 'has'} not")
    if isinstance(sae, JumpReLUSAE):
        threshold_F = sae.threshold.detach()
        if not torch.allclose(threshold_F, threshold_F[0].expand_as(threshold_F), rtol=1e-3) or threshold_F[0] < 0:
            low, high = threshold_F.aminmax()
            raise ValueError(
                "threshold of a jumprelu SAE must be one non-negative number for all latents, as saved from batchtopk; "
                f"got {low:.4g} to {high:.4g}"
            )


def check_folded(sae: SAE) -> None:
    """Raise ValueError where the weights are for activations scaled by a factor that only training knew."""
    if sae.cfg.normalize_activations in _NOT_FOLDED:
        raise ValueError(
            f"normalize_activations must be folded into the weights first (fold_activation_norm_scaling_factor, "
            f"fold_activation_whitening; a finished run has done so); got {sae.cfg.normalize_activations!r}"
        )


def topk_of(sae: SAE, k: int | None, x_ND: Tensor) -> TopK:
    """The weights of an accepted SAE, detached copies. ``k`` None: its own. Raises ValueError for an impossible k."""
    assert isinstance(sae, TopKSAE | TopKTrainingSAE | JumpReLUSAE)
    dtype = router_dtype(sae.dtype)
    W_enc_FD, W_dec_FD = sae.W_enc.detach().T.to(dtype, copy=True), sae.W_dec.detach().to(dtype, copy=True)
    b_enc_F, b_dec_D = (t.detach().to(dtype, copy=True) for t in (sae.b_enc, sae.b_dec))
    pre_bias_D = b_dec_D if sae.cfg.apply_b_dec_to_input else None
    if k is None:
        k = _own_k(sae, W_enc_FD, b_enc_F, pre_bias_D, x_ND[:_TOKENS_COUNTED])
    if not 1 <= k <= sae.cfg.d_sae:
        raise ValueError(f"k must be between 1 and d_sae={sae.cfg.d_sae}; got {k}")
    norm_F = W_dec_FD.norm(dim=1)
    rescales = not isinstance(sae, JumpReLUSAE) and sae.cfg.rescale_acts_by_decoder_norm
    tolerance = 4 * torch.finfo(sae.dtype).eps + 1e-6
    unit_rows = bool(norm_F.min() > 0) and (rescales or bool(norm_F.max() <= (1 + tolerance) * norm_F.min()))
    if unit_rows:
        W_enc_FD, b_enc_F = W_enc_FD * norm_F.unsqueeze(1), b_enc_F * norm_F
        W_dec_FD = W_dec_FD / norm_F.unsqueeze(1)
    elif rescales:
        raise ValueError("W_dec must have no row of zeros where rescale_acts_by_decoder_norm is True")
    return TopK(W_enc_FD, b_enc_F, W_dec_FD, b_dec_D, pre_bias_D, k, unit_rows)


def _own_k(
    sae: TopKSAE | TopKTrainingSAE | JumpReLUSAE,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    pre_bias_D: Tensor | None,
    x_ND: Tensor,
) -> int:
    """TopK's k; BatchTopK's mean, rounded; of a jumprelu SAE, the mean number of latents over the threshold."""
    if isinstance(sae, BatchTopKTrainingSAE):
        return max(1, round(sae.cfg.k))
    if not isinstance(sae, JumpReLUSAE):
        return sae.cfg.k
    n_active = 0
    for x_BD in x_ND.split(512):
        centered_BD = x_BD if pre_bias_D is None else x_BD - pre_bias_D
        n_active += int((centered_BD @ W_enc_FD.T + b_enc_F > sae.threshold.to(x_BD.dtype)).sum())
    return max(1, round(n_active / len(x_ND)))


@torch.no_grad()
def sampled_inputs(sae: SAE, activations: ActivationSource, n_tokens: int, seed: int) -> Tensor:
    """Up to n_tokens activations [N, D] as the SAE's encoder sees them, in float32 at least, on the SAE's device.

    None is taken twice from a tensor or a folder.

    Raises:
        ValueError: For activations of another width, that are not finite, or that are none.
    """
    n_tokens = int(rules.check_value("n_tokens", n_tokens, rules.Whole(at_least=1)))
    parts, n = [], 0
    for batch in _batches(sae, activations, n_tokens, seed):
        x_BD = activation_rows(batch.detach(), sae.cfg.d_in)[: n_tokens - n].to(sae.device, router_dtype(sae.dtype))
        if not torch.isfinite(x_BD).all():
            raise ValueError("activations must be finite; these hold NaN or infinite values")
        parts.append(sae.run_time_activation_norm_fn_in(x_BD))
        n += len(x_BD)
        if n >= n_tokens:
            break
    if not parts:
        raise ValueError("activations must hold at least one token; got none")
    return torch.cat(parts)


def _batches(sae: SAE, activations: ActivationSource, n_tokens: int, seed: int) -> Iterator[Tensor]:
    if isinstance(activations, str | Path):  # once: what does not fill a last batch is left out
        hook_name = sae.cfg.metadata.hook_name
        n = cached_rows(activations, hook_name)
        rows = max(1, min(ROWS_AT_ONCE, n_tokens, n))
        return islice(activation_batches(activations, rows, hook_name=hook_name, seed=seed), n // rows)
    if not isinstance(activations, Tensor):
        return activation_batches(activations, ROWS_AT_ONCE)
    x_ND = activation_rows(activations.detach(), sae.cfg.d_in)
    if len(x_ND) <= n_tokens:
        return iter(x_ND.split(ROWS_AT_ONCE))
    rows = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(seed))[:n_tokens].sort().values
    return (x_ND[part.to(x_ND.device)] for part in rows.split(ROWS_AT_ONCE))
