"""Stage `correctness`: every kernel and every gradient against dense float64, written out here.

Uninitialised memory is NaN while a kernel runs, and each runs twice: the same bits. Tokens are unevenly spread: the
last expert has none, the first 40 %, and one latent is active on 40 % of the tokens.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from sae_lens_switch_kernels import backend, torch_backend
from sae_lens_switch_kernels.indexing import ExpertGroups, expert_groups, latent_index, one_group
from torch import Tensor

from gpu import adam_kernels, gradients, repeats, step_kernels
from gpu.record import Case
from gpu.shapes import Shape
from gpu.timing import PRECISIONS, dtype_of, free, normal, triton_runs, use

# Error of a result in units of its norm. TF32 and bf16 keep 10 and 8 bits; sums are float32 in all three.
TOLERATED = {"fp32": 1e-5, "tf32": 2e-3, "bf16": 8e-3}
ODD, REAL = Shape(515, 80, 318, 5, 6), Shape(4096, 768, 24576, 32, 32)
TINY = Shape(13, 20, 21, 3, 3)
WIDE_TILES = Shape(2048, 2304, 8192, 64, 8)
TRAINED = ("switch", "sparse_topk", "sparse_abstopk", "sparse_batchtopk", "sparse_matryoshka_batchtopk")


def cases(args: argparse.Namespace) -> Iterator[Case]:
    on_gpu = args.device == "cuda"
    shapes = {"odd": TINY} if args.tiny else {"odd": ODD, "real": REAL, "wide": WIDE_TILES}
    precisions = ("fp32", "bf16") if args.tiny else PRECISIONS  # a CPU has no TF32
    for dtype in (torch.float32, torch.bfloat16) if on_gpu else ():
        for name in backend.PRIMITIVES:
            yield f"self-check, {name}, {dtype}", lambda n=name, t=dtype: self_check(n, t)
    for label, shape in shapes.items():
        for precision in precisions:
            for name, check in CHECKS.items():
                if name in (*adam_kernels.CHECKS, "clip", "route") and precision != "fp32":
                    continue  # all weights are stepped in it
                yield (
                    f"{name}, {label}, {precision}",
                    lambda c=check, s=shape, p=precision: against_float64(c, s, p, args.device),
                )
        yield from gradients.cases(label, shape, (*precisions, "autocast"), args.device)
    for kind in TRAINED:
        s = shapes["odd"] if kind == "switch" else shapes["odd"]._replace(E=1)
        for precision in (*precisions, "autocast") if on_gpu else ("fp32",):
            for optimizer in ("adam", "row_sparse_adam"):
                yield (
                    f"training of {kind} twice, {precision}, {optimizer}",
                    lambda k=kind, s=s, p=precision, o=optimizer: repeats.check(k, s, p, args.device, optimizer=o),
                )
        yield (
            f"training of {kind} twice, fp32, AuxK",
            lambda k=kind, s=s: repeats.check(k, s, "fp32", args.device, aux_loss_coefficient=1 / 32, window=1),
        )
    for kind in TRAINED:
        yield (
            f"nondeterministic operators, {kind}",
            lambda k=kind: gradients.nondeterministic(k, args.device, args.tiny),
        )
    if on_gpu and not args.tiny:
        yield "beyond 2^31 elements", lambda: beyond_int32(args.device)


def kernels(dtype: torch.dtype) -> Any:
    """The Triton forms; the plain ones where nothing runs Triton: its interpreter cannot multiply bfloat16."""
    if not triton_runs(dtype):
        return torch_backend
    from sae_lens_switch_kernels import triton_backend

    return triton_backend


def self_check(name: str, dtype: torch.dtype) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        proven = backend._proven(name, torch.device("cuda", torch.cuda.current_device()), dtype)
    if not proven:
        raise AssertionError(str(caught[-1].message) if caught else "refused")
    return {}


@contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated without being written is NaN, or the smallest integer."""
    empty, new_empty, empty_like = torch.empty, Tensor.new_empty, torch.empty_like

    def poison(t: Tensor) -> Tensor:
        return t.fill_(torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).min) if t.dtype != torch.bool else t

    torch.empty = lambda *a, **k: poison(empty(*a, **k))
    torch.empty_like = lambda *a, **k: poison(empty_like(*a, **k))
    Tensor.new_empty = lambda *a, **k: poison(new_empty(*a, **k))  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.empty, Tensor.new_empty, torch.empty_like = empty, new_empty, empty_like  # type: ignore[method-assign]


