"""Activations from wherever they are: tensors, iterators, a vision model, a synthetic model."""

import logging

import pytest
import torch
from helpers import D, E, F, K, activations, random_input, training_sae
from helpers.sources import exactly, losses, numbers, our_trainer, rows, take
from sae_lens import SAE
from sae_lens.config import LoggingConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunnerConfig, synthetic_sae_runner
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from torch.nn.functional import interpolate

from sae_lens_switch import (
    SparseSAETrainer,
    SwitchSAE,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
    TrainerOptions,
    activation_batches,
)
from sae_lens_switch.training.history import FILENAME, read_history
from sae_lens_switch.training.synthetic import SyntheticSAERunner

# Tensors


@pytest.mark.parametrize("batch", [1, 5, 6, 30])
def test_an_epoch_has_every_row_of_a_tensor_once_and_each_epoch_an_order_of_its_own(batch):
    batches = activation_batches(rows(30), batch)
    epochs = [numbers(take(30 // batch, batches)) for _ in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(30))
    assert len({tuple(epoch) for epoch in [*epochs, list(range(30))]}) == 5


def test_a_last_batch_that_is_not_full_is_left_out():
    batches = activation_batches(rows(30), 8)
    epochs = [numbers(take(3, batches)) for _ in range(20)]
    for epoch in epochs:
        assert len(set(epoch)) == 24
    assert set().union(*epochs) == set(range(30))  # not the same ones in every epoch


def test_the_seed_decides_the_order():
    first, again, other = (numbers(take(12, activation_batches(rows(30), 6, seed=seed))) for seed in (3, 3, 4))
    assert first == again != other
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert numbers(take(12, activation_batches(rows(30), 6, seed=3))) == first
    assert torch.equal(torch.get_rng_state(), state)  # and nothing else


@pytest.mark.parametrize("drawn", [0, 1, 4, 5, 7, 23])
def test_from_its_state_a_tensors_stream_goes_on_at_the_same_place(drawn):
    batches = activation_batches(rows(30), 6)
    take(drawn, batches)
    state = dict(batches.state_dict())
    expected = numbers(take(12, batches))
    another = activation_batches(rows(30), 6)
    take(2, another)
    another.load_state_dict(state)
    assert numbers(take(12, another)) == expected


def test_a_tensor_of_more_dimensions_is_its_rows():
    x = random_input(5, 3, 2, D)
    expected = take(10, activation_batches(x.view(-1, D), 6))
    for batch, same in zip(take(10, activation_batches(x, 6)), expected, strict=True):
        assert batch.shape == (6, D)
        assert batch.dtype == x.dtype
        torch.testing.assert_close(batch, same, **exactly)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((), r"\[\.\.\., d_in\]; got \(\)"),
        ((64,), r"\[\.\.\., d_in\]; got \(64,\)"),
        ((0, D), "at least one batch of 64; there are 0"),
        ((4, 0, D), "at least one batch of 64; there are 0"),
        ((63, D), "at least one batch of 64; there are 63"),
        ((3, 21, D), "at least one batch of 64; there are 63"),
    ],
)
def test_a_tensor_without_a_batch_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        activation_batches(torch.zeros(shape), 64)
    with pytest.raises(ValueError, match=message):
        our_trainer(torch.zeros(shape))


def test_training_on_a_tensor_learns_it_for_as_many_epochs_as_are_asked_for():
    x = torch.cat(activations(10))
    the_trainer = our_trainer(x.view(5, 2, 64, D), training_sae(dtype="float32"), n_steps=150)
    seen = losses(the_trainer)
    assert len(seen) == 150
    assert sum(seen[-10:]) < 0.6 * sum(seen[:10])
    place = the_trainer.data_provider.state_dict()
    assert (place["epoch"], place["batch"]) == (14, 10)
    assert torch.equal(x, torch.cat(activations(10)))


# Iterators


def generator(batches: list[Tensor]):
    yield from batches


@pytest.mark.parametrize("shape", [(64, D), (4, 16, D), (2, 4, 8, D)])
@pytest.mark.parametrize("make", [list, iter, generator])
def test_items_of_any_iterable_are_batches_as_they_are(make, shape):
    flat = our_trainer(iter(activations(8)))
    flat.fit()
    shaped = our_trainer(make([batch.view(shape) for batch in activations(8)]))
    shaped.fit()
    assert (shaped.n_training_steps, shaped.n_training_samples) == (8, 8 * 64)
    for name, weight in flat.sae.state_dict().items():
        assert torch.equal(shaped.sae.state_dict()[name], weight)


def test_a_generator_may_yield_where_gradients_are_off():
    with torch.enable_grad():  # whatever the generator leaves behind
        the_trainer = our_trainer(torch.no_grad()(generator)(activations(8)))
        the_trainer.fit()
        assert the_trainer.n_training_steps == 8

        def inside():
            with torch.no_grad():
                yield from activations(9)

        the_trainer = our_trainer(inside())
        the_trainer.fit()
        assert torch.is_grad_enabled()
        assert the_trainer.n_training_steps == 8


def test_statistics_count_the_rows_that_items_have():
    batches = [batch.view(4, 16, D) for batch in activations(4)]
    the_trainer = our_trainer(batches, batch=32, n_steps=8)
    outputs, step = [], the_trainer.step
    the_trainer.step = lambda batch: outputs.append(step(batch)) or outputs[-1]
    sae = the_trainer.fit()
    active = sum((output.codes.values > 0).sum().item() for output in outputs)
    assert the_trainer.n_training_samples == 4 * 64
    assert the_trainer.feature_sparsity.sum().item() == pytest.approx(active / (4 * 64))
    assert sae.cfg.metadata.l0 == pytest.approx(active / (4 * 64))


@pytest.mark.parametrize("normalize_activations", ["none", "expected_average_only_in", "covariance_whitening"])
def test_activations_that_end_end_training_with_a_warning_and_the_sae_is_finished(
    normalize_activations, tmp_path, caplog
):
    sae = training_sae(normalize_activations=normalize_activations, dtype="float32")
    options = {"n_batches_for_norm_estimate": 2, "save_final_checkpoint": True, "checkpoint_path": str(tmp_path)}
    the_trainer = our_trainer((batch for batch in activations(7)), sae, n_steps=100, **options)
    the_trainer.fit()
    n_steps = 7 if normalize_activations == "none" else 5
    assert the_trainer.n_training_steps == n_steps
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith(f"activations ended after {n_steps * 64} of 6400 samples")
    assert (the_trainer.activation_scaler.scaling_factor, the_trainer.activation_scaler.whitening) == (None, None)
    saved = TrainingSAE.load_from_disk(tmp_path / f"final_{n_steps * 64}")
    x = activations(1)[0]
    torch.testing.assert_close(saved(x), sae(x), **exactly)
    # Folded: it reconstructs activations as they come.
    assert (sae(x) - x).square().sum() < (x - x.mean(0)).square().sum()
    assert sae.cfg.metadata.l0 == pytest.approx(the_trainer.feature_sparsity.sum().item())


@pytest.mark.parametrize("normalize_activations", ["expected_average_only_in", "covariance_whitening"])
def test_activations_that_end_while_their_norm_is_estimated_are_refused(normalize_activations):
    sae = training_sae(normalize_activations=normalize_activations)
    with pytest.raises(ValueError, match=r"after 3 .*n_batches_for_norm_estimate=5"):
        our_trainer(activations(3), sae, n_batches_for_norm_estimate=5).fit()


def test_an_iterable_without_a_batch_leaves_the_sae_as_it_was(caplog):
    sae = training_sae()
    before = {name: weight.clone() for name, weight in sae.state_dict().items()}
    our_trainer([], sae).fit()
    assert "activations ended after 0 of 512 samples" in caplog.text
    assert all(torch.equal(weight, before[name]) for name, weight in sae.state_dict().items())


@pytest.mark.parametrize("normalize_activations", ["none", "expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("width", [D - 1, 2 * D])
@pytest.mark.parametrize("kind", ["tensor", "iterator"])
def test_activations_of_another_width_are_refused_with_both(kind, width, normalize_activations):
    batches = activations(8, d_in=width)
    source = torch.cat(batches) if kind == "tensor" else iter(batches)
    sae = training_sae(normalize_activations=normalize_activations)
    with pytest.raises(ValueError, match=rf"d_in must be .* activations, {width}; got d_in={D}, shape \(64, {width}\)"):
        our_trainer(source, sae, n_batches_for_norm_estimate=2).fit()


# Vision


def test_an_sae_of_a_vision_transformers_patches(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vit = transformers.ViTModel(
        transformers.ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=D,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            initializer_range=0.5,
        ),
        add_pooling_layer=False,
    ).eval()

    def patches():
        while True:
            images = interpolate(torch.randn(4, 3, 4, 4), size=32)
            with torch.no_grad():
                hidden = vit(images, output_hidden_states=True).hidden_states
            yield hidden[1][:, 1:]

    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=D, d_sae=F, n_experts=E, k=K))
    seen = losses(our_trainer(patches(), sae, n_steps=150))
    assert len(seen) == 150
    assert sum(seen[-10:]) < 0.6 * sum(seen[:10])
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is SwitchSAE
    x = next(patches())
    assert x.shape == (4, 16, D)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), sae(x), **exactly)
        assert 0 < (loaded.encode(x) != 0).sum(-1).max() <= K
        assert (loaded(x) - x).square().sum() < 0.8 * (x - x.mean((0, 1))).square().sum()


