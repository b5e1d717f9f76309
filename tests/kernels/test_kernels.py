"""Every primitive against reference.py in float64: outputs and all gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens_switch_kernels import (
    RowGrads,
    latent_weight_grad,
    matmul_at_indices,
    reference,
    sparse_autoencode,
    sparse_decode,
    switch_encode,
    topk_encode,
)
from sae_lens_switch_kernels import operators as library
from sae_lens_switch_kernels import torch_backend as torch_ops
from torch import Tensor

# B, D, E, M, K: widths that are no power of two, one token, one latent, every latent active
SHAPES = [
    (33, 48, 4, 16, 5),
    (7, 1000, 2, 9, 1),
    (20, 576, 7, 32, 32),
    (1, 5, 3, 4, 2),
    (64, 3, 1, 1, 1),
    (50, 17, 32, 2, 2),
]
shapes = pytest.mark.parametrize(("B", "D", "E", "M", "K"), SHAPES, ids=str)


def assert_close(name: str, actual: Tensor, expected: Tensor, ratio: float = 1e-12) -> None:
    """RMS error over RMS of the expected values: one number a tensor."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    error = (actual - expected).double().square().mean().sqrt()
    base = expected.double().square().mean().sqrt()
    assert error <= ratio * base + 1e-300, f"{name}: error ratio {error / base:.3g}, allowed {ratio:.3g}"


