"""Every Triton primitive against reference.py or plain torch in float64: on a GPU, else in Triton's interpreter.

Judged by error ratio: our error may not be more than a few times that of plain torch in the same dtype.
"""

import os
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens_switch_kernels import reference
from sae_lens_switch_kernels.indexing import LatentIndex, latent_index
from sae_lens_switch_kernels.triton_backend.blocks import candidate_block
from torch import Tensor

pytest.importorskip("triton")

from sae_lens_switch_kernels.triton_backend import latent_weight_grads as latents  # noqa: E402
from sae_lens_switch_kernels.triton_backend.gather import matmul_at_indices, sparse_decode  # noqa: E402
from sae_lens_switch_kernels.triton_backend.grouped_matmul import grouped_decode, grouped_encode, grouped_weight_grad  # noqa: E402
from sae_lens_switch_kernels.triton_backend.latent_weight_grads import latent_weight_grads  # noqa: E402
from sae_lens_switch_kernels.triton_backend.select_topk import select_topk  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="neither a GPU nor TRITON_INTERPRET=1"
)

# B, D, F, K: widths that are no power of two and no multiple of 16, one token, K of a single slot and of many
SHAPES = [(7, 48, 20, 5), (3, 576, 12, 32), (2, 1000, 10, 5), (5, 1, 9, 1), (4, 17, 12, 3), (1, 48, 9, 32)]
shapes = pytest.mark.parametrize(("B", "D", "F", "K"), SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(monkeypatch):
    """A kernel that forgets part of its output is found out, whatever the memory held before."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def poison(t: Tensor) -> Tensor:
        return t.fill_(float("nan") if t.is_floating_point() else -(2**31) + 1)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


@pytest.fixture(autouse=True, scope="module")
def interpreter_multiplies_bfloat16():
    """Triton's interpreter keeps bf16 as 16-bit integers, and its dot multiplies those."""
    if DEVICE == "cuda":
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def lift(t: TensorHandle) -> TensorHandle:
        if t.dtype != tl.bfloat16:
            return t
        return TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    create_dot = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(self, lift(a), lift(b), *rest)
    yield
    InterpreterBuilder.create_dot = create_dot


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def assert_as_good_as_torch(name: str, actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Error against float64 at most three times plain torch's, and never judged finer than one rounding."""
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} is not {tuple(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype} is not {plain.dtype}"
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    error, allowed = rms(actual - exact), 3 * rms(plain - exact) + 4 * torch.finfo(actual.dtype).eps * rms(exact)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def random_indices(B: int, F: int, K: int, seed: int = 0) -> Tensor:
    """Distinct in a row if the latents suffice."""
    generator = torch.Generator().manual_seed(seed)
    if K > F:
        return torch.randint(0, F, (B, K), generator=generator).to(DEVICE)
    return torch.rand(B, F, generator=generator).topk(K).indices.to(DEVICE)


def check_decode(values: Tensor, indices: Tensor, W: Tensor) -> None:
    exact = reference.sparse_decode(values.double(), indices, W.double())
    plain = torch.einsum("bk,bkd->bd", values, W[indices.long()])
    assert_as_good_as_torch("sparse_decode", sparse_decode(values, indices, W), exact, plain)


def check_matmul_at_indices(g: Tensor, W: Tensor, indices: Tensor) -> None:
    exact = reference.matmul_at_indices(g.double(), W.double(), indices)
    plain = torch.einsum("bd,bkd->bk", g, W[indices.long()])
    assert_as_good_as_torch("matmul_at_indices", matmul_at_indices(g, W, indices), exact, plain)


def check_latent_weight_grads(values: Tensor, indices: Tensor, F: int, g: Tensor, d_pre: Tensor, x: Tensor) -> None:
    def exact(weights: Tensor, rows: Tensor) -> Tensor:
        return reference.latent_weight_grad(weights.double(), indices, rows.double(), F)

    def plain(weights: Tensor, rows: Tensor) -> Tensor:
        terms = (weights.float()[:, :, None] * rows.float()[:, None, :]).flatten(0, 1)
        return torch.zeros(F, rows.shape[1], device=DEVICE).index_add_(0, indices.flatten(), terms).to(rows.dtype)

    index = latent_index(indices, F)
    grads = latent_weight_grads(index, values, g, d_pre, x)
    assert grads.dW_enc_FD is not None
    assert grads.d_b_enc_F is not None
    ones = torch.ones_like(g[:, :1])
    assert_as_good_as_torch("dW_dec", grads.dW_dec_FD, exact(values, g), plain(values, g))
    assert_as_good_as_torch("dW_enc", grads.dW_enc_FD, exact(d_pre, x), plain(d_pre, x))
    assert_as_good_as_torch("d_b_enc", grads.d_b_enc_F[:, None], exact(d_pre, ones), plain(d_pre, ones))
    fired = torch.bincount(indices[values > 0], minlength=F)
    assert grads.fired_F.dtype == torch.int32
    assert torch.equal(grads.fired_F.long(), fired)

    decoder_only = latent_weight_grads(index, values, g)
    assert decoder_only.dW_enc_FD is None
    assert decoder_only.d_b_enc_F is None
    for ours, again in zip(decoder_only, grads, strict=True):
        assert ours is None or torch.equal(ours, again)


@shapes
@dtypes
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_gathers(B, D, F, K, dtype, index_dtype):
    indices = random_indices(B, F, K).to(index_dtype)
    W = random(F, D, dtype=dtype)
    check_decode(random(B, K, dtype=dtype, seed=1), indices, W)
    check_matmul_at_indices(random(B, D, dtype=dtype, seed=2), W, indices)


@shapes
@dtypes
def test_latent_weight_grads(B, D, F, K, dtype):
    values, d_pre, g, x = (random(B, n, dtype=dtype, seed=seed) for seed, n in enumerate((K, K, D, D)))
    check_latent_weight_grads(values, random_indices(B, F, K), F, g, d_pre, x)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("one latent has all", torch.float32),
        ("hot latents", torch.bfloat16),
        ("piece borders", torch.float32),
        ("all negative", torch.float32),
        ("zero values", torch.bfloat16),
    ],
    ids=str,
)
def test_latents_of_every_length(case, dtype):
    """Long segments are cut into pieces; their borders fall anywhere, and latents that never fire are zero."""
    B, D, F, K = 150, 20, 11, 3
    values, d_pre, g, x = (random(B, n, dtype=dtype, seed=seed) for seed, n in enumerate((K, K, D, D)))
    indices = random_indices(B, F, K)
    if case == "one latent has all":
        indices[:] = 4
    elif case == "hot latents":
        indices[:, 0], indices[:, 1] = 0, F - 1
        indices[:, 2] = 5
    elif case == "piece borders":
        lengths = torch.tensor([64, 0, 65, 63, 128, 1, 129])
        indices = torch.arange(7).repeat_interleave(lengths).reshape(B, K).to(DEVICE)
    elif case == "all negative":
        values = -values.abs()
    else:
        values[:, 1:] = 0
    check_latent_weight_grads(values, indices, F, g, d_pre, x)


