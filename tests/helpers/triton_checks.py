"""Checks of every Triton primitive against reference.py in float64: on a GPU, else in Triton's interpreter.

Judged by error ratio: the error may not exceed a few times that of plain torch in the same dtype.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import settings
from sae_lens_switch_kernels import reference
from sae_lens_switch_kernels.indexing import latent_index
from torch import Tensor

pytest.importorskip("triton")

from sae_lens_switch_kernels.triton_backend.gather import matmul_at_indices, sparse_decode  # noqa: E402
from sae_lens_switch_kernels.triton_backend.grouped_matmul import grouped_decode, grouped_encode, grouped_weight_grad  # noqa: E402
from sae_lens_switch_kernels.triton_backend.latent_weight_grads import latent_weight_grads  # noqa: E402
from sae_lens_switch_kernels.triton_backend.select_topk import select_topk  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# B, D, F, K: widths that are no power of two and no multiple of 16, one token, K of a single slot and of many
SHAPES = [(7, 48, 20, 5), (3, 576, 12, 32), (2, 1000, 10, 5), (5, 1, 9, 1), (4, 17, 12, 3), (1, 48, 9, 32)]

shapes = pytest.mark.parametrize(("B", "D", "F", "K"), SHAPES, ids=str)

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def assert_as_good_as_torch(name: str, actual: Tensor, exact: Tensor, plain: Tensor, roundings: int = 4) -> None:
    """Error against float64 at most three times that of plain torch, plus a few roundings."""
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} is not {tuple(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype} is not {plain.dtype}"
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    rounding = torch.finfo(actual.dtype).eps * rms(exact)
    error, allowed = rms(actual - exact), 3 * rms(plain - exact) + roundings * rounding
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def random_indices(B: int, F: int, K: int, seed: int = 0) -> Tensor:
    """Distinct in a row if the latents suffice."""
    generator = torch.Generator().manual_seed(seed)
    if K > F:
        return torch.randint(0, F, (B, K), generator=generator).to(DEVICE)
    return torch.rand(B, F, generator=generator).topk(K).indices.to(DEVICE)


def check_decode(values: Tensor, indices: Tensor, W: Tensor) -> None:
    exact = reference.sparse_decode(values.double(), indices, W.double())
    plain = torch.einsum("bk,bkd->bd", values, W[indices.long()])
    assert_as_good_as_torch("sparse_decode", sparse_decode(values, indices, W), exact, plain)


def check_matmul_at_indices(g: Tensor, W: Tensor, indices: Tensor) -> None:
    exact = reference.matmul_at_indices(g.double(), W.double(), indices)
    plain = torch.einsum("bd,bkd->bk", g, W[indices.long()])
    assert_as_good_as_torch("matmul_at_indices", matmul_at_indices(g, W, indices), exact, plain)


def check_latent_weight_grads(values: Tensor, indices: Tensor, F: int, g: Tensor, d_pre: Tensor, x: Tensor) -> None:
    def exact(weights: Tensor, rows: Tensor) -> Tensor:
        return reference.latent_weight_grad(weights.double(), indices, rows.double(), F)

    def plain(weights: Tensor, rows: Tensor) -> Tensor:
        terms = (weights.float()[:, :, None] * rows.float()[:, None, :]).flatten(0, 1)
        return torch.zeros(F, rows.shape[1], device=DEVICE).index_add_(0, indices.flatten(), terms).to(rows.dtype)

    index = latent_index(indices, F)
    grads = latent_weight_grads(index, values, g, d_pre, x)
    assert grads.dW_enc_FD is not None
    assert grads.d_b_enc_F is not None
    ones = torch.ones_like(g[:, :1])
    assert_as_good_as_torch("dW_dec", grads.dW_dec_FD, exact(values, g), plain(values, g))
    assert_as_good_as_torch("dW_enc", grads.dW_enc_FD, exact(d_pre, x), plain(d_pre, x))
    assert_as_good_as_torch("d_b_enc", grads.d_b_enc_F[:, None], exact(d_pre, ones), plain(d_pre, ones))

    decoder_only = latent_weight_grads(index, values, g)
    assert decoder_only.dW_enc_FD is None
    assert decoder_only.d_b_enc_F is None
    for ours, again in zip(decoder_only, grads, strict=True):
        assert ours is None or torch.equal(ours, again)


def check_select(pre: Tensor, k: int, bias: Tensor | None = None, scale: Tensor | None = None) -> None:
    values, indices = select_topk(pre, k, bias, scale)
    assert values.dtype == pre.dtype
    assert indices.dtype == torch.int64
    assert values.shape == indices.shape == (len(pre), k)
    assert all(len(set(row)) == k and set(row) <= set(range(pre.shape[1])) for row in indices.tolist())
    shifted = pre if bias is None else pre.float() + bias.float()
    keys = shifted if scale is None else shifted.float() * scale.float()
    # The same keys are chosen; which of equal ones is free.
    assert torch.equal(keys.gather(1, indices).sort(1).values, keys.topk(k).values.sort(1).values)
    torch.testing.assert_close(values, shifted.gather(1, indices).to(pre.dtype), rtol=1e-2, atol=1e-6)


def check_grouped(x: Tensor, a: Tensor, W: Tensor, offsets: Tensor) -> None:
    M, bounds = a.shape[1], offsets.tolist()
    experts = [(slice(s, e), slice(i * M, (i + 1) * M)) for i, (s, e) in enumerate(pairwise(bounds))]

    def compare(name, ours, inputs, truth):
        exact = truth(*(t.double() for t in inputs))
        assert_as_good_as_torch(name, ours(*inputs, offsets), exact, truth(*(t.float() for t in inputs)).to(W.dtype))

    compare("encode", grouped_encode, (x, W), lambda x, W: torch.cat([x[rows] @ W[own].T for rows, own in experts]))
    compare("decode", grouped_decode, (a, W), lambda a, W: torch.cat([a[rows] @ W[own] for rows, own in experts]))
    compare("grad", grouped_weight_grad, (a, x), lambda a, x: torch.cat([a[rows].T @ x[rows] for rows, _ in experts]))


small = settings(max_examples=20, deadline=None, derandomize=True)
