"""Codes of tokens with experts that vary in number: the largest of a batch, and those above thresholds; and levels."""

import pytest
import torch
from helpers.kernel_cases import assert_close
from sae_lens_switch_kernels import (
    RowGrads,
    backend,
    batch_topk_encode,
    sparse_autoencode,
    threshold_encode,
    torch_batch_topk,
    torch_codes,
    torch_tiles,
)
from torch import Tensor

# B, D, E, M, S shared, A active, k of the batch
SHAPES = [
    (1, 5, 3, 4, 0, 1, 3),
    (23, 17, 5, 6, 0, 1, 61),
    (23, 17, 5, 6, 0, 1, 138),
    (40, 6, 1, 9, 0, 1, 77),
    (31, 9, 4, 5, 0, 3, 90),
    (31, 9, 4, 5, 7, 1, 120),
    (31, 9, 4, 5, 3, 2, 1),
    (600, 4, 7, 3, 2, 2, 1500),
    (9, 3, 2, 2, 0, 1, 0),
]
shapes = pytest.mark.parametrize(("B", "D", "E", "M", "S", "A", "k"), SHAPES, ids=str)


class Case:
    def __init__(self, B, D, E, M, S, A):
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.F, self.S, self.M = S + E * M, S, M
        self.leaves = {"x_BD": normal(B, D) + 0.3, "W_enc_FD": normal(self.F, D), "pre_bias_D": normal(D)}
        self.leaves["gates_B"] = normal(B, A).sigmoid()
        self.W_dec_FD = normal(self.F, D)
        experts = torch.rand(B, E, generator=generator)
        experts[:, E - 1] -= 1 if E > A else 0  # the last has no token
        self.options = {"expert_B": experts.topk(A).indices, "n_experts": E, "n_shared": S}

    def gates(self, gates_BA: Tensor) -> Tensor:
        """[B, F]; 0 for latents that the token may not choose."""
        rows = []
        for gates, experts in zip(gates_BA, self.options["expert_B"].tolist(), strict=True):
            row = [torch.ones(self.S, dtype=gates.dtype)]
            for e in range(self.options["n_experts"]):
                own = gates[experts.index(e)] if e in experts else gates.new_zeros(())
                row.append(own.expand(self.M))
            rows.append(torch.cat(row))
        return torch.stack(rows)

    def pre(self, x_BD: Tensor, W_enc_FD: Tensor, pre_bias_D: Tensor) -> Tensor:
        return torch.einsum("bd,fd->bf", x_BD - pre_bias_D, W_enc_FD).relu()

    def largest(self, pre_BF: Tensor, gates_BF: Tensor, k: int) -> Tensor:
        ranked = (pre_BF * gates_BF).flatten()
        is_active = torch.zeros_like(ranked)
        is_active[ranked.topk(k).indices] = 1
        return is_active.view(pre_BF.shape) * (gates_BF > 0)


def row_of(offsets: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())


def dense(values: Tensor, indices: Tensor, offsets: Tensor | None, F: int) -> Tensor:
    if offsets is None:
        return values.new_zeros(len(values), F).scatter(1, indices, values)
    return values.new_zeros(len(offsets) - 1, F).index_put((row_of(offsets), indices), values)


def use_small_tiles(monkeypatch) -> None:
    monkeypatch.setitem(torch_tiles.TILE_ROWS, "cpu", 5)
    monkeypatch.setattr(torch_tiles, "_TILE_LATENTS", 3)
    monkeypatch.setattr(torch_batch_topk, "_SEARCH_ELEMENTS", 8)
    monkeypatch.setitem(torch_codes.SEARCH_ELEMENTS, "cpu", 8)


