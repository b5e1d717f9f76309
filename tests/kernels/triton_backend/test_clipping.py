"""Whether a step is finite and how it is clipped: on Triton, in torch, and as numbers say."""

import math

import pytest
import torch
from helpers.triton_checks import DEVICE
from sae_lens_switch_kernels import torch_clipping
from sae_lens_switch_kernels.triton_backend import clipping

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("clip", [clipping.clip, torch_clipping.clip], ids=["triton", "torch"])
@pytest.mark.parametrize("max_norm", [1.0, 0.25, None], ids=str)
@pytest.mark.parametrize("norm", [0.0, 0.5, 3.0, 5e37, INF, NAN])
@pytest.mark.parametrize("loss", [2.0, -3e38, INF, -INF, NAN])
def test_a_step_is_judged_and_clipped(norm, loss, max_norm, clip):
    is_finite, found_inf, scale = clip(torch.tensor(norm, device=DEVICE), torch.tensor(loss, device=DEVICE), max_norm)
    good = math.isfinite(norm) and math.isfinite(loss)
    assert is_finite.dtype == torch.bool
    assert (is_finite.item(), found_inf.item()) == (good, float(not good))
    if good:
        assert scale.item() == pytest.approx(1 if max_norm is None else max(1, norm / max_norm), rel=1e-5)
    assert found_inf.shape == scale.shape == ()
