"""SAELens's SAEs in inference, whose latents are SparseCodes: no tensor of tokens x d_sae is made."""

from dataclasses import replace

import torch
from sae_lens.saes.abstopk_sae import AbsTopK, AbsTopKSAE
from sae_lens.saes.gated_sae import GatedSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.standard_sae import StandardSAE
from sae_lens.saes.topk_sae import TopK, TopKSAE
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder, SkipTranscoder, Transcoder
from sae_lens_switch_kernels import matmul_at_indices, threshold_encode, topk_encode
from torch import Tensor, nn

from sae_lens_switch.common.torch_private import has_hooks
from sae_lens_switch.common.types import AnySAE
from sae_lens_switch.saes.sparse_codes import SparseCodes
from sae_lens_switch.saes.sparse_sae import SparseSAE
from sae_lens_switch.saes.step import differentiable_codes
from sae_lens_switch.saes.transcoder import Transcoder as SparseTranscoder

# Exactly these: a subclass may encode in another way.
_CLASSES = (
    *(StandardSAE, JumpReLUSAE, GatedSAE, TopKSAE, AbsTopKSAE),
    *(Transcoder, SkipTranscoder, JumpReLUTranscoder, JumpReLUSkipTranscoder),
)


def encode_sparse(sae: AnySAE, x: Tensor) -> SparseCodes:
    """The latents that ``sae.encode(x)`` finds, without a tensor of tokens x d_sae, on a CPU or a GPU.

    For SAELens's inference SAEs ``standard``, ``jumprelu`` (as which BatchTopK SAEs are saved), ``gated``, ``topk``,
    ``abstopk`` and its four transcoders, and for all SAEs of this package. Selection, normalisation, reshaping, dtypes
    and the hook on the input are as in ``sae.encode``; among near ties another latent may be chosen, since products
    are rounded in another order. A ``gated`` SAE takes one matrix product instead of two.

    Memory beside the weights: a tile of 512 tokens (4,096 on a GPU) and at most 32,768 latents; and the codes, with
    int64 indices, twice for a moment. ``topk`` and ``abstopk`` have k codes per token, the others as many as are
    active, which in a ``standard`` SAE may be much of the dictionary.

    Differentiable as ``sae.encode`` if x requires a gradient; otherwise without a graph, whatever the weights require.

    Args:
        sae: The SAE.
        x: Activations [..., d_in], or [..., n_heads, d_head] where the SAE reshapes; of any dtype.

    Returns:
        The codes, laid out as the tokens of x, in the dtype of the SAE.

    Raises:
        ValueError: For an SAE of another class, or with another activation function than its class has; if x has
            another width; if hooks at hook_sae_acts_pre or hook_sae_acts_post wait for dense latents.
    """
    _check_class(sae)
    _check_hooks(sae)
    _check_width(sae, x)
    with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
        if isinstance(sae, SparseSAE):
            return sae.encode_sparse(x)
        inputs = sae.process_sae_in(x)
        return _encode_rows(sae, inputs.reshape(-1, inputs.shape[-1])).view(*inputs.shape[:-1])


def decode_sparse(sae: AnySAE, codes: SparseCodes, x: Tensor | None = None) -> Tensor:
    """What ``sae.decode`` makes of the same latents: 2 B k d_in flops instead of 2 B d_sae d_in.

    Differentiable as ``sae.decode``, also in the values of the codes, which may be edited.

    Args:
        sae: An SAE that ``encode_sparse`` takes.
        codes: Latents. With ``normalize_activations`` other than "none", those of the last ``encode_sparse``, whose
            statistics SAELens uses up here as in ``sae.decode``.
        x: The encoder's input, of which a transcoder with a skip connection adds its linear part, as its ``forward``
            does and its ``decode`` does not. Of no effect in other SAEs.

    Returns:
        The reconstruction, [..., d_in]; [..., d_out] of a transcoder.

    Raises:
        ValueError: For an SAE of another architecture, or codes of another width.
    """
    _check_class(sae)
    if codes.d_sae != sae.cfg.d_sae:
        raise ValueError(f"codes must be of d_sae={sae.cfg.d_sae} latents; got {codes.d_sae}")
    if isinstance(sae, SparseSAE):
        out = sae.decode(codes)
        return sae.with_skip(out, x) if isinstance(sae, SparseTranscoder) and x is not None else out
    codes = differentiable_codes(codes)
    values = codes.values.to(sae.W_dec.dtype)
    if isinstance(sae, TopKSAE) and sae.cfg.rescale_acts_by_decoder_norm:
        values = values / sae.W_dec.norm(dim=-1)[codes.indices]
    out = sae.hook_sae_recons(replace(codes, values=values).matmul(sae.W_dec) + sae.b_dec)
    if not isinstance(sae, Transcoder):
        return sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(out), sae.d_head)
    if isinstance(sae, SkipTranscoder) and x is not None:
        out = out + x.to(sae.W_skip.dtype) @ sae.W_skip.T
    return out


