"""The linear operators and the encoder against reference.py in float64: outputs and all gradients."""

import pytest
import torch
from helpers.kernel_cases import assert_close, compare, make_codes, shapes
from sae_lens_switch_kernels import (
    batch_topk_encode,
    latent_weight_grad,
    matmul_at_indices,
    reference,
    sparse_decode,
    switch_encode,
    topk_encode,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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


class Dispatched(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


ENCODERS = {
    "topk": lambda x, W, b, c: topk_encode(x, W, 2, pre_bias_D=b, bias_F=c)[0],
    "of the batch": lambda x, W, b, c: batch_topk_encode(x, W, 11, pre_bias_D=b, bias_F=c)[0],
    "switch": lambda x, W, b, _: switch_encode(x, torch.arange(6) % 3, W, 2, 3, pre_bias_D=b)[0],
}


def encoder_leaves() -> list[Tensor]:
    _, _, W, x = make_codes(6, 4, 9, 3)
    generator = torch.Generator().manual_seed(4)
    biases = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (4, 9))
    return [t.requires_grad_() for t in (x, W, *biases)]


@pytest.mark.parametrize("name", ENCODERS)
def test_no_gradient_of_an_encoder_is_summed_by_atomics_on_a_gpu(name):
    leaves = encoder_leaves()
    values = ENCODERS[name](*leaves)
    with Dispatched() as dispatched:
        torch.autograd.grad(values.sum(), leaves[: 3 if name == "switch" else 4])
    assert "latent_weight_grad" in dispatched.names
    assert not {n for n in dispatched.names if n.startswith(("index_add", "index_put", "scatter", "_index_put"))}


def test_an_encoder_makes_only_the_gradients_that_are_needed():
    x, *others = encoder_leaves()
    values = ENCODERS["topk"](x, *(t.detach() for t in others))
    with Dispatched() as dispatched:
        torch.autograd.grad(values.sum(), x)
    assert "sparse_decode" in dispatched.names
    assert not dispatched.names & {"latent_weight_grad", "index_add"}


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_of_an_encoders_gradients(name):
    *leaves, bias = encoder_leaves()
    if name == "switch":
        assert torch.autograd.gradgradcheck(lambda *given: ENCODERS[name](*given, None), leaves)
    else:
        assert torch.autograd.gradgradcheck(ENCODERS[name], (*leaves, bias))