def test_pieces_are_a_matter_of_speed_only(monkeypatch):
    """Whatever the length of a piece, the sums agree: every piece is found by its owner, none is counted twice."""
    indices = random_indices(60, 5, 4)
    values, g = random(60, 4), random(60, 8, seed=1)
    index, exact = latent_index(indices, 5), reference.latent_weight_grad(values.double(), indices, g.double(), 5)
    for piece in (8, 16):
        monkeypatch.setattr(latents, "PIECE", piece)
        assert_as_good_as_torch("dW", latent_weight_grads(index, values, g).dW_dec_FD, exact, exact.float())


def test_an_index_of_int32():
    indices = random_indices(60, 5, 4)
    index = latent_index(indices, 5)
    values, g = random(60, 4), random(60, 8, seed=1)
    narrow = LatentIndex(index.order_N.int(), index.starts_F1.int())
    assert torch.equal(
        latent_weight_grads(narrow, values, g).dW_dec_FD, latent_weight_grads(index, values, g).dW_dec_FD
    )


def test_an_index_twice_in_a_row_counts_twice():
    indices = random_indices(20, 6, 1).expand(20, 4)
    values, d_pre, g, x = (random(20, n, seed=seed) for seed, n in enumerate((4, 4, 16, 16)))
    check_decode(values, indices, random(6, 16))
    check_matmul_at_indices(g, random(6, 16), indices)
    check_latent_weight_grads(values, indices, 6, g, d_pre, x)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "offset"])
