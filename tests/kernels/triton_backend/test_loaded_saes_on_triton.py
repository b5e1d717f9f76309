"""SAELens's own SAEs through the Triton kernels: TopK's encoder, and everybody's decoder."""

import pytest
import torch
from helpers import D, random_input
from helpers.inference_saes import ALL, with_few_active
from helpers.triton_checks import DEVICE

from sae_lens_switch import decode_sparse, encode_sparse


@pytest.mark.parametrize("name", ["topk, rescaling", "abstopk", "jumprelu", "gated", "skip_transcoder"])
def test_latents_and_reconstructions_equal_saelens(name, monkeypatch):
    monkeypatch.setenv("SAE_LENS_SWITCH_BACKEND", "triton")
    sae = with_few_active(ALL[name]()).to(DEVICE, torch.float32)
    x = random_input(3, 7, D, dtype=torch.float32).to(DEVICE)
    codes = encode_sparse(sae, x)
    torch.testing.assert_close(codes.to_dense(), sae.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode_sparse(sae, codes, x), sae(x), rtol=1e-4, atol=1e-4)
