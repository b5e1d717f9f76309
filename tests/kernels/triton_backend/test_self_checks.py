"""The kernels' own comparison with their plain forms, in every dtype that training steps run them in."""

import pytest
import torch
from helpers.triton_checks import DEVICE, dtypes
from sae_lens_switch_kernels import backend


@dtypes
@pytest.mark.parametrize("name", backend.PRIMITIVES)
def test_every_kernel_passes_its_own_check(name, dtype):
    assert backend._compare(name, torch.device(DEVICE), dtype) == ""
