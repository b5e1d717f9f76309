"""Gradient accumulation: a batch in parts is the same step, in the memory of one part."""

import weakref
from functools import partial

import pytest
import torch
from helpers import D, F, K, activations, largest_allocation, random_input, randomize, training_sae
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens_switch_kernels import RowGrads

from sae_lens_switch import (
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)

FAR = 10**6  # samples: further than any test goes


def make_sae(architecture: str, dtype: str = "float64", **fields):
    torch.manual_seed(0)
    if architecture == "switch":
        # what a batch has as a whole, its balance, is of no concern here
        return randomize(training_sae(dtype=dtype, load_balance_coefficient=0.0, normalize_decoder=False, **fields))
    options = {"d_in": D, "d_sae": F, "dtype": dtype, **fields}
    if architecture == "standard":
        return randomize(StandardTrainingSAE(StandardTrainingSAEConfig(**options)))
    return randomize(SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(k=K, **options)))


def trained(sae, batches, **fields) -> SparseSAETrainer:
    cfg = SparseSAETrainerConfig(FAR, len(batches[0]), lr=1e-2, lr_decay_steps=0, dead_feature_window=1, **fields)
    the_trainer = SparseSAETrainer(cfg, sae, iter(batches))
    the_trainer.outputs = []
    for batch in batches:
        the_trainer.outputs.append(the_trainer.step(batch))
        the_trainer.n_training_steps += 1
    return the_trainer


@pytest.mark.parametrize("parts", [2, 3, 64])
@pytest.mark.parametrize("options", [{}, {"aux_loss_coefficient": 0.5}], ids=str)
@pytest.mark.parametrize(
    ("architecture", "optimizer"),
    [("switch", "adam"), ("switch", "row_sparse_adam"), ("sparse_topk", "adam"), ("sparse_topk", "row_sparse_adam")],
)
def test_steps_in_parts_are_the_steps_of_whole_batches(architecture, optimizer, options, parts):
    batches = [random_input(50, D, seed=i) for i in range(4)]  # 50: the parts are of two sizes
    whole = trained(make_sae(architecture, **options), batches, optimizer=optimizer)
    split = trained(make_sae(architecture, **options), batches, optimizer=optimizer, gradient_accumulation_steps=parts)
    for (name, p), q in zip(split.sae.named_parameters(), whole.sae.named_parameters(), strict=True):
        assert torch.allclose(p, q[1], rtol=1e-7, atol=1e-9), name
    assert torch.equal(split.n_forward_passes_since_fired, whole.n_forward_passes_since_fired)
    assert torch.equal(split.act_freq_scores, whole.act_freq_scores)
    assert split.n_frac_active_samples == whole.n_frac_active_samples == 200
    assert (split.n_training_steps, split.n_training_samples) == (4, 200)
    for a, b in zip(split.outputs, whole.outputs, strict=True):
        assert a.losses.keys() == b.losses.keys()
        for name in b.losses:
            assert torch.allclose(a.losses[name].double(), b.losses[name].double(), rtol=1e-6), name
        assert torch.allclose(a.loss.double(), b.loss.double(), rtol=1e-6)
        for name in ("sae_in", "sae_out", "hidden_pre"):
            assert torch.allclose(getattr(a, name), getattr(b, name), rtol=1e-6, atol=1e-8), name
        assert torch.equal(a.feature_acts.to_dense() != 0, b.feature_acts.to_dense() != 0)
    if architecture == "switch":
        a, b = (t.outputs[-1].metrics for t in (split, whole))
        assert a.keys() == b.keys()
        for name in ("expert_load_max", "expert_load_min", "expert_load_entropy", "gate_mean"):
            assert torch.allclose(a[name]().double(), b[name]().double(), rtol=1e-6), name
        assert torch.allclose(split.routing.load_E, whole.routing.load_E)
    log, expected = (t.build_train_step_log_dict(t.outputs[-1], 1) for t in (split, whole))
    assert log.keys() == expected.keys()


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
def test_the_decoder_s_constraint_holds_in_parts_too(optimizer):
    batches = [random_input(64, D, seed=i) for i in range(4)]
    whole, split = (training_sae(load_balance_coefficient=0.0, router_start_std=None, bias_start="zeros") for _ in "ab")
    trained(whole, batches, optimizer=optimizer)
    trained(split, batches, optimizer=optimizer, gradient_accumulation_steps=4)
    for (name, p), q in zip(split.named_parameters(), whole.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-7, atol=1e-9), name
    torch.testing.assert_close(split.W_dec.norm(dim=1), torch.ones(F).double(), rtol=0, atol=1e-12)


