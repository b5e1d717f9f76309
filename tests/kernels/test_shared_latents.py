"""What is particular to shared latents; that they compute the right thing is in test_autoencode.py."""

import pytest
import torch
from sae_lens_switch_kernels import ExpertGroups, code_gates, route, sparse_autoencode, switch_encode


def test_one_expert_in_a_column_is_one_expert():
    torch.manual_seed(0)
    x, W, expert, gates = torch.randn(9, 5), torch.randn(14, 5), torch.randint(0, 3, (9,)), torch.rand(9)
    column, row = (
        sparse_autoencode(x, W, W, 4, expert_B=e, n_experts=3, n_shared=2, gates_B=g)
        for e, g in ((expert, gates), (expert.unsqueeze(1), gates.unsqueeze(1)))
    )
    assert torch.equal(column.out_BD, row.out_BD)
    assert torch.equal(column.indices_BK, row.indices_BK)


@pytest.mark.parametrize("n_shared", [0, 2])
@pytest.mark.parametrize("dead", [None, torch.tensor([0, 3, 5, 9, 13])], ids=["", "dead"])
def test_tokens_that_are_sorted_already_give_the_same_and_the_same_gradients(n_shared, dead):
    torch.manual_seed(0)
    found = []
    logits, x, W = torch.randn(9, 3), torch.randn(9, 5), torch.randn(12 + n_shared, 5)
    routed = route(logits)
    dead = None if dead is None else dead[dead < len(W)]
    for groups in (None, ExpertGroups(routed.order_B, routed.offsets_E1)):
        leaves = x.clone(), W.clone(), W.flip(0).clone(), routed.gates_B.clone(), torch.ones(5)
        x_BD, W_enc, W_dec, gates, pre_bias = (t.requires_grad_() for t in leaves)
        options = {"expert_B": routed.expert_B, "n_experts": 3, "n_shared": n_shared, "pre_bias_D": pre_bias}
        options |= {"dead_N": dead, "aux_k": 0 if dead is None else 2}
        result = sparse_autoencode(x_BD, W_enc, W_dec, 3, groups=groups, gates_B=gates, **options)
        outputs = [result.out_BD, *([] if dead is None else [result.aux_out_BD])]
        grads = torch.autograd.grad(sum(t.square().sum() for t in outputs), [x_BD, W_enc, W_dec, gates, pre_bias])
        found.append([*outputs, result.indices_BK, result.acts_BK, *grads])
    for given, sorted_here in zip(*found, strict=True):
        assert torch.equal(given, sorted_here)


def test_groups_of_tokens_with_several_experts_are_refused():
    x, W, groups = torch.zeros(4, 5), torch.zeros(14, 5), ExpertGroups(torch.arange(4), torch.tensor([0, 2, 4]))
    for expert in (None, torch.tensor([[0, 1]] * 4)):
        with pytest.raises(ValueError, match="groups must be of tokens with one expert each"):
            sparse_autoencode(x, W, W, 2, expert_B=expert, n_experts=1 if expert is None else 2, groups=groups)


def test_a_gate_ranks_the_latents_of_an_expert_behind_shared_ones():
    W, x = torch.eye(4), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    options = {"x_BD": x, "expert_B": torch.tensor([0]), "W_enc_FD": W, "k": 2, "n_experts": 1, "n_shared": 2}
    _, ungated = switch_encode(**options)
    values, gated = switch_encode(**options, gates_B=torch.tensor([0.3]))
    assert sorted(ungated[0].tolist()) == [2, 3]
    assert sorted(gated[0].tolist()) == [1, 3]  # 2, and 0.3 * 4, which is more than 0.3 * 3 and 1
    assert sorted(values[0].tolist()) == [2, 4]  # without the gate


def test_the_gate_of_a_shared_code_is_one():
    gates, experts = torch.tensor([[0.7, 0.2]], requires_grad=True), torch.tensor([[3, 1]])
    found = code_gates(gates, experts, torch.tensor([[1, -1, 3, -4, 1]]))
    assert torch.equal(found, torch.tensor([[0.2, 1.0, 0.7, 1.0, 0.2]]))
    found.sum().backward()
    assert gates.grad.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_an_empty_batch_and_a_single_token(n_tokens):
    x, W, expert = torch.randn(n_tokens, 5), torch.randn(14, 5), torch.zeros(n_tokens, dtype=torch.long)
    found = sparse_autoencode(x, W, W, 6, expert_B=expert, n_experts=3, n_shared=2, gates_B=torch.rand(n_tokens))
    assert found.out_BD.shape == (n_tokens, 5)
    assert [sorted(row) for row in found.indices_BK.tolist()] == [list(range(6))] * n_tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_shared": -1}, "n_shared must be at least 0 and less than the number of latents; got -1, F=14"),
        ({"n_shared": 14}, "n_shared must be at least 0 and less than the number of latents; got 14, F=14"),
        (
            {"n_shared": 3},
            "n_experts must divide the number of latents beside the 3 shared ones; got n_experts=3",
        ),
        ({"k": 7}, r"k must be between 1 and \(F - n_shared\) / n_experts \+ n_shared = 6; got k=7"),
        ({"gates_B": torch.zeros(5)}, "gates_B must have shape"),
        ({"expert_B": torch.tensor([0, 3, 0, 0])}, r"expert_B must lie in \[0, 3\)"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"x_BD": torch.zeros(4, 5), "expert_B": torch.tensor([0, 2, 1, 1]), "W_enc_FD": torch.zeros(14, 5)}
    with pytest.raises(ValueError, match=message):
        switch_encode(**(arguments | {"k": 2, "n_experts": 3, "n_shared": 2} | change))


def test_they_need_a_router():
    x, W = torch.zeros(4, 5), torch.zeros(14, 5)
    with pytest.raises(ValueError, match="expert_B must be given for n_experts=1, n_shared=2"):
        sparse_autoencode(x, W, W, 2, n_shared=2)
