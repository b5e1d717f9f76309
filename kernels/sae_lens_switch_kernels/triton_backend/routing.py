"""The router's choice on Triton: all of it, and the tokens sorted by expert, in two launches; the gradient in one.

The second launch adds up what the programs of the first have counted, and so knows where each token belongs
(``counting_sort.py``). Beyond 128 experts those are too many counts for every program to read: tokens are then sorted
by themselves.

Letters: P is the number of programs, each with a few tokens.
"""

# Triton declares that a reduction may return a tuple.
# pyright: reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_lens_switch_kernels.torch_routing import Routed
from sae_lens_switch_kernels.triton_backend.blocks import cdiv, next_power_of_2
from sae_lens_switch_kernels.triton_backend.counting_sort import sorted_places
from sae_lens_switch_kernels.triton_backend.launch import Traffic, launch

_TILE = 1024  # numbers that a program works on at a time
_PROGRAMS = 256
_SORTED = 128  # up to so many experts
_EXPERTS = 32  # per program, of those that add up the shares


@triton.jit(do_not_specialize=["B", "per_program"])
def _route_kernel(
    logits,  # [B, E]
    bias,  # [E] or None
    probs,  # [B, E]
    expert,  # [B]
    gates,  # [B]
    parts,  # [P, 2, E]: tokens, and the sum of probabilities
    B,
    E,
    per_program,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    p = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    tokens = tl.zeros([BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_E], tl.float32)
    factor = tl.zeros([BLOCK_E], tl.float32)
    if bias is not None:
        shift = tl.load(bias + e, mask=e < E, other=float("-inf")).to(tl.float32)
        factor = tl.exp(shift - tl.max(shift, 0))
    end = tl.minimum(B, (p + 1) * per_program)
    for first in range(p * per_program, end, ROWS):
        b = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (b < end)[:, None] & (e < E)[None, :]
        at = b[:, None] * E + e[None, :]
        logit = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
        logit = tl.where((b < end)[:, None], logit, 0.0)
        weight = tl.exp(logit - tl.max(logit, 1)[:, None])
        prob = weight / tl.sum(weight, 1)[:, None]
        prob = tl.where(inside, prob, 0.0)
        score = prob
        if bias is not None:
            score = prob * factor[None, :]
        best = tl.max(score, 1)
        # The first of equals; the first of all where a logit is not a finite number, and so no probability is one.
        chosen = tl.min(tl.where((score == best[:, None]) & inside, e[None, :], E), 1)
        chosen = tl.where(chosen < E, chosen, 0)
        is_chosen = (e[None, :] == chosen[:, None]) & inside
        tl.store(probs + at, prob, mask=inside)
        tl.store(expert + b, chosen.to(tl.int64), mask=b < end)
        tl.store(gates + b, tl.sum(tl.where(is_chosen, prob, 0.0), 1), mask=b < end)
        tokens += tl.sum(is_chosen.to(tl.float32), 0)
        total += tl.sum(prob, 0)
    tl.store(parts + 2 * p * E + e, tokens, mask=e < E)
    tl.store(parts + (2 * p + 1) * E + e, total, mask=e < E)


@triton.jit(do_not_specialize=["P", "B"])
def _shares_kernel(
    parts,  # [P, 2, E]
    load,  # [E]
    importance,  # [E]
    P,
    B,
    E,
    AT_ONCE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    tokens = tl.zeros([BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_E], tl.float32)
    for first in range(0, P, AT_ONCE):
        p = first + tl.arange(0, AT_ONCE)
        inside = (p < P)[:, None] & (e < E)[None, :]
        at = parts + 2 * p[:, None] * E + e[None, :]
        tokens += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
        total += tl.sum(tl.load(at + E, mask=inside, other=0.0), 0)
    tl.store(load + e, tokens / B, mask=e < E)
    tl.store(importance + e, total / B, mask=e < E)


@triton.jit(do_not_specialize=["P", "B", "per_program"])
def _place_tokens_kernel(
    expert,  # [B]
    parts,  # [P, 2, E]
    load,  # [E]
    importance,  # [E]
    balance,
    order,  # [B]
    offsets,  # [E + 1]
    P,
    B,
    E,
    per_program,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    p = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    tokens = tl.zeros([BLOCK_E], tl.float32)
    earlier = tl.zeros([BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_E], tl.float32)
    for first in range(0, P, AT_ONCE):
        q = first + tl.arange(0, AT_ONCE)
        inside = (q < P)[:, None] & (e < E)[None, :]
        at = parts + 2 * q[:, None] * E + e[None, :]
        found = tl.load(at, mask=inside, other=0.0)
        tokens += tl.sum(found, 0)
        earlier += tl.sum(tl.where((q < p)[:, None], found, 0.0), 0)
        if p == 0:
            total += tl.sum(tl.load(at + E, mask=inside, other=0.0), 0)
    counts = tokens.to(tl.int32)
    begin = tl.cumsum(counts, 0) - counts
    if p == 0:
        share, mean = tokens / tl.maximum(B, 1), total / tl.maximum(B, 1)
        tl.store(load + e, share, mask=e < E)
        tl.store(importance + e, mean, mask=e < E)
        tl.store(balance, tl.sum(tl.where(e < E, share * mean, 0.0), 0) * E)
        tl.store(offsets + e, begin, mask=e < E)
        tl.store(offsets + E, tl.sum(counts, 0))
    place = begin + earlier.to(tl.int32)
    end = tl.minimum(B, (p + 1) * per_program)
    for first in range(p * per_program, end, ROWS):
        b = first + tl.arange(0, ROWS)
        chosen = tl.load(expert + b, mask=b < end, other=-1).to(tl.int32)
        ones = (chosen[:, None] == e[None, :]).to(tl.int32)
        to = place[None, :] + tl.cumsum(ones, 0) - 1
        tl.store(order + to, tl.zeros([ROWS, BLOCK_E], tl.int64) + b[:, None], mask=ones != 0)
        place += tl.sum(ones, 0)


@triton.jit(do_not_specialize=["B"])
def _route_backward_kernel(
    probs,  # [B, E]
    expert,  # [B]
    grad_probs,  # [B, E] or None
    grad_gates,  # [B] or None
    grad_importance,  # [E] or None
    grad_balance,  # or None
    load,  # [E]
    d_logits,  # [B, E]
    B,
    E,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_E)
    inside = (b < B)[:, None] & (e < E)[None, :]
    at = b[:, None] * E + e[None, :]
    prob = tl.load(probs + at, mask=inside, other=0.0)
    slope = tl.zeros([ROWS, BLOCK_E], tl.float32)
    if grad_probs is not None:
        slope += tl.load(grad_probs + at, mask=inside, other=0.0)
    if grad_gates is not None:
        chosen = tl.load(expert + b, mask=b < B, other=0)
        gate = tl.load(grad_gates + b, mask=b < B, other=0.0)
        slope += tl.where(e[None, :] == chosen[:, None], gate[:, None], 0.0)
    if grad_importance is not None:
        slope += tl.load(grad_importance + e, mask=e < E, other=0.0)[None, :] / B
    if grad_balance is not None:
        slope += (tl.load(grad_balance) * E * tl.load(load + e, mask=e < E, other=0.0) / B)[None, :]
    slope = prob * (slope - tl.sum(prob * slope, 1)[:, None])
    tl.store(d_logits + at, slope, mask=inside)


@triton.jit
def _update_loads_kernel(
    load,  # [E]
    running,  # [E]
    steps_without,  # [E]
    steps_too_busy,
    E,
    decay,
    share,
    BLOCK_E: tl.constexpr,
):
    e = tl.arange(0, BLOCK_E)
    now = tl.load(load + e, mask=e < E, other=0.0).to(tl.float32)
    mean = tl.load(running + e, mask=e < E, other=0.0).to(tl.float32)
    tl.store(running + e, mean + decay * (now - mean), mask=e < E)
    without = tl.load(steps_without + e, mask=e < E, other=0.0).to(tl.float32)
    tl.store(steps_without + e, tl.where(now == 0, without + 1, 0.0), mask=e < E)
    busy = tl.load(steps_too_busy).to(tl.float32)
    tl.store(steps_too_busy, tl.where(tl.max(now, 0) > share, busy + 1, 0.0))


@triton.jit
def _update_expert_bias_kernel(
    bias,  # [E]
    counts,  # [E]
    is_finite,
    E,
    rate,
    BLOCK_E: tl.constexpr,
):
    e = tl.arange(0, BLOCK_E)
    count = tl.load(counts + e, mask=e < E, other=0.0).to(tl.float32)
    less = tl.sum(count, 0) - E * count
    step = tl.where(e < E, (less > 0).to(tl.float32) - (less < 0).to(tl.float32), 0.0)
    step = rate * (step - tl.sum(step, 0) / E) * tl.load(is_finite).to(tl.float32)
    before = tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)
    tl.store(bias + e, before + step, mask=e < E)


def route(logits_BE: Tensor, bias_E: Tensor | None = None) -> Routed:
    """As torch_routing's; float32."""
    B, E = logits_BE.shape
    BLOCK_E = next_power_of_2(E)
    ROWS = max(1, _TILE // BLOCK_E)
    empty = logits_BE.new_empty
    probs_BE, expert_B, gates_B = empty(B, E), empty(B, dtype=torch.int64), empty(B)
    load_E, importance_E, balance = empty(E), empty(E), empty(())
    per_program = max(1, cdiv(cdiv(B, ROWS), _PROGRAMS)) * ROWS
    P = max(1, cdiv(B, per_program))
    parts = empty(P, 2, E, dtype=torch.float32)  # counts, which low precision would round
    sizes = {"B": B, "E": E, "per_program": per_program, "ROWS": ROWS, "BLOCK_E": BLOCK_E}
    found = {"probs": probs_BE, "expert": expert_B, "gates": gates_B, "parts": parts}
    given = {"logits": logits_BE.contiguous(), "bias": None if bias_E is None else bias_E.contiguous()}
    launch(_route_kernel, (P,), 4, **given, **found, **sizes)
    sums = {"parts": parts, "load": load_E, "importance": importance_E, "P": P}
    if E <= _SORTED:
        order_B, offsets_E1 = empty(B, dtype=torch.int64), empty(E + 1, dtype=torch.int32)
        placed = {"expert": expert_B, "balance": balance, "order": order_B, "offsets": offsets_E1}
        launch(_place_tokens_kernel, (P,), 4, **sums, **placed, **sizes, AT_ONCE=ROWS)
    else:
        at_once = {"AT_ONCE": _TILE // _EXPERTS, "BLOCK_E": _EXPERTS}
        launch(_shares_kernel, (cdiv(E, _EXPERTS),), 4, **sums, B=max(1, B), E=E, **at_once)
        order_B, offsets_E1 = sorted_places(expert_B, E, torch.int64)
        offsets_E1, balance = offsets_E1.int(), E * torch.dot(load_E, importance_E)
    return Routed(probs_BE, expert_B, gates_B, load_E, importance_E, balance, order_B, offsets_E1)


def route_backward(
    probs_BE: Tensor,
    expert_B: Tensor,
    grad_probs_BE: Tensor | None,
    grad_gates_B: Tensor | None,
    grad_importance_E: Tensor | None,
    grad_balance: Tensor | None,
    load_E: Tensor,
) -> Tensor:
    """As torch_routing's; float32."""
    B, E = probs_BE.shape
    BLOCK_E = next_power_of_2(E)
    ROWS = max(1, _TILE // BLOCK_E)
    d_logits_BE = torch.empty_like(probs_BE)
    launch(
        _route_backward_kernel,
        (cdiv(B, ROWS),),
        4,
        probs=probs_BE.contiguous(),
        expert=expert_B,
        grad_probs=None if grad_probs_BE is None else grad_probs_BE.contiguous(),
        grad_gates=None if grad_gates_B is None else grad_gates_B.contiguous(),
        grad_importance=None if grad_importance_E is None else grad_importance_E.contiguous(),
        grad_balance=grad_balance,
        load=load_E,
        d_logits=d_logits_BE,
        B=B,
        E=E,
        ROWS=ROWS,
        BLOCK_E=BLOCK_E,
    )
    return d_logits_BE


def update_loads(
    load_E: Tensor, running_E: Tensor, steps_without_E: Tensor, steps_too_busy: Tensor, decay: float, share: float
) -> None:
    """As torch_routing's; float32."""
    launch(
        _update_loads_kernel,
        (1,),
        1,
        load=load_E.contiguous(),
        running=running_E,
        steps_without=steps_without_E,
        steps_too_busy=steps_too_busy,
        E=len(load_E),
        decay=float(decay),
        share=float(share),
        BLOCK_E=next_power_of_2(len(load_E)),
    )


def update_expert_bias(bias_E: Tensor, counts_E: Tensor, is_finite: Tensor, rate: float) -> None:
    """As torch_routing's; float32."""
    launch(
        _update_expert_bias_kernel,
        (1,),
        1,
        bias=bias_E,
        counts=counts_E.contiguous(),
        is_finite=is_finite,
        E=len(bias_E),
        rate=float(rate),
        BLOCK_E=next_power_of_2(len(bias_E)),
    )


def route_traffic(B: int, E: int) -> Traffic:
    """Logits read, probabilities, experts and gates written; without the few sums."""
    return Traffic(flops=6 * B * E, streamed=8 * B * E + 12 * B)


def route_backward_traffic(B: int, E: int) -> Traffic:
    """Of the gates' gradient and the importance's."""
    return Traffic(flops=6 * B * E, streamed=8 * B * E + 12 * B)