def make_codes(B: int, D: int, F: int, K: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    values = torch.randn(B, K, **options)
    indices = torch.rand(B, F, generator=generator).topk(min(K, F)).indices
    return values[:, : indices.shape[1]], indices, torch.randn(F, D, **options), torch.randn(B, D, **options)


def gradients(function, inputs: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    out = function(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out.detach(), **{f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}}


def compare(ours, truth, inputs: dict[str, Tensor], upstream: Tensor) -> None:
    actual, expected = gradients(ours, inputs, upstream), gradients(truth, inputs, upstream)
    for name in expected:
        assert_close(name, actual[name], expected[name])


@shapes
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_sparse_decode_and_its_gradients(B, D, E, M, K, index_dtype):
    values, indices, W, g = make_codes(B, D, E * M, K)
    indices = indices.to(index_dtype)
    compare(
        lambda values, W: sparse_decode(values, indices, W),
        lambda values, W: reference.sparse_decode(values, indices, W),
        {"values": values, "W": W},
        g,
    )


@shapes
def test_matmul_at_indices(B, D, E, M, K):
    _, indices, W, g = make_codes(B, D, E * M, K)
    expected = reference.matmul_at_indices(g, W, indices)
    assert_close("out", matmul_at_indices(g, W, indices), expected)
    assert_close("out, int32", matmul_at_indices(g, W, indices.int()), expected)


@shapes
def test_latent_weight_grad(B, D, E, M, K):
    values, indices, _, g = make_codes(B, D, E * M, K)
    expected = reference.latent_weight_grad(values, indices, g, E * M)
    assert_close("out", latent_weight_grad(values, indices, g, E * M), expected)
    assert_close("out, int32", latent_weight_grad(values, indices.int(), g, E * M), expected)


@pytest.mark.parametrize("case", ["hot latent", "duplicates in a row", "zero values"])
def test_codes_that_are_not_a_top_k(case):
    values, indices, W, g = make_codes(40, 12, 30, 6)
    if case == "hot latent":
        indices[:, 0] = 7
    elif case == "duplicates in a row":
        indices[:] = indices[:, :1]
    else:
        values[:, 2:] = 0
    compare(
        lambda values, W: sparse_decode(values, indices, W),
        lambda values, W: reference.sparse_decode(values, indices, W),
        {"values": values, "W": W},
        g,
    )


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded gradient"])
def test_inputs_that_are_not_contiguous(layout):
    values, indices, W, g = make_codes(24, 10, 18, 4)
    if layout == "transposed":
        W, values = W.T.contiguous().T, values.T.contiguous().T
        indices = indices.T.contiguous().T
    elif layout == "strided":
        W, values, g = (t.repeat_interleave(2, 1)[:, ::2] for t in (W, values, g))
    else:
        g = torch.ones((), dtype=g.dtype).expand_as(g)
    compare(
        lambda values, W: sparse_decode(values, indices, W),
        lambda values, W: reference.sparse_decode(values, indices, W),
        {"values": values, "W": W},
        g,
    )
    assert_close("dot", matmul_at_indices(g, W, indices), reference.matmul_at_indices(g, W, indices))


def compare_encoders(x: Tensor, experts: Tensor, W: Tensor, bias: Tensor, k: int, n_experts: int) -> None:
    upstream = torch.randn(len(x), len(W), dtype=x.dtype, generator=torch.Generator().manual_seed(5))

    def dense(encode):
        def run(x, W, bias):
            values, indices = encode(x, experts, W, k, n_experts, pre_bias_D=bias)
            return reference.dense_codes(values, indices, len(W))

        return run

    compare(dense(switch_encode), dense(reference.switch_encode), {"x": x, "W": W, "bias": bias}, upstream)


@shapes
@pytest.mark.parametrize("routing", ["random", "one expert has all", "an expert without tokens"])
def test_switch_encode_and_its_gradients(B, D, E, M, K, routing):
    _, _, W, x = make_codes(B, D, E * M, 1)
    experts = torch.randint(0, E, (B,), generator=torch.Generator().manual_seed(1))
    if routing == "one expert has all":
        experts = torch.full((B,), E - 1)
    elif routing == "an expert without tokens":
        experts = experts.clamp(max=max(0, E - 2))
    compare_encoders(x, experts, W, x.mean(0), K, E)


def test_negative_pre_activations_give_zeros_and_no_gradient():
    _, _, W, x = make_codes(10, 6, 12, 1)
    W = -W.abs()
    x = x.abs()
    experts = torch.arange(10) % 3
    values, indices = switch_encode(x, experts, W, 4, 3)
    assert values.count_nonzero() == 0
    assert all(len(set(row)) == 4 for row in indices.tolist())
    compare_encoders(x, experts, W, torch.zeros(6, dtype=x.dtype), 4, 3)


def test_ties_keep_values_and_distinct_indices():
    x = torch.ones(9, 4, dtype=torch.float64)
    W = torch.ones(12, 4, dtype=torch.float64)
    values, indices = switch_encode(x, torch.arange(9) % 2, W, 3, 2)
    assert torch.equal(values, torch.full((9, 3), 4.0, dtype=torch.float64))
    for token, row in enumerate(indices.tolist()):
        assert len(set(row)) == 3
        assert {i // 6 for i in row} == {token % 2}


def test_topk_encode_is_one_expert_that_owns_every_latent():
    _, _, W, x = make_codes(31, 14, 40, 1)
    bias = x.mean(0)
    values, indices = topk_encode(x, W, 6, pre_bias_D=bias)
    expected = reference.topk_encode(x, W, 6, pre_bias_D=bias)
    assert_close("codes", reference.dense_codes(values, indices, 40), reference.dense_codes(*expected, 40))


def test_gradcheck_in_float64():
    values, indices, W, _ = make_codes(5, 4, 9, 3)
    assert torch.autograd.gradcheck(
        lambda v, w: sparse_decode(v, indices, w), (values.requires_grad_(), W.clone().requires_grad_())
    )
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(3))
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(4))
    experts = torch.arange(6) % 3
    assert torch.autograd.gradcheck(
        lambda x, w, b: switch_encode(x, experts, w, 2, 3, pre_bias_D=b)[0], (x, W.clone().requires_grad_(), bias)
    )


def test_the_three_products_are_each_others_derivatives_any_number_of_times():
    values, indices, W, g = (t.requires_grad_() if t.is_floating_point() else t for t in make_codes(5, 4, 9, 3))
    for function, inputs in (
        (lambda v, w: sparse_decode(v, indices, w), (values, W)),
        (lambda g, w: matmul_at_indices(g, w, indices), (g, W)),
        (lambda v, g: latent_weight_grad(v, indices, g, 9), (values, g)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


OPTIONS = {
    "bare": {},
    "pre-bias": {"pre_bias_D"},
    "biases and scale": {"pre_bias_D", "bias_F", "scale_F"},
    "dead latents": {"pre_bias_D", "bias_F", "scale_F", "dead_N"},
    "dead latents alone": {"dead_N"},
    "routed": {"expert_B"},
    "routed and gated": {"expert_B", "gates_B", "pre_bias_D"},
    "dead latents by expert": {"expert_B", "gates_B", "pre_bias_D", "dead_N"},
}


def autoencoder_inputs(B, D, E, M, K, names) -> tuple[dict[str, Tensor], dict[str, Tensor | int]]:
    """What takes a gradient, and what does not."""
    generator = torch.Generator().manual_seed(3)
    F = E * M

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = {"x_BD": normal(B, D) + 1, "W_enc_FD": normal(F, D), "W_dec_FD": normal(F, D)}
    optional = {"pre_bias_D": normal(D), "bias_F": normal(F), "gates_B": normal(B).sigmoid()}
    constants: dict = {"k": K}
    scale, experts = normal(F).exp(), torch.randint(0, E, (B,), generator=generator)
    dead = torch.randperm(F, generator=generator)[: max(1, F // 2)].sort().values
    if "scale_F" in names:
        constants["scale_F"] = scale
    if "expert_B" in names:
        constants |= {"expert_B": experts, "n_experts": E}
    if "dead_N" in names:
        constants |= {"dead_N": dead, "k_aux": max(1, len(dead) // 2)}
    return leaves | {n: t for n, t in optional.items() if n in names}, constants


@shapes
@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("route", ["sparse", "sparse without MKL", "dense within experts"])
def test_sparse_autoencode_and_all_its_gradients(B, D, E, M, K, names, route, monkeypatch):
    monkeypatch.setitem(library._DENSE_UP_TO, "cpu", 10**9 if route == "dense within experts" else 0)
    if route == "sparse without MKL":
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    leaves, constants = autoencoder_inputs(B, D, E, M, K, names)
    upstream = [torch.randn(B, n, dtype=torch.float64) for n in (D, E * M, D)]

    def run(function):
        inputs = {name: t.clone().requires_grad_() for name, t in leaves.items()}
        out, values, indices, aux_out = function(**inputs, **constants)
        results = [out, reference.dense_codes(values, indices, E * M), *([] if aux_out is None else [aux_out])]
        total = sum((r * u).sum() for r, u in zip(results, upstream, strict=False))
        grads = torch.autograd.grad(total, list(inputs.values()))
        return dict(zip(["out", "codes", "aux"], results, strict=False)) | {
            f"d_{name}": g for name, g in zip(inputs, grads, strict=True)
        }

    actual, expected = run(sparse_autoencode), run(reference.sparse_autoencode)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(name, actual[name], expected[name])


@shapes
@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dense_up_to", [0, 10**9], ids=["sparse", "dense within experts"])
def test_row_grads_are_the_rows_of_the_dense_gradients_that_are_not_zero(
    B, D, E, M, K, names, dense_up_to, monkeypatch
):
    monkeypatch.setitem(library._DENSE_UP_TO, "cpu", dense_up_to)
    leaves, constants = autoencoder_inputs(B, D, E, M, K, names)
    upstream = [torch.randn(B, n, dtype=torch.float64) for n in (D, D)]

    def gradients(**options):
        inputs = {name: t.clone().requires_grad_() for name, t in leaves.items()}
        result = sparse_autoencode(**inputs, **constants, **options)
        outs = [result.out_BD] if result.aux_out_BD is None else [result.out_BD, result.aux_out_BD]
        torch.autograd.backward(outs, upstream[: len(outs)])
        return {name: t.grad for name, t in inputs.items()}

    expected, rows = gradients(), RowGrads()
    actual = gradients(row_grads=rows)
    assert rows.rows_R is not None
    assert torch.equal(rows.rows_R, rows.rows_R.unique())
    for name, row_grad in (("W_enc_FD", rows.dW_enc_RD), ("W_dec_FD", rows.dW_dec_RD), ("bias_F", rows.d_bias_R)):
        if name in leaves:
            assert actual[name] is None
            actual[name] = torch.zeros_like(leaves[name]).index_copy(0, rows.rows_R, row_grad)
    for name in expected:
        assert_close(name, actual[name], expected[name])
    along_F = (expected["W_dec_FD"] * leaves["W_dec_FD"]).sum(1)
    assert_close("along", torch.zeros(E * M, dtype=torch.float64).index_copy(0, rows.rows_R, rows.along_R), along_F)

    # Or the same components alone, of every latent, and gradients where they always are.
    rows = RowGrads(active_only=False)
    actual = gradients(row_grads=rows)
    for name in expected:
        assert_close(name, actual[name], expected[name])
    assert_close("along", rows.along_R, along_F)
    assert rows.rows_R is rows.dW_dec_RD is None


@pytest.mark.parametrize("active_only", [True, False])
@pytest.mark.parametrize("how", ["bf16 weights", "autocast"])
def test_low_precision_leaves_no_component_along_the_weights(how, active_only):
    leaves, constants = autoencoder_inputs(6, 4, 1, 9, 3, set())
    dtype = torch.bfloat16 if how == "bf16 weights" else torch.float32
    inputs = {name: t.to(dtype).requires_grad_() for name, t in leaves.items()}
    rows = RowGrads(active_only)
    with torch.autocast("cpu", enabled=how == "autocast"):
        out = sparse_autoencode(**inputs, **constants, row_grads=rows).out_BD
    out.sum().backward()
    assert rows.along_R is None
    assert (rows.dW_dec_RD is None) == (inputs["W_dec_FD"].grad is not None) == (not active_only)


def test_row_grads_hold_one_backward_pass_at_a_time_and_are_as_long_as_the_active_latents():
    leaves, constants = autoencoder_inputs(5, 4, 1, 1000, 3, set())
    rows = RowGrads()
    inputs = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    losses = [sparse_autoencode(**inputs, **constants, row_grads=rows).out_BD.sum() for _ in range(2)]
    losses[0].backward()
    assert rows.dW_enc_RD is not None
    assert len(rows.dW_enc_RD) <= 5 * 3
    with pytest.raises(RuntimeError, match="row_grads still holds an earlier backward pass"):
        losses[1].backward()
    rows.clear()
    assert rows.rows_R is None


@pytest.fixture
def uninitialised_memory_is_nan(monkeypatch):
    """An operator that forgets part of its output is found out, whatever the memory held before."""

    def poisoned(make):
        def run(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(torch.nan if t.is_floating_point() else -(2**31))

        return run

    monkeypatch.setattr(torch_ops, "empty_large", poisoned(torch_ops.empty_large))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("dense_up_to", [0, 10**9], ids=["sparse", "dense within experts"])
@pytest.mark.parametrize("names", ["dead latents", "routed and gated", "dead latents by expert"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "expanded"])
def test_layouts_unwritten_memory_and_bits(names, layout, dense_up_to, monkeypatch):
    """Any strides in, every element of every result written, and the same bits on every run."""
    monkeypatch.setitem(library._DENSE_UP_TO, "cpu", dense_up_to)
    E = 4 if "expert_B" in OPTIONS[names] else 1
    leaves, constants = autoencoder_inputs(40, 6, E, 20 // E, 3, OPTIONS[names])
    if "expert_B" in constants:
        constants["expert_B"] = constants["expert_B"].clamp(max=E - 2)  # the last expert has no token
    lay_out = {
        "contiguous": lambda t: t,
        "transposed": lambda t: t.mT.contiguous().mT if t.ndim == 2 else t,
        "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "expanded": lambda t: t,
    }[layout]
    leaves = {name: lay_out(t) for name, t in leaves.items()}
    g = torch.ones((), dtype=torch.float64).expand(40, 6) if layout == "expanded" else lay_out(random_like(40, 6))

    def run(function):
        given = {name: t.detach().requires_grad_() for name, t in leaves.items()}
        out, values, _, aux_out = function(**given, **constants)
        outs = [out] if aux_out is None else [out, aux_out]
        return [out, values.sort(1).values, *torch.autograd.grad(outs, list(given.values()), [g] * len(outs))]

    first, second, truth = run(sparse_autoencode), run(sparse_autoencode), run(reference.sparse_autoencode)
    for a, b, c in zip(first, second, truth, strict=True):
        assert torch.equal(a, b)
        assert_close("result", a, c)


def random_like(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 20),
    D=st.integers(1, 24),
    E=st.integers(1, 5),
    M=st.integers(1, 12),
    K=st.integers(1, 12),
    names=st.sampled_from(sorted(OPTIONS)),
    seed=st.integers(0, 100),
)
def test_sparse_autoencode_on_shapes_nobody_thought_of(B, D, E, M, K, names, seed):
    if "expert_B" not in OPTIONS[names]:
        E = 1
    leaves, constants = autoencoder_inputs(B, D, E, M, min(K, M), OPTIONS[names])
    leaves["x_BD"] = leaves["x_BD"] * (1 + seed) - seed  # all pre-activations negative for some
    ours, truth = (f(**leaves, **constants) for f in (sparse_autoencode, reference.sparse_autoencode))
    assert_close("out", ours[0], truth[0], 1e-10)
    assert_close("values", ours[1].sort(1).values, truth[1].sort(1).values, 1e-10)
    assert all(len(set(row)) == min(K, M) for row in ours.indices_BK.tolist())


def test_only_the_gradients_that_are_needed_are_made():
    leaves, constants = autoencoder_inputs(20, 6, 4, 5, 2, {"expert_B", "gates_B", "pre_bias_D"})
    leaves["W_dec_FD"].requires_grad_()
    sparse_autoencode(**leaves, **constants).out_BD.sum().backward()
    assert leaves["W_dec_FD"].grad is not None
    assert all(t.grad is None for name, t in leaves.items() if name != "W_dec_FD")


def test_gradients_of_the_joint_operators_gradients_are_refused():
    leaves, constants = autoencoder_inputs(20, 6, 4, 5, 2, {"expert_B"})
    W = leaves["W_dec_FD"].requires_grad_()
    (grad,) = torch.autograd.grad(sparse_autoencode(**leaves, **constants).out_BD.square().sum(), W, create_graph=True)
    with pytest.raises(RuntimeError, match="autoencode_backward"):
        grad.sum().backward()


@pytest.mark.parametrize(("n_latents", "k"), [(1000, 4), (4099, 3), (9000, 32), (300, 1), (64, 64), (40000, 5)])
@pytest.mark.parametrize("values", ["random", "ties", "negative", "constant"])
def test_the_pruned_top_k_is_exact(n_latents, k, values):
    generator = torch.Generator().manual_seed(n_latents)
    pre = torch.randn(7, n_latents, generator=generator, dtype=torch.float64)
    if values == "ties":
        pre = pre.mul(2).round()
    elif values == "negative":
        pre = -pre.abs() - 1
    elif values == "constant":
        pre = torch.zeros_like(pre)
    bias, scale = (torch.randn(n_latents, generator=generator, dtype=torch.float64) for _ in range(2))
    for options in ({}, {"bias_F": bias, "scale_F": scale.abs()}):
        found, indices = torch_ops.select_topk(pre.clone(), k, **options)
        biased = pre + options.get("bias_F", 0)
        ranked = biased * options.get("scale_F", 1)
        assert torch.equal(found, biased.gather(1, indices))
        assert torch.equal(ranked.gather(1, indices).sort(descending=True).values, ranked.topk(k).values)
        assert all(len(set(row)) == k for row in indices.tolist())
    if (n_latents, k) == (40000, 5):
        assert torch_ops._block_count(n_latents, k) > 0  # pruning took place


def test_a_dictionary_wider_than_a_tile_gives_the_same_codes(monkeypatch):
    monkeypatch.setattr(torch_ops, "_TILE_LATENTS", 7)
    monkeypatch.setitem(torch_ops._TILE_ROWS, "cpu", 5)
    monkeypatch.setattr(torch_ops, "_PRODUCT_LATENTS", 3)
    leaves, constants = autoencoder_inputs(33, 6, 1, 40, 9, {"pre_bias_D", "bias_F", "scale_F"})
    ours, truth = sparse_autoencode(**leaves, **constants), reference.sparse_autoencode(**leaves, **constants)
    assert_close("out", ours.out_BD, truth[0])
    assert_close("codes", *(reference.dense_codes(values, i, 40) for values, i in (ours[1:3], truth[1:3])))


OPERATORS = {
    "sparse_decode": lambda t: (t["values"], t["indices"], t["W"]),
    "matmul_at_indices": lambda t: (t["g"], t["W"], t["indices"]),
    "latent_weight_grad": lambda t: (t["values"], t["indices"], t["g"], 8),
    "encode": lambda t: (t["x"], t["W"], t["bias"], t["scale"], None, None, 3, 1, torch.float64),
    "autoencode": lambda t: (
        *(t["x"], t["W"], t["W_dec"], t["gates"], t["bias"], None, None, t["experts"], torch.arange(4)),
        *(3, 2, 2, torch.float64),
    ),
}


@pytest.mark.parametrize("M", [600, 1100])
@pytest.mark.parametrize("onednn", [True, False])
def test_wide_experts_in_float32(onednn, M, monkeypatch):
    """The product with many latents has a way of its own, where torch has the operator for it."""
    torch.manual_seed(0)
    E, D, K = 3, 37, 5
    expert_B = torch.tensor([0] * 17 + [1] * 1 + [2] * 140)
    x, W = torch.randn(len(expert_B), D), torch.randn(E * M, D)
    taken = []
    monkeypatch.setattr(torch_ops, "_PRODUCT_ELEMENTS", 32 * 1100)
    if onednn and torch_ops._has_onednn(x.device):
        linear = torch_ops._onednn_linear
        monkeypatch.setattr(torch_ops, "_onednn_linear", lambda a, b: taken.append(len(a)) or linear(a, b))
    else:
        monkeypatch.setattr(torch_ops, "_has_onednn", lambda _: False)
    values, indices = switch_encode(x, expert_B, W, K, E)
    wanted = [32, 16, 144] if M == 600 else [32, 16, 144, 144]
    assert taken == (wanted if onednn and torch_ops._has_onednn(x.device) else [])
    pre = torch.einsum("bd,bmd->bm", x.double(), W.double().view(E, M, D)[expert_B])
    expected = pre.topk(K).values.relu()
    assert_close("values", values.double().sort(descending=True).values, expected, 1e-6)
    chosen = pre.gather(1, indices - M * expert_B.unsqueeze(1)).relu()
    assert_close("chosen", chosen, values.double(), 1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPERATORS)
def test_the_operators_are_torchs_own_citizens(name):
    """Schema, fake implementation, autograd registration and tracing, by torch's own checks."""
    values, indices, W, g = make_codes(6, 5, 8, 3)
    tensors = {"values": values, "W": W, "g": g, "W_dec": W + 1, "x": g - 1, "bias": g[0].clone()}
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    tensors |= {"indices": indices, "scale": W.exp()[:, 0].detach(), "gates": values[:, 0].detach()}
    arguments = OPERATORS[name](tensors | {"experts": torch.arange(6) % 2})
    torch.library.opcheck(getattr(library, name), arguments)


def test_torch_export_and_compile_trace_through():
    leaves, constants = autoencoder_inputs(20, 6, 4, 5, 2, {"expert_B", "gates_B", "pre_bias_D"})

    class Module(torch.nn.Module):
        def forward(self, x_BD):
            return sparse_autoencode(**{**leaves, "x_BD": x_BD}, **constants).out_BD

    expected = Module()(leaves["x_BD"])
    exported = torch.export.export(Module(), (leaves["x_BD"],))
    assert any("sae_lens_switch.autoencode" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(leaves["x_BD"]), expected, rtol=0, atol=0)

    W = leaves["W_enc_FD"].requires_grad_()
    grads = []
    for function in (Module(), torch.compile(Module(), backend="aot_eager", fullgraph=True)):
        grads.append(torch.autograd.grad(function(leaves["x_BD"]).square().sum(), W)[0])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_vmap_gives_right_numbers_and_functional_gradients_a_clear_error():
    values, indices, W, _ = make_codes(6, 5, 8, 3)
    stacked = torch.stack([values, 2 * values])
    batched = torch.vmap(lambda v: library.sparse_decode(v, indices, W))(stacked)
    torch.testing.assert_close(batched, torch.stack([reference.sparse_decode(v, indices, W) for v in stacked]))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda W: sparse_decode(values, indices, W).square().sum())(W)


def test_bf16_stays_near_float64():
    values, indices, W, g = make_codes(64, 96, 128, 8)
    low = [t.bfloat16() for t in (values, W, g)]
    exact = [t.double() for t in low]
    assert_close(
        "decode", sparse_decode(low[0], indices, low[1]), reference.sparse_decode(exact[0], indices, exact[1]), 1e-2
    )
    assert_close(
        "dot",
        matmul_at_indices(low[2], low[1], indices),
        reference.matmul_at_indices(exact[2], exact[1], indices),
        1e-2,
    )
    assert_close(
        "weight gradient",
        latent_weight_grad(low[0], indices, low[2], 128),
        reference.latent_weight_grad(exact[0], indices, exact[2], 128),
        1e-2,
    )


def test_autocast_lowers_the_matrix_product_only():
    _, _, W, x = (t.float() for t in make_codes(64, 32, 48, 4))
    experts = torch.arange(64) % 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, indices = switch_encode(x, experts, W, 4, 3)
    low = (x.bfloat16() @ W.bfloat16().T).float().gather(1, indices).relu()
    assert values.dtype == torch.float32
    assert_close("values", values, low, 1e-2)
    assert not torch.equal(values, (x @ W.T).gather(1, indices).relu())


def test_two_runs_give_the_same_bits():
    values, indices, W, g = (t.float() if t.is_floating_point() else t for t in make_codes(512, 64, 96, 16))

    def run() -> list[Tensor]:
        leaves = values.clone().requires_grad_(), W.clone().requires_grad_()
        out = sparse_decode(leaves[0], indices, leaves[1])
        return [out, *torch.autograd.grad(out, leaves, g)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.full((4, 3), 9)}, r"indices_BK must lie in \[0, 9\)"),
        ({"indices": torch.full((4, 3), -1)}, r"indices_BK must lie in \[0, 9\)"),
        ({"indices": torch.zeros(4, 3)}, "indices_BK must be int32 or int64"),
        ({"indices": torch.zeros(4, 2, dtype=torch.long)}, "must share a shape"),
        ({"values": torch.zeros(4, 3).half()}, "must share a dtype"),
        ({"values": torch.zeros(4, 3, device="meta")}, "must share a device"),
        ({"values": torch.zeros(12)}, "values_BK must have shape"),
        ({"W": torch.zeros(9)}, "W_dec_FD must have shape"),
        ({"W": torch.zeros(9, 5, dtype=torch.long)}, "W_dec_FD must be floating point"),
    ],
)
def test_bad_codes_are_refused(change, message):
    arguments = {"values": torch.zeros(4, 3), "indices": torch.zeros(4, 3, dtype=torch.long), "W": torch.zeros(9, 5)}
    with pytest.raises(ValueError, match=message):
        sparse_decode(*(arguments | change).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 4}, "k must be between 1 and F / n_experts = 3; got k=4"),
        ({"k": 0}, "got k=0"),
        ({"n_experts": 4}, "n_experts must divide"),
        ({"n_experts": 0}, "n_experts must divide"),
        ({"expert": torch.full((4,), 3)}, r"expert_B must lie in \[0, 3\)"),
        ({"expert": torch.zeros(5, dtype=torch.long)}, "expert_B must have shape"),
        ({"x": torch.zeros(4, 6)}, "W_enc_FD must have shape"),
        ({"x": torch.zeros(4, 5).double()}, "must share a dtype"),
    ],
)
def test_bad_encoder_arguments_are_refused(change, message):
    arguments = {
        "x": torch.zeros(4, 5),
        "expert": torch.zeros(4, dtype=torch.long),
        "W": torch.zeros(9, 5),
        "k": 2,
        "n_experts": 3,
    }
    with pytest.raises(ValueError, match=message):
        switch_encode(*(arguments | change).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_dec_FD": torch.zeros(8, 5)}, r"W_dec_FD must have shape \(9, 5\); got \(8, 5\)"),
        ({"W_dec_FD": torch.zeros(9, 5).double()}, "must share a dtype"),
        ({"k": 10}, "k must be between 1 and F / n_experts = 9; got k=10"),
        ({"n_experts": 3}, "expert_B must be given for n_experts=3"),
        ({"expert_B": torch.full((4,), 3), "n_experts": 3}, r"expert_B must lie in \[0, 3\)"),
        ({"expert_B": torch.zeros(4), "n_experts": 3}, "expert_B must be int32 or int64"),
        ({"gates_B": torch.zeros(3)}, r"gates_B must have shape \(4,\); got \(3,\)"),
        ({"pre_bias_D": torch.zeros(4)}, r"pre_bias_D must have shape \(5,\)"),
        ({"bias_F": torch.zeros(5)}, r"bias_F must have shape \(9,\)"),
        ({"scale_F": torch.zeros(9).double()}, "scale_F and W_enc_FD must share a dtype"),
        ({"dead_N": torch.tensor([9]), "k_aux": 1}, r"dead_N must lie in \[0, 9\)"),
        ({"dead_N": torch.tensor([1, 2]), "k_aux": 3}, "k_aux must be between 1 and the 2 dead latents; got k_aux=3"),
        ({"dead_N": torch.tensor([1, 2])}, "got k_aux=0"),
        ({"scale_F": torch.zeros(9, device="meta")}, "must share a device"),
    ],
)
def test_bad_arguments_of_the_joint_operator_are_refused(change, message):
    arguments = {"x_BD": torch.zeros(4, 5), "W_enc_FD": torch.zeros(9, 5), "W_dec_FD": torch.zeros(9, 5), "k": 2}
    with pytest.raises(ValueError, match=message):
        sparse_autoencode(**(arguments | change))


def test_an_empty_batch_gives_empty_codes_and_zero_gradients():
    W = torch.randn(9, 5, requires_grad=True)
    values, indices = switch_encode(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), W, 2, 3)
    assert values.shape == indices.shape == (0, 2)
    out = sparse_decode(values, indices, W)
    assert out.shape == (0, 5)
    out.sum().backward()
    assert torch.equal(W.grad, torch.zeros(9, 5))
    W.grad = None
    joint = sparse_autoencode(torch.zeros(0, 5), W, W, 2, expert_B=torch.zeros(0, dtype=torch.long), n_experts=3)
    assert joint.out_BD.shape == (0, 5)
    joint.out_BD.sum().backward()
    assert torch.equal(W.grad, torch.zeros(9, 5))