def test_inputs_that_are_not_contiguous(layout):
    B, D, F, K, E = 6, 24, 20, 4, 2

    def awkward(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.T.contiguous().T
        if layout == "strided":
            return t.repeat_interleave(2, 1)[:, ::2]
        if layout == "expanded":
            return t[:1].expand_as(t)
        return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)  # not aligned to 16 bytes

    indices = awkward(random_indices(B, F, K))
    values, d_pre, g, x = (awkward(random(B, n, seed=seed)) for seed, n in enumerate((K, K, D, D)))
    a, pre = awkward(random(B, F // E)), awkward(random(B, 500))
    W = random(F, D) if layout == "expanded" else awkward(random(F, D))
    check_decode(values, indices, W)
    check_matmul_at_indices(g, W, indices)
    check_latent_weight_grads(values, indices, F, g, d_pre, x)
    check_grouped(x, a, W, torch.tensor([0, 2, B], device=DEVICE))
    check_select(pre, 3)


def test_an_empty_batch():
    no_indices = torch.zeros(0, 3, dtype=torch.long, device=DEVICE)
    W, none, rows = random(12, 8), random(0, 3), random(0, 8)
    assert sparse_decode(none, no_indices, W).shape == (0, 8)
    no_slots = torch.zeros(3, 0, dtype=torch.long, device=DEVICE)
    assert torch.equal(sparse_decode(random(3, 0), no_slots, W), torch.zeros(3, 8, device=DEVICE))
    assert matmul_at_indices(random(3, 8), W, no_slots).shape == (3, 0)
    assert latent_weight_grads(latent_index(no_slots, 2), random(3, 0), random(3, 8)).dW_dec_FD.count_nonzero() == 0
    assert matmul_at_indices(rows, W, no_indices).shape == (0, 3)
    grads = latent_weight_grads(latent_index(no_indices, 12), none, rows, none, rows)
    assert all(t is not None and t.count_nonzero() == 0 for t in grads)
    assert [t.shape for t in select_topk(random(0, 500), 3)] == [(0, 3), (0, 3)]
    offsets = torch.zeros(4, dtype=torch.long, device=DEVICE)
    assert grouped_encode(rows, W, offsets).shape == (0, 4)
    assert grouped_decode(random(0, 4), W, offsets).shape == (0, 8)
    assert torch.equal(grouped_weight_grad(random(0, 4), rows, offsets), torch.zeros(12, 8, device=DEVICE))


def check_select(pre: Tensor, k: int, bias: Tensor | None = None, scale: Tensor | None = None) -> None:
    values, indices = select_topk(pre, k, bias, scale)
    assert values.dtype == pre.dtype
    assert indices.dtype == torch.int64
    assert values.shape == indices.shape == (len(pre), k)
    assert all(len(set(row)) == k and set(row) <= set(range(pre.shape[1])) for row in indices.tolist())
    shifted = pre if bias is None else pre.float() + bias.float()
    keys = shifted if scale is None else shifted.float() * scale.float()
    # The same keys are chosen; which of equal ones is free.
    assert torch.equal(keys.gather(1, indices).sort(1).values, keys.topk(k).values.sort(1).values)
    torch.testing.assert_close(values, shifted.gather(1, indices).to(pre.dtype), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("R", "F", "k"),
    [(5, 1000, 3), (2, 4096, 32), (9, 65, 1), (3, 5000, 1), (2, 300, 300), (4, 37, 5), (3, 1, 1), (2, 700, 128)],
    ids=str,
)
@dtypes
def test_select_topk(R, F, k, dtype):
    pre, bias, scale = (random(n, F, dtype=dtype, seed=seed) for seed, n in enumerate((R, 1, 1)))
    check_select(pre, k)
    check_select(pre, k, bias=bias[0])
    check_select(pre, k, scale=scale[0].abs())
    check_select(pre, k, bias[0], scale[0].abs())


@pytest.mark.parametrize("case", ["all equal", "few values", "all negative", "minus infinity", "sorted", "one block"])
def test_select_topk_in_awkward_rows(case):
    R, F, k = 3, 1003, 4  # the last block is not full
    assert F % candidate_block(F, k)
    pre = random(R, F)
    if case == "all equal":
        pre = torch.zeros_like(pre)
    elif case == "few values":
        pre = pre.round()
    elif case == "all negative":
        pre = -pre.abs() - 1e30
    elif case == "minus infinity":
        pre[:, : F - 2] = -float("inf")
        pre[0] = -float("inf")
    elif case == "sorted":
        pre = pre.sort(1).values
    else:
        pre[:, 64:72] += 100
    check_select(pre, k)


def test_padding_is_never_chosen_whichever_of_equals_torch_prefers(monkeypatch):
    def last_of_equals(t: Tensor, k: int, sorted: bool = True):  # noqa: A002, ARG001
        order = t.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :k]
        indices = (t.shape[1] - 1 - order).sort(1).values
        return torch.return_types.topk((t.gather(1, indices), indices))

    pre = torch.full((2, 1003), -float("inf"), device=DEVICE)
    pre[1, -2:] = 1.0
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "topk", last_of_equals)
        _, indices = select_topk(pre, 4)
    assert indices.max() < 1003
    assert {1001, 1002} < set(indices[1].tolist())


