"""Activations from wherever they are: tensors, iterators, folders cached by SAELens, a vision model."""

import itertools
import logging
from types import SimpleNamespace

import datasets
import pytest
import torch
from helpers import CONTEXT, HOOK, D, E, F, K, activations, random_input, run_fields, training_sae
from sae_lens import SAE, cache_activations_runner
from sae_lens.config import CacheActivationsRunnerConfig, LoggingConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunnerConfig, synthetic_sae_runner
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from torch.nn.functional import interpolate

from sae_lens_switch import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SwitchSAE,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
    TrainerOptions,
    activation_batches,
)
from sae_lens_switch.training.history import FILENAME, read_history
from sae_lens_switch.training.synthetic import SyntheticSAERunner

exactly = {"rtol": 0, "atol": 0}


def take(n: int, batches) -> list[Tensor]:
    return list(itertools.islice(batches, n))


def rows(n: int) -> Tensor:
    """Row i is i in every entry."""
    return torch.arange(float(n))[:, None].expand(n, D)


def numbers(batches: list[Tensor]) -> list[int]:
    x_ND = torch.cat(batches)
    assert (x_ND == x_ND[:, :1]).all()
    return x_ND[:, 0].int().tolist()


def our_trainer(source, sae=None, n_steps: int = 8, batch: int = 64, **fields) -> SparseSAETrainer:
    fields = {"total_training_samples": n_steps * batch, "train_batch_size_samples": batch, "lr": 1e-2, **fields}
    return SparseSAETrainer(SparseSAETrainerConfig(**fields), sae or training_sae(), source)


def losses(the_trainer) -> list[float]:
    """Of the steps of ``fit``."""
    step, seen = the_trainer.step, []

    def remember(batch):
        output = step(batch)
        seen.append(output.losses["mse_loss"].item())
        return output

    the_trainer.step = remember
    the_trainer.fit()
    return seen


# --- Tensors


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


@pytest.mark.parametrize("kind", ["tensor", "folder"])
def test_a_resumed_trainer_goes_on_at_its_place_in_a_source(kind, cached, tmp_path):
    source = torch.cat(activations(5)) if kind == "tensor" else cached.folder
    whole = our_trainer(source, training_sae(), n_steps=12)
    whole.fit()
    options = {"n_steps": 12, "checkpoint_path": str(tmp_path)}
    part = our_trainer(source, training_sae(), n_checkpoints=1, **options)
    part.fit()
    (checkpoint,) = tmp_path.iterdir()
    assert checkpoint.name == str(7 * 64)
    resumed = our_trainer(source, training_sae(seed=1), n_checkpoints=1, resume=str(checkpoint), **options)
    resumed.fit()
    assert resumed.data_provider.state_dict() == whole.data_provider.state_dict()
    for name, weight in whole.sae.state_dict().items():
        assert torch.equal(resumed.sae.state_dict()[name], weight)


# --- Iterators


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


def test_a_cached_folder_of_another_width_is_refused_with_both(cached):
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=D + 2, d_sae=F, n_experts=E, k=K))
    with pytest.raises(ValueError, match=rf"d_in must be .* activations, {D}; got d_in={D + 2}, shape \(64, {D}\)"):
        our_trainer(cached.folder, sae).fit()


# --- Folders cached by SAELens

N_CONTEXTS = 48


def cache(folder, model, dataset, dtype: str = "float32") -> SimpleNamespace:
    """What SAELens's own runner writes for the tiny model, in three shards."""
    cfg = CacheActivationsRunnerConfig(
        dataset_path="none",
        model_name="tiny",
        model_batch_size=4,
        hook_name=HOOK,
        d_in=D,
        training_tokens=N_CONTEXTS * CONTEXT,
        context_size=CONTEXT,
        dtype=dtype,
        buffer_size_gb=(16 * CONTEXT * D * getattr(torch, dtype).itemsize + 1) / 1e9,
        new_cached_activations_path=str(folder),
        device="cpu",
        streaming=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_activations_runner, "load_model", lambda **_: model)
        written = cache_activations_runner.CacheActivationsRunner(cfg, override_dataset=dataset).run()
    acts = torch.tensor(written[HOOK])
    assert acts.shape == (N_CONTEXTS, CONTEXT, D)
    return SimpleNamespace(folder=folder, tokens=acts.view(-1, D), dataset=written)


@pytest.fixture(scope="module")
def cached(tmp_path_factory, model, dataset):
    return cache(tmp_path_factory.mktemp("cache") / "activations", model, dataset)


