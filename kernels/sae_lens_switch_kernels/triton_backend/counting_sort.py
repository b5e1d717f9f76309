"""A stable sort of small integers by counting: the tokens of each expert, and the tokens of each latent.

Two launches a digit. Every program counts the digits of its own keys; then, from the counts of all programs, it finds
where its first key of each digit belongs, and places its keys in order. No atomics: what lands where follows from the
keys alone. Up to 128 different keys are one digit; more are sorted by digits of at most six bits, lowest first, and
where each key begins is then looked up in the sorted keys.

Of 262,144 int64 keys below 24,576, three digits move 64 bytes a key, 17 MB. torch's stable sort of int64 takes eight
digits, whatever the keys, and moves 32 bytes a key in each, 67 MB: 0.115 ms as measured on an H200, where the 17 MB
would take 0.004, and launches count for more. The counts stay smaller than the keys, however many latents there are, so
this is the better way at every shape.

Letters: N is the number of keys, n what they lie below, P the number of programs.
"""

from math import isqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels.indexing import ExpertGroups, LatentIndex
from sae_lens_switch_kernels.triton_backend.blocks import cdiv, next_power_of_2
from sae_lens_switch_kernels.triton_backend.launch import Traffic, launch

_ONE_DIGIT, _DIGIT_BITS = 128, 6
_TILE = 1024  # keys times digits that a program compares at a time, in few registers
_FEWEST, _MOST = 256, 512  # programs
_STARTS = 256


