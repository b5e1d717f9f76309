"""SparseSAETrainer beside SAELens's own trainer, and beside references written out here."""

import gc
import logging
import weakref
from dataclasses import fields
from itertools import cycle

import pytest
import torch
from helpers import D, E, F, K, M, activations, largest_allocation, net_allocated, trainer, training_sae
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens_switch_kernels import huge_pages, inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_switch import (
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
    TrainerOptions,
    scaling_law_lr,
)
from sae_lens_switch.training import trainer as trainer_module
from sae_lens_switch.training.optim.constrained_adam import remove_parallel_, total_norm, without_parallel
from sae_lens_switch.training.optim.row_sparse_adam import RowSparseAdam
from sae_lens_switch.training.routing_monitor import RoutingMonitor, reseed

FAR = 10**6  # samples: further than any test goes


def our_trainer(sae, batches: list[Tensor], **fields) -> SparseSAETrainer:
    fields = {"total_training_samples": FAR, "train_batch_size_samples": len(batches[0]), "lr": 1e-2, **fields}
    return SparseSAETrainer(SparseSAETrainerConfig(**fields), sae, cycle(batches))


def run(trainer_, batches: list[Tensor]) -> list:
    outputs = []
    for batch in batches:
        outputs.append(trainer_.step(batch))
        trainer_.n_training_steps += 1
    return outputs


def topk(sae_class, config_class, dtype: str = "float32", **fields):
    torch.manual_seed(0)
    return sae_class(config_class(**{"d_in": D, "d_sae": F, "k": K, "dtype": dtype, **fields}))


# Beside SAELens's trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rescale_acts_by_decoder_norm": False},
        {"aux_loss_coefficient": 0.0},
        {"k": 1},
        {"apply_b_dec_to_input": False},
    ],
    ids=str,
)
def test_sparse_topk_follows_saelens_topk_loss_by_loss_and_count_by_count(options):
    batches = activations(80)
    window = {"dead_feature_window": 5, "lr": 1e-3, "lr_end": 1e-4, "feature_sampling_window": 1000}
    stock = trainer(topk(TopKTrainingSAE, TopKTrainingSAEConfig, **options), batches, **window)
    ours = SparseSAETrainer(
        stock.cfg, topk(SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig, **options), iter(batches)
    )
    n_dead = 0
    for a, b in zip(run(stock, batches), run(ours, batches), strict=True):
        n_dead += a.losses["auxiliary_reconstruction_loss"].item() > 0
        for name, loss in a.losses.items():
            torch.testing.assert_close(b.losses[name], loss, rtol=1e-5, atol=1e-6)
    assert n_dead > 0 or options.get("aux_loss_coefficient") == 0.0
    for name in ("act_freq_scores", "n_forward_passes_since_fired", "dead_neurons", "feature_sparsity"):
        assert torch.equal(getattr(ours, name), getattr(stock, name)), name
    assert ours.n_frac_active_samples == stock.n_frac_active_samples
    assert ours.optimizer.param_groups[0]["lr"] == stock.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("gate", ["probability", "one"])
def test_switch_ends_where_saelens_trainer_takes_it(gate):
    batches = activations(40)
    stock = trainer(training_sae(gate=gate), batches)
    ours = SparseSAETrainer(stock.cfg, training_sae(gate=gate), iter(batches))
    stock.fit()
    ours.fit()
    for name, weight in stock.sae.state_dict().items():
        torch.testing.assert_close(ours.sae.state_dict()[name], weight, rtol=1e-6, atol=1e-9)
    assert ours.sae.cfg.metadata.l0 == pytest.approx(stock.sae.cfg.metadata.l0)
    assert ours.sae.cfg.metadata.num_dead_features == stock.sae.cfg.metadata.num_dead_features


@pytest.mark.parametrize("normalize_activations", ["expected_average_only_in", "covariance_whitening"])
def test_what_is_estimated_is_folded_as_saelens_does(normalize_activations):
    batches = activations(30)
    options = {"n_batches_for_norm_estimate": 6, "total_training_samples": 24 * 64}
    stock, ours = (
        make(training_sae(normalize_activations=normalize_activations))
        for make in (
            lambda sae: trainer(sae, batches, **options),
            lambda sae: SparseSAETrainer(trainer(sae, batches, **options).cfg, sae, iter(batches)),
        )
    )
    stock.fit()
    ours.fit()
    assert ours.sae.cfg.normalize_activations == "none"
    for name, weight in stock.sae.state_dict().items():
        torch.testing.assert_close(ours.sae.state_dict()[name], weight, rtol=1e-5, atol=1e-7)


