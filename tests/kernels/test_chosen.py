"""Latents chosen by somebody else: candidates and decoder against dense float64, outputs and all gradients."""

import pytest
import torch
from helpers.kernel_cases import compare
from sae_lens_switch_kernels import RowGrads, sparse_autoencode, topk_encode
from sae_lens_switch_kernels.chosen import Candidates, Codes, Dead, dead_candidates, decode_chosen, topk_candidates
from torch import Tensor
from torch.testing import assert_close

B, D, F, K, A = 23, 17, 31, 6, 4
DEAD = torch.tensor([2, 3, 11, 19, 23, 24, 30])
OPTIONS = [{"pre_bias_D", "bias_F", "scale_F"}, {"bias_F"}, {"scale_F"}, set()]
options = pytest.mark.parametrize("names", OPTIONS, ids=lambda names: "-".join(sorted(names)) or "bare")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(names: set[str]) -> tuple[dict[str, Tensor], Tensor | None]:
    leaves = {"W_enc_FD": normal(F, D, seed=1), "W_dec_FD": normal(F, D, seed=2)}
    optional = {"pre_bias_D": normal(D, seed=3), "bias_F": normal(F, seed=4)}
    leaves |= {name: t for name, t in optional.items() if name in names}
    return leaves, normal(F, seed=5).exp() if "scale_F" in names else None


def pre_activations(x: Tensor, W_enc_FD: Tensor, pre_bias_D: Tensor | None = None, bias_F: Tensor | None = None):
    pre = (x if pre_bias_D is None else x - pre_bias_D) @ W_enc_FD.T
    return pre if bias_F is None else pre + bias_F


