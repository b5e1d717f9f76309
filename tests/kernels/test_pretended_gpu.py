"""A training step on torch's meta device in place of a GPU: its tensors have no values, so whatever would synchronise
to read one back raises, and every copy from the host is seen."""

import pytest
import torch
from helpers.launches import pretended_gpu
from helpers.pretended_gpu import on_device
from sae_lens_switch_kernels import RowGrads, autoencode, products
from sae_lens_switch_kernels.indexing import one_group
from sae_lens_switch_kernels.inputs import EncoderInputs

B, D, F, K = 40, 16, 96, 3


def test_a_copy_from_the_host_is_seen(copies):
    torch.tensor([0, 3], device="meta")
    torch.as_tensor(3, device="meta")
    torch.zeros(1).to("meta")
    on_device(1).copy_(torch.zeros(1))
    assert copies == ["tensor", "as_tensor", "_to_copy", "copy_"]


def forward_and_backward(encoder, decoder, monkeypatch):
    """What the forward pass returns, and the gradients, also from dead latents if there are any."""
    with pretended_gpu(monkeypatch) as launches:
        outputs = autoencode.forward(encoder, decoder)
        known = encoder._asdict() | decoder._asdict() | outputs._asdict()
        saved = {name: known[name] for name in autoencode._SAVED}
        upstream = outputs.out_BD, None, None if decoder.dead_N is None else outputs.aux_out_BD
        constants = {"n_experts": encoder.n_experts, "n_shared": encoder.n_shared, "dtype": encoder.dtype}
        inputs = autoencode.BackwardInputs(*upstream, **saved, **constants, needs_x=True, needs_pre_bias=True)
        grads = autoencode.backward(inputs, RowGrads(active_only=False))
    assert launches.n
    return outputs, grads


@pytest.mark.parametrize("low_precision", [(None, 0), (torch.bfloat16, 7)], ids=["full", "bfloat16"])
@pytest.mark.parametrize(("n_experts", "n_shared"), [(1, 0), (4, 0), (4, 16)])
@pytest.mark.parametrize("dense_up_to", [0, 10**9], ids=["sparse", "dense within experts"])
def test_forward_and_backward_copy_nothing_and_wait_for_nothing(
    copies, n_experts, n_shared, dense_up_to, low_precision, monkeypatch
):
    pytest.importorskip("triton")
    monkeypatch.setattr(products, "_DENSE_UP_TO", {"meta": dense_up_to})
    x, W_enc, W_dec = on_device(B, D), on_device(F, D), on_device(F, D)
    several = n_experts > 1
    shape = (B, 1) if n_shared else (B,)
    expert = on_device(*shape, dtype=torch.int64) if several else None
    gates = on_device(*shape) if several else None
    pre_bias, bias = on_device(D), None if several else on_device(F)
    encoder = EncoderInputs(x, W_enc, pre_bias, bias, None, expert, gates, K, n_experts, torch.float32, *low_precision)
    encoder = encoder._replace(n_shared=n_shared)
    _, grads = forward_and_backward(encoder, autoencode.DecoderInputs(W_dec, None, 0), monkeypatch)
    assert [tuple(g.shape) for g in grads[:3]] == [(B, D), (F, D), (F, D)]
    assert copies == []


PER_LATENT = [
    (what, *routing)
    for what in ("dead latents as a mask", "a bias", "a scale")
    for routing in ((1, 0, 0), (4, 0, 0), (4, 1, 16), (4, 2, 0))
    if what != "a scale" or routing[1] == 0
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("what", "n_experts", "n_active", "n_shared"), PER_LATENT)
@pytest.mark.parametrize("dense_up_to", [0, 10**9], ids=["sparse", "dense within experts"])
def test_what_differs_by_latent_is_not_waited_for(
    copies, what, n_experts, n_active, n_shared, dense_up_to, dtype, monkeypatch
):
    pytest.importorskip("triton")
    monkeypatch.setattr(products, "_DENSE_UP_TO", {"meta": dense_up_to})
    shape = (B, n_active) if n_active else (B,)
    routed = (on_device(*shape, dtype=torch.int64), on_device(*shape)) if n_experts > 1 else (None, None)
    bias, scale = (on_device(F) if what == name else None for name in ("a bias", "a scale"))
    encoder = EncoderInputs(on_device(B, D), on_device(F, D), on_device(D), bias, scale, *routed, K, n_experts, dtype)
    mask = on_device(F, dtype=torch.bool) if what == "dead latents as a mask" else None
    decoder = autoencode.DecoderInputs(on_device(F, D), mask, 0 if mask is None else 5)
    outputs, grads = forward_and_backward(encoder._replace(n_shared=n_shared), decoder, monkeypatch)
    assert mask is None or outputs.aux_out_BD.shape == (B, D)
    assert [tuple(g.shape) for g in grads[:3]] == [(B, D), (F, D), (F, D)]
    assert copies == []


@pytest.mark.parametrize("precision", [(None, 0), (torch.bfloat16, 200)], ids=["full", "bfloat16"])
@pytest.mark.parametrize("ends", [None, (5, F)], ids=["one level", "two levels"])
def test_forward_and_backward_over_a_batch_copy_nothing_and_wait_for_nothing(copies, ends, precision, monkeypatch):
    pytest.importorskip("triton")
    x, W_enc, W_dec = on_device(B, D), on_device(F, D), on_device(F, D)
    k, ends_L = 2 * B, None if ends is None else on_device(len(ends), dtype=torch.int64)
    encoder = EncoderInputs(
        *(x, W_enc, on_device(D), on_device(F), on_device(F), None, None, k, 1, torch.float32),
        *precision,
        over_batch=True,
    )
    decoder = autoencode.DecoderInputs(W_dec, None, 0, ends_L=ends_L)
    outputs, grads = forward_and_backward(encoder, decoder, monkeypatch)
    assert outputs.out_BD.shape == (B * (1 if ends is None else len(ends)), D)
    assert outputs.values_BK.shape == (k,)
    assert [tuple(g.shape) for g in grads[:3]] == [(B, D), (F, D), (F, D)]
    assert copies == []


def test_the_offsets_of_one_group_are_made_on_the_device(copies):
    assert one_group(B, torch.device("meta")).offsets_E1.device.type == "meta"
    assert copies == []


@pytest.mark.parametrize("n_tokens", [0, 1, 7])
def test_one_group_is_all_tokens(n_tokens):
    order, offsets = one_group(n_tokens, torch.device("cpu"))
    assert order is None
    assert offsets.dtype == torch.int64
    assert offsets.tolist() == [0, n_tokens]
