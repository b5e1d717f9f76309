"""Times predicted from bytes and flops for every launcher at the shapes of the report. Nothing is measured here."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lens_switch_kernels.indexing import ExpertGroups, LatentIndex
from sae_lens_switch_kernels.triton_backend.adam import (
    adam_rows,
    adam_rows_traffic,
    lazy_adam_rows,
    lazy_adam_rows_traffic,
)
from sae_lens_switch_kernels.triton_backend.adam_tensors import adam_tensors, adam_tensors_traffic
from sae_lens_switch_kernels.triton_backend.clipping import clip, clip_traffic
from sae_lens_switch_kernels.triton_backend.code_rows import (
    code_grads,
    code_grads_traffic,
    codes_traffic,
    dense_rows,
    dense_rows_traffic,
    sorted_codes,
    sorted_row_pair,
    sorted_rows,
    sorted_rows_traffic,
    take_in_rows,
    take_in_rows_traffic,
    unsorted_codes,
)
from sae_lens_switch_kernels.triton_backend.codes_above import codes_above_traffic, count_above, write_above
from sae_lens_switch_kernels.triton_backend.count_codes import count_codes, count_codes_traffic
from sae_lens_switch_kernels.triton_backend.counting_sort import expert_groups, latent_index, sorted_places_traffic
from sae_lens_switch_kernels.triton_backend.gated_codes import (
    gated_row_grads,
    gated_row_grads_traffic,
    gated_rows,
    gated_rows_traffic,
)
from sae_lens_switch_kernels.triton_backend.gather import (
    matmul_at_indices,
    matmul_at_indices_traffic,
    sparse_decode,
    sparse_decode_traffic,
)
from sae_lens_switch_kernels.triton_backend.grouped_matmul import (
    grouped_decode,
    grouped_encode,
    grouped_traffic,
    grouped_weight_grad,
    grouped_weight_grads,
)
from sae_lens_switch_kernels.triton_backend.latent_weight_grads import latent_weight_grads, latent_weight_grads_traffic
from sae_lens_switch_kernels.triton_backend.launch import Traffic
from sae_lens_switch_kernels.triton_backend.routing import (
    route,
    route_backward,
    route_backward_traffic,
    route_traffic,
    update_expert_bias,
    update_loads,
)
from sae_lens_switch_kernels.triton_backend.select_topk import select_topk, select_topk_traffic
from sae_lens_switch_kernels.triton_backend.step_loss import loss, loss_backward, loss_backward_traffic, loss_traffic
from sae_lens_switch_kernels.triton_backend.topk_rows import topk_rows_traffic

B, K, F, E = 4096, 32, 32768, 32
fp32 = torch.float32
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


class Gpu(NamedTuple):
    """Bytes and flops per second that well-written code reaches, and bytes of L2."""

    memory: float
    l2: float
    l2_bytes: int
    flops: dict[str, float]


GPUS = {
    "H100 SXM": Gpu(3.35e12, 5.5e12, 50 << 20, {"fp32": 50e12, "tf32": 300e12, "bf16": 600e12}),
    "A100 SXM": Gpu(2.0e12, 3.5e12, 40 << 20, {"fp32": 16e12, "tf32": 110e12, "bf16": 220e12}),
}


class Operation(NamedTuple):
    name: str
    run: Callable[[], Any]
    traffic: Traffic
    tensor_cores: bool = False


def operations(D: int, dtype: str) -> Iterator[Operation]:
    """Every launcher at width D, on tensors without storage."""

    def empty(*shape: int, dtype: torch.dtype = DTYPES[dtype]) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    M, size = F // E, DTYPES[dtype].itemsize
    values, indices = empty(B, K), empty(B, K, dtype=torch.int64)
    x, W, a = empty(B, D), empty(F, D), empty(B, M)
    offsets = empty(E + 1, dtype=torch.int64)
    index = LatentIndex(empty(B * K, dtype=torch.int64), empty(F + 1, dtype=torch.int64))
    order = empty(B, dtype=torch.int64)
    products = grouped_traffic(B, D, M, E, size)
    yield Operation("grouped_encode", lambda: grouped_encode(x, W, offsets), products, True)
    yield Operation("grouped_decode", lambda: grouped_decode(a, W, offsets), products, True)
    yield Operation("grouped_decode, unsorted", lambda: grouped_decode(a, W, offsets, order, fp32), products, True)
    for tokens in (16, 32, 64):  # per expert
        n = B // tokens
        few = empty(B, F // n), empty(n + 1, dtype=torch.int64)
        traffic = grouped_traffic(B, D, F // n, n, size)
        yield Operation(
            f"grouped_encode, {tokens} tokens each", lambda few=few: grouped_encode(x, W, few[1]), traffic, True
        )
        yield Operation(
            f"grouped_decode, {tokens} tokens each", lambda few=few: grouped_decode(few[0], W, few[1]), traffic, True
        )
    yield Operation("grouped_weight_grad", lambda: grouped_weight_grad(a, x, offsets), products, True)
    yield Operation(
        "grouped_weight_grads",
        lambda: grouped_weight_grads(a, x, a, x, offsets, fp32),
        products._replace(flops=2 * products.flops, streamed=2 * products.streamed),
        True,
    )
    if dtype == "tf32":  # only the products run on tensor cores, where fp32 may be TF32
        return
    yield Operation("sparse_decode", lambda: sparse_decode(values, indices, W), sparse_decode_traffic(B, K, F, D, size))
    yield Operation(
        "matmul_at_indices", lambda: matmul_at_indices(x, W, indices), matmul_at_indices_traffic(B, K, F, D, size)
    )
    yield Operation(
        "latent_weight_grads",
        lambda: latent_weight_grads(index, values, x, values, x),
        latent_weight_grads_traffic(B, K, F, D, size),
    )
    yield Operation(
        "latent_weight_grads, decoder only",
        lambda: latent_weight_grads(index, values, x),
        latent_weight_grads_traffic(B, K, F, D, size, encoder=False),
    )
    pre, vector = empty(B, F), empty(F)
    yield Operation("select_topk", lambda: select_topk(pre, K), select_topk_traffic(B, F, K, size))
    yield Operation(
        "select_topk, bias and scale",
        lambda: select_topk(pre, K, vector, vector),
        select_topk_traffic(B, F, K, size, vectors=2, vector_itemsize=size),
    )
    yield Operation("select_topk, one expert", lambda: select_topk(a, K), topk_rows_traffic(B, M, K, size))
    for name, given in (("codes_above, bias", (vector, None)), ("codes_above, gated", (None, empty(B, 1)))):
        yield Operation(
            name,
            lambda given=given: (
                count_above(pre, vector, *given),
                write_above(pre, vector, *given, empty(B + 1, dtype=torch.int64), B * K),
            ),
            codes_above_traffic(B, F, B * K, size, vectors=1 + (given[0] is not None)),
        )
    groups = ExpertGroups(order, offsets)
    yield Operation(
        "select_topk, by expert",
        lambda: select_topk(a, K, groups=groups, dtype=fp32),
        topk_rows_traffic(B, M, K, size),
    )
    yield from _around(D, x, values, indices, groups, size)
    yield Operation(
        "select_topk, one expert, bias, scale",
        lambda: select_topk(a, K, vector[:M], vector[:M]),
        topk_rows_traffic(B, M, K, size, vectors=2, vector_itemsize=size),
    )
    if dtype != "fp32":  # which all weights are stepped in
        return
    yield from _routing(size)
    yield from _losses(D, size)
    yield from _optimisers(D)


def _optimisers(D: int) -> Iterator[Operation]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    W, grad, m, v, number, radial = *(empty(F, D) for _ in range(4)), empty(), empty(F)
    copy, options, numbers = empty(F, D, dtype=torch.bfloat16), (0.9, 0.999, 1e-8), (number, number)
    constraint: dict[str, Any] = {"unit_rows": True, "project": True}
    steps: list[tuple[str, float | Tensor, dict[str, Any]]] = [
        ("adam_rows", 1e-4, {}),
        ("adam_rows, bf16 copy", 1e-4, {"copy_FD": copy}),
        ("adam_rows, projected, unit", 1e-4, {"radial_F": radial, **constraint}),
        ("adam_rows, projected, unit, bf16 copy", 1e-4, {"radial_F": radial, "copy_FD": copy, **constraint}),
        ("adam_rows, dots, lr on device", number, constraint),
        (
            "adam_rows, projected, unit, bf16 copy and moments",
            1e-4,
            {"radial_F": radial, "copy_FD": copy, **constraint},
        ),
    ]
    for name, lr, given in steps:
        kept = (copy, copy) if "moments" in name else (m, v)
        yield Operation(
            name,
            lambda lr=lr, kept=kept, given=given: adam_rows(
                W, grad, kept[0], kept[1], number, lr, *options, *numbers, **given
            ),
            adam_rows_traffic(F, D, "project" in given, 2 if "copy_FD" in given else 0, kept[0].itemsize),
        )
    small = [empty(D), empty(D, E), empty(D)]
    small_state, sizes = (small, small, small, small, [number] * 3), [t.numel() for t in small]
    for name, lr in (("adam_tensors", 1e-4), ("adam_tensors, lr on device", number)):
        yield Operation(
            name, lambda lr=lr: adam_tensors(*small_state, lr, *options, *numbers), adam_tensors_traffic(sizes)
        )
    grads = [W, grad.T, *small]
    for name, max_norm in (("clip", 1.0), ("clip, no limit", None)):
        yield Operation(
            name,
            lambda limit=max_norm: clip(grads, number, limit, empty(2, dtype=torch.int64), [number] * 5),
            clip_traffic([t.numel() for t in grads]),
        )
    R = F // 4
    moments, grad_RD, rows, steps_F = empty(F, 2, D), empty(R, D), empty(R, dtype=torch.int64), empty(F)
    lazy: list[tuple[str, dict[str, Any]]] = [
        ("lazy_adam_rows, a quarter", {}),
        ("lazy_adam_rows, projected, unit, copy", {"radial_R": radial[:R], "copy_FD": copy, **constraint}),
        (
            "lazy_adam_rows, projected, unit, copy, bf16 moments",
            {"radial_R": radial[:R], "copy_FD": copy, **constraint},
        ),
    ]
    for name, given in lazy:
        kept = moments.to(torch.bfloat16) if "moments" in name else moments
        yield Operation(
            name,
            lambda kept=kept, given=given: lazy_adam_rows(
                *(W, grad_RD, kept[:, 0], kept[:, 1], steps_F, rows, 1e-4, *options, number), **given
            ),
            lazy_adam_rows_traffic(R, D, "project" in given, 2 if "copy_FD" in given else 0, kept.itemsize),
        )


def _around(D: int, x: Tensor, values: Tensor, indices: Tensor, groups: ExpertGroups, size: int) -> Iterator[Operation]:
    """What sorts tokens and codes, and works on them one by one."""
    bias, gates, expert = x.new_empty(D), x.new_empty(B), x.new_empty(B, dtype=torch.int64)
    more, offsets, M = torch.empty_like(values), groups.offsets_E1, F // E
    for n in (E, 128):
        traffic = sorted_places_traffic(B, n, itemsize=8)
        yield Operation(f"expert_groups, {n} experts", lambda n=n: expert_groups(expert, n), traffic)
    last, total = expert.new_empty(F, dtype=torch.int32), expert.new_empty(F)
    yield Operation(
        "count_codes",
        lambda: count_codes(values, indices, last[0] > 0, 1, last, total),
        count_codes_traffic(B, K, size),
    )
    yield Operation("latent_index", lambda: latent_index(indices, F), sorted_places_traffic(B * K, F))
    yield Operation("sorted_rows", lambda: sorted_rows(x, bias, groups, x.dtype), sorted_rows_traffic(B, D, size, size))
    codes = codes_traffic(B, K, size)
    pair = sorted_rows_traffic(B, D, 2 * size, 2 * size)
    yield Operation("sorted_row_pair", lambda: sorted_row_pair(x, x, bias, groups, x.dtype), pair)
    yield Operation(
        "gated_rows",
        lambda: gated_rows(values, indices, gates, F, groups, x.dtype),
        gated_rows_traffic(B, K, M, size, size),
    )
    yield Operation(
        "gated_row_grads",
        lambda: gated_row_grads(values, indices, gates, None, x.new_empty(B, M), groups),
        gated_row_grads_traffic(B, K, M, size, size),
    )
    yield Operation("sorted_codes", lambda: sorted_codes(values, indices, gates, groups), codes)
    yield Operation("unsorted_codes", lambda: unsorted_codes(values, indices, gates, groups), codes)
    yield Operation("code_grads", lambda: code_grads(values, more, gates, None, groups), code_grads_traffic(B, K, size))
    yield Operation(
        "dense_rows, two",
        lambda: dense_rows(values, indices, F, offsets, x.dtype, more),
        dense_rows_traffic(B, K, M, size, size, outputs=2),
    )
    yield Operation(
        "take_in_rows",
        lambda: take_in_rows(x.new_empty(B, M), indices, offsets, x.dtype),
        take_in_rows_traffic(B, K, size, size),
    )


def _losses(D: int, size: int) -> Iterator[Operation]:
    out = torch.empty(B, D, dtype=fp32, device="meta")
    number, low = out.new_empty(()), out.to(torch.bfloat16)
    for name, x, given in (
        ("loss", out, (None, 1.0, 1.0)),
        ("loss, balance and spread", out, (number, 1.0, None)),
        ("loss, bf16 target, on device", low, (number, number, None)),
    ):
        traffic = loss_traffic(B, D, size)
        yield Operation(name, lambda x=x, given=given: loss(out, out[0], x, *given), traffic)
    columns, grads = out.new_empty(64, D), (None, number, None, None)
    traffic = loss_backward_traffic(B, D, size)
    yield Operation("loss_backward", lambda: loss_backward(out, out, number, columns, *grads), traffic)
    yield Operation("loss_backward, bf16 target", lambda: loss_backward(out, low, number, columns, *grads), traffic)


def _routing(size: int) -> Iterator[Operation]:
    logits = torch.empty(B, E, dtype=fp32, device="meta")
    gates, loads, expert = logits.new_empty(B), logits.new_empty(E), logits.new_empty(B, dtype=torch.int64)
    for n in (E, 512):
        yield Operation(f"route, {n} experts", lambda n=n: route(logits.new_empty(B, n)), route_traffic(B, n))
    yield Operation("route, biased", lambda: route(logits, loads), route_traffic(B, E))
    yield Operation(
        "route_backward",
        lambda: route_backward(logits, expert, logits, gates, loads, loads[0], loads),
        route_backward_traffic(B, E),
    )
    yield Operation(
        "update_loads",
        lambda: update_loads(loads, loads, loads, loads[0], 0.02, 0.5),
        Traffic(flops=3 * E, streamed=5 * E * size),
    )
    yield Operation(
        "update_expert_bias",
        lambda: update_expert_bias(loads, loads, loads[0] > 0, 1e-3),
        Traffic(flops=6 * E, streamed=3 * E * size),
    )


def predicted_seconds(traffic: Traffic, gpu: Gpu, unit: str) -> float:
    """The slowest of arithmetic, memory and L2. Gathered rows come from L2 if they fit, one pass at a time."""
    held = traffic.pool <= gpu.l2_bytes * traffic.passes
    memory = traffic.streamed + (traffic.pool if held else max(traffic.gathered, traffic.pool))
    return max(
        traffic.flops / gpu.flops[unit],
        memory / gpu.memory,
        (traffic.streamed + traffic.gathered) / gpu.l2,
    )