@shapes
@pytest.mark.parametrize("small_tiles", [False, True], ids=["as they are", "small tiles"])
@pytest.mark.parametrize("as_on_gpu", [False, True], ids=["", "as on a GPU"])
def test_the_largest_of_the_batch_and_their_gradients(B, D, E, M, S, A, k, small_tiles, as_on_gpu, monkeypatch):
    if small_tiles:
        use_small_tiles(monkeypatch)
    if as_on_gpu:
        monkeypatch.setattr(torch_batch_topk, "_may_wait_for", lambda _: False)
    case = Case(B, D, E, M, S, A)
    given = {n: t.clone().requires_grad_() for n, t in case.leaves.items() if n != "gates_B"}
    gates_BA = case.leaves["gates_B"]
    values, indices, offsets = batch_topk_encode(k=k, gates_B=gates_BA, **given, **case.options)
    assert values.shape == indices.shape == (k,)
    assert ((row_of(offsets) * case.F + indices).diff() > 0).all(), "distinct, and ascending within a token"
    truth = {n: t.detach().clone().requires_grad_() for n, t in given.items()}
    pre = case.pre(**truth)
    expected = pre * case.largest(pre, case.gates(gates_BA), k)
    found = dense(values, indices, offsets, case.F)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(B, case.F, dtype=torch.float64)
    if k:
        for a, b in zip(
            torch.autograd.grad(found, list(given.values()), upstream),
            torch.autograd.grad(expected, list(truth.values()), upstream),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@shapes
@pytest.mark.parametrize("over_batch", [True, False])
@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("gated", [True, False])
def test_sparse_autoencode_its_levels_and_all_gradients(B, D, E, M, S, A, k, over_batch, levels, gated):
    if not over_batch and (levels == 0 or k == 0):
        return  # other tests'
    k = k if over_batch else min(3, M)
    case = Case(B, D, E, M, S, A)
    ends = {0: [M], 1: [M], 3: [e for e in (1, 2) if e < M] + [M]}[levels]
    leaves = case.leaves | {"W_dec_FD": case.W_dec_FD}
    if not gated:
        del leaves["gates_B"]
    position = torch.tensor([0] * S + [i for _ in range(E) for i in range(M)])
    upstream = torch.randn(B, len(ends), D, dtype=torch.float64), torch.randn(B, case.F, dtype=torch.float64)

    def ours(row_grads=None, **given):
        ends_L = torch.tensor(ends) if levels else None
        r = sparse_autoencode(**given, k=k, **case.options, over_batch=over_batch, ends_L=ends_L, row_grads=row_grads)
        assert (r.offsets_B1 is None) == (not over_batch)
        out = r.out_BD if levels else r.out_BD.unsqueeze(1)
        return out, dense(r.values_BK, r.indices_BK, r.offsets_B1, case.F)

    def truth(x_BD, W_enc_FD, pre_bias_D, W_dec_FD, gates_B=None):
        pre = case.pre(x_BD, W_enc_FD, pre_bias_D)
        gates = case.gates(torch.ones(B, A, dtype=torch.float64) if gates_B is None else gates_B)
        if over_batch:
            codes = pre * case.largest(pre, gates, k)
        else:
            best = (pre * gates).topk(k, dim=1).indices
            codes = pre * (torch.zeros_like(pre).scatter(1, best, 1.0) * (gates > 0))
        acts, parts = codes * gates, []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            parts.append((acts * ((position >= start) & (position < end))) @ W_dec_FD)
        return torch.stack(parts, 1), codes

    def run(function, **options):
        given = {n: t.clone().requires_grad_() for n, t in leaves.items()}
        results = function(**given, **options)
        sum((r * u).sum() for r, u in zip(results, upstream, strict=True)).backward()
        return results, {n: t.grad for n, t in given.items()}

    (results, grads), (expected, expected_grads) = run(ours), run(truth)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, msg=lambda m, name=name: f"{name}: {m}")

    rows = RowGrads()
    _, grads = run(ours, row_grads=rows)
    assert rows.rows_R is not None
    for name, part in (("W_enc_FD", rows.dW_enc_RD), ("W_dec_FD", rows.dW_dec_RD)):
        assert grads[name] is None
        torch.testing.assert_close(
            torch.zeros_like(leaves[name]).index_copy(0, rows.rows_R, part), expected_grads[name]
        )


