"""Codes whose number varies by token (BatchTopK): every primitive against dense float64, outputs and all gradients."""

import pytest
import torch
from helpers.kernel_cases import assert_close, compare
from sae_lens_switch_kernels import (
    RowGrads,
    batch_topk_encode,
    latent_weight_grad,
    matmul_at_indices,
    sparse_autoencode,
    sparse_decode,
    torch_batch_topk,
    torch_tiles,
)
from torch import Tensor

# B, D, F, k of the batch: no codes, one, fewer than tokens, uneven, every latent
SHAPES = [(1, 5, 7, 0), (1, 5, 7, 1), (9, 3, 4, 2), (23, 17, 31, 101), (40, 64, 96, 640), (6, 8, 10, 60)]
shapes = pytest.mark.parametrize(("B", "D", "F", "k"), SHAPES, ids=str)
mkl = pytest.mark.parametrize("has_mkl", [True, False], ids=["MKL", "without MKL"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def variable_codes(B: int, F: int, k: int) -> tuple[Tensor, Tensor]:
    """Indices [k] and offsets of k random places in [B, F]."""
    places = torch.randperm(B * F, generator=torch.Generator().manual_seed(7))[:k].sort().values
    return places % F, torch.searchsorted(places, torch.arange(B + 1) * F)


def row_of(offsets: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())


def dense(values: Tensor, indices: Tensor, offsets: Tensor, F: int) -> Tensor:
    return values.new_zeros(len(offsets) - 1, F).index_put((row_of(offsets), indices.long()), values, accumulate=True)


@shapes
@mkl
@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
def test_the_linear_operators_and_their_gradients(B, D, F, k, has_mkl, integer, monkeypatch):
    if not has_mkl:
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    indices, offsets = variable_codes(B, F, k)
    values, W, g = normal(k), normal(F, D, seed=1), normal(B, D, seed=2)
    codes, rows = indices.to(integer), offsets.to(integer)
    compare(
        lambda W, values=values: sparse_decode(values, codes, W, rows),
        lambda W, values=values: dense(values, indices, offsets, F) @ W,
        {"values": values, "W": W} if k else {"W": W},
        g,
    )
    if k == 0:
        return
    compare(
        lambda g, W: matmul_at_indices(g, W, codes, rows),
        lambda g, W: (g @ W.T)[row_of(offsets), indices],
        {"g": g, "W": W},
        values,
    )
    compare(
        lambda values, g: latent_weight_grad(values, codes, g, F, rows),
        lambda values, g: dense(values, indices, offsets, F).T @ g,
        {"values": values, "g": g},
        W,
    )


def test_equally_many_codes_per_token_are_the_same_bits_in_either_form():
    B, D, F, K = 12, 6, 20, 3
    indices = torch.rand(B, F, generator=torch.Generator().manual_seed(1)).topk(K).indices
    values, W, g = normal(B, K).float(), normal(F, D).float(), normal(B, D, seed=4).float()
    offsets = torch.arange(B + 1) * K
    assert torch.equal(
        sparse_decode(values, indices, W), sparse_decode(values.flatten(), indices.flatten(), W, offsets)
    )
    dots = matmul_at_indices(g, W, indices)
    assert torch.equal(dots.flatten(), matmul_at_indices(g, W, indices.flatten(), offsets))
    grad = latent_weight_grad(values, indices, g, F)
    assert torch.equal(grad, latent_weight_grad(values.flatten(), indices.flatten(), g, F, offsets))


def reference_codes(x: Tensor, W: Tensor, k: int, pre_bias_D=None, bias_F=None, scale_F=None) -> Tensor:
    """[B, F]: relu of what is among the k largest of the whole batch."""
    pre = (x if pre_bias_D is None else x - pre_bias_D) @ W.T
    pre = pre if bias_F is None else pre + bias_F
    ranked = pre if scale_F is None else pre * scale_F
    chosen = torch.zeros(pre.numel(), dtype=torch.bool)
    chosen[ranked.flatten().topk(k).indices] = True
    return pre.relu() * chosen.view(pre.shape)


OPTIONS = {"bare": set(), "all": {"pre_bias_D", "bias_F", "scale_F"}, "bias": {"bias_F"}, "scale": {"scale_F"}}
options = pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS.keys())


def encoder_inputs(B: int, D: int, F: int, names: set[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    leaves = {"x_BD": normal(B, D, seed=3) + 0.3, "W_enc_FD": normal(F, D, seed=1)}
    optional = {"pre_bias_D": normal(D, seed=5), "bias_F": normal(F, seed=6)}
    constants = {"scale_F": normal(F, seed=8).exp()} if "scale_F" in names else {}
    return leaves | {name: t for name, t in optional.items() if name in names}, constants


@shapes
@options
@pytest.mark.parametrize("tiny", [False, True], ids=["one tile", "tiny tiles"])
def test_batch_topk_encode_and_its_gradients(B, D, F, k, names, tiny, monkeypatch):
    if tiny:  # of rows, latents, and of what is searched at a time
        monkeypatch.setitem(torch_tiles.TILE_ROWS, "cpu", 5)
        monkeypatch.setattr(torch_tiles, "_TILE_LATENTS", 19)
        monkeypatch.setattr(torch_batch_topk, "_SEARCH_ELEMENTS", 40)
    leaves, constants = encoder_inputs(B, D, F, names)

    def ours(**given):
        values, indices, offsets = batch_topk_encode(**given, k=k, **constants)
        assert values.shape == indices.shape == (k,)
        assert offsets[0] == 0
        assert offsets[-1] == k
        places = row_of(offsets) * F + indices
        assert (places.diff() > 0).all(), "distinct, and ascending within a token"
        return dense(values, indices, offsets, F)

    def truth(x_BD, W_enc_FD, **given):
        return reference_codes(x_BD, W_enc_FD, k, **given, **constants)

    compare(ours, truth, leaves, normal(B, F, seed=9))


def autoencode_reference(x_BD, W_enc_FD, W_dec_FD, k, ends, dead_N, aux_k, pre_bias_D=None, bias_F=None, scale_F=None):
    """Parts of every level [B, L, D], the codes [B, F], and the reconstruction from dead latents."""
    codes = reference_codes(x_BD, W_enc_FD, k, pre_bias_D, bias_F, scale_F)
    bounds = [0, *ends]
    parts = [codes[:, a:b] @ W_dec_FD[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    pre = (x_BD if pre_bias_D is None else x_BD - pre_bias_D) @ W_enc_FD[dead_N].T
    pre = pre if bias_F is None else pre + bias_F[dead_N]
    chosen = (pre if scale_F is None else pre * scale_F[dead_N]).topk(aux_k).indices
    acts = torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen))
    return torch.stack(parts, 1), codes, acts @ W_dec_FD[dead_N]


@pytest.mark.parametrize(("B", "D", "F", "k"), SHAPES[1:], ids=str)
@options
@mkl
@pytest.mark.parametrize("levels", [1, 3])
def test_sparse_autoencode_over_a_batch_its_levels_and_all_gradients(B, D, F, k, names, has_mkl, levels, monkeypatch):
    if not has_mkl:
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    leaves, constants = encoder_inputs(B, D, F, names)
    leaves["W_dec_FD"] = normal(F, D, seed=11)
    ends = [F] if levels == 1 else [1, F // 2 + 1, F]
    dead = torch.arange(0, F, 2)
    upstream = [normal(B, levels, D, seed=12), normal(B, F, seed=13), normal(B, D, seed=14)]

    def ours(row_grads=None, **given):
        ends_L = None if levels == 1 else torch.tensor(ends)
        options = {"dead_N": dead, "aux_k": 2, "over_batch": True, "ends_L": ends_L, "row_grads": row_grads}
        r = sparse_autoencode(**given, k=k, **constants, **options)
        out = r.out_BD.unsqueeze(1) if levels == 1 else r.out_BD
        return out, dense(r.values_BK, r.indices_BK, r.offsets_B1, F), r.aux_out_BD

    def truth(**given):
        return autoencode_reference(**given, k=k, ends=ends, dead_N=dead, aux_k=2, **constants)

    def run(function, **options):
        inputs = {name: t.clone().requires_grad_() for name, t in leaves.items()}
        results = function(**inputs, **options)
        sum((r * u).sum() for r, u in zip(results, upstream, strict=True)).backward()
        return dict(zip(["out", "codes", "aux"], results, strict=True)), {n: t.grad for n, t in inputs.items()}

    (results, grads), (expected, expected_grads) = run(ours), run(truth)
    for name in expected:
        assert_close(name, results[name], expected[name])
    for name in expected_grads:
        assert_close(f"d_{name}", grads[name], expected_grads[name])

    rows = RowGrads()
    _, grads = run(ours, row_grads=rows)
    assert rows.rows_R is not None
    for name, part in (("W_enc_FD", rows.dW_enc_RD), ("W_dec_FD", rows.dW_dec_RD), ("bias_F", rows.d_bias_R)):
        if name in leaves:
            assert grads[name] is None
            assert part is not None
            grads[name] = torch.zeros_like(leaves[name]).index_copy(0, rows.rows_R, part)
    for name in expected_grads:
        assert_close(f"d_{name}", grads[name], expected_grads[name])
    assert rows.radial_R is not None
    radial = (expected_grads["W_dec_FD"] * leaves["W_dec_FD"]).sum(1)
    assert_close("radial", torch.zeros_like(radial).index_copy(0, rows.rows_R, rows.radial_R), radial)


@pytest.mark.parametrize("counts", [[1], [3, 1, 4], [8]], ids=str)
@pytest.mark.parametrize("over_batch", [True, False])
def test_dead_latents_in_groups_reconstruct_apart_with_all_their_gradients(counts, over_batch):
    B, D, F, aux_k = 11, 6, 20, 2
    dead = torch.arange(1, 2 * sum(counts), 2)
    leaves, constants = encoder_inputs(B, D, F, OPTIONS["all"])
    leaves["W_dec_FD"] = normal(F, D, seed=11)
    upstream = normal(B, len(counts), D, seed=12)

    def ours(row_grads=None, **given):
        options = {"dead_N": dead, "aux_k": min(aux_k, len(dead)), "dead_counts": counts, "row_grads": row_grads}
        return sparse_autoencode(**given, k=3, over_batch=over_batch, **constants, **options).aux_out_BD

    def truth(x_BD, W_enc_FD, W_dec_FD, pre_bias_D, bias_F):
        outs = []
        for mine in dead.split(counts):
            pre = (x_BD - pre_bias_D) @ W_enc_FD[mine].T + bias_F[mine]
            chosen = (pre * constants["scale_F"][mine]).topk(min(aux_k, len(mine))).indices
            outs.append(torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen)) @ W_dec_FD[mine])
        return torch.stack(outs, 1)

    compare(ours, truth, leaves, upstream)
    rows = RowGrads()
    given = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    (ours(rows, **given) * upstream).sum().backward()
    expected = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    (truth(**expected) * upstream).sum().backward()
    assert rows.rows_R is not None
    assert rows.dW_dec_RD is not None
    grad = torch.zeros(F, D, dtype=torch.float64).index_copy(0, rows.rows_R, rows.dW_dec_RD)
    assert_close("dW_dec", grad, expected["W_dec_FD"].grad)


@pytest.mark.parametrize("precision", ["bfloat16", "float8"])
def test_low_precision_selects_nearly_the_same_with_exact_values(precision):
    x, W = normal(64, 48).float(), normal(200, 48, seed=1).float()
    bias, scale = normal(200, seed=2).float(), normal(200, seed=3).mul(0.2).exp().float()
    options = {"bias_F": bias, "scale_F": scale}
    exact, found = (batch_topk_encode(x, W, 600, **options, encoder_precision=p) for p in ("full", precision))
    values, indices, offsets = found
    pre = (x @ W.T + bias).relu()
    torch.testing.assert_close(values, pre[row_of(offsets), indices], rtol=1e-5, atol=1e-5)
    same = (dense(values, indices, offsets, 200) > 0) == (dense(*exact, 200) > 0)
    assert (~same).sum() <= {"bfloat16": 0.01, "float8": 0.1}[precision] * 600
    places = row_of(offsets) * 200 + indices
    assert (places.diff() > 0).all()
    r = sparse_autoencode(x, W, W, 600, over_batch=True, encoder_precision=precision, **options)
    assert r.doubtful_B is not None
    assert r.doubtful_B.shape == (64,)
    assert torch.equal(r.values_BK, values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets_B1": torch.tensor([0, 2, 3])}, r"offsets_B1 must ascend from 0 to the number of codes, 4"),
        ({"offsets_B1": torch.tensor([0, 3, 2, 4])}, "offsets_B1 must ascend"),
        ({"offsets_B1": torch.tensor([[0, 4]])}, r"offsets_B1 must have shape \(B \+ 1,\); got \(1, 2\)"),
        ({"offsets_B1": torch.tensor([0.0, 4.0])}, "offsets_B1 must be int32 or int64"),
        ({"indices_BK": torch.zeros(2, 2, dtype=torch.long), "values_BK": torch.zeros(2, 2)}, "with offsets_B1"),
        ({"indices_BK": torch.full((4,), 9)}, r"indices_BK must lie in \[0, 5\)"),
    ],
)
def test_codes_that_cannot_be_are_refused(change, message):
    given = {"values_BK": torch.ones(4), "indices_BK": torch.arange(4), "offsets_B1": torch.tensor([0, 1, 4])} | change
    with pytest.raises(ValueError, match=message):
        sparse_decode(given["values_BK"], given["indices_BK"], torch.ones(5, 3), given["offsets_B1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 36}, "k must be between 0 and B F = 35; got k=36"),
        ({"k": -1}, "k must be between 0 and B F = 35; got k=-1"),
        ({"by_magnitude": True}, "by_magnitude must be False with over_batch or expert_B; got True"),
        ({"gates_B": torch.ones(5)}, "over_batch must be False with gates_B, unless expert_B is given"),
        ({"ends_L": torch.tensor([3, 6])}, "ends_L must ascend to the number of latents, 7"),
        ({"ends_L": torch.tensor([0, 7])}, "ends_L must ascend"),
        ({"ends_L": torch.tensor([[7]])}, r"ends_L must have shape \(at least 1,\)"),
        (
            {"dead_N": torch.arange(3), "aux_k": 1, "dead_counts": [1, 1]},
            "dead_counts must be positive and sum to the 3",
        ),
        ({"dead_counts": [1]}, "dead_counts must be positive and sum to the 0 dead latents"),
    ],
)
def test_impossible_arguments_over_a_batch_are_refused(options, message):
    x, W = torch.ones(5, 3), torch.ones(7, 3)
    with pytest.raises(ValueError, match=message):
        sparse_autoencode(x, W, W, **{"k": 4, "over_batch": True, **options})


def test_two_runs_give_the_same_bits():
    leaves, constants = encoder_inputs(50, 12, 40, OPTIONS["all"])
    leaves["W_dec_FD"] = normal(40, 12)

    def run() -> list[Tensor]:
        given = {name: t.float().requires_grad_() for name, t in leaves.items()}
        scale = constants["scale_F"].float()
        r = sparse_autoencode(**given, scale_F=scale, k=200, over_batch=True, ends_L=torch.tensor([5, 40]))
        return [*r[:3], *torch.autograd.grad(r.out_BD.square().sum(), list(given.values()))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
