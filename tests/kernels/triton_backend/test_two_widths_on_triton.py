"""A transcoder's dead latents under autocast, whose products are sparse in float32 beside dense ones in bfloat16."""

import pytest
import torch
from helpers.triton_checks import DEVICE, random
from sae_lens_switch_kernels import RowGrads, autoencode, backend, products, reference, sparse_autoencode

B, D, D_OUT, F, N = 21, 20, 12, 16, 5


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("radial", [False, True])
@pytest.mark.parametrize("masked", [True, False], ids=["as a mask", "as indices"])
def test_gradients_of_dead_latents_are_added_to_those_of_all(masked, radial, needs_x, monkeypatch):
    monkeypatch.setenv("SAE_LENS_SWITCH_BACKEND", "triton")
    monkeypatch.setattr(backend, "_proven", lambda *_: True)
    for module in (products, autoencode):  # dense products for all latents, sparse ones for the dead alone
        monkeypatch.setattr(module, "is_dense", lambda *given: given[1] == F)
    leaves = {"x_BD": random(B, D, seed=1), "W_enc_FD": random(F, D, seed=2), "W_dec_FD": random(F, D_OUT, seed=3)}
    leaves["pre_bias_D"] = random(D, seed=4)
    dead = torch.arange(N, device=DEVICE)
    constants = {"dead_N": torch.arange(F, device=DEVICE) < N if masked else dead, "k": F, "aux_k": N}  # no choice
    upstream = random(B, D_OUT, seed=5), random(B, D_OUT, seed=6)

    def run(function, dtype, **options):
        given = {name: t.detach().to(dtype).requires_grad_(name != "x_BD" or needs_x) for name, t in leaves.items()}
        out, _, _, aux_out, *_ = function(**given, **constants, **options)
        wanted = [t for t in given.values() if t.requires_grad]
        return [out, aux_out, *torch.autograd.grad([out, aux_out], wanted, [g.to(dtype) for g in upstream])]

    with torch.autocast(DEVICE, torch.bfloat16):
        ours = run(sparse_autoencode, torch.float32, row_grads=RowGrads(active_only=False) if radial else None)
    for a, b in zip(ours, run(reference.sparse_autoencode, torch.float64), strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).norm() <= 2e-2 * b.norm()