def _encode_rows(sae: AnySAE, x_BD: Tensor) -> SparseCodes:
    if isinstance(sae, TopKSAE):
        return _largest(sae, x_BD)
    if isinstance(sae, GatedSAE):
        return _gated(sae, x_BD)
    assert isinstance(sae, StandardSAE | JumpReLUSAE | Transcoder)
    if isinstance(sae, JumpReLUSAE | JumpReLUTranscoder):
        threshold_F = sae.threshold.clamp(min=0)  # what is negative, ReLU removes
    else:
        threshold_F = torch.zeros_like(sae.b_enc)
    codes = _above(sae, x_BD, threshold_F, sae.b_enc)
    return replace(codes, values=codes.values.relu())


def _gated(sae: GatedSAE, x_BD: Tensor) -> SparseCodes:
    """Both paths are of u = x W_enc, that of the magnitude times exp(r_mag): active is where both are positive."""
    scale_F = sae.r_mag.exp()
    codes = _above(sae, x_BD, torch.maximum(-sae.b_gate, -sae.b_mag / scale_F))
    values = (codes.values * scale_F[codes.indices] + sae.b_mag[codes.indices]).relu()
    return replace(codes, values=values)


def _above(sae: AnySAE, x_BD: Tensor, threshold_F: Tensor, bias_F: Tensor | None = None) -> SparseCodes:
    values, indices, offsets = threshold_encode(x_BD, sae.W_enc.T, threshold_F, bias_F=bias_F)
    if torch.is_grad_enabled():
        values = _pre_activations(sae, x_BD, indices, offsets, bias_F)
    return SparseCodes(values, indices, sae.cfg.d_sae, offsets, (len(x_BD),))


def _largest(sae: TopKSAE, x_BD: Tensor) -> SparseCodes:
    select, W_FD, bias_F = sae.activation_fn, sae.W_enc.T, sae.b_enc
    assert isinstance(select, TopK | AbsTopK)
    scale_F = sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None
    options = {"bias_F": bias_F, "scale_F": None if scale_F is None else scale_F.detach()}
    values, indices = topk_encode(x_BD, W_FD, select.k, **options, by_magnitude=isinstance(select, AbsTopK))
    return SparseCodes(values if scale_F is None else values * scale_F[indices], indices, sae.cfg.d_sae)


def _pre_activations(
    sae: AnySAE, x_BD: Tensor, indices: Tensor, offsets_B1: Tensor | None, bias_F: Tensor | None
) -> Tensor:
    """Of these latents, once more and with a gradient: 2 B k d_in flops."""
    products = matmul_at_indices(x_BD, sae.W_enc.T, indices, offsets_B1)
    return products if bias_F is None else products + bias_F[indices]


def _check_class(sae: AnySAE) -> None:
    if isinstance(sae, SparseSAE):
        return
    if type(sae) not in _CLASSES:
        names = ", ".join(c.__name__ for c in _CLASSES)
        saved = "; one in training: save_inference_model, and load that" if isinstance(sae, TrainingSAE) else ""
        raise ValueError(f"sae must be a SparseSAE or exactly one of {names}; got a {type(sae).__name__}{saved}")
    expected = (TopK, AbsTopK) if isinstance(sae, TopKSAE) else (nn.ReLU,)
    if not isinstance(sae.activation_fn, expected):
        names = " or ".join(c.__name__ for c in expected)
        raise ValueError(f"sae.activation_fn of a {type(sae).__name__} must be {names}; got {sae.activation_fn!r}")


def _check_hooks(sae: AnySAE) -> None:
    hooked = [name for name in ("hook_sae_acts_pre", "hook_sae_acts_post") if has_hooks(sae.get_submodule(name))]
    if hooked:
        raise ValueError(
            "sae must have no hooks on dense latents, since there are none: call sae.reset_hooks(), or sae.encode; "
            f"got hooks at {', '.join(hooked)}"
        )


def _check_width(sae: AnySAE, x: Tensor) -> None:
    reshapes = sae.hook_z_reshaping_mode and not isinstance(sae, Transcoder)
    width = x.shape[-2:].numel() if reshapes else x.shape[-1] if x.ndim else 0
    if width != sae.cfg.d_in or (reshapes and x.ndim < 2):
        expected = "[..., n_heads, d_head] with n_heads * d_head" if reshapes else "[..., d_in] with d_in"
        raise ValueError(f"x must be {expected} = {sae.cfg.d_in}; got shape {tuple(x.shape)}")