def test_any_other_architecture_trains_as_under_saelens_trainer():
    batches = activations(30)
    saes = []
    for _ in range(2):
        torch.manual_seed(0)
        saes.append(StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D, d_sae=F, l1_coefficient=0.1)))
    stock = trainer(saes[0], batches)
    ours = SparseSAETrainer(stock.cfg, saes[1], iter(batches))
    stock.fit()
    ours.fit()
    for name, weight in stock.sae.state_dict().items():
        torch.testing.assert_close(ours.sae.state_dict()[name], weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.act_freq_scores, stock.act_freq_scores)
    assert torch.equal(ours.n_forward_passes_since_fired, stock.n_forward_passes_since_fired)


def test_saelens_own_config_keeps_its_settings_and_ours_follows_the_paper():
    sae = training_sae()
    stock = SAETrainerConfig(total_training_samples=6400, train_batch_size_samples=64, lr=3e-3, lr_end=1e-3)
    assert SparseSAETrainer(stock, sae, iter([])).cfg.lr == 3e-3
    assert SparseSAETrainer(stock, sae, iter([])).cfg.lr_decay_steps == 0
    cfg = SparseSAETrainerConfig(total_training_samples=6400, train_batch_size_samples=64)
    ours = SparseSAETrainer(cfg, sae, iter([]))
    assert ours.cfg.lr == scaling_law_lr(F)
    assert ours.cfg.lr_decay_steps == 20
    assert cfg.lr is None  # the config that was given stays as it was
    assert {f.name for f in fields(TrainerOptions)} <= {f.name for f in fields(ours.cfg)}


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
    remove_parallel_(projected, W)
    torch.testing.assert_close(projected, expected)
    radial_R = (g * W).sum(1)
    for known in (None, radial_R):
        torch.testing.assert_close(without_parallel(g, W, torch.empty_like(g), known), expected)
    others = [g.T, torch.randn(5), torch.tensor(3.0)]
    expected = sum(t.double().square().sum() for t in others).sqrt()
    torch.testing.assert_close(total_norm(others).double(), expected, rtol=1e-6, atol=0)


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


# Dead latents


