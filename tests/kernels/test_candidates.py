"""Selection in low precision: exact values and gradients at what is selected, and what may be missed is flagged."""

import pytest
import torch
from helpers.kernel_cases import OPTIONS, assert_close, autoencoder_inputs, expert_of_latents
from sae_lens_switch_kernels import candidates, reference, sparse_autoencode, topk_encode
from sae_lens_switch_kernels.float8 import Float8Rows

PRECISIONS = pytest.mark.parametrize("precision", ["bfloat16", "float8"])
SHAPES = pytest.mark.parametrize(
    ("B", "D", "E", "M", "K"), [(37, 24, 1, 203, 5), (64, 33, 3, 90, 1), (5, 16, 4, 64, 7), (1, 48, 1, 112, 32)]
)


def at(pre_BF, indices_BK):
    return pre_BF.gather(1, indices_BK)


@SHAPES
@PRECISIONS
@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS.keys())
def test_outputs_and_all_gradients_are_those_of_full_precision_at_the_selected_latents(B, D, E, M, K, names, precision):
    leaves, constants = autoencoder_inputs(B, D, E, M, K, names)
    upstream = [torch.randn(B, n, dtype=torch.float64) for n in (D, E * M, D)]
    ours = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    found = sparse_autoencode(**ours, **constants, encoder_precision=precision)
    assert found.doubtful_B is not None
    assert found.doubtful_B.shape == (B,)
    assert all(len(set(row)) == K for row in found.indices_BK.tolist())

    # The reference selects what we selected.
    truth = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    bias_F = truth.get("bias_F", torch.zeros(E * M, dtype=torch.float64))
    chosen = torch.zeros(B, E * M, dtype=torch.float64).scatter(1, found.indices_BK, 1)
    pre = (truth["x_BD"] - truth.get("pre_bias_D", 0)) @ truth["W_enc_FD"].T + bias_F
    acts = (pre if "by_magnitude" in constants else pre.relu()) * chosen
    gates_BF = torch.ones(B, 1, dtype=torch.float64)
    if "gates_B" in truth:
        expert_BF = expert_of_latents(E * M, constants).expand(B, -1)
        expert_B, gates_B = constants.get("expert_B"), truth["gates_B"]
        if "n_shared" in constants and expert_B.ndim == 1:
            expert_B, gates_B = expert_B.unsqueeze(1), gates_B.unsqueeze(1)
        gates_BF = reference._gates_at(gates_B, expert_B, expert_BF)
    out = (acts * gates_BF) @ truth["W_dec_FD"]
    assert_close("out", found.out_BD, out)
    codes = reference.dense_codes(found.values_BK, found.indices_BK, E * M)
    assert_close("codes", codes, acts)
    total = (found.out_BD * upstream[0]).sum() + (codes * upstream[1]).sum()
    expected = (out * upstream[0]).sum() + (acts * upstream[1]).sum()
    if found.aux_out_BD is not None:
        full = sparse_autoencode(**truth, **constants)
        total = total + (found.aux_out_BD * upstream[2]).sum()
        expected = expected + (full.aux_out_BD * upstream[2]).sum()
    grads = (torch.autograd.grad(t, list(leaf.values())) for t, leaf in ((total, ours), (expected, truth)))
    for name, mine, theirs in zip(leaves, *grads, strict=True):
        assert_close(f"d_{name}", mine, theirs)


@PRECISIONS
def test_the_most_of_full_precision_is_found_and_every_token_that_misses_a_latent_is_in_doubt(precision):
    torch.manual_seed(0)
    x, W, bias = torch.randn(500, 64), torch.randn(4096, 64), torch.randn(4096)
    scale, k = torch.rand(4096) + 0.5, 16
    arguments = {"bias_F": bias, "scale_F": scale}
    ranked = (x @ W.T + bias) * scale
    best = ranked.topk(k).values
    inputs = sparse_autoencode(x, W, W, k, **arguments, encoder_precision=precision)
    found = at(ranked, inputs.indices_BK).sort(descending=True).values
    assert found.sum() / best.sum() > {"bfloat16": 0.9999, "float8": 0.999}[precision]
    missed_B = (found < best - 1e-4).any(1)
    assert not (missed_B & ~inputs.doubtful_B).any()
    assert inputs.doubtful_B.float().mean() < {"bfloat16": 0.2, "float8": 1.1}[precision]


def test_a_gap_at_the_border_leaves_no_doubt_and_near_ties_do():
    # Latents are distinct unit vectors, so token b's pre-activations are its own numbers.
    x = torch.zeros(2, 64)
    x[0, :3] = torch.tensor([3.0, 2.0, 1.0])
    x[1] = 1 + torch.arange(64) * 1e-5  # equal in bfloat16
    found = sparse_autoencode(x, torch.eye(64), torch.eye(64), 3, encoder_precision="bfloat16")
    assert found.doubtful_B.tolist() == [False, True]
    assert sorted(found.indices_BK[0].tolist()) == [0, 1, 2]


def test_a_token_all_of_whose_other_latents_are_negative_is_not_in_doubt():
    x = -1 - torch.arange(64.0).unsqueeze(0) * 1e-5
    x[0, 5] = 1.0
    found = sparse_autoencode(x, torch.eye(64), torch.eye(64), 3, encoder_precision="bfloat16")
    assert found.doubtful_B.tolist() == [False]
    assert found.values_BK.sum() == 1


