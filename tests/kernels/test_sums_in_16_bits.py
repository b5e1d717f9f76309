"""Gradients that are sums of ones, over tokens or codes: added in 16 bits they would stop at 256, or at 2,048.

Latent 0 is active on every token. Its value, and the gradient of its pre-activation, are 1.
"""

import pytest
import torch
from sae_lens_switch_kernels import (
    RowGrads,
    batch_topk_encode,
    products,
    sparse_autoencode,
    switch_encode,
    topk_encode,
)
from sae_lens_switch_kernels.chosen import Codes, decode_chosen
from torch import Tensor

B, D, F = 4096, 2, 3
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# Every route to a gradient of the encoder's bias, or where it has none of the pre-bias.
ENCODERS = {
    "topk_encode": lambda x, W, b, c: topk_encode(x, W, 1, pre_bias_D=b, bias_F=c),
    "batch_topk_encode": lambda x, W, b, c: batch_topk_encode(x, W, B, pre_bias_D=b, bias_F=c),
    "switch_encode": lambda x, W, b, _: switch_encode(x, torch.zeros(B, dtype=torch.long), W, 1, 1, pre_bias_D=b),
}
JOINT = {
    "every token has k": {},
    "over the batch": {"k": B, "over_batch": True},
    "in levels": {"ends_L": torch.tensor([1, F])},
    "dead latents": {"dead_N": torch.tensor([0, 1]), "aux_k": 1},
    "dead latents as a mask": {"dead_N": torch.tensor([True, False, False]), "aux_k": 1},
    "dead latents in groups": {"dead_N": torch.tensor([0, 1]), "aux_k": 1, "dead_counts": [1, 1]},
    "experts": {"expert_B": torch.zeros(B, dtype=torch.long)},
    "several experts": {"expert_B": torch.arange(2).expand(B, 2), "n_experts": 3},
    "shared latents": {"expert_B": torch.zeros(B, dtype=torch.long), "n_experts": 2, "n_shared": 1},
}


def leaves(dtype: torch.dtype) -> list[Tensor]:
    """x, W_enc, pre-bias and bias."""
    x, W = torch.zeros(B, D, dtype=dtype), torch.zeros(F, D, dtype=dtype)
    x[:, 0], W[0, 0], W[1:, 0] = 1, 1, -1
    return [x, *(t.requires_grad_() for t in (W, torch.zeros(D, dtype=dtype), torch.zeros(F, dtype=dtype)))]


def decoder(dtype: torch.dtype) -> Tensor:
    return torch.tensor([[1, 0], [0, 1], [0, 1]], dtype=dtype).requires_grad_()


def assert_sums(bias: Tensor, d_bias: Tensor | None, d_pre_bias: Tensor) -> None:
    if d_bias is not None:
        assert d_bias.tolist() == [B, 0, 0]
        assert d_bias.dtype == bias.dtype
    assert d_pre_bias.tolist() == [-B, 0]


@dtypes
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, dtype):
    x, W, pre_bias, bias = leaves(dtype)
    ENCODERS[name](x, W, pre_bias, bias)[0].sum().backward()
    assert_sums(bias, bias.grad, pre_bias.grad)


@dtypes
@pytest.mark.parametrize("dense_up_to", [0, 10**9], ids=["sparse", "dense within experts"])
@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("row_grads", [False, True])
def test_encoder_and_decoder(name, dense_up_to, row_grads, dtype, monkeypatch):
    monkeypatch.setitem(products._DENSE_UP_TO, "cpu", dense_up_to)
    x, W, pre_bias, bias = leaves(dtype)
    rows = RowGrads() if row_grads else None
    options = {"k": 1, "pre_bias_D": pre_bias, "bias_F": bias, **JOINT[name], "row_grads": rows}
    found = sparse_autoencode(x, W, decoder(dtype), **options)
    out = found.out_BD if found.aux_out_BD is None else found.aux_out_BD
    out[..., 0].sum().backward()
    d_bias = bias.grad
    if rows is not None:
        assert rows.rows_R is not None
        d_bias = torch.zeros(F, dtype=dtype).index_copy(0, rows.rows_R, rows.d_bias_R)
    assert_sums(bias, d_bias, pre_bias.grad)


@dtypes
def test_a_decoder_of_chosen_latents(dtype):
    x, W, pre_bias, bias = leaves(dtype)
    codes = Codes(torch.ones(B, dtype=dtype), torch.zeros(B, dtype=torch.long), torch.arange(B + 1))
    out, _ = decode_chosen(x, W, decoder(dtype), codes, pre_bias_D=pre_bias, bias_F=bias)
    out[:, 0].sum().backward()
    assert_sums(bias, bias.grad, pre_bias.grad)


@dtypes
@pytest.mark.parametrize("over_batch", [True, False])
@pytest.mark.parametrize("in_levels", [True, False])
def test_the_gate_of_a_token_with_many_codes(over_batch, in_levels, dtype):
    n = 2 * B  # all latents of the only expert are active on the only token, half of them in each level
    x, W = torch.ones(1, 1, dtype=dtype), torch.ones(n, 1, dtype=dtype)
    gates = torch.ones(1, 1, dtype=dtype).requires_grad_()
    options = {"expert_B": torch.zeros(1, 1, dtype=torch.long), "gates_B": gates, "over_batch": over_batch}
    ends_L = torch.tensor([B, n]) if in_levels else None
    out = sparse_autoencode(x, W, W, n, **options, ends_L=ends_L).out_BD
    out.flatten()[0].backward()
    assert gates.grad.item() == (B if in_levels else n)
