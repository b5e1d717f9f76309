"""A step of SparseSAETrainer written out: clip, project, step, renormalise; and nothing is left of it."""

import gc
import weakref

import pytest
import torch
from helpers import D, E, F, K, activations, largest_allocation, net_allocated, trainer, training_sae
from helpers.trainers import our_trainer, run, topk
from sae_lens.config import LoggingConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens_switch_kernels import huge_pages, inputs, torch_clipping
from sae_lens_switch_kernels.torch_clipping import total_norm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_switch import (
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)
from sae_lens_switch.saes.decoder_constraint import project_out_rows, project_out_rows_
from sae_lens_switch.training import trainer as trainer_module
from sae_lens_switch.training.optim import constrained_adam
from sae_lens_switch.training.optim.row_sparse_adam import RowSparseAdam

# The step: clip, project, step, renormalise


@pytest.mark.parametrize("max_grad_norm", [1.0, 1e-3, None])
@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
def test_a_first_step_is_clip_project_adam_renormalise_written_out(optimizer, max_grad_norm):
    """On the first step lazy Adam is Adam, but for the rows that it does not touch."""
    (batch,) = activations(1)
    sae = training_sae(bias_start="mean")
    trainer_ = our_trainer(sae, [batch.double()], optimizer=optimizer, max_grad_norm=max_grad_norm, lr=0.1)
    twin = training_sae(bias_start="mean")
    coefficients = trainer_.get_coefficients()
    twin.training_forward_pass(
        TrainStepInput(
            sae_in=batch.double(),
            coefficients=coefficients,
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
    ).loss.backward()
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    trainer_.step(batch.double())
    grads = {name: p.grad for name, p in twin.named_parameters()}
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    for name, start in before.items():
        g = grads[name] if max_grad_norm is None else grads[name] * min(1.0, max_grad_norm / (norm + 1e-6))
        if name == "W_dec":
            g = g - (g * start).sum(1, keepdim=True) * start
        end = start - 0.1 * g / (g.abs() + 1e-8)  # m / (1 - b1) = g, v / (1 - b2) = g^2
        if name == "W_dec":
            end = end / end.norm(dim=1, keepdim=True)
        torch.testing.assert_close(
            sae.state_dict()[name], end, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("options", [{}, {"gate": "one"}, {"aux_loss_coefficient": 0.5}], ids=str)
def test_the_backward_pass_tells_the_step_what_to_project_out(options, monkeypatch):
    batches = activations(20)
    sae = training_sae(dtype="float32", **options)
    trainer_ = our_trainer(sae, batches, dead_feature_window=2)
    told, step = [], trainer_.optimizer.step

    def looked_at(*, radial_F, **others):
        told.append(radial_F)
        if radial_F is not None:
            expected = (sae.W_dec.grad.double() * sae.W_dec.detach()).sum(1)
            torch.testing.assert_close(radial_F.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        step(radial_F=radial_F, **others)

    monkeypatch.setattr(trainer_.optimizer, "step", looked_at)
    outputs = run(trainer_, batches)
    assert len(told) == len(batches)
    assert all(radial_F is not None and radial_F.any() for radial_F in told)
    if options.get("aux_loss_coefficient"):
        assert any(o.losses["auxiliary_reconstruction_loss"] > 0 for o in outputs)
    sae.hook_sae_acts_post.add_hook(lambda t, hook: t)  # noqa: ARG005
    run(trainer_, batches[:1])
    assert told[-1] is None


def test_projection_and_norm_written_out():
    g, W = torch.randn(1300, 7, dtype=torch.float64), torch.randn(1300, 7, dtype=torch.float64)
    W /= W.norm(dim=1, keepdim=True)
    expected = g - torch.einsum("fd,fd->f", g, W)[:, None] * W
    projected = g.clone()
    project_out_rows_(projected, W)
    torch.testing.assert_close(projected, expected)
    radial_R = (g * W).sum(1)
    for known in (None, radial_R):
        torch.testing.assert_close(project_out_rows(g, W, torch.empty_like(g), known), expected)
    others = [g.T, torch.randn(5), torch.tensor(3.0)]
    expected = sum(t.double().square().sum() for t in others).sqrt()
    torch.testing.assert_close(total_norm(others).double(), expected, rtol=1e-6, atol=0)


def test_the_norm_of_all_gradients_at_once_is_that_of_one_by_one(monkeypatch):
    grads = [torch.randn(13, 7).T, torch.randn(5), torch.tensor(3.0)]
    expected = sum(t.double().square().sum() for t in grads).sqrt()
    for one_by_one in ({"cpu"}, set()):
        monkeypatch.setattr(torch_clipping, "_ONE_BY_ONE", one_by_one)
        torch.testing.assert_close(total_norm(grads).double(), expected, rtol=1e-6, atol=0)


def lazy_adam(x, rows_grads, lr, betas, eps=1e-8):
    """Row by row: a row has its own moments and count, and rests when it has no gradient. Float64 loops."""
    m, v, t = torch.zeros_like(x), torch.zeros_like(x), [0] * len(x)
    for step in rows_grads:
        for row, g in step.items():
            t[row] += 1
            m[row] = betas[0] * m[row] + (1 - betas[0]) * g
            v[row] = betas[1] * v[row] + (1 - betas[1]) * g * g
            x[row] -= lr * (m[row] / (1 - betas[0] ** t[row])) / ((v[row] / (1 - betas[1] ** t[row])).sqrt() + eps)
    return x


def test_row_sparse_adam_is_adam_of_each_row_in_the_steps_of_its_latent():
    sae = training_sae(normalize_decoder=False)
    optimizer = RowSparseAdam(sae, lr=0.03, betas=(0.8, 0.95))
    start = {"W_enc": sae.W_enc.detach().T.clone(), "W_dec": sae.W_dec.detach().clone()}
    given: dict[str, list[dict[int, Tensor]]] = {"W_enc": [], "W_dec": []}
    generator = torch.Generator().manual_seed(0)
    for _ in range(7):
        rows = torch.randperm(F, generator=generator)[:9].sort().values
        g = optimizer.row_grads
        g.rows_R = rows
        g.dW_enc_RD, g.dW_dec_RD = torch.randn(2, 9, D, generator=generator, dtype=torch.float64)
        g.d_bias_R = torch.zeros(9)
        g.radial_R = torch.full((9,), torch.nan)  # of no use without a constraint
        for name, grad in (("W_enc", g.dW_enc_RD), ("W_dec", g.dW_dec_RD)):
            given[name].append(dict(zip(rows.tolist(), grad.clone() / 2.0, strict=True)))
        optimizer.step(grad_scale=2.0)
        g.clear()
    for name, actual in (("W_enc", sae.W_enc.T), ("W_dec", sae.W_dec)):
        torch.testing.assert_close(
            actual, lazy_adam(start[name], given[name], 0.03, (0.8, 0.95)), rtol=1e-9, atol=1e-12
        )
    untouched = sorted(set(range(F)) - {row for step in given["W_dec"] for row in step})
    assert untouched
    assert torch.equal(sae.W_dec[untouched], training_sae(normalize_decoder=False).W_dec[untouched])


def test_row_sparse_adam_learns_keeps_decoder_rows_unit_and_no_gradient_as_long_as_the_dictionary():
    batches = activations(60)
    for make in (
        lambda: SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=D, d_sae=F, n_experts=E, k=K)),
        lambda: topk(SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig),
    ):
        sae = make()
        trainer_ = our_trainer(sae, batches, optimizer="row_sparse_adam")
        outputs = run(trainer_, batches)
        assert outputs[-1].losses["mse_loss"] < 0.5 * outputs[0].losses["mse_loss"]
        assert sae.W_enc.grad is None
        assert sae.W_dec.grad is None
        if isinstance(sae, SwitchTrainingSAE):
            torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    with pytest.raises(ValueError, match="row_sparse_adam.* got standard"):
        our_trainer(
            StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D, d_sae=F)), batches, optimizer="row_sparse_adam"
        )