@PRECISIONS
def test_by_magnitude_the_farthest_from_zero_are_candidates(precision):
    torch.manual_seed(0)
    x, W, scale, k = torch.randn(500, 64), torch.randn(4096, 64), torch.rand(4096) + 0.5, 16
    ranked = x @ W.T * scale
    found = sparse_autoencode(x, W, W, k, scale_F=scale, encoder_precision=precision, by_magnitude=True)
    chosen, best = at(ranked, found.indices_BK).abs().sort(descending=True).values, ranked.abs().topk(k).values
    assert chosen.sum() / best.sum() > {"bfloat16": 0.9999, "float8": 0.999}[precision]
    assert not ((chosen < best - 1e-4).any(1) & ~found.doubtful_B).any()
    torch.testing.assert_close(found.values_BK, at(x @ W.T, found.indices_BK), rtol=1e-4, atol=1e-4)
    assert 0.4 < (found.values_BK < 0).float().mean() < 0.6


@PRECISIONS
def test_numbers_that_low_precision_can_hold_give_the_same_latents(precision):
    torch.manual_seed(0)
    x = torch.eye(40)[torch.randint(0, 40, (30,))]
    W = torch.stack([torch.randperm(16).repeat(25)[:300] for _ in range(40)], dim=1).float()  # whole numbers to 15
    values, _ = topk_encode(x, W, 3, encoder_precision=precision)
    assert torch.equal(values.sort().values, (x @ W.T).topk(3).values.sort().values)


@pytest.mark.parametrize(
    ("dtype", "k", "precision"),
    [(torch.bfloat16, 4, "bfloat16"), (torch.float16, 4, "bfloat16"), (torch.float32, 38, "bfloat16"),
     (torch.float32, 30, "float8"), (torch.float32, 4, "full")],
)  # fmt: skip
def test_where_low_precision_saves_nothing_the_step_is_the_same(dtype, k, precision):
    torch.manual_seed(0)
    x, W = torch.randn(9, 12).to(dtype), torch.randn(42, 12).to(dtype)
    found, full = sparse_autoencode(x, W, W, k, encoder_precision=precision), sparse_autoencode(x, W, W, k)
    assert found.doubtful_B is None
    assert all(torch.equal(a, b) for a, b in zip(found[:3], full[:3], strict=True))


def test_under_autocast_values_are_those_of_the_weights_dtype():
    torch.manual_seed(0)
    x, W = torch.randn(20, 32), torch.randn(500, 32)
    with torch.autocast("cpu", torch.bfloat16):
        values, indices = topk_encode(x, W, 4, encoder_precision="bfloat16")
    torch.testing.assert_close(values, at(x @ W.T, indices).relu())


def test_a_token_that_is_not_finite_gives_values_that_are_not():
    x, W = torch.randn(3, 32), torch.randn(500, 32)
    x[1, 3] = float("nan")
    for precision in ("bfloat16", "float8"):
        found = sparse_autoencode(x, W, W, 4, encoder_precision=precision)
        assert found.out_BD.isfinite().all(1).tolist() == [True, False, True]


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="encoder_precision must be one of 'full', 'bfloat16', 'float8'; got 'fp8'"):
        topk_encode(torch.randn(2, 3), torch.randn(9, 3), 1, encoder_precision="fp8")


@pytest.mark.parametrize("k", [1, 8, 32, 100])
def test_the_margin_grows_with_k_and_with_the_coarseness_of_the_precision(k):
    inputs = candidates.EncoderInputs(
        torch.randn(1, 8), torch.randn(1000, 8), None, None, None, None, None, k, 1, torch.float32
    )
    bf16, float8 = (candidates.with_candidates(inputs, p).n_candidates for p in ("bfloat16", "float8"))
    assert k + k / 8 <= bf16 < float8
    assert float8 >= 1.5 * k


@pytest.mark.parametrize("size", [2.0**-60, 1.0, 2.0**60])
def test_rows_rounded_to_float8_keep_four_bits_at_any_scale(size):
    torch.manual_seed(0)
    x = torch.randn(40, 64) * size
    x[7] = 0
    x[8] = 448 * size
    rounded = Float8Rows.of(x).to_bfloat16().float()
    largest = x.abs().amax(1, keepdim=True)
    assert ((rounded - x).abs() <= x.abs() * 2**-4 + largest * 2**-17).all()
    assert torch.equal(rounded[7:9], x[7:9].bfloat16().float())


@pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU"),
    reason="this torch has the product on GPUs alone, where gpu_check tests it",
)
def test_the_product_in_float8_is_that_of_the_rounded_numbers():
    torch.manual_seed(0)
    x, W = Float8Rows.of(torch.randn(48, 32) * 3), Float8Rows.of(torch.randn(64, 32) / 5)
    expected = x.to_bfloat16().double() @ W.to_bfloat16().double().T
    torch.testing.assert_close(x.times(W).double(), expected, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(x[5:9].times(W[16:32]).double(), expected[5:9, 16:32], rtol=2**-7, atol=1e-3)
