"""Stochastic rounding to bfloat16: its bits against Python's integers, its results against both neighbours."""

import pytest
import torch
from sae_lens_switch_kernels import torch_adam
from sae_lens_switch_kernels.stochastic_rounding import random_bits, rounded, rounded_moments
from torch import Tensor

STEPS = 1 << 14


def hashed(place: int, step: int) -> int:
    def times(x: int, factor: int) -> int:
        return x * factor % (1 << 32)

    x = (times(place, 0x9E3779B1) + times(step, 0x85EBCA77)) % (1 << 32)
    x = times(x ^ x >> 16, 0x7FEB352D)
    x = times(x ^ x >> 15, 0x846CA68B)
    return x ^ x >> 16


@pytest.mark.parametrize("steps", [[9], [1, 700, 100_000]], ids=["one step", "a step per row"])
def test_bits_are_a_hash_of_place_and_step(steps):
    """The last row begins beyond the 2^32nd number of the matrix."""
    rows, width = [0, 5, (1 << 31) - 1], 1003
    bits = random_bits(torch.tensor(rows), width, torch.tensor(steps, dtype=torch.float32))
    assert bits.dtype == torch.int32
    for i, row in enumerate(rows):
        for d in (0, 1, 500, 1002):
            expected = hashed((row * width + d) % (1 << 32), steps[i % len(steps)])
            assert bits[i, d].item() % (1 << 32) == expected


def test_a_number_becomes_one_of_its_neighbours_and_stays_if_it_is_one():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 40, generator=generator) * 10.0 ** torch.randint(-30, 30, (50, 40), generator=generator)
    bits = random_bits(torch.arange(50), 40, torch.tensor(3.0))
    result = rounded(x, bits).float()
    below = (x.view(torch.int32) & -0x10000).view(torch.float32)  # towards zero
    above = ((x.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert ((result == below) | (result == above)).all()
    assert (result == below).any()
    assert (result == above).any()
    for some in (below, torch.zeros(50, 40), torch.full((50, 40), torch.inf), torch.full((50, 40), -torch.inf)):
        assert torch.equal(rounded(some, bits).float(), some)
    assert rounded(torch.full((50, 40), torch.nan), bits).isnan().all()


def means(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of both moments of a row over many steps, each rounded anew."""
    rows = torch.zeros(STEPS, dtype=torch.int64)
    m, v = rounded_moments(x.expand(STEPS, -1), x.expand(STEPS, -1), rows, torch.arange(STEPS) + 1.0)
    return m.double(), v.double()


def test_the_mean_of_many_roundings_is_the_number():
    x = torch.tensor([1.0, 1.001, 1.0039, -1.0041, 3.1415926, 1e-20, 0.99999])
    spacing = 2.0**-7 * x.double().abs()  # at most
    for result in means(x):
        off = (result.mean(0) - x.double()).abs() / spacing
        assert (off <= 4 * 0.5 / STEPS**0.5).all(), off


def test_both_moments_of_a_number_and_neighbouring_numbers_are_rounded_independently():
    m, v = (t - t.mean(0) for t in means(torch.full((8,), 1.0039)))
    series = torch.cat([m, v], 1)
    correlation = (series.T @ series) / torch.outer(series.norm(dim=0), series.norm(dim=0)) - torch.eye(16)
    assert correlation.abs().max() <= 5 / STEPS**0.5


def test_a_second_moment_falls_to_where_gradients_are_while_one_rounded_to_the_nearest_sticks():
    """A thousandth of the way per step, from 1 to 0.01."""
    W, grad = torch.zeros(4, 64), torch.full((4, 64), 0.1)
    m, v = torch.zeros(4, 64, dtype=torch.bfloat16), torch.ones(4, 64, dtype=torch.bfloat16)
    nearest, exact = v.clone(), v.double()
    for step in range(1, 4001):
        torch_adam.adam_rows(W, grad, m, v, torch.tensor(float(step)), 1e-3, 0.9, 0.999, 1e-8)
        nearest.copy_(0.999 * nearest.float() + 0.001 * grad.square())
        exact = 0.999 * exact + 0.001 * 0.01
    assert (nearest == 1).all()
    torch.testing.assert_close(v.double().mean(), exact.mean(), rtol=0.02, atol=0)
    torch.testing.assert_close(m.double().mean(), torch.tensor(0.1, dtype=torch.float64), rtol=0.01, atol=0)
