"""Stage `primitives`: what the machine can do, then each primitive beside its floor and beside torch's own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from sae_lens_switch_kernels import products, sparse_autoencode, torch_backend
from sae_lens_switch_kernels.indexing import expert_groups, latent_index
from torch import Tensor
from torch.nn import functional

from gpu import optimisers, shapes
from gpu.correctness import case_of, kernels
from gpu.record import Case, Record, summary
from gpu.shapes import Shape, Work
from gpu.timing import PRECISIONS, dtype_of, free, median_ms, normal, rotated, triton_runs, use

NARROW = [Shape(8192, 768, 24576, 32, E) for E in (1, 32, 128)]
WIDE = [Shape(8192, 2304, 65536, 64, E) for E in (1, 64)]
VERY_WIDE = Shape(8192, 4096, 131072, 32)
# Rows of select_topk alone, of every width that an expert may have.
ROWS, TINY_ROWS = [Shape(8192, 1, M, 32) for M in (192, 768, 1024, 2048, 4096, 8192)], [Shape(8, 1, 16, 2)]
TINY = [Shape(8, 16, 32, 2, E) for E in (1, 2)]
# Of the threshold between sparse and dense products inside an expert: M / K by the number of experts.
SWEEP, TINY_SWEEP = (Shape(8192, 768, 24576, 32, 1), (128, 64, 32, 16, 8, 4)), (TINY[0], (4, 1))


class Primitive(NamedTuple):
    """One call of ours on a case's tensors, what it must at least do, and others' ways to the same result."""

    work: Work
    ours: Callable[[SimpleNamespace], Any]
    theirs: dict[str, Callable[[SimpleNamespace], Any]]


def cases(args: argparse.Namespace) -> Iterator[Case]:
    device = args.device
    yield "ceiling, copy", lambda: copy_ceiling(device, args.tiny)
    for precision in PRECISIONS:
        yield f"ceiling, {precision}", lambda p=precision: product_ceiling(p, device, args.tiny)
    precisions = ("bf16", "fp32") if args.tiny else ("bf16", "tf32", "fp32")
    narrow, wide = (TINY, []) if args.tiny else (NARROW, WIDE)
    for shape, precision in product(TINY_ROWS if args.tiny else ROWS, ("bf16", "fp32")):
        yield (
            f"select_topk, {shape.B:,} rows of {shape.M:,}, k {shape.K}, {precision}",
            partial(rows, shape, precision, args),
        )
    yield from of_shapes(narrow, precisions, args)
    yield from optimisers.cases([narrow[0]] if args.tiny else [narrow[0], WIDE[0], VERY_WIDE], args)
    shape, experts = TINY_SWEEP if args.tiny else SWEEP
    for precision, n in product(precisions, experts):
        swept = shape._replace(E=n)
        yield f"sparse or dense, M/K {swept.M // swept.K}, {precision}", partial(sweep, swept, precision, device)
    yield from of_shapes(wide, precisions, args)


def of_shapes(shapes_: list[Shape], precisions: tuple[str, ...], args: argparse.Namespace) -> Iterator[Case]:
    for shape, precision in product(shapes_, precisions):
        for name in primitives_of(shape, precision):
            yield f"{name}, {shape}, {precision}", partial(beside, name, shape, precision, args)


def copy_ceiling(device: str, tiny: bool) -> dict[str, Any]:
    n = 1 << (20 if tiny else 29)
    pairs = rotated(lambda i: [normal(n, seed=i, device=device), torch.zeros(n, device=device)], 8 * n, device)
    ms = median_ms(lambda pair: pair[1].copy_(pair[0]), pairs, device)
    free()
    return {"ms": ms, "per_second": 8 * n / (1e-3 * ms)}


def product_ceiling(precision: str, device: str, tiny: bool) -> dict[str, Any]:
    n = 256 if tiny else 8192
    use(precision)
    pairs = rotated(lambda i: normal(2, n, n, seed=i, device=device, dtype=dtype_of(precision)), 8 * n * n, device)
    ms = median_ms(lambda pair: pair[0] @ pair[1].T, pairs, device)
    free()
    return {"ms": ms, "per_second": 2 * n**3 / (1e-3 * ms)}


def primitives_of(s: Shape, precision: str) -> dict[str, Primitive]:
    size = dtype_of(precision).itemsize
    if s.E > 1:
        return grouped_primitives(s, size)
    found = {"topk_encode": Primitive(shapes.encode(s, size), ours_encode, {"mm, topk": mm_and_topk})}
    wide = Primitive(shapes.select(s, size), ours_select, {"torch.topk": lambda c: c.pre.topk(c.s.K, sorted=False)})
    found["select_topk"] = wide
    if precision == "tf32":  # nothing else multiplies matrices
        return found
    return found | {
        "sparse_decode": Primitive(
            shapes.decode(s, size),
            lambda c: kernels(c.dtype).sparse_decode(c.values, c.indices, c.W),
            {
                "embedding_bag": lambda c: functional.embedding_bag(
                    c.indices, c.W, mode="sum", per_sample_weights=c.values.to(c.W.dtype)
                )
            },
        ),
        "matmul_at_indices": Primitive(
            shapes.decode(s, size),
            lambda c: kernels(c.dtype).matmul_at_indices(c.g, c.W, c.indices),
            {"gather, bmm": lambda c: torch_backend.matmul_at_indices(c.g, c.W, c.indices)},
        ),
        "latent_index": Primitive(
            shapes.index(s),
            lambda c: kernels(c.dtype).latent_index(c.indices, c.s.F),
            {"torch.sort, searchsorted": lambda c: latent_index(c.indices, c.s.F)},
        ),
        "latent_weight_grads": Primitive(
            shapes.weight_grads(s, size),
            lambda c: kernels(c.dtype).latent_weight_grads(c.index, c.values, c.g, c.d_pre, c.x),
            {
                "embedding_bag, twice": lambda c: torch_backend.latent_weight_grads(
                    c.index, c.values, c.g, c.d_pre, c.x
                ),
                "dense mm, twice": lambda c: (c.pre.T @ c.g, c.pre.T @ c.x),
            },
        ),
    }


def grouped_primitives(s: Shape, size: int) -> dict[str, Primitive]:
    work = shapes.grouped(s, size)
    found = {"topk_encode": Primitive(shapes.encode(s, size), ours_encode, {"grouped_mm, topk": grouped_mm_and_topk})}
    found["select_topk"] = Primitive(
        shapes.select(s, size), ours_select, {"torch.topk": lambda c: c.pre.topk(c.s.K, sorted=False)}
    )
    found["expert_groups"] = Primitive(
        shapes.index(s._replace(F=s.E, K=1)),
        lambda c: kernels(c.dtype).expert_groups(c.expert, c.s.E),
        {"torch.sort, searchsorted": lambda c: expert_groups(c.expert, c.s.E)},
    )
    if not triton_runs(torch.bfloat16 if size == 2 else torch.float32):
        return found
    from sae_lens_switch_kernels.triton_backend import grouped_matmul as grouped
    from sae_lens_switch_kernels.triton_backend.grouped_library import product

    return found | {
        "grouped_encode": Primitive(
            work,
            lambda c: grouped._grouped_matmul(c.x, c.W, c.groups.offsets_E1, transposed=True),
            {
                "F.grouped_mm": grouped_mm_encode,
                "F.grouped_mm, as we call it": lambda c: product(c.x, c.W, c.groups.offsets_E1),
                "bmm, even experts": lambda c: c.x_even @ c.W_EMD.transpose(1, 2),
            },
        ),
        "grouped_decode": Primitive(
            work,
            lambda c: grouped.grouped_decode(c.pre, c.W, c.groups.offsets_E1),
            {"F.grouped_mm": lambda c: functional.grouped_mm(c.pre, c.W_EMD, offs=c.ends)},
        ),
        "grouped_weight_grad": Primitive(
            work,
            lambda c: grouped.grouped_weight_grad(c.pre, c.g, c.groups.offsets_E1),
            {"F.grouped_mm": lambda c: functional.grouped_mm(c.pre.T, c.g, offs=c.ends)},
        ),
    }


def ours_encode(c: SimpleNamespace) -> Any:
    return kernels(c.dtype).topk_encode(c.x, c.W, c.s.K, c.groups, None, None, c.dtype)


def ours_select(c: SimpleNamespace) -> Any:
    if not triton_runs(c.dtype):
        return torch_backend.select_topk(c.pre, c.s.K)
    from sae_lens_switch_kernels.triton_backend.select_topk import select_topk

    return select_topk(c.pre, c.s.K)


def mm_and_topk(c: SimpleNamespace) -> Any:
    return (c.x @ c.W.T).topk(c.s.K, sorted=False)


def grouped_mm_encode(c: SimpleNamespace) -> Tensor:
    return functional.grouped_mm(c.x, c.W_EMD.transpose(1, 2), offs=c.ends)


def grouped_mm_and_topk(c: SimpleNamespace) -> Any:
    return grouped_mm_encode(c).topk(c.s.K, sorted=False)


def tensors(s: Shape, precision: str, device: str, seed: int) -> SimpleNamespace:
    """As of the stage `correctness`, and what only timing needs; others for another seed."""
    c = case_of(s, precision, device, seed)
    c.index = latent_index(c.indices, s.F)
    c.pre = normal(s.B, s.M, seed=seed + 100, device=device, dtype=c.dtype)
    c.W_EMD = c.W.view(s.E, s.M, s.D)
    c.ends = c.groups.offsets_E1[1:].to(torch.int32)
    c.x_even = c.x[: s.B // s.E * s.E].view(s.E, -1, s.D)
    return c


def beside(name: str, s: Shape, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    use(precision)
    size = dtype_of(precision).itemsize
    n_bytes = (s.F * s.D + 3 * s.B * s.D + s.B * s.M) * size
    inputs = rotated(lambda i: tensors(s, precision, args.device, 10 * i), n_bytes, args.device)
    primitive = primitives_of(s, precision)[name]
    record = Record(args.output / "primitives.json")
    ms = median_ms(primitive.ours, inputs, args.device)
    floor = shapes.ceilings_of(record.cases).ms(primitive.work, precision)
    theirs: dict[str, Any] = {}
    for label, call in primitive.theirs.items():
        try:
            theirs[label] = median_ms(call, inputs, args.device)
        except (
            AttributeError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # not in this torch, or not for this dtype
            theirs[label] = summary(error)
    del inputs
    free()
    found = {"ms": ms, "floor_ms": floor, "times_floor": ms / floor, "theirs_ms": theirs}
    return found | {"flops": primitive.work.flops, "bytes": primitive.work.bytes}


def rows(s: Shape, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """select_topk, its slower ways and torch.topk on rows without anything around them."""
    use(precision)
    dtype = dtype_of(precision)

    def make(i: int) -> SimpleNamespace:
        return SimpleNamespace(s=s, dtype=dtype, pre=normal(s.B, s.M, seed=i, device=args.device, dtype=dtype))

    inputs = rotated(make, s.B * s.M * dtype.itemsize, args.device)
    work = shapes.select(s, dtype.itemsize)
    ms = median_ms(ours_select, inputs, args.device)
    theirs = {"torch.topk": median_ms(lambda c: c.pre.topk(s.K, sorted=False), inputs, args.device)}
    if triton_runs(dtype):
        from sae_lens_switch_kernels.triton_backend.select_topk import select_in_blocks
        from sae_lens_switch_kernels.triton_backend.topk_rows import topk_rows

        theirs["one launch"] = median_ms(lambda c: topk_rows(c.pre, s.K), inputs, args.device)
        theirs["in blocks"] = median_ms(lambda c: select_in_blocks(c.pre, s.K), inputs, args.device)
    del inputs
    free()
    floor = shapes.ceilings_of(Record(args.output / "primitives.json").cases).ms(work, precision)
    found = {"ms": ms, "floor_ms": floor, "times_floor": ms / floor, "theirs_ms": theirs}
    return found | {"flops": work.flops, "bytes": work.bytes}


def sweep(s: Shape, precision: str, device: str) -> dict[str, Any]:
    """Forward and backward with sparse and with dense products inside experts."""
    use(precision)
    n_bytes = 2 * s.F * s.D * dtype_of(precision).itemsize
    inputs = rotated(lambda i: case_of(s, precision, device, 10 * i), n_bytes, device)

    def both(c: SimpleNamespace) -> None:
        W_enc, W_dec = (c.W.detach().requires_grad_() for _ in range(2))
        out_BD = sparse_autoencode(c.x, W_enc, W_dec, s.K, expert_B=c.expert, n_experts=s.E).out_BD
        torch.autograd.grad(out_BD, [W_enc, W_dec], c.g)

    found = {}
    before = products._DENSE_UP_TO
    try:
        for route, limit in (("sparse", 0), ("dense", 10**9)):
            products._DENSE_UP_TO = {device: limit}
            found[f"{route}_ms"] = median_ms(both, inputs, device)
    finally:
        products._DENSE_UP_TO = before
    del inputs
    free()
    return {"M/K": s.M / s.K, **found, "dense_wins_by": found["sparse_ms"] / found["dense_ms"]}