@triton.jit
def _digits(keys, at, end, n, SHIFT: tl.constexpr, RADIX: tl.constexpr):
    """The keys at these places, and [BLOCK, RADIX]: 1 where a key has the digit. Keys beyond n have none."""
    key = tl.load(keys + at, mask=at < end, other=-1).to(tl.int32)
    digit = tl.where((key >= 0) & (key < n), (key >> SHIFT) & (RADIX - 1), -1)
    return key, (digit[:, None] == tl.arange(0, RADIX)[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["N", "n", "per_program"])
def _count_digits_kernel(
    keys,  # [N]
    counts,  # [P, RADIX]
    N,
    n,
    per_program,
    SHIFT: tl.constexpr,
    RADIX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0)
    end = tl.minimum(N, (p + 1) * per_program)
    found = tl.zeros([BLOCK, RADIX], tl.int32)  # added up once, not for every block
    for first in range(p * per_program, end, BLOCK):
        _key, ones = _digits(keys, first + tl.arange(0, BLOCK), end, n, SHIFT, RADIX)
        found += ones
    tl.store(counts + p * RADIX + tl.arange(0, RADIX), tl.sum(found, 0))


@triton.jit(do_not_specialize=["N", "n", "P", "per_program"])
def _place_by_digit_kernel(
    keys,  # [N]
    order,  # [N], what the keys belong to; None: their own places
    counts,  # [P, RADIX]
    placed_keys,  # [N] or None
    placed_order,  # [N]
    starts,  # [n + 1] or None
    N,
    n,
    P,
    per_program,
    SHIFT: tl.constexpr,
    RADIX: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    p = tl.program_id(0)
    d = tl.arange(0, RADIX)
    totals = tl.zeros([AT_ONCE, RADIX], tl.int32)
    before = tl.zeros([AT_ONCE, RADIX], tl.int32)
    for first in range(0, P, AT_ONCE):
        q = first + tl.arange(0, AT_ONCE)
        found = tl.load(counts + q[:, None] * RADIX + d[None, :], mask=(q < P)[:, None], other=0)
        totals += found
        before += tl.where((q < p)[:, None], found, 0)
    total = tl.sum(totals, 0)
    begin = tl.cumsum(total, 0) - total
    if starts is not None:  # noqa: SIM102, Triton decides the outer one as it compiles
        if p == 0:
            tl.store(starts + d, begin.to(starts.dtype.element_ty), mask=d < n)
            tl.store(starts + n, tl.sum(total, 0).to(starts.dtype.element_ty))
    place = begin + tl.sum(before, 0)
    end = tl.minimum(N, (p + 1) * per_program)
    for first in range(p * per_program, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        key, ones = _digits(keys, at, end, n, SHIFT, RADIX)
        mine = at
        if order is not None:
            mine = tl.load(order + at, mask=at < end, other=0)
        to = place[None, :] + tl.cumsum(ones, 0) - 1
        spread = tl.zeros([BLOCK, RADIX], tl.int32)
        tl.store(placed_order + to, (spread + mine[:, None]).to(placed_order.dtype.element_ty), mask=ones != 0)
        if placed_keys is not None:
            tl.store(placed_keys + to, spread + key[:, None], mask=ones != 0)
        place += tl.sum(ones, 0)


@triton.jit(do_not_specialize=["N", "n", "steps"])
def _find_starts_kernel(
    keys,  # [N], sorted
    starts,  # [n + 1]
    N,
    n,
    steps,  # of halving N
    BLOCK: tl.constexpr,
):
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int32)
    high = low + N
    for _ in range(0, steps):
        middle = (low + high) // 2
        open_ = low < high
        less = tl.load(keys + middle, mask=open_, other=0) < key
        low = tl.where(open_ & less, middle + 1, low)
        high = tl.where(open_ & (less == 0), middle, high)
    tl.store(starts + key, low.to(starts.dtype.element_ty), mask=key <= n)


def sorted_places(keys_N: Tensor, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Places of the keys 0 to n - 1 in ascending order, equal ones as they came, [N]; and where each begins, [n + 1].

    A key outside [0, n) is left out: the last start then falls short of N.
    """
    N, bits = len(keys_N), max(1, (n - 1).bit_length())
    if N == 0:
        return keys_N.new_empty(0, dtype=dtype), keys_N.new_zeros(n + 1, dtype=dtype)
    digits = 1 if n <= _ONE_DIGIT else cdiv(bits, _DIGIT_BITS)
    digit_bits = cdiv(bits, digits)
    RADIX = 1 << digit_bits
    BLOCK = max(8, min(next_power_of_2(N), _TILE // RADIX))
    per_program = cdiv(cdiv(N, _programs(N)), BLOCK) * BLOCK
    P = cdiv(N, per_program)
    keys, order = keys_N.contiguous(), None
    starts = keys_N.new_empty(n + 1, dtype=dtype)
    for i in range(digits):
        counts = keys_N.new_empty(P, RADIX, dtype=torch.int32)
        sizes = {"N": N, "n": n, "per_program": per_program}
        sizes |= {"SHIFT": i * digit_bits, "RADIX": RADIX, "BLOCK": BLOCK}
        launch(_count_digits_kernel, (P,), 4, keys=keys, counts=counts, **sizes)
        placed = keys_N.new_empty(N, dtype=dtype)
        placed_keys = None if digits == 1 else keys_N.new_empty(N, dtype=torch.int32)
        launch(
            _place_by_digit_kernel,
            (P,),
            4,
            keys=keys,
            order=order,
            counts=counts,
            placed_keys=placed_keys,
            placed_order=placed,
            starts=starts if digits == 1 else None,
            P=P,
            AT_ONCE=max(1, min(next_power_of_2(P), _TILE // RADIX)),
            **sizes,
        )
        order, keys = placed, keys if placed_keys is None else placed_keys
    if digits > 1:
        launch(
            _find_starts_kernel,
            (cdiv(n + 1, _STARTS),),
            4,
            keys=keys,
            starts=starts,
            N=N,
            n=n,
            steps=N.bit_length(),
            BLOCK=_STARTS,
        )
    assert order is not None
    return order, starts


def _programs(N: int) -> int:
    """Of P programs each works on N / P keys and reads P counts, block after block: the sum is least at P = sqrt(N).

    In blocks of 32, 262,144 keys take 16 + 16 with 512 programs, 32 + 8 with 256. Still more keys would be served best
    by still more programs, if they ran at the same time: at about 100 registers a thread, four of 128 threads fit on
    each of 128 multiprocessors, and any beyond these would wait.
    """
    return min(_MOST, max(_FEWEST, isqrt(N)))


def expert_groups(expert_B: Tensor, n_experts: int) -> ExpertGroups:
    """As ``indexing.expert_groups``: int64, as torch's own copies by index want them."""
    return ExpertGroups(*sorted_places(expert_B, n_experts, torch.int64))


def latent_index(indices_BK: Tensor, n_latents: int) -> LatentIndex:
    """As ``indexing.latent_index``: int32, which a weight gradient reads once for each slice of D."""
    return LatentIndex(*sorted_places(indices_BK.flatten(), n_latents, torch.int32))


def sorted_places_traffic(N: int, n: int, key_itemsize: int = 8, itemsize: int = 4) -> Traffic:
    """All launches, without the counts, which every program reads from cache."""
    digits = 1 if n <= _ONE_DIGIT else cdiv(max(1, (n - 1).bit_length()), _DIGIT_BITS)
    first, last = 2 * key_itemsize + itemsize, 2 * 4 + 2 * itemsize
    keys = 4 * N if digits > 1 else 0  # written by every digit, unless there is only one
    return Traffic(flops=0, streamed=N * first + (digits - 1) * N * last + digits * keys + itemsize * (n + 1))
