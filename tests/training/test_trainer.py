"""SparseSAETrainer beside SAELens's own trainer, and beside references written out here."""

from dataclasses import fields

import pytest
import torch
from helpers import D, E, F, K, M, activations, trainer, training_sae
from helpers.trainers import our_trainer, run, topk
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

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


# Precision


def last_losses(optimizer: str, dtype: str, autocast: bool = False) -> float:
    """Of three seeds: one alone may be 2 percent off, by its rounding."""
    batches, total = activations(400), 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        cfg = SwitchTrainingSAEConfig(d_in=D, d_sae=F, n_experts=E, k=K, dtype=dtype, load_balance_coefficient=0.1)
        trainer_ = our_trainer(SwitchTrainingSAE(cfg), batches, optimizer=optimizer, lr=3e-3, autocast=autocast)
        total += sum(o.losses["mse_loss"].item() for o in run(trainer_, batches)[-100:])
    return total


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("row_sparse_adam", marks=pytest.mark.slow)])
def test_low_precision_ends_within_two_percent_of_float32(optimizer):
    expected = pytest.approx(last_losses(optimizer, "float32"), rel=0.02)
    assert last_losses(optimizer, "bfloat16") == expected
    assert last_losses(optimizer, "float32", autocast=True) == expected


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
