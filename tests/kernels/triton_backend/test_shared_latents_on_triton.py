"""Shared latents on the Triton form of every primitive, against reference.py in float64."""

import pytest
import torch
from helpers.kernel_cases import OPTIONS, autoencoder_inputs
from helpers.triton_checks import DEVICE
from sae_lens_switch_kernels import backend, products, reference, sparse_autoencode


@pytest.mark.parametrize("names", [name for name in OPTIONS if "shared" in OPTIONS[name]])
@pytest.mark.parametrize("dense_up_to", [0, 10**9], ids=["sparse", "dense"])
def test_outputs_and_all_gradients(names, dense_up_to, monkeypatch):
    monkeypatch.setenv("SAE_LENS_SWITCH_BACKEND", "triton")
    monkeypatch.setattr(backend, "_proven", lambda *_: True)
    monkeypatch.setattr(products, "_DENSE_UP_TO", {DEVICE: dense_up_to})
    leaves, constants = autoencoder_inputs(21, 24, 4, 9, 5, OPTIONS[names])
    upstream = [torch.randn(21, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2)]

    def run(function, dtype, device="cpu"):
        inputs = {n: t.to(device, dtype).requires_grad_() for n, t in leaves.items()}
        rest = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in constants.items()}
        out, values, _, aux, *_ = function(**inputs, **rest)
        outs = [out] if aux is None else [out, aux]
        grads = torch.autograd.grad(outs, list(inputs.values()), [g.to(device, dtype) for g in upstream[: len(outs)]])
        return [*outs, values.sort(1).values, *grads]

    for ours, truth in zip(
        run(sparse_autoencode, torch.float32, DEVICE), run(reference.sparse_autoencode, torch.float64), strict=True
    ):
        torch.testing.assert_close(ours.cpu().double(), truth, rtol=1e-4, atol=1e-4)