def test_after_row_sparse_training_any_other_optimiser_gets_its_gradients():
    batches = activations(5)
    sae = training_sae(dtype="float32")
    run(our_trainer(sae, batches, optimizer="row_sparse_adam"), batches)
    before = sae.W_dec.detach().clone()
    trainer(sae, batches).fit()
    assert not torch.equal(sae.W_dec, before)


def test_a_row_sparse_step_asks_for_no_memory_as_long_as_the_dictionary():
    d_sae, batch = 1 << 17, 32
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=8, d_sae=d_sae, n_experts=256, k=4))
    x = torch.randn(batch, 8)
    trainer_ = our_trainer(sae, [x], optimizer="row_sparse_adam", lr=1e-3)
    run(trainer_, [x] * 2)  # the optimiser's moments are made
    assert largest_allocation(lambda: run(trainer_, [x])) < d_sae


def test_dense_steps_with_hooks_are_taken_by_row_sparse_adam_too():
    batches = activations(20)
    sae = training_sae(dtype="float32")
    trainer_ = our_trainer(sae, batches, optimizer="row_sparse_adam")
    sae.hook_sae_acts_post.add_hook(lambda t, hook: t)  # noqa: ARG005
    outputs = run(trainer_, batches)
    assert outputs[-1].losses["mse_loss"] < outputs[0].losses["mse_loss"]
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
def test_weights_are_moved_to_large_memory_as_they_are(optimizer):
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=512, d_sae=2048, n_experts=4, k=4))
    before = {name: (p, p.data_ptr(), p.stride(), p.detach().clone()) for name, p in sae.named_parameters()}
    our_trainer(sae, [torch.randn(8, 512)], optimizer=optimizer)
    for name, p in sae.named_parameters():
        same, place, stride, values = before[name]
        assert p is same
        assert p.stride() == stride
        assert torch.equal(p, values)
        assert (p.data_ptr() != place) == (name in ("W_enc", "W_dec"))


