"""Codes on the way to a dense product and back on Triton, against plain torch in float64."""

import pytest
import torch
from helpers.triton_checks import DEVICE, assert_as_good_as_torch, dtypes, random
from sae_lens_switch_kernels import torch_backend, torch_codes, triton_backend
from sae_lens_switch_kernels.indexing import ExpertGroups, expert_groups
from sae_lens_switch_kernels.triton_backend import gated_codes

# B, D, E, M, K; experts of more latents than a program writes at a time; a single one
shapes = pytest.mark.parametrize(
    ("B", "D", "E", "M", "K"), [(13, 20, 3, 21, 4), (9, 6, 2, 1500, 5), (1, 3, 1, 5, 5), (30, 17, 5, 4, 1)], ids=str
)


def case(B, E, M, K, dtype):
    """Codes in the order of the tokens, the last expert without any token; one value in three is 0, as after ReLU."""
    generator = torch.Generator().manual_seed(3)
    expert = torch.randint(0, max(1, E - 1), (B,), generator=generator).to(DEVICE)
    chosen = torch.rand(B, M, generator=generator).topk(K).indices.to(DEVICE)
    values = random(B, K, dtype=dtype).abs() * (torch.rand(B, K, generator=generator) < 0.7).to(DEVICE)
    return values, chosen + expert.unsqueeze(1) * M, expert_groups(expert, E)


def double(*tensors):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]


@shapes
@dtypes
@pytest.mark.parametrize("has_gates", [True, False], ids=["gates", ""])
def test_codes_are_laid_out_and_put_back(B, D, E, M, K, dtype, has_gates):  # noqa: ARG001
    values, indices, groups = case(B, E, M, K, dtype)
    gates = random(B, seed=1).sigmoid() if has_gates else None
    given = groups.sorted(values), groups.sorted(indices), gates
    dense, acts, *back = gated_codes.gated_rows(*given, E * M, groups, torch.float32)
    sorted_acts, expected, *_ = torch_codes.unsorted_codes(*given, groups)
    assert torch.equal(acts, expected)
    assert torch.equal(back[0], values)
    assert torch.equal(back[1], indices)
    first = torch.div(given[1][:, :1], M, rounding_mode="floor") * M
    assert torch.equal(dense, torch.zeros(B, M, device=DEVICE).scatter(1, given[1] - first, sorted_acts.float()))


@shapes
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)], ids=str)
def test_the_backward_pass_of_an_expert(B, D, E, M, K, given):
    values, indices, groups = case(B, E, M, K, torch.float32)
    gates = random(B, seed=1).sigmoid() if given[0] else None
    grad_values = random(B, K, seed=2) if given[1] else None
    matrices = random(B, D, seed=3), random(B, D, seed=4), random(D, seed=5), random(E * M, D, seed=6)
    arguments = values, indices, gates, grad_values, *matrices, groups
    ours = triton_backend.gated_grads(*arguments, torch.float32)
    again = triton_backend.gated_grads(*arguments, torch.float32)
    plain = torch_backend.gated_grads(*arguments, torch.float32)
    exact = torch_backend.gated_grads(*double(*arguments), torch.float64)
    assert (ours[3] is None) == (gates is None)
    for name, a, b, c, d in zip(("dW_dec", "dW_enc", "d_bias", "d_gates", "x"), ours, exact, plain, again, strict=True):
        if a is not None:
            assert_as_good_as_torch(name, a, b, c)
            assert torch.equal(a, d)


@shapes
@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_the_forward_pass_of_an_expert(B, D, E, M, K, dtype):
    values, indices, groups = case(B, E, M, K, dtype)
    given = groups.sorted(values), groups.sorted(indices), random(B, seed=1).sigmoid(), random(E * M, D, seed=6)
    ours = triton_backend.gated_decode(*given, groups, dtype)
    plain = torch_backend.gated_decode(*given, groups, dtype)
    exact = torch_backend.gated_decode(*double(*given), groups, torch.float64)
    for name, a, b, c in zip(("out", "acts", "values"), ours, exact, plain, strict=False):
        assert_as_good_as_torch(name, a, b, c)
    assert torch.equal(ours[3], indices)


def test_sorted_rows_come_in_pairs():
    from sae_lens_switch_kernels.triton_backend.code_rows import sorted_row_pair, sorted_rows

    groups = expert_groups(torch.randint(0, 3, (11,)).to(DEVICE), 3)
    t, x, bias = random(11, 300), random(11, 300, seed=1), random(300, seed=2)
    for options in ((groups, torch.float32), (ExpertGroups(None, groups.offsets_E1), torch.bfloat16)):
        first, second = sorted_row_pair(t, x, bias, *options)
        assert torch.equal(first, sorted_rows(t, None, *options))
        assert torch.equal(second, sorted_rows(x, bias, *options))
