"""The kernels' own comparison with their plain forms, in every dtype that training steps run them in."""

import pytest
import torch
from helpers.triton_checks import DEVICE, dtypes
from sae_lens_switch_kernels import backend
from sae_lens_switch_kernels.check_cases import cases_of
from sae_lens_switch_kernels.triton_backend import routing


@dtypes
@pytest.mark.parametrize("name", backend.PRIMITIVES)
def test_every_kernel_passes_its_own_check(name, dtype):
    assert backend._compare(name, torch.device(DEVICE), dtype) == ""


@pytest.mark.parametrize("name", ["route", "route_backward", "update_loads", "update_expert_bias"])
def test_the_router_is_checked_in_float32_as_it_is_trained(name):
    for given in cases_of(name, backend._SMALL, torch.device(DEVICE), torch.bfloat16):
        assert {t.dtype for t in given if torch.is_tensor(t) and t.is_floating_point()} == {torch.float32}


def test_the_router_is_checked_on_more_tokens_of_one_expert_than_low_precision_can_count():
    cases = cases_of("route", backend._SMALL, torch.device(DEVICE), torch.bfloat16)
    most = max(routing.route(*given).offsets_E1.diff().max().item() for given in cases)
    assert most != torch.tensor(most, dtype=torch.bfloat16).item()