# Nothing is left of a step


def test_nothing_of_a_step_is_alive_when_the_next_begins():
    seen: list[weakref.ref] = []
    alive: list[int] = []
    sae = training_sae(dtype="float32")
    forward = sae.training_forward_pass

    def watched(step_input):
        gc.collect()
        alive.append(sum(r() is not None for r in seen))
        output = forward(step_input)
        seen.extend(weakref.ref(t) for t in (output.sae_out, output.codes.values, output.codes.indices, output.loss))
        return output

    sae.training_forward_pass = watched
    batches = activations(8)
    SparseSAETrainer(SparseSAETrainerConfig(8 * 64, 64, optimizer="adam"), sae, iter(batches)).fit()
    assert len(seen) == 32
    assert alive == [0] * 8


def test_a_step_makes_no_tensor_of_batch_times_width():
    batch, d_sae = 512, 4096
    for options in ({}, {"aux_loss_coefficient": 0.5}):
        sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=6, d_sae=d_sae, n_experts=64, k=4, **options))
        x = torch.randn(batch, 6)
        trainer_ = our_trainer(sae, [x], lr=1e-3, dead_feature_window=1)
        run(trainer_, [x] * 4)
        assert trainer_.dead_neurons.any()
        assert largest_allocation(lambda t=trainer_, x=x: run(t, [x])) < 0.25 * batch * d_sae


class Waits(TorchDispatchMode):
    """Where the host would wait for a device to read a value back."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select"):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("cuda_graph", "aux"), [(False, 0.0), (True, 0.0), (True, 0.1)])
@pytest.mark.parametrize("architecture", ["switch", "sparse_topk"])
def test_a_step_never_waits_for_the_device(architecture, cuda_graph, aux, monkeypatch):
    # As on a GPU, where a range is checked by an assertion on the device.
    monkeypatch.setattr(trainer_module, "_LOOK_EVERY", {})
    monkeypatch.setattr(constrained_adam, "_READ_AT_ONCE", set())
    monkeypatch.setattr(inputs, "_is_readable", lambda _: False)
    batches = activations(4)
    sae = (
        training_sae(dtype="float32", aux_loss_coefficient=aux)
        if architecture == "switch"
        else topk(SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig, aux_loss_coefficient=aux)
    )
    fields = {"cuda_graph": cuda_graph, "dead_feature_window": 1}
    trainer_ = our_trainer(sae, batches, logger=LoggingConfig(log_to_wandb=False), **fields)
    run(trainer_, batches[:2])
    trainer_.firing.last_fired_F -= 10
    with Waits() as waits:
        run(trainer_, batches[2:3])
        assert waits.found == []
        trainer_.n_skipped_steps  # noqa: B018, this one does
        assert waits.found


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
@pytest.mark.parametrize("architecture", ["switch", "sparse_topk"])
def test_nothing_of_a_step_is_kept(architecture, optimizer, monkeypatch):
    """By what torch and our blocks hold after it, not by the process's peak, which depends on the allocator."""
    blocks: list[weakref.ref] = []
    new_block = huge_pages._new_block

    def tracked(n_bytes: int):
        block = new_block(n_bytes)
        blocks.append(weakref.ref(block))
        return block

    monkeypatch.setattr(huge_pages, "_new_block", tracked)
    monkeypatch.setattr(huge_pages, "_SMALLEST", 1 << 12)
    monkeypatch.setattr(huge_pages, "_free", {})
    torch.manual_seed(0)
    fields = {"d_in": 16, "d_sae": 2048, "k": 8, "aux_loss_coefficient": 0.03}
    sae = (
        SwitchTrainingSAE(SwitchTrainingSAEConfig(n_experts=16, **fields))
        if architecture == "switch"
        else SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**fields))
    )
    batches = [torch.randn(256, 16) for _ in range(16)]
    trainer_ = our_trainer(sae, batches, optimizer=optimizer, dead_feature_window=2)  # so that AuxK has work to do

    def train() -> None:
        run(trainer_, batches)

    train()
    assert trainer_.dead_neurons.any()
    before = sum(block() is not None for block in blocks)
    assert before > 0
    net_allocated(train)  # what the profiler itself keeps the first time
    assert net_allocated(train) == 0
    most_kept = huge_pages._SIZES_KEPT * huge_pages._BLOCKS_KEPT
    assert sum(block() is not None for block in blocks) <= before + most_kept


def test_what_a_step_keeps_is_seen():
    kept = []
    assert net_allocated(lambda: kept.append(torch.zeros(1000, dtype=torch.uint8))) >= 1000