@pytest.mark.parametrize("F", [40, 1003])
def test_select_topk_takes_nan_for_the_largest_as_torch_does(F):
    pre = random(4, F)
    pre[0, 7], pre[1], pre[2, 3] = float("nan"), float("nan"), float("inf")
    values, indices = select_topk(pre, 4)
    assert all(len(set(row)) == 4 for row in indices.tolist())
    assert values.isnan().sum(1).tolist() == [1, 4, 0, 0]
    assert float("inf") in values[2]


def check_grouped(x: Tensor, a: Tensor, W: Tensor, offsets: Tensor) -> None:
    M, bounds = a.shape[1], offsets.tolist()
    experts = [(slice(s, e), slice(i * M, (i + 1) * M)) for i, (s, e) in enumerate(pairwise(bounds))]

    def compare(name, ours, inputs, truth):
        exact = truth(*(t.double() for t in inputs))
        assert_as_good_as_torch(name, ours(*inputs, offsets), exact, truth(*(t.float() for t in inputs)).to(W.dtype))

    compare("encode", grouped_encode, (x, W), lambda x, W: torch.cat([x[rows] @ W[own].T for rows, own in experts]))
    compare("decode", grouped_decode, (a, W), lambda a, W: torch.cat([a[rows] @ W[own] for rows, own in experts]))
    compare("grad", grouped_weight_grad, (a, x), lambda a, x: torch.cat([a[rows].T @ x[rows] for rows, _ in experts]))


