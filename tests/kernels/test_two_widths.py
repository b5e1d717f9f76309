"""Encoder and decoder of different widths, as a transcoder has them, against the dense reference in float64."""

import pytest
import torch
from helpers.kernel_cases import OPTIONS, assert_close, autoencoder_inputs, shapes
from sae_lens_switch_kernels import RowGrads, products, reference, sparse_autoencode
from torch import Tensor

D_OUT = 29  # narrower than some of the shapes' D, wider than others


def inputs_of_two_widths(B, D, E, M, K, names) -> tuple[dict[str, Tensor], dict[str, Tensor | int]]:
    leaves, constants = autoencoder_inputs(B, D, E, M, K, names)
    generator = torch.Generator().manual_seed(4)
    return leaves | {"W_dec_FD": torch.randn(E * M, D_OUT, generator=generator, dtype=torch.float64)}, constants


def run(function, leaves, constants, upstream) -> dict[str, Tensor]:
    inputs = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    out, values, indices, aux_out, *_ = function(**inputs, **constants)
    results = [out, reference.dense_codes(values, indices, len(leaves["W_enc_FD"]))]
    results += [] if aux_out is None else [aux_out]
    total = sum((r * u).sum() for r, u in zip(results, upstream, strict=False))
    grads = torch.autograd.grad(total, list(inputs.values()))
    named = dict(zip(["out", "codes", "aux"], results, strict=False))
    return named | {f"d_{name}": g for name, g in zip(inputs, grads, strict=True)}


@shapes
@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dense_up_to", [0, 10**9], ids=["sparse", "dense within experts"])
def test_autoencode_and_all_its_gradients(B, D, E, M, K, names, dense_up_to, monkeypatch):
    monkeypatch.setitem(products._DENSE_UP_TO, "cpu", dense_up_to)
    leaves, constants = inputs_of_two_widths(B, D, E, M, K, names)
    upstream = [torch.randn(B, n, dtype=torch.float64) for n in (D_OUT, E * M, D_OUT)]
    actual = run(sparse_autoencode, leaves, constants, upstream)
    expected = run(reference.sparse_autoencode, leaves, constants, upstream)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(name, actual[name], expected[name])


@pytest.mark.parametrize("names", ["dead latents", "dead latents by expert"])
def test_row_grads_have_the_width_of_their_matrix(names):
    leaves, constants = inputs_of_two_widths(33, 48, 4, 16, 5, OPTIONS[names])
    upstream = [torch.full((33, n), weight).double() for n, weight in ((D_OUT, 1.0), (64, 1.0), (D_OUT, 0.0))]
    expected = run(reference.sparse_autoencode, leaves, constants, upstream)
    rows, inputs = RowGrads(), {name: t.clone().requires_grad_() for name, t in leaves.items()}
    result = sparse_autoencode(**inputs, **constants, row_grads=rows)
    (result.out_BD.sum() + result.values_BK.sum()).backward()
    assert rows.rows_R is not None
    for name, row_grad in (("W_enc_FD", rows.dW_enc_RD), ("W_dec_FD", rows.dW_dec_RD)):
        whole = torch.zeros_like(leaves[name]).index_copy(0, rows.rows_R, row_grad)
        assert_close(name, whole, expected[f"d_{name}"])


def test_codes_over_the_batch_and_in_levels():
    """BatchTopK, and Matryoshka's levels, each of which decodes apart."""
    generator = torch.Generator().manual_seed(5)
    B, D, D_out, F, k = 20, 7, 11, 30, 50
    x, W_enc, W_dec = (torch.randn(*n, generator=generator).double() for n in ((B, D), (F, D), (F, D_out)))
    given = [t.requires_grad_() for t in (x, W_enc, W_dec)]
    ends = torch.tensor([10, F])
    out_BLD = sparse_autoencode(*given, k, over_batch=True, ends_L=ends).out_BD
    pre = (x @ W_enc.T).relu()
    dense = pre * (pre >= pre.flatten().topk(k).values[-1])
    truth_BLD = torch.stack([dense[:, :10] @ W_dec[:10], dense[:, 10:] @ W_dec[10:]], dim=1)
    assert_close("out", out_BLD, truth_BLD)
    weights = torch.randn(B, 2, D_out, generator=generator).double()
    ours, theirs = (torch.autograd.grad((out * weights).sum(), given) for out in (out_BLD, truth_BLD))
    for a, b in zip(ours, theirs, strict=True):
        assert_close("gradient", a, b)


def test_compiled_shapes_are_those_of_the_decoder():
    leaves, constants = inputs_of_two_widths(7, 12, 4, 16, 5, OPTIONS["dead latents by expert"])
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(t) if isinstance(t, Tensor) else t for name, t in (leaves | constants).items()}
        result = sparse_autoencode(**fake)
    assert result.out_BD.shape == (7, D_OUT)
    assert result.aux_out_BD is not None
    assert result.aux_out_BD.shape == (7, D_OUT)