def case_of(s: Shape, precision: str, device: str, first_seed: int = 0) -> SimpleNamespace:
    """Tensors of a shape, tokens sorted by expert; experts and latents as uneven as said above."""
    dtype = dtype_of(precision)

    def draw(seed: int, *shape: int) -> Tensor:
        return normal(*shape, seed=first_seed + seed, device=device, dtype=dtype)

    generator = torch.Generator(device).manual_seed(first_seed + 7)
    expert_B = torch.randint(0, max(1, s.E - 1), (s.B,), generator=generator, device=device)
    if s.E > 2:
        expert_B[torch.rand(s.B, generator=generator, device=device) < 0.4] = 0
    expert_B = expert_B.sort().values
    indices_BK = torch.rand(s.B, s.M, generator=generator, device=device).topk(s.K).indices
    hot_B = torch.rand(s.B, generator=generator, device=device) < 0.4
    indices_BK[hot_B, 0] = torch.where((indices_BK[hot_B] == 0).any(1), indices_BK[hot_B, 0], 0)
    indices_BK += expert_B.unsqueeze(1) * s.M
    return SimpleNamespace(
        s=s,
        dtype=dtype,
        x=draw(0, s.B, s.D),
        g=draw(1, s.B, s.D),
        W=draw(2, s.F, s.D) / s.D**0.5,
        values=draw(3, s.B, s.K),
        d_pre=draw(4, s.B, s.K),
        bias=draw(5, s.F),
        scale=draw(6, s.F).abs() + 0.5,
        expert=expert_B,
        indices=indices_BK,
        groups=ExpertGroups(None, expert_groups(expert_B, s.E).offsets_E1),
    )


def dense(values_BK: Tensor, indices_BK: Tensor, width: int) -> Tensor:
    codes_BF = torch.zeros(len(values_BK), width, dtype=torch.float64, device=values_BK.device)
    return codes_BF.scatter_add_(1, indices_BK, values_BK.double())


Pairs = Iterator[tuple[str, Tensor, Tensor]]


def check_decode(p: Any, c: SimpleNamespace) -> Pairs:
    yield "out", p.sparse_decode(c.values, c.indices, c.W), dense(c.values, c.indices, c.s.F) @ c.W.double()


def check_dots(p: Any, c: SimpleNamespace) -> Pairs:
    truth_BK = (c.g.double() @ c.W.double().T).gather(1, c.indices)
    yield "out", p.matmul_at_indices(c.g, c.W, c.indices), truth_BK


def check_weight_grads(p: Any, c: SimpleNamespace) -> Pairs:
    index = latent_index(c.indices, c.s.F)
    ours = p.latent_weight_grads(index, c.values, c.g, c.d_pre, c.x)
    acts_BF, slopes_BF = dense(c.values, c.indices, c.s.F), dense(c.d_pre, c.indices, c.s.F)
    yield "dW_dec", ours.dW_dec_FD, acts_BF.T @ c.g.double()
    yield "dW_enc", ours.dW_enc_FD, slopes_BF.T @ c.x.double()
    yield "d_bias", ours.d_b_enc_F, slopes_BF.sum(0)


def check_grouped(p: Any, c: SimpleNamespace) -> Pairs:
    """The three products inside experts, from codes."""
    acts_BF, options = dense(c.values, c.indices, c.s.F), (c.groups, c.dtype)
    yield "decode", p.grouped_decode(c.values, c.indices, c.W, *options), acts_BF @ c.W.double()
    dots_BK = (c.g.double() @ c.W.double().T).gather(1, c.indices)
    yield "at indices", p.grouped_matmul_at_indices(c.g, c.W, c.indices, *options), dots_BK
    ours, slopes_BF = (
        p.grouped_weight_grads(c.values, c.indices, c.g, c.d_pre, c.x, c.s.F, *options),
        dense(c.d_pre, c.indices, c.s.F),
    )
    yield "dW_dec", ours.dW_dec_FD, acts_BF.T @ c.g.double()
    yield "dW_enc", ours.dW_enc_FD, slopes_BF.T @ c.x.double()
    yield "d_bias", ours.d_b_enc_F, slopes_BF.sum(0)


def check_sorts(p: Any, c: SimpleNamespace) -> Pairs:
    """Tokens by expert and codes by latent, exactly."""
    for ours, truth in (
        (p.expert_groups(c.expert, c.s.E), expert_groups(c.expert, c.s.E)),
        (p.latent_index(c.indices, c.s.F), latent_index(c.indices, c.s.F)),
    ):
        for name, a, b in zip(truth._fields, ours, truth, strict=True):
            yield name, a.double(), b.double()


def check_switch_encode(p: Any, c: SimpleNamespace) -> Pairs:
    values_BK, indices_BK = p.topk_encode(c.x, c.W, c.s.K, c.groups, None, None, c.dtype)
    pre_BF = c.x.double() @ c.W.double().T
    own_F = torch.arange(c.s.F, device=c.x.device) // c.s.M
    pre_BF.masked_fill_(own_F != c.expert.unsqueeze(1), -torch.inf)
    yield from selected(values_BK, indices_BK, pre_BF, pre_BF)


def check_topk_encode(p: Any, c: SimpleNamespace) -> Pairs:
    """One expert, with bias and scale."""
    groups = one_group(c.s.B, c.x.device)
    values_BK, indices_BK = p.topk_encode(c.x, c.W, c.s.K, groups, c.bias, c.scale, c.dtype)
    pre_BF = c.x.double() @ c.W.double().T + c.bias.double()
    yield from selected(values_BK, indices_BK, pre_BF, pre_BF * c.scale.double())


