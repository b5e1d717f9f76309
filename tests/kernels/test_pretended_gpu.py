"""A training step on torch's meta device in place of a GPU: its tensors have no values, so whatever would synchronise
to read one back raises, and every copy from the host is seen."""

from contextlib import nullcontext

import pytest
import torch
from helpers.pretended_gpu import on_device
from sae_lens_switch_kernels import RowGrads, autoencode, operators, products
from sae_lens_switch_kernels.indexing import one_group
from sae_lens_switch_kernels.inputs import EncoderInputs

B, D, F, K = 40, 16, 96, 3


def test_a_copy_from_the_host_is_seen(copies):
    torch.tensor([0, 3], device="meta")
    torch.as_tensor(3, device="meta")
    torch.zeros(1).to("meta")
    on_device(1).copy_(torch.zeros(1))
    assert copies == ["tensor", "as_tensor", "_to_copy", "copy_"]


@pytest.mark.parametrize("low_precision", [(None, 0), (torch.bfloat16, 7)], ids=["full", "bfloat16"])
@pytest.mark.parametrize("n_experts", [1, 4])
@pytest.mark.parametrize("dense_up_to", [0, 10**9], ids=["sparse", "dense within experts"])
def test_forward_and_backward_copy_nothing_and_wait_for_nothing(
    copies, n_experts, dense_up_to, low_precision, monkeypatch
):
    pytest.importorskip("triton")
    from sae_lens_switch_kernels import triton_backend
    from sae_lens_switch_kernels.triton_backend.blocks import Arch
    from sae_lens_switch_kernels.triton_backend.launch import recording

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no meta device
    for module in (operators, autoencode):
        monkeypatch.setattr(module, "primitives", lambda _: triton_backend)
    monkeypatch.setattr(products, "_DENSE_UP_TO", {"meta": dense_up_to})
    x, W_enc, W_dec = on_device(B, D), on_device(F, D), on_device(F, D)
    several = n_experts > 1
    expert = on_device(B, dtype=torch.int64) if several else None
    gates = on_device(B) if several else None
    pre_bias, bias = on_device(D), None if several else on_device(F)
    with recording(Arch(lanes=32, shared=232448)) as launches:
        out, values, indices, _, *aux, centered, _ = autoencode.forward(
            EncoderInputs(x, W_enc, pre_bias, bias, None, expert, gates, K, n_experts, torch.float32, *low_precision),
            autoencode.DecoderInputs(W_dec, None, 0),
        )
        saved = x, centered, W_enc, W_dec, gates, expert, None, values, indices, *aux
        grads = autoencode.backward(
            autoencode.BackwardInputs(out, None, None, *saved, n_experts, torch.float32, True, True),
            RowGrads(active_only=False),
        )
    assert launches
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
