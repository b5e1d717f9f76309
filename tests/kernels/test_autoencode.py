"""The fused operator against reference.py in float64: outputs, all gradients, and row gradients."""

import pytest
import torch
from helpers.kernel_cases import OPTIONS, assert_close, autoencoder_inputs, shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens_switch_kernels import RowGrads, products, reference, sparse_autoencode, torch_backend
from sae_lens_switch_kernels.indexing import ExpertGroups
from torch import Tensor


@shapes
@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("route", ["sparse", "sparse without MKL", "dense within experts"])
def test_sparse_autoencode_and_all_its_gradients(B, D, E, M, K, names, route, monkeypatch):
    monkeypatch.setitem(products._DENSE_UP_TO, "cpu", 10**9 if route == "dense within experts" else 0)
    if route == "sparse without MKL":
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    leaves, constants = autoencoder_inputs(B, D, E, M, K, names)
    upstream = [torch.randn(B, n, dtype=torch.float64) for n in (D, E * M, D)]

    def run(function):
        inputs = {name: t.clone().requires_grad_() for name, t in leaves.items()}
        out, values, indices, aux_out, *_ = function(**inputs, **constants)
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
    monkeypatch.setitem(products._DENSE_UP_TO, "cpu", dense_up_to)
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
    radial_F = (expected["W_dec_FD"] * leaves["W_dec_FD"]).sum(1)
    assert_close("along", torch.zeros(E * M, dtype=torch.float64).index_copy(0, rows.rows_R, rows.radial_R), radial_F)

    # Or the same components alone, of every latent, and gradients where they always are.
    rows = RowGrads(active_only=False)
    actual = gradients(row_grads=rows)
    for name in expected:
        assert_close(name, actual[name], expected[name])
    assert_close("along", rows.radial_R, radial_F)
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
    assert rows.radial_R is None
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
    """An operator that leaves part of its output unwritten fails, whatever the memory held before."""

    def poisoned(make):
        def run(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(torch.nan if t.is_floating_point() else -(2**31))

        return run

    monkeypatch.setattr(torch_backend, "empty_huge", poisoned(torch_backend.empty_huge))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("dense_up_to", [0, 10**9], ids=["sparse", "dense within experts"])
@pytest.mark.parametrize(
    "names", ["dead latents", "routed and gated", "dead latents by expert", "dead latents, shared and by expert"]
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "expanded"])
def test_layouts_unwritten_memory_and_bits(names, layout, dense_up_to, monkeypatch):
    """Any strides in, every element of every result written, and the same bits on every run."""
    monkeypatch.setitem(products._DENSE_UP_TO, "cpu", dense_up_to)
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
        out, values, _, aux_out, *_ = function(**given, **constants)
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


def test_sparse_or_dense_on_a_gpu_is_decided_by_latents_per_active_one_and_dtype():
    groups = ExpertGroups(None, torch.zeros(5, dtype=torch.long))  # four experts
    gpu = torch.device("cuda")

    def up_to(dtype: torch.dtype) -> int:
        """The widest expert with dense products, by its latents per active one."""
        return max(ratio for ratio in range(1, 200) if products.is_dense(4 * 3 * ratio, 3, groups, gpu, dtype))

    assert up_to(torch.bfloat16) == up_to(torch.float16) == 32
    assert up_to(torch.float32) == 8