@pytest.mark.parametrize("gate", ["probability", "one"])
@pytest.mark.parametrize("dead", [[1], [0, 3, 4, 5, 6, 7, 8, 11, 35], list(range(F))], ids=len)
@pytest.mark.parametrize("aux_k", [None, 1, K + 1, 100])
def test_auxk_of_a_switch_sae_written_out_token_by_token(gate, dead, aux_k):
    """The dead latents of the token's own expert reconstruct the residual; none of the loss reaches the router."""
    sae = training_sae(gate=gate, aux_loss_coefficient=0.7, aux_k=aux_k, bias_start="mean")
    (x,) = activations(1, batch=23)
    mask = torch.zeros(F, dtype=torch.bool)
    mask[dead] = True
    step = TrainStepInput(
        sae_in=x.double(),
        coefficients={"load_balance": 0.0},
        dead_neuron_mask=mask,
        n_training_steps=0,
        is_logging_step=False,
    )
    aux_loss = sae.training_forward_pass(step).losses["auxiliary_reconstruction_loss"]
    parameters = [sae.W_enc, sae.W_dec, sae.b_dec, sae.W_router, sae.b_router]
    grads = torch.autograd.grad(aux_loss, parameters, allow_unused=True, retain_graph=True)

    p = torch.softmax((x.double() - sae.b_router) @ sae.W_router, dim=1).detach()
    total = torch.zeros((), dtype=torch.float64)
    aux_k = aux_k or K
    for b, x_D in enumerate(x.double()):
        e = int(p[b].argmax())
        f = p[b, e] if gate == "probability" else 1.0
        block = torch.arange(e * M, (e + 1) * M)
        pre = (x_D - sae.b_dec) @ sae.W_enc[:, block]
        top = pre.topk(K)
        out = f * top.values.relu() @ sae.W_dec[block[top.indices]] + sae.b_dec
        mine = [latent for latent in dead if latent // M == e]
        aux = torch.zeros(D, dtype=torch.float64)
        if mine:
            dead_pre = (x_D - sae.b_dec) @ sae.W_enc[:, mine]
            best = dead_pre.topk(min(aux_k, len(mine)))
            aux = f * best.values @ sae.W_dec[torch.tensor(mine)[best.indices]]
        total = total + min(1, len(mine) / aux_k) * (aux - (x_D - out).detach()).square().sum()
    expected = 0.7 * total / len(x)
    torch.testing.assert_close(aux_loss, expected, rtol=1e-9, atol=1e-12)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    for grad, reference in zip(grads, wanted, strict=True):
        reference = 0 if reference is None else reference
        grad = torch.zeros(()) if grad is None else grad
        assert (grad - reference).abs().max() < 1e-9


def test_auxk_brings_dead_latents_of_a_switch_sae_back():
    batches = activations(300)
    dead = {0.0: 0, 1 / 32: 0}
    for coefficient in dead:
        for seed in range(3):
            torch.manual_seed(seed)
            cfg = SwitchTrainingSAEConfig(d_in=D, d_sae=64, n_experts=E, k=2, aux_loss_coefficient=coefficient)
            trainer_ = our_trainer(SwitchTrainingSAE(cfg), batches, dead_feature_window=50, lr=1e-2)
            run(trainer_, batches)
            dead[coefficient] += int(trainer_.dead_neurons.sum())
    assert dead[1 / 32] < 0.7 * dead[0.0]


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


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("architecture", ["switch", "sparse_topk"])
def test_a_step_never_waits_for_the_device(architecture, cuda_graph, monkeypatch):
    # As on a GPU, where a range is checked by an assertion on the device.
    monkeypatch.setattr(trainer_module, "_LOOK_EVERY", {})
    monkeypatch.setattr(inputs, "_is_readable", lambda _: False)
    batches = activations(4)
    sae = (
        training_sae(dtype="float32")
        if architecture == "switch"
        else topk(SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig, aux_loss_coefficient=0.0)
    )
    trainer_ = our_trainer(sae, batches, cuda_graph=cuda_graph, logger=LoggingConfig(log_to_wandb=False))
    run(trainer_, batches[:2])
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


# The routing, watched


def collapsed_sae(**options) -> SwitchTrainingSAE:
    """A router that sends everything to expert 1."""
    sae = training_sae(dtype="float32", bias_start="mean", router_start_std=None, **options)
    sae.is_fresh = False
    batch = torch.cat(activations(4))
    with torch.no_grad():
        sae.b_dec.copy_(batch.mean(0))
        sae.W_router.zero_()
        sae.W_router[:, 1] = 3 * batch.mean(0) / batch.mean(0).square().sum()
        sae.b_router.zero_()
    return sae


@pytest.mark.parametrize("on_collapse", ["report", "raise_coefficient", "reseed"])
def test_a_collapsed_router_is_reported_once_and_countered_if_wanted(on_collapse, caplog):
    batches = activations(120)
    sae = collapsed_sae(load_balance_coefficient=0.0 if on_collapse != "raise_coefficient" else 0.01)
    # At a learning rate of next to nothing, what changes the routing is the counter-measure.
    lr = 0.02 if on_collapse == "raise_coefficient" else 1e-12
    trainer_ = our_trainer(sae, batches, on_collapse=on_collapse, collapse_patience=8, lr=lr)
    coefficient = trainer_.get_coefficients()["load_balance"]
    with caplog.at_level(logging.WARNING):
        outputs = run(trainer_, batches)
    (report,) = [r.message for r in caplog.records if "collapsed" in r.message]
    assert "expert 1 has taken 100% of the tokens for 8 steps" in report
    assert "3 experts (0, 2, 3) have had no token for 8 steps" in report
    assert ("load_balance_coefficient" in report) == (on_collapse == "report")
    load = outputs[-1].routing.load_E
    if on_collapse == "report":
        assert trainer_.n_interventions == 0
        assert load[1] == 1
        assert trainer_.get_coefficients()["load_balance"] == coefficient
    else:
        assert trainer_.n_interventions > 0
        assert load.max() < 0.9
        assert (load > 0).sum() >= (3 if on_collapse == "reseed" else 2)
    if on_collapse == "raise_coefficient":
        assert trainer_.get_coefficients()["load_balance"] >= 2 * coefficient


def test_even_routing_is_no_collapse_whatever_the_number_of_experts():
    for n_experts in (1, 2, 4):
        monitor = RoutingMonitor(n_experts, share=None, patience=3, device="cpu")
        for _ in range(10):
            monitor.update(torch.full((n_experts,), 1 / n_experts))
        assert monitor.collapse() is None
    monitor = RoutingMonitor(2, share=None, patience=3, device="cpu")
    for _ in range(3):
        assert monitor.collapse() is None
        monitor.update(torch.tensor([0.8, 0.2]))
    found = monitor.collapse()
    assert found is not None
    assert found.too_busy
    assert found.without_tokens == []
    monitor.update(torch.tensor([0.5, 0.5]))  # steps in a row are what counts
    assert monitor.collapse() is None


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
def test_a_reseeded_expert_is_the_busiest_ones_twin_and_the_reconstruction_stays(optimizer):
    batches = activations(10)
    sae = collapsed_sae()
    trainer_ = our_trainer(sae, batches, optimizer=optimizer, lr=1e-9)
    run(trainer_, batches)
    x = batches[0]
    before = (sae(x) - x).square().sum(-1).mean()
    (pair,) = reseed(sae, trainer_.optimizer, x, [2])
    assert pair == (2, 1)
    assert torch.equal(sae.W_dec[2 * M : 3 * M], sae.W_dec[M : 2 * M])
    assert torch.equal(sae.W_enc[:, 2 * M : 3 * M], sae.W_enc[:, M : 2 * M])
    state = trainer_.optimizer.state[sae.W_dec]
    moments = state["moments"] if optimizer == "row_sparse_adam" else state["exp_avg_sq"]
    assert moments[M : 2 * M].any()
    assert torch.equal(moments[2 * M : 3 * M], moments[M : 2 * M])
    experts = sae.encode_sparse(x).indices[:, 0] // M
    share = (experts == 2).float().mean()
    assert 0.15 < share < 0.85
    assert set(experts.tolist()) == {1, 2}
    assert (sae(x) - x).square().sum(-1).mean() < 1.3 * before


# Precision


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"autocast": True}], ids=str)
def test_low_precision_ends_within_two_percent_of_float32(options, optimizer):
    batches = activations(400)
    losses = {}
    for name, given in (("float32", {}), ("low", options)):
        torch.manual_seed(0)
        cfg = SwitchTrainingSAEConfig(
            d_in=D, d_sae=F, n_experts=E, k=K, dtype=given.get("dtype", "float32"), load_balance_coefficient=0.1
        )
        trainer_ = our_trainer(
            SwitchTrainingSAE(cfg), batches, optimizer=optimizer, lr=3e-3, autocast="autocast" in given
        )
        outputs = run(trainer_, batches)
        losses[name] = sum(o.losses["mse_loss"].item() for o in outputs[-100:])
    assert losses["low"] == pytest.approx(losses["float32"], rel=0.02)


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
def test_updates_smaller_than_a_bfloat16_weights_rounding_add_up(optimizer):
    batches = activations(50)
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=D, d_sae=F, n_experts=E, k=K, dtype="bfloat16"))
    trainer_ = our_trainer(sae, batches, optimizer=optimizer, lr=1e-5)
    run(trainer_, batches[:1])
    start = sae.W_enc.detach().clone()
    run(trainer_, batches[1:])
    assert sae.W_enc.dtype == torch.bfloat16
    assert sae.W_router.dtype == torch.float32
    moved = (sae.W_enc != start).float().mean()
    assert 0.001 < moved < 0.5  # few weights have crossed to the next number yet; without masters none ever would
    for p, state in trainer_.optimizer.state.items():
        assert {t.dtype for t in state.values()} == {torch.float32}, p.shape


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamw"}, "optimizer must be one of .*got 'adamw'"),
        ({"on_collapse": "panic"}, "on_collapse must be one of .*got 'panic'"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a positive finite number or None; got 0.0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be a whole number, at least 1 or None; got 0"),
        ({"max_skipped_steps": 0}, "max_skipped_steps must be a whole number, at least 1; got 0"),
        ({"collapse_patience": 2.5}, "collapse_patience must be a whole number, at least 1; got 2.5"),
        ({"collapse_share": -1}, "collapse_share must be a positive finite number, at most 1 or None; got -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SparseSAETrainerConfig(total_training_samples=64, train_batch_size_samples=8, **options)
