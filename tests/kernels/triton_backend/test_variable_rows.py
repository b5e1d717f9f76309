"""The Triton kernels on codes whose number varies by row, against dense float64."""

import pytest
import torch
from helpers.triton_checks import DEVICE, assert_as_good_as_torch, dtypes, random
from sae_lens_switch_kernels.indexing import code_rows, latent_index, level_offsets
from sae_lens_switch_kernels.triton_backend.gather import matmul_at_indices, sparse_decode
from sae_lens_switch_kernels.triton_backend.latent_weight_grads import latent_weight_grads
from torch import Tensor

# B, D, F, codes: none, one, fewer than rows, rows with none and with many more than the mean, latents with pieces
SHAPES = [(3, 16, 5, 0), (2, 5, 7, 1), (9, 48, 4, 2), (20, 17, 12, 60), (70, 24, 3, 200)]
shapes = pytest.mark.parametrize(("B", "D", "F", "k"), SHAPES, ids=str)


def codes(B: int, F: int, k: int) -> tuple[Tensor, Tensor]:
    """Indices [k] and offsets; half of the codes are the first row's, as far as it has room."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randperm(F, generator=generator)[: min(F, k // 2)]
    rest = torch.randperm((B - 1) * F, generator=generator)[: k - len(first)] + F
    places = torch.cat([first, rest]).sort().values
    assert len(places) == k
    return (places % F).to(DEVICE), torch.searchsorted(places, torch.arange(B + 1) * F).to(DEVICE)


def dense(values: Tensor, indices: Tensor, offsets: Tensor, F: int) -> Tensor:
    rows = code_rows(offsets, len(indices)).row_S
    return values.new_zeros(len(offsets) - 1, F).index_put((rows, indices.long()), values)


@shapes
@dtypes
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_gathers(B, D, F, k, dtype, index_dtype):
    indices, offsets = codes(B, F, k)
    values, W, g = random(k, dtype=dtype, seed=1), random(F, D, dtype=dtype), random(B, D, dtype=dtype, seed=2)
    given = indices.to(index_dtype), offsets.to(index_dtype)
    out = sparse_decode(values, given[0], W, given[1])
    exact, plain = (dense(v, indices, offsets, F) @ w for v, w in ((values.double(), W.double()), (values, W)))
    assert_as_good_as_torch("sparse_decode", out, exact, plain)
    rows = code_rows(offsets, k).row_S
    dots = matmul_at_indices(g, W, *given)
    exact, plain = ((a @ w.T)[rows, indices] for a, w in ((g.double(), W.double()), (g, W)))
    assert_as_good_as_torch("matmul_at_indices", dots, exact, plain)


@shapes
@dtypes
@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("wider", [0, 9])
def test_weight_gradients_whose_rows_are_levels_of_tokens(B, D, F, k, dtype, levels, wider):
    indices, offsets = codes(B, F, k)
    if levels > 1:
        offsets = level_offsets(offsets, indices, torch.tensor([1, F // 2 + 1, F], device=DEVICE), F)
    rows = code_rows(offsets, k, levels)
    values, d_pre = random(k, dtype=dtype, seed=1), random(k, dtype=dtype, seed=2)
    g, x = random(B * levels, D + wider, dtype=dtype, seed=3), random(B, D, dtype=dtype, seed=4)
    ones = torch.ones(B, 1, dtype=dtype, device=DEVICE)
    grads = latent_weight_grads(latent_index(indices, F), values, g, d_pre, x, rows)
    assert grads.dW_enc_FD is not None
    assert grads.d_b_enc_F is not None

    def exact(weights: Tensor, offsets: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        return dense(weights.to(dtype), indices, offsets, F).T @ y.to(dtype)

    for name, actual, *sums in (
        ("dW_dec", grads.dW_dec_FD, values, offsets, g),
        ("dW_enc", grads.dW_enc_FD, d_pre, rows.offsets_B1, x),
        ("d_b_enc", grads.d_b_enc_F[:, None], d_pre, rows.offsets_B1, ones),
    ):
        plain = exact(*sums, torch.float32).to(dtype)
        assert_as_good_as_torch(name, actual, exact(*sums, torch.float64), plain)
