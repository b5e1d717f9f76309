"""Which latents are active, counted on Triton and by torch."""

import pytest
import torch
from helpers.triton_checks import DEVICE, random, random_indices
from sae_lens_switch_kernels import torch_codes
from sae_lens_switch_kernels.triton_backend.count_codes import count_codes


@pytest.mark.parametrize("number", [3, 4096, "on the device"])
@pytest.mark.parametrize(("B", "K", "F"), [(1, 1, 1), (70, 33, 41), (0, 4, 9), (700, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_active_latents_are_counted(B, K, F, dtype, number):
    values, indices = random(B, K, dtype=dtype), random_indices(B, F, K)
    if B > 1:
        values[1] = torch.nan
    number = torch.tensor(7, dtype=torch.int32, device=DEVICE) if isinstance(number, str) else number
    for is_finite in (True, False):
        given = torch.tensor(is_finite, device=DEVICE)
        last = torch.arange(F, dtype=torch.int32, device=DEVICE) % 3
        total = torch.arange(F, device=DEVICE) + 2**24
        ours, theirs = (last, total), (last.clone(), total.clone())
        expected = total.clone()
        for latent in indices[values.abs() > 0].tolist() if is_finite else ():
            expected[latent] += 1
        count_codes(values, indices, given, number, *ours)
        torch_codes.count_codes(values, indices, given, number, *theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(total, expected)
        assert torch.equal(last == int(number), expected > torch.arange(F, device=DEVICE) + 2**24) or int(number) < 3


def test_a_latent_that_all_tokens_share_is_counted_for_each():
    values, indices = torch.ones(3000, 1, device=DEVICE), torch.zeros(3000, 1, dtype=torch.int64, device=DEVICE)
    last, total = torch.zeros(2, dtype=torch.int32, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    count_codes(values, indices, torch.tensor(True, device=DEVICE), 1, last, total)
    assert (last.tolist(), total.tolist()) == ([1, 0], [3000, 0])
