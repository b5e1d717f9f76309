"""Activations from folders cached by SAELens."""

from types import SimpleNamespace

import datasets
import pytest
import torch
from helpers import CONTEXT, HOOK, D, E, F, K, activations, run_fields, training_sae
from helpers.sources import exactly, losses, numbers, our_trainer, rows, take
from sae_lens import cache_activations_runner
from sae_lens.config import CacheActivationsRunnerConfig
from torch import Tensor

from sae_lens_switch import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
    activation_batches,
)

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


def test_a_cached_folder_of_another_width_is_refused_with_both(cached):
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=D + 2, d_sae=F, n_experts=E, k=K))
    with pytest.raises(ValueError, match=rf"d_in must be .* activations, {D}; got d_in={D + 2}, shape \(64, {D}\)"):
        our_trainer(cached.folder, sae).fit()