def check_select_topk(p: Any, c: SimpleNamespace) -> Pairs:
    """Rows that one warp holds, rows that several hold, rows searched in blocks; with many ties, and by magnitude."""
    rows = c.s.B if c.x.is_cuda else 2  # a CPU searches them one by one
    for width in (192, 1000, 4096, 8200):
        pre_BM = normal(rows, width, seed=width, device=c.x.device, dtype=c.dtype)
        kinds = ("", pre_BM, False), (", ties", (4 * pre_BM).round(), False), (", magnitude", pre_BM, True)
        for label, t_BM, by_magnitude in kinds:
            values_BK, indices_BK = p.select_topk(t_BM.clone(), c.s.K, by_magnitude=by_magnitude)
            exact_BM = t_BM.double()
            keys_BM = exact_BM.abs() if by_magnitude else exact_BM
            for name, ours, truth in selected(values_BK, indices_BK, exact_BM, keys_BM):
                yield f"{name}, {width}{label}", ours, truth


def selected(values_BK: Tensor, indices_BK: Tensor, pre_BF: Tensor, keys_BF: Tensor) -> Pairs:
    """Values are those at their indices, which differ within a row and have the largest keys, but for near-ties."""
    yield "values", values_BK, pre_BF.gather(1, indices_BK)
    yield "keys", keys_BF.gather(1, indices_BK).sort(1).values, keys_BF.topk(values_BK.shape[1]).values.sort(1).values
    repeated = (indices_BK.sort(1).values.diff(dim=1) == 0).sum()
    yield "repeated indices", repeated.unsqueeze(0), torch.zeros(1, dtype=torch.float64, device=values_BK.device)


CHECKS: dict[str, Callable[[Any, SimpleNamespace], Pairs]] = {
    "sparse_decode": check_decode,
    "matmul_at_indices": check_dots,
    "latent_weight_grads": check_weight_grads,
    "grouped": check_grouped,
    "sorts": check_sorts,
    "select_topk": check_select_topk,
    "topk_encode, experts": check_switch_encode,
    "topk_encode, bias and scale": check_topk_encode,
    **adam_kernels.CHECKS,
    **step_kernels.CHECKS,
}


def against_float64(check: Callable[..., Pairs], s: Shape, precision: str, device: str) -> dict[str, Any]:
    use(precision)
    given = case_of(s, precision, device)
    with poisoned():
        first = list(check(kernels(given.dtype), given))
        again = list(check(kernels(given.dtype), given))
    errors = {name: relative_error(ours, truth) for name, ours, truth in first}
    differ = [name for (name, a, _), (_, b, _) in zip(first, again, strict=True) if not torch.equal(a, b)]
    del first, again, given
    free()
    return judged(errors, TOLERATED[precision], differ)


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """Of the norm; where the truth is zero everywhere, the error's own."""
    size = truth.double().norm().item()
    return (ours.double() - truth).norm().item() / (size or 1.0)


def judged(errors: dict[str, float], tolerated: float, differ: list[str]) -> dict[str, Any]:
    """What is recorded; raises AssertionError if it is wrong."""
    rounded = {name: float(f"{error:.3g}") for name, error in errors.items()}
    wrong = {name: error for name, error in rounded.items() if not error <= tolerated}
    if wrong or differ:
        raise AssertionError(f"errors {wrong or rounded}, tolerated {tolerated}; other bits on a second run: {differ}")
    return {"errors": rounded, "tolerated": tolerated}


def beyond_int32(device: str) -> dict[str, Any]:
    """Rows of a matrix of more than 2^31 elements, the last ones: an offset in 32 bits would wrap around."""
    D, K, B = 768, 8, 64
    F = 2**31 // D + 4096
    if torch.cuda.mem_get_info()[0] < 4 * F * D * 2:
        return {"skipped": "not enough memory"}
    use("bf16")
    W_FD = torch.empty(F, D, dtype=torch.bfloat16, device=device).normal_()
    indices_BK = F - 1 - torch.arange(B * K, device=device).view(B, K) * 7
    values_BK = normal(B, K, seed=0, device=device, dtype=torch.bfloat16)
    g_BD = normal(B, D, seed=1, device=device, dtype=torch.bfloat16)
    p, rows_BKD = kernels(W_FD.dtype), W_FD[indices_BK].double()
    ours = p.latent_weight_grads(latent_index(indices_BK, F), values_BK, g_BD).dW_dec_FD
    grads_BKD = values_BK.double().unsqueeze(2) * g_BD.double().unsqueeze(1)
    errors = {
        "decode": relative_error(
            p.sparse_decode(values_BK, indices_BK, W_FD), (values_BK.double().unsqueeze(2) * rows_BKD).sum(1)
        ),
        "dots": relative_error(p.matmul_at_indices(g_BD, W_FD, indices_BK), (rows_BKD * g_BD.double()[:, None]).sum(2)),
        "weight grads": relative_error(ours[indices_BK], grads_BKD),
    }
    del W_FD, rows_BKD, ours
    free()
    return judged(errors, TOLERATED["bf16"], [])