@pytest.mark.parametrize("routing", ["even", "uneven", "one expert has all", "an expert without rows", "tiny"])
@pytest.mark.parametrize(
    ("B", "D", "M", "E"), [(70, 48, 40, 4), (33, 100, 17, 7), (9, 17, 1, 3), (40, 1, 9, 2)], ids=str
)
@dtypes
def test_grouped(B, D, M, E, routing, dtype):
    if routing == "one expert has all":
        counts = torch.zeros(E).long()
        counts[E // 2] = B
    else:
        experts = torch.randint(0, E, (B,), generator=torch.Generator().manual_seed(1))
        if routing == "uneven":
            experts = experts // 2 * 2
        elif routing == "an expert without rows":
            experts = experts.clamp(max=E - 2)
        elif routing == "tiny":
            B = 1
            experts = experts[:1]
        elif routing == "even":
            experts = torch.arange(B) % E
        counts = experts.bincount(minlength=E)
    offsets = torch.cat([torch.zeros(1).long(), counts.cumsum(0)]).to(DEVICE)
    x, a, W = (random(n, m, dtype=dtype, seed=s) for s, (n, m) in enumerate(((B, D), (B, M), (E * M, D))))
    check_grouped(x, a, W, offsets.int() if routing == "even" else offsets)


def test_a_single_expert_is_a_plain_matrix_product():
    x, a, W = random(20, 30), random(20, 50), random(50, 30)
    check_grouped(x, a, W, torch.tensor([0, 20], device=DEVICE))


@pytest.mark.parametrize("setting", ["allow_tf32", "fp32_precision", "default"])
def test_precision_follows_torch(setting):
    from sae_lens_switch_kernels.triton_backend.grouped_matmul import _precision

    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        if setting == "allow_tf32":
            matmul.allow_tf32 = True
        elif setting == "fp32_precision":
            if not hasattr(matmul, "fp32_precision"):
                pytest.skip("older torch")
            matmul.fp32_precision = "tf32"
        expected = "ieee" if setting == "default" else "tf32"
        assert _precision(torch.zeros(1)) == expected
        assert _precision(torch.zeros(1, dtype=torch.bfloat16)) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_two_runs_give_the_same_bits():
    B, D, F, K = 60, 24, 3, 4  # some latents long enough for pieces
    indices, W = random_indices(B, F, K), random(F, D)
    values, d_pre, g, x = (random(B, n, seed=seed) for seed, n in enumerate((K, K, D, D)))
    offsets, pre = torch.tensor([0, 30, 30, B], device=DEVICE), random(4, 900).round()

    def run() -> list[Tensor | None]:
        return [
            sparse_decode(values, indices, W),
            matmul_at_indices(g, W, indices),
            *latent_weight_grads(latent_index(indices, F), values, g, d_pre, x),
            *select_topk(pre, 5),
            grouped_weight_grad(x[:, :5], g, offsets),
        ]

    for first, second in zip(run(), run(), strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)


small = settings(max_examples=20, deadline=None, derandomize=True)


@small
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 12), st.integers(1, 9), st.integers(0, 99))
def test_any_small_codes(B, D, F, K, seed):
    indices = torch.randint(0, F, (B, K), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    values, d_pre, g, x = (random(B, n, seed=seed + i) for i, n in enumerate((K, K, D, D)))
    W = random(F, D, seed=seed + 4)
    check_decode(values, indices, W)
    check_matmul_at_indices(g, W, indices)
    check_latent_weight_grads(values, indices, F, g, d_pre, x)


@small
@given(st.integers(1, 5), st.integers(1, 400), st.integers(1, 400), st.integers(0, 99), st.booleans())
def test_any_small_selection(R, F, k, seed, ties):
    pre = random(R, F, seed=seed)
    check_select(pre.round() if ties else pre, min(k, F))


@small
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_any_small_experts(counts, D, M, seed):
    offsets = torch.tensor([0, *counts]).cumsum(0).to(DEVICE)
    B, E = sum(counts), len(counts)
    check_grouped(random(B, D, seed=seed), random(B, M, seed=seed + 1), random(E * M, D, seed=seed + 2), offsets)
