"""What the public functions accept and refuse."""

import pytest
import torch
from sae_lens_switch_kernels import latent_weight_grad, sparse_autoencode, sparse_decode, switch_encode


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
        ({"W_dec_FD": torch.zeros(8, 5)}, r"W_dec_FD must have shape \(9, any\); got \(8, 5\)"),
        ({"W_dec_FD": torch.zeros(9, 5).double()}, "must share a dtype"),
        ({"k": 10}, "k must be between 1 and F / n_experts = 9; got k=10"),
        ({"n_experts": 3}, "expert_B must be given for n_experts=3"),
        ({"expert_B": torch.full((4,), 3), "n_experts": 3}, r"expert_B must lie in \[0, 3\)"),
        ({"expert_B": torch.zeros(4), "n_experts": 3}, "expert_B must be int32 or int64"),
        ({"gates_B": torch.zeros(3)}, r"gates_B must have shape \(4,\); got \(3,\)"),
        ({"pre_bias_D": torch.zeros(4)}, r"pre_bias_D must have shape \(5,\)"),
        ({"bias_F": torch.zeros(5)}, r"bias_F must have shape \(9,\)"),
        ({"scale_F": torch.zeros(9).double()}, "scale_F and W_enc_FD must share a dtype"),
        ({"dead_N": torch.tensor([9]), "aux_k": 1}, r"dead_N must lie in \[0, 9\)"),
        ({"dead_N": torch.tensor([1, 2]), "aux_k": 3}, "aux_k must be between 1 and the 2 dead latents; got aux_k=3"),
        ({"dead_N": torch.tensor([1, 2])}, "got aux_k=0"),
        ({"dead_N": torch.ones(8, dtype=torch.bool), "aux_k": 1}, r"dead_N must have shape \(9,\) as a mask"),
        (
            {"dead_N": torch.ones(9, dtype=torch.bool), "aux_k": 10},
            "between 1 and the 9 latents of an expert; got aux_k=10",
        ),
        (
            {"dead_N": torch.ones(9, dtype=torch.bool), "aux_k": 1, "dead_counts": [9]},
            "dead latents, which are indices",
        ),
        ({"scale_F": torch.zeros(9, device="meta")}, "must share a device"),
        (
            {"scale_F": torch.ones(9), "expert_B": torch.tensor([[0, 1]] * 4), "n_experts": 3},
            "scale_F must be None with several experts per token or shared latents; got it with n_active=2, n_shared=0",
        ),
        (
            {"scale_F": torch.ones(9), "expert_B": torch.zeros(4, dtype=torch.long), "n_experts": 2, "n_shared": 1},
            "scale_F must be None .* got it with n_active=1, n_shared=1",
        ),
        (
            {"gates_B": torch.ones(4), "ends_L": torch.tensor([3, 9])},
            "gates_B must be None with ends_L, unless expert_B is given; got a tensor",
        ),
        (
            {"gates_B": torch.ones(4), "dead_N": torch.arange(3), "aux_k": 1, "dead_counts": [1, 2]},
            "gates_B must be None with dead_counts, unless expert_B is given; got a tensor",
        ),
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


@pytest.mark.parametrize("ends_L", [None, torch.tensor([4, 9])], ids=["", "in levels"])
def test_an_empty_batch_has_no_reconstruction_from_each_group_of_dead_latents(ends_L):
    W = torch.randn(9, 5, requires_grad=True)
    dead = {"dead_N": torch.arange(6), "aux_k": 2, "dead_counts": [1, 2, 3]}
    found = sparse_autoencode(torch.zeros(0, 5), W, W, 2, **dead, ends_L=ends_L)
    assert found.aux_out_BD.shape == (0, 3, 5)
    (found.out_BD.sum() + found.aux_out_BD.sum()).backward()
    assert torch.equal(W.grad, torch.zeros(9, 5))


def test_of_no_latents_there_is_no_index():
    none = torch.zeros(0, 5)
    assert torch.equal(sparse_decode(torch.ones(4, 0), torch.zeros(4, 0, dtype=torch.long), none), torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"indices_BK must lie in \[0, 0\); got values from 0 to 0"):
        sparse_decode(torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.long), none)
    with pytest.raises(ValueError, match=r"indices_BK must lie in \[0, 0\)"):
        latent_weight_grad(torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 5), 0)


def test_gates_of_tokens_with_experts_apply_in_levels():
    generator = torch.Generator().manual_seed(0)
    x, W, V = (torch.randn(*n, generator=generator, dtype=torch.float64) for n in ((4, 5), (9, 5), (9, 5)))
    expert, gates = torch.tensor([0, 2, 1, 0]), torch.rand(4, generator=generator, dtype=torch.float64)
    options = {"expert_B": expert, "n_experts": 3, "gates_B": gates}
    whole = sparse_autoencode(x, W, V, 2, **options).out_BD
    parts = sparse_autoencode(x, W, V, 2, **options, ends_L=torch.tensor([1, 3])).out_BD
    torch.testing.assert_close(parts.sum(1), whole)
