"""Seeds mixed from integers: those that CPython's hash of a tuple gave, on any interpreter."""

import random
import sys

import pytest
import torch

from sae_lens_switch import activation_batches
from sae_lens_switch.common.seeds import mixed_seed


@pytest.mark.parametrize(
    ("parts", "seed"),
    [
        ((), 5740354900026072187),
        ((0,), 469874208863542616),
        ((0, 0), 765232833172254823),
        ((1, 2, 3), 529344067295497451),
        ((-1, 7), 5130140236324056618),
        ((2**61 - 1, 2**70, -(2**61)), 8442210255696772284),
    ],
)
def test_seeds_are_written_down(parts, seed):
    assert mixed_seed(*parts) == seed


@pytest.mark.skipif(sys.hash_info.width != 64 or sys.implementation.name != "cpython", reason="another hash")
def test_seeds_are_those_of_earlier_versions():
    draw = random.Random(0)
    for _ in range(5000):
        kinds = draw.randrange(-3, 3), draw.randrange(10**6), draw.randrange(-(2**80), 2**80)
        parts = tuple(draw.choice(kinds) for _ in range(draw.randrange(5)))
        assert mixed_seed(*parts) == hash(parts) & (2**63 - 1)


def test_the_order_of_activations_is_that_of_earlier_versions():
    x = torch.arange(24.0).reshape(12, 2)
    batches = activation_batches(x, 4, seed=5)
    generator = torch.Generator().manual_seed(6168762918786387636)  # of (5, 0)
    assert torch.equal(torch.cat([next(batches) for _ in range(3)]), x[torch.randperm(12, generator=generator)])
