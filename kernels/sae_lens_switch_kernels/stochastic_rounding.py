"""Rounding to bfloat16 up or down at random, right on average (Gupta et al. 2015, arXiv 1502.02551).

Adam's second moment changes by a thousandth per step, and bfloat16's neighbours lie a 128th to a 256th apart: rounded
to the nearest, it would never move. Rounded up the more often the nearer the upper one is, its expectation is exact.

The random bits of a number are a hash of its place in the matrix and of the step: the same on every device, in every
run and after a checkpoint. ``triton_backend/adam.py`` has the same hash.
"""

import torch
from torch import Tensor


def rounded_moments(m_RD: Tensor, v_RD: Tensor, rows_R: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments of some rows of a matrix, float32 [R, D], in bfloat16.

    Args:
        m_RD: First moments.
        v_RD: Second moments.
        rows_R: Which rows of the matrix they belong to.
        step: Which step this is, from 1: a number, or one per row.
    """
    bits_RD = random_bits(rows_R, m_RD.shape[1], step)
    return rounded(m_RD, bits_RD), rounded(v_RD, bits_RD >> 16)


def rounded(t: Tensor, bits: Tensor) -> Tensor:
    """float32 numbers in bfloat16: away from zero where their last 16 bits and those of ``bits`` add up to 2^16."""
    return (t.view(torch.int32) + (bits & 0xFFFF)).bitwise_and_(-0x10000).view(torch.float32).to(torch.bfloat16)


def random_bits(rows_R: Tensor, D: int, step: Tensor) -> Tensor:
    """32 bits for each number of some rows of a matrix with D columns, int32 [R, D]."""
    place_RD = rows_R.to(torch.int32).unsqueeze(1) * D + torch.arange(D, dtype=torch.int32, device=rows_R.device)
    x = place_RD.mul_(_int32(0x9E3779B1)).add_(step.to(torch.int32).view(-1, 1) * _int32(0x85EBCA77))
    x = x.bitwise_xor_(_shifted(x, 16)).mul_(_int32(0x7FEB352D))
    x = x.bitwise_xor_(_shifted(x, 15)).mul_(_int32(0x846CA68B))
    return x.bitwise_xor_(_shifted(x, 16))


def _int32(unsigned: int) -> int:
    """The int32 of the same bits; products wrap around alike."""
    return unsigned - (1 << 32) if unsigned >> 31 else unsigned


def _shifted(x: Tensor, n: int) -> Tensor:
    """Shifted to the right as unsigned numbers are."""
    return (x >> n).bitwise_and_((1 << (32 - n)) - 1)