def some_of(found: Candidates, seed: int, share: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(found.values_BC.shape, generator=generator) < share


def dense_mask(found: Candidates, is_chosen: Tensor, width: int) -> Tensor:
    return torch.zeros(len(is_chosen), width, dtype=torch.float64).scatter(1, found.indices_BC, is_chosen.double())


@options
@pytest.mark.parametrize("k", [1, K, F])
def test_candidates_are_what_the_encoder_selects_before_relu(names, k):
    leaves, scale = weights(names)
    del leaves["W_dec_FD"]
    x = normal(B, D)
    found = topk_candidates(x, k=k, scale_F=scale, **leaves)
    pre = pre_activations(x, **leaves)
    assert_close(found.values_BC, pre.gather(1, found.indices_BC))
    ranked = pre if scale is None else pre * scale
    assert_close(found.ranked_BC, ranked.gather(1, found.indices_BC))
    assert_close(found.ranked_BC.sort(1, descending=True).values, ranked.topk(k).values)
    values, _ = topk_encode(x, k=k, scale_F=scale, **leaves)
    assert_close(found.values_BC.relu().sort(1).values, values.sort(1).values)


def test_candidates_of_low_precision_are_ranked_by_what_they_are_in_full():
    x, W = normal(B, D).float(), normal(300, D, seed=1).float()
    found = topk_candidates(x, W, K, encoder_precision="bfloat16")
    assert_close(found.values_BC, (x @ W.T).gather(1, found.indices_BC))
    assert found.ranked_BC.dtype == torch.float32


@pytest.mark.parametrize("aux_k", [1, 3, 9])
@pytest.mark.parametrize("has_pre_bias", [True, False])
@pytest.mark.parametrize("dead", [[1, 4, 5, 8, 29], [0], list(range(11, 20)), []], ids=str)
@pytest.mark.parametrize("n_experts", [1, 3])
def test_dead_candidates_are_the_best_dead_latents_of_a_tokens_expert(n_experts, dead, has_pre_bias, aux_k):
    width = 30 // n_experts
    x, W = normal(B, D), normal(n_experts * width, D, seed=1)
    pre_bias = normal(D, seed=3) if has_pre_bias else None
    expert = torch.randint(n_experts, (B,), generator=torch.Generator().manual_seed(2))
    dead_N = torch.tensor(dead, dtype=torch.long)
    found = dead_candidates(x, W, dead_N, aux_k, expert_B=expert, n_experts=n_experts, pre_bias_D=pre_bias)
    pre = pre_activations(x, W, pre_bias)
    for row in range(B):
        own = {place: pre[row, latent].item() for place, latent in enumerate(dead) if latent // width == expert[row]}
        best = sorted(own, key=own.__getitem__, reverse=True)[:aux_k]
        is_real = found.ranked_BC[row] > -torch.inf
        places, values = found.indices_BC[row][is_real].tolist(), found.values_BC[row][is_real]
        assert sorted(places) == sorted(best)
        assert_close(values, torch.tensor([own[place] for place in places], dtype=values.dtype))
        assert_close(found.ranked_BC[row][is_real], values)


@options
@pytest.mark.parametrize("ends", [(9, 20, F), (0, 9, 9, F), (F,), (0, F, F)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_each_level_of_codes_is_decoded_apart(names, ends, share):
    """Levels may be empty, as a process's part of them is."""
    leaves, scale = weights(names)
    x = normal(B, D)
    encoder = {name: t for name, t in leaves.items() if name != "W_dec_FD"}
    best = topk_candidates(x, k=K * B, scale_F=scale, over_batch=True, **encoder)
    chosen = some_of(best, 1, share)
    codes = best.chosen(chosen).after_relu().in_levels(torch.tensor(ends), F)
    pre = pre_activations(x, **encoder)
    ranked = pre if scale is None else pre * scale
    is_candidate = torch.zeros(B * F, dtype=torch.bool).index_fill(0, ranked.flatten().topk(K * B).indices, True)
    mask = torch.zeros(B * F, dtype=torch.float64).masked_scatter(is_candidate, chosen.double()).view(B, F)
    levels = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    dead_levels, found = [DEAD[:3], DEAD[3:4], DEAD[4:]], []
    for dead in dead_levels:
        W_ND, bias_N = leaves["W_enc_FD"][dead], leaves["bias_F"][dead] if "bias_F" in leaves else None
        of_level = topk_candidates(x, W_ND, min(2, len(dead)), pre_bias_D=leaves.get("pre_bias_D"), bias_F=bias_N)
        found.append((of_level, some_of(of_level, 2 + len(dead), share)))
    firsts = [0, 3, 4]
    parts = [
        best._replace(indices_BC=best.indices_BC + n).chosen(t) for n, (best, t) in zip(firsts, found, strict=True)
    ]
    dead_codes = Codes.of_levels(parts)

    def ours(W_enc_FD, W_dec_FD, pre_bias_D=None, bias_F=None):
        rest = {"pre_bias_D": pre_bias_D, "bias_F": bias_F, "dead": Dead(DEAD, dead_codes)}
        out, aux = decode_chosen(x, W_enc_FD, W_dec_FD, codes, **rest)
        assert aux is not None
        return torch.cat([out.view(B, -1), aux.view(B, -1)], 1)

    def truth(W_enc_FD, W_dec_FD, **biases):
        pre = pre_activations(x, W_enc_FD, **biases)
        acts = pre.relu() * mask
        outs = [acts[:, level] @ W_dec_FD[level] for level in levels]
        for dead, (of_level, is_chosen) in zip(dead_levels, found, strict=True):
            outs.append((pre[:, dead] * dense_mask(of_level, is_chosen, len(dead))) @ W_dec_FD[dead])
        return torch.cat(outs, 1)

    compare(ours, truth, leaves, normal(B, (len(ends) + 3) * D, seed=8))


@options
@pytest.mark.parametrize("shares", [(0.5, 0.5), (1.0, 1.0), (0.0, 0.5), (0.5, 0.0), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("active_only", [None, False, True])
def test_decode_chosen_and_all_gradients_whatever_was_chosen(names, shares, active_only):
    leaves, scale = weights(names)
    x = normal(B, D)
    encoder = {name: t for name, t in leaves.items() if name != "W_dec_FD"}
    best = topk_candidates(x, k=K, scale_F=scale, **encoder)
    of_dead = {n: t[DEAD] if n in ("W_enc_FD", "bias_F") else t for n, t in encoder.items()}
    best_dead = topk_candidates(x, k=A, scale_F=None if scale is None else scale[DEAD], **of_dead)
    chosen, chosen_dead = some_of(best, 1, shares[0]), some_of(best_dead, 2, shares[1])
    codes = best.chosen(chosen)
    codes = codes._replace(values_S=codes.values_S.relu())
    row_grads = None if active_only is None else RowGrads(active_only)

    def ours(W_enc_FD, W_dec_FD, pre_bias_D=None, bias_F=None):
        dead = Dead(DEAD, best_dead.chosen(chosen_dead))
        rest = {"pre_bias_D": pre_bias_D, "bias_F": bias_F, "row_grads": row_grads}
        return torch.cat(decode_chosen(x, W_enc_FD, W_dec_FD, codes, dead=dead, **rest), 1)

    def truth(W_enc_FD, W_dec_FD, **biases):
        pre = pre_activations(x, W_enc_FD, **biases)
        out = (pre.relu() * dense_mask(best, chosen, F)) @ W_dec_FD
        return torch.cat([out, (pre[:, DEAD] * dense_mask(best_dead, chosen_dead, len(DEAD))) @ W_dec_FD[DEAD]], 1)

    g = normal(B, 2 * D, seed=8)
    if not active_only:
        compare(ours, truth, leaves, g)
        return
    given = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    (truth(**given) * g).sum().backward()
    expected = {name: t.grad for name, t in given.items()}
    given = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    (ours(**given) * g).sum().backward()
    assert given["W_enc_FD"].grad is None
    rows = row_grads.rows_R
    assert set(rows.tolist()) == set(best.indices_BC[chosen].tolist()) | set(
        DEAD[best_dead.indices_BC[chosen_dead]].tolist()
    )
    parts = {"W_enc_FD": row_grads.dW_enc_RD, "W_dec_FD": row_grads.dW_dec_RD, "bias_F": row_grads.d_bias_R}
    for name, part in parts.items():
        if name in expected:
            assert_close(torch.zeros_like(leaves[name]).index_put((rows,), part), expected[name])
    if "pre_bias_D" in expected:
        assert_close(given["pre_bias_D"].grad, expected["pre_bias_D"])


def test_a_part_that_is_the_whole_is_the_fused_operator():
    leaves, scale = weights({"pre_bias_D", "bias_F", "scale_F"})
    x, g = normal(B, D), normal(B, D, seed=8)
    encoder = {name: t for name, t in leaves.items() if name != "W_dec_FD"}
    best = topk_candidates(x, k=K, scale_F=scale, **encoder)
    codes = best.chosen(torch.ones_like(best.indices_BC, dtype=torch.bool))
    codes = codes._replace(values_S=codes.values_S.relu())

    def ours(**given):
        return decode_chosen(x, codes=codes, **given)[0]

    def fused(**given):
        return sparse_autoencode(x, k=K, scale_F=scale, **given).out_BD

    compare(ours, fused, leaves, g)