@shapes
@pytest.mark.parametrize("small_tiles", [False, True], ids=["as they are", "small tiles"])
@pytest.mark.parametrize("gated", [True, False])
def test_all_above_their_thresholds_once_gated(B, D, E, M, S, A, k, small_tiles, gated, monkeypatch):  # noqa: ARG001
    if small_tiles:
        use_small_tiles(monkeypatch)
    case = Case(B, D, E, M, S, A)
    x, W, gates_BA = case.leaves["x_BD"], case.leaves["W_enc_FD"], case.leaves["gates_B"] if gated else None
    for height in (0.6, -99.0, 99.0):
        threshold = height * (1 + torch.arange(case.F).double() / case.F)
        values, indices, offsets = threshold_encode(x, W, threshold, gates_B=gates_BA, **case.options)
        gates = case.gates(torch.ones(B, A, dtype=torch.float64) if gates_BA is None else gates_BA)
        pre = torch.einsum("bd,fd->bf", x, W)
        is_active = (pre * gates > threshold) & (gates > 0)
        assert torch.equal(indices, is_active.nonzero()[:, 1])
        assert torch.equal(row_of(offsets), is_active.nonzero()[:, 0])
        if len(values):
            assert_close("values", values, pre[is_active])


def test_a_token_that_is_not_a_number_has_all_of_its_experts_latents():
    x, W = torch.tensor([[1.0], [torch.nan]]), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    _, indices, offsets = threshold_encode(
        x, W, torch.full((4,), 1.5), expert_B=torch.tensor([0, 1]), n_experts=2, gates_B=torch.ones(2)
    )
    assert offsets.tolist() == [0, 1, 3]
    assert indices.tolist() == [1, 2, 3]


def test_the_triton_form_selects_the_same(monkeypatch):
    pytest.importorskip("triton")
    case = Case(31, 9, 4, 5, 3, 2)
    given = {n: t.float() for n, t in case.leaves.items()}

    def found() -> list[Tensor]:
        leaves = {n: t.clone().requires_grad_() for n, t in given.items()} | {"W_dec_FD": case.W_dec_FD.float()}
        r = sparse_autoencode(**leaves, k=90, over_batch=True, ends_L=torch.tensor([2, 5]), **case.options)
        grads = torch.autograd.grad(r.out_BD.square().sum(), [leaves[n] for n in given])
        return [r.indices_BK, r.offsets_B1, r.out_BD, r.acts_BK, *grads]

    plain = found()
    monkeypatch.setenv("SAE_LENS_SWITCH_BACKEND", "triton")
    for remembered in (backend._proven, backend._triton_imports):
        remembered.cache_clear()
    for a, b in zip(found(), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for remembered in (backend._proven, backend._triton_imports):
        remembered.cache_clear()


def test_two_runs_give_the_same_bits():
    case = Case(50, 12, 4, 9, 3, 2)

    def found() -> list[Tensor]:
        given = {n: t.float().requires_grad_() for n, t in (case.leaves | {"W_dec_FD": case.W_dec_FD}).items()}
        r = sparse_autoencode(**given, k=200, over_batch=True, ends_L=torch.tensor([2, 9]), **case.options)
        return [*r[:3], *torch.autograd.grad(r.out_BD.square().sum(), list(given.values()))]

    for first, second in zip(found(), found(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 16}, "k must be between 0 and B times the 3 latents of a token = 15; got k=16"),
        ({"bias_F": torch.ones(6)}, "bias_F must be None with expert_B where tokens differ in number of codes"),
        ({"scale_F": torch.ones(6)}, "scale_F must be None with expert_B where tokens differ"),
        ({"ends_L": torch.tensor([2, 6])}, "ends_L must ascend to the number of latents, 3"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    x, W = torch.ones(5, 3), torch.ones(6, 3)
    routed = {"expert_B": torch.tensor([0, 1, 0, 1, 1]), "n_experts": 2, "over_batch": True}
    with pytest.raises(ValueError, match=message):
        sparse_autoencode(x, W, W, **{"k": 4, **routed, **options})
