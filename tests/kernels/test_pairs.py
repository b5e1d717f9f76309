"""What is particular to several experts per token; that they compute the right thing is in test_autoencode.py."""

import pytest
import torch
from sae_lens_switch_kernels import code_gates, sparse_autoencode, switch_encode


def test_one_expert_in_a_column_is_one_expert():
    torch.manual_seed(0)
    x, W, expert, gates = torch.randn(9, 5), torch.randn(12, 5), torch.randint(0, 3, (9,)), torch.rand(9)
    column, row = (
        sparse_autoencode(x, W, W, 2, expert_B=e, n_experts=3, gates_B=g)
        for e, g in ((expert, gates), (expert.unsqueeze(1), gates.unsqueeze(1)))
    )
    assert torch.equal(column.out_BD, row.out_BD)
    assert torch.equal(column.indices_BK, row.indices_BK)


def test_gates_decide_which_latents_are_selected():
    W = torch.eye(4)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    expert = torch.tensor([[0, 1]])
    _, ungated = switch_encode(x, expert, W, 2, 2)
    values, gated = switch_encode(x, expert, W, 2, 2, gates_B=torch.tensor([[0.9, 0.1]]))
    assert sorted(ungated[0].tolist()) == [2, 3]
    assert sorted(gated[0].tolist()) == [0, 1]
    assert sorted(values[0].tolist()) == [1, 2]  # without the gate


def test_an_expert_twice_is_refused():
    with pytest.raises(ValueError, match=r"expert_B must hold distinct experts per token; got \[1, 1\]"):
        switch_encode(torch.randn(2, 5), torch.tensor([[0, 1], [1, 1]]), torch.randn(9, 5), 2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"expert_B": torch.zeros(4, 4, dtype=torch.long)},
            r"shape \(4,\) or \(4, n_active\) with n_active from 1 to 3",
        ),
        ({"expert_B": torch.zeros(4, 0, dtype=torch.long)}, "expert_B must have shape"),
        ({"expert_B": torch.zeros(5, 2, dtype=torch.long)}, "expert_B must have shape"),
        ({"expert_B": torch.tensor([[0, 3]] * 4)}, r"expert_B must lie in \[0, 3\)"),
        ({"k": 7}, "k must be between 1 and 2 F / n_experts = 6; got k=7"),
        ({"gates_B": torch.zeros(4)}, r"gates_B must have shape \(4, 2\); got \(4,\)"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"x_BD": torch.zeros(4, 5), "expert_B": torch.tensor([[0, 2]] * 4), "W_enc_FD": torch.zeros(9, 5)}
    with pytest.raises(ValueError, match=message):
        switch_encode(**(arguments | {"k": 2, "n_experts": 3} | change))


def test_the_gate_of_a_code_is_its_experts():
    gates, experts = torch.tensor([[0.7, 0.2], [0.5, 0.4]]), torch.tensor([[3, 1], [0, 2]])
    found = code_gates(gates, experts, torch.tensor([[1, 3, 3], [2, 2, 0]]))
    assert torch.equal(found, torch.tensor([[0.2, 0.7, 0.7], [0.4, 0.4, 0.5]]))