def as_set(tokens_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct tokens, and how often each is there: the first of all contexts are the same."""
    return torch.unique(tokens_ND, dim=0, return_counts=True)


@pytest.mark.parametrize("batch", [8, 16, 24, 32, 48, 64, 96, 768])
@pytest.mark.parametrize("as_path", [str, lambda folder: folder], ids=["str", "Path"])
def test_an_epoch_has_every_cached_token_once_and_each_epoch_an_order_of_its_own(as_path, batch, cached):
    batches = activation_batches(as_path(cached.folder), batch)
    epochs = [torch.cat(take(len(cached.tokens) // batch, batches)) for _ in range(2)]
    for epoch in epochs:
        for found, expected in zip(as_set(epoch), as_set(cached.tokens), strict=True):
            torch.testing.assert_close(found, expected, **exactly)
    assert not torch.equal(*epochs)


def test_batches_of_a_cached_folder_that_do_not_divide_it_hold_no_token_twice(cached):
    batches = activation_batches(cached.folder, 100)
    for _ in range(3):
        epoch = torch.cat(take(7, batches))
        assert epoch.shape == (700, D)
        tokens, counts = as_set(torch.cat([cached.tokens, epoch]))
        there = dict(zip(map(tuple, as_set(cached.tokens)[0].tolist()), as_set(cached.tokens)[1].tolist(), strict=True))
        assert len(tokens) == len(there)
        assert all(count <= 2 * there[token] for token, count in zip(map(tuple, tokens.tolist()), counts, strict=True))


@pytest.mark.parametrize("batch", [1, 4, 7, 12, 14])
def test_contexts_that_are_no_multiple_of_the_batch_are_cut_without_loss(batch, tmp_path):
    features = datasets.Features({"a": datasets.Array2D(shape=(5, D), dtype="float32")})
    contexts = rows(84 * 5).reshape(84, 5, D).tolist()
    datasets.Dataset.from_dict({"a": contexts}, features=features).save_to_disk(tmp_path / "five")
    batches = activation_batches(tmp_path / "five", batch)
    for _ in range(2):
        assert sorted(numbers(take(420 // batch, batches))) == list(range(420))


def test_a_batch_of_a_cached_folder_mixes_tokens_of_many_contexts(cached):
    (batch,) = take(1, activation_batches(cached.folder, CONTEXT))
    context = {tuple(token): i // CONTEXT for i, token in enumerate(cached.tokens.tolist())}
    assert len({context[token] for token in map(tuple, batch.tolist())}) > CONTEXT / 3


def test_seed_and_state_of_a_cached_folder(cached):
    first, again, other = (torch.cat(take(20, activation_batches(cached.folder, 64, seed=s))) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    batches = activation_batches(cached.folder, 64, seed=3)
    batches.load_state_dict({"epoch": 1, "batch": 2})  # 12 batches an epoch
    assert torch.equal(torch.cat(take(6, batches)), first[14 * 64 :])
    place = batches.state_dict()
    assert (place["epoch"], place["batch"]) == (1, 8)


def test_activations_cached_in_half_precision_come_in_float32(tmp_path, model, dataset):
    half = cache(tmp_path / "half", model, dataset, dtype="float16")
    epoch = torch.cat(take(12, activation_batches(half.folder, 64)))
    assert epoch.dtype == torch.float32
    for found, expected in zip(as_set(epoch), as_set(half.tokens.half().float()), strict=True):
        torch.testing.assert_close(found, expected, **exactly)


def test_training_on_a_cached_folder_learns_it(cached):
    seen = losses(our_trainer(cached.folder, training_sae(dtype="float32"), n_steps=150))
    assert len(seen) == 150
    assert sum(seen[-12:]) < 0.6 * sum(seen[:12])


def test_our_runner_reads_activations_that_saelens_has_cached(cached, tmp_path, model, dataset):
    cfg = LanguageModelSAERunnerConfig(
        architecture="switch",
        **{"d_in": D, "d_sae": F, "n_experts": E, "k": K},
        **run_fields(tmp_path, use_cached_activations=True, cached_activations_path=str(cached.folder)),
    )
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)
    seen = []
    runner.sae.hook_sae_input.register_forward_hook(lambda _, __, x: seen.append(x))
    runner.run()
    assert len(seen) == 6
    there = set(map(tuple, cached.tokens.tolist()))
    assert all(tuple(token) in there for token in torch.cat(seen).tolist())


@pytest.fixture(scope="module")
def two_hooks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "activations"
    shape = datasets.Array2D(shape=(4, D), dtype="float32")
    features = datasets.Features(
        {"a": shape, "b": shape, "token_ids": datasets.Sequence(datasets.Value("int32"), length=4)}
    )
    x = rows(40).reshape(10, 4, D)
    data = {"a": x.tolist(), "b": (x + 100).tolist(), "token_ids": [[1, 2, 3, 4]] * 10}
    datasets.Dataset.from_dict(data, features=features).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("hook_name", [None, "c", "token_ids"])
def test_of_several_columns_one_must_be_named(hook_name, two_hooks):
    with pytest.raises(ValueError, match=rf"hook_name must be one of .*\['a', 'b'\]; got {hook_name!r}"):
        activation_batches(two_hooks, 8, hook_name=hook_name)
    with pytest.raises(ValueError, match=r"hook_name must be one of .*\['a', 'b'\]; got None"):
        our_trainer(two_hooks, batch=8)


@pytest.mark.parametrize(("hook_name", "first"), [("a", 0), ("b", 100)])
def test_the_named_column_is_read(hook_name, first, two_hooks):
    batches = activation_batches(two_hooks, 8, hook_name=hook_name)
    assert sorted(numbers(take(5, batches))) == list(range(first, first + 40))


def test_a_wrong_name_for_the_only_column_is_refused(cached):
    with pytest.raises(ValueError, match=rf"\['{HOOK}'\]; got 'other'"):
        activation_batches(cached.folder, 8, hook_name="other")


@pytest.mark.parametrize("kind", ["missing", "empty", "of something else", "without activations", "too small"])
def test_a_folder_without_activations_is_refused(kind, tmp_path):
    folder, message = tmp_path / "folder", "holds no cached activations"
    if kind != "missing":
        folder.mkdir()
    if kind == "of something else":
        training_sae().save_model(folder)
    if kind == "without activations":
        datasets.Dataset.from_dict({"tokens": [[1, 2], [3, 4]]}).save_to_disk(folder)
        message = r"hook_name must be one of .*\[\]; got None"
    if kind == "too small":
        features = datasets.Features({"a": datasets.Array2D(shape=(4, D), dtype="float32")})
        datasets.Dataset.from_dict({"a": torch.zeros(15, 4, D).tolist()}, features=features).save_to_disk(folder)
        message = "at least one batch of 64; there are 60"
    for source in (folder, str(folder)):
        with pytest.raises(ValueError, match=message):
            our_trainer(source)


# --- Vision


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


# --- Synthetic activations


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