# Synthetic activations


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
def test_our_synthetic_runner_trains_with_our_trainer_and_its_options(optimizer, tmp_path):
    cfg = SyntheticSAERunnerConfig(
        synthetic_model=SyntheticModelConfig(num_features=20, hidden_dim=D, seed=0),
        sae=SwitchTrainingSAEConfig(d_in=D, d_sae=F, n_experts=E, k=K),
        training_samples=10 * 64,
        batch_size=64,
        eval_samples=128,
        output_path=str(tmp_path / "output"),
        checkpoint_path=str(tmp_path / "checkpoints"),
        n_checkpoints=1,
        logger=LoggingConfig(log_to_wandb=False),
    )
    runner = SyntheticSAERunner(cfg, options=TrainerOptions(optimizer=optimizer))
    made, make = [], SparseSAETrainer.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseSAETrainer, "__init__", lambda self, *a, **k: made.append(self) or make(self, *a, **k))
        result = runner.run()
    (the_trainer,) = made
    assert (the_trainer.cfg.optimizer, the_trainer.n_training_steps) == (optimizer, 10)
    assert synthetic_sae_runner.SAETrainer is SAETrainer
    assert (tmp_path / "checkpoints" / str(6 * 64) / "checkpoint.json").exists()
    assert 0 < result.final_eval.sae_l0 <= K
    assert 0 < result.final_eval.mcc <= 1
    x = random_input(7, D, dtype=torch.float32)
    torch.testing.assert_close(SAE.load_from_disk(tmp_path / "output")(x), result.sae(x), **exactly)
    assert [row["step"] for row in read_history(tmp_path / "output" / FILENAME)] == list(range(1, 11))
