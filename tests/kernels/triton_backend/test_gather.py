"""Both gathers on Triton against reference.py in float64."""

import pytest
import torch
from helpers.triton_checks import check_decode, check_matmul_at_indices, dtypes, random, random_indices, shapes


@shapes
@dtypes
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_gathers(B, D, F, K, dtype, index_dtype):
    indices = random_indices(B, F, K).to(index_dtype)
    W = random(F, D, dtype=dtype)
    check_decode(random(B, K, dtype=dtype, seed=1), indices, W)
    check_matmul_at_indices(random(B, D, dtype=dtype, seed=2), W, indices)