def test_an_sae_of_saelens_is_trained_in_parts():
    batches = [random_input(50, D, seed=i) for i in range(4)]
    whole = trained(make_sae("standard", l1_coefficient=0.1), batches)
    split = trained(make_sae("standard", l1_coefficient=0.1), batches, gradient_accumulation_steps=3)
    for p, q in zip(split.sae.parameters(), whole.sae.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-7, atol=1e-9)
    assert torch.equal(split.act_freq_scores, whole.act_freq_scores)
    assert torch.allclose(split.outputs[-1].loss.double(), whole.outputs[-1].loss.double(), rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
def test_one_bad_part_makes_a_bad_step(optimizer):
    batches = activations(3)
    batches[1][60, 3] = torch.nan
    sae = training_sae(dtype="float32")
    the_trainer = trained(sae, batches[:1], optimizer=optimizer, gradient_accumulation_steps=4)
    before = [p.detach().clone() for p in sae.parameters()]
    the_trainer.step(batches[1])
    assert the_trainer.n_skipped_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), before, strict=True))
    the_trainer.step(batches[2])
    assert the_trainer.n_skipped_steps == 1
    assert not all(torch.equal(p, q) for p, q in zip(sae.parameters(), before, strict=True))


def test_a_part_takes_the_memory_of_a_part():
    B, d_in, d_sae, n_experts = 512, 8, 256, 4
    largest = []
    for parts in (1, 8):
        cfg = SwitchTrainingSAEConfig(d_in=d_in, d_sae=d_sae, n_experts=n_experts, k=4)
        batch = torch.randn(B, d_in)
        the_trainer = trained(SwitchTrainingSAE(cfg), [batch, batch], gradient_accumulation_steps=parts)
        largest.append(largest_allocation(partial(the_trainer.step, batch)))
    assert largest[1] <= largest[0] / 4


def test_dense_latents_of_one_part_at_a_time_are_kept():
    sae = make_sae("standard", l1_coefficient=0.1)
    held = []
    forward = sae.training_forward_pass

    def recorded(step_input):
        held.append(sum(t() is not None for t in seen))
        output = forward(step_input=step_input)
        seen.append(weakref.ref(output.feature_acts))
        return output

    seen: list[weakref.ref] = []
    sae.training_forward_pass = recorded
    trained(sae, [random_input(50, D)], gradient_accumulation_steps=5)
    assert len(held) == 5
    assert max(held) <= 1


def test_row_gradients_add_up():
    rows = [torch.tensor([1, 4, 6]), torch.tensor([0, 4]), torch.tensor([6])]
    grads = [RowGrads(True, r, *(random_input(len(r), D, seed=i) for i in range(2)), None, None) for r in rows]
    total = grads[0].plus(grads[1]).plus(grads[2])
    dense = torch.zeros(8, D, dtype=torch.float64)
    for g in grads:
        dense[g.rows_R] += g.dW_dec_RD
    assert total.rows_R.tolist() == [0, 1, 4, 6]
    assert torch.allclose(total.dW_dec_RD, dense[total.rows_R])
    assert total.d_bias_R is None
    a, b = (RowGrads(False, radial_R=random_input(5, seed=i)) for i in range(2))
    assert torch.equal(a.plus(b).radial_R, a.radial_R + b.radial_R)
    assert a.plus(RowGrads(False)).radial_R is None
