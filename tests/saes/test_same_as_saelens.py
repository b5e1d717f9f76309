"""Ours on sparse kernels against SAELens's TopK, BatchTopK and Matryoshka BatchTopK, where all three are alike."""

import pytest
import torch
from helpers import D, activations, is_that_of_tiles, largest_allocation, random_input, trainer
from helpers.saelens_pairs import (
    F,
    assert_same_step,
    assert_same_threshold,
    dead_latents,
    each,
    loss_and_gradients,
    options_of,
    pair,
    rescaling,
    step_input,
    tightly,
)
from sae_lens.saes.sae import TrainingSAE


@each
@rescaling
def test_encode_decode_and_forward_equal_saelens(kind, rescale):
    ours, stock = pair(kind, rescale_acts_by_decoder_norm=rescale)
    for shape in ((D,), (7, D), (3, 4, D), (2, 3, 2, D)):
        x = random_input(*shape)
        acts = ours.encode(x)
        torch.testing.assert_close(acts, stock.encode(x), **tightly)
        torch.testing.assert_close(ours.decode(acts), stock.decode(acts), **tightly)
        torch.testing.assert_close(ours.decode(ours.encode_sparse(x)), stock(x), **tightly)
        torch.testing.assert_close(ours(x), stock(x), **tightly)


@each
def test_autocast_stays_near_saelens_own_under_autocast(kind):
    ours, stock = pair(kind, dtype="float32")
    x = random_input(60, D, dtype=torch.float32)
    results = []
    for sae in (ours, stock):
        sae.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = sae.training_forward_pass(step_input(x, dead_latents(6)))
        output.loss.backward()
        results.append([output.loss, *(p.grad for p in sae.parameters())])
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= kind.autocast_error * b.norm()


@each
@pytest.mark.parametrize("hook", ["hook_sae_acts_pre", "hook_sae_acts_post"])
def test_a_hook_on_dense_latents_sees_and_edits_them_in_training(kind, hook):
    ours, stock = pair(kind)
    seen = []

    def steer(acts, hook):  # noqa: ARG001
        seen.append(acts)
        return acts * 0.5

    for sae in (ours, stock):
        sae.add_hook(hook, steer)
    x = random_input(20, D)
    (a, a_grads), (b, b_grads) = loss_and_gradients(ours, x), loss_and_gradients(stock, x)
    assert [tuple(t.shape) for t in seen] == [(20, F)] * 2
    assert list(a.losses) == list(b.losses)
    torch.testing.assert_close(a.loss, b.loss, **tightly)
    assert_same_threshold(ours, stock, **tightly)
    for name in b_grads:
        torch.testing.assert_close(a_grads[name], b_grads[name], **tightly)


@each
@pytest.mark.parametrize("hook", ["hook_sae_acts_pre", "hook_sae_acts_post"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse activations", "dense"])
@pytest.mark.parametrize("shape", [(4, 6), (24,), (2, 3, 4)], ids=str)
def test_a_step_with_such_a_hook_takes_activations_of_any_shape_as_their_rows(kind, hook, sparse, shape):
    levels = {"use_matryoshka_aux_loss": True} if "matryoshka_widths" in kind.options else {}
    ours, _ = pair(kind, use_sparse_activations=sparse, **levels)
    ours.add_hook(hook, lambda acts, hook: acts * 0.5)  # noqa: ARG005
    x, dead = random_input(24, D), dead_latents(9)
    (a, a_grads), (b, b_grads) = (loss_and_gradients(ours, rows, dead) for rows in (x.view(*shape, D), x))
    assert list(a.losses) == list(b.losses)
    torch.testing.assert_close(a.losses, b.losses, **tightly)
    torch.testing.assert_close(a.loss, b.loss, **tightly)
    torch.testing.assert_close(a_grads, b_grads, **tightly)
    for name, width in {"sae_in": D, "sae_out": D, "hidden_pre": F, "feature_acts": F}.items():
        found = vars(a)[name].to_dense()
        assert found.shape == (*shape, width)
        torch.testing.assert_close(found.view(24, width), vars(b)[name].to_dense(), **tightly)


@each
def test_one_token_alone_takes_such_a_step_too(kind):
    ours, _ = pair(kind)
    ours.add_hook("hook_sae_acts_pre", lambda acts, hook: acts * 0.5)  # noqa: ARG005
    x = random_input(D)
    alone, row = (ours.training_forward_pass(step_input(given)) for given in (x, x.view(1, D)))
    assert (alone.sae_out.shape, alone.feature_acts.shape) == ((D,), (F,))
    torch.testing.assert_close(alone.loss, row.loss, **tightly)


@each
def test_encode_gives_dense_latents_also_with_a_hook_and_sparse_activations(kind):
    ours, _ = pair(kind, use_sparse_activations=True)
    for shape in ((7, D), (3, 4, D)):
        x = random_input(*shape)
        latents, out = ours.encode(x), ours(x)
        with ours.hooks([("hook_sae_acts_pre", lambda acts, hook: None)]):  # noqa: ARG005
            assert not ours.encode(x).is_sparse
            torch.testing.assert_close(ours.encode(x), latents, **tightly)
            torch.testing.assert_close(ours(x), out, **tightly)


@each
@rescaling
def test_twenty_steps_of_saelens_trainer_end_in_the_same_weights_and_statistics(kind, rescale):
    batches = [batch.double() for batch in activations(20)]  # SAELens's loss takes one dtype in older versions of torch
    ours, stock = pair(kind, rescale_acts_by_decoder_norm=rescale)
    trainers = [trainer(sae, batches, lr=1e-3, lr_end=1e-4, dead_feature_window=4) for sae in (ours, stock)]
    died = 0
    for batch in batches:
        for t in trainers:
            t.step(batch)
            t.n_training_steps += 1
        died += int(trainers[0].dead_neurons.sum())
        assert torch.equal(trainers[0].dead_neurons, trainers[1].dead_neurons)
    assert died > 0  # so that the auxiliary loss took part
    assert torch.equal(trainers[0].act_freq_scores, trainers[1].act_freq_scores)
    assert torch.equal(trainers[0].n_forward_passes_since_fired, trainers[1].n_forward_passes_since_fired)
    assert_same_threshold(ours, stock, rtol=1e-6, atol=1e-8)
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@each
def test_a_training_step_makes_no_tensor_of_batch_times_width_outside_a_tile(kind):
    B, width = 2048, 1024
    widths = {"matryoshka_widths": [100, 500, width]} if "matryoshka_widths" in kind.options else {}
    sae = kind.ours(kind.our_config(d_in=D, d_sae=width, k=4, **widths))
    x = random_input(B, D, dtype=torch.float32)
    dead = torch.zeros(width, dtype=torch.bool)
    dead[:40] = True

    def step() -> None:
        sae.training_forward_pass(step_input(x, dead)).loss.backward()

    assert is_that_of_tiles(largest_allocation(step), width, B)
    sae.add_hook("hook_sae_acts_post", lambda acts, hook: None)  # noqa: ARG005
    assert largest_allocation(step) >= 4 * B * width, "the census can see a dense tensor"


@each
def test_its_checkpoint_comes_back_and_stock_weights_load(kind, tmp_path):
    ours, stock = pair(kind)
    for sae in (ours, stock):
        sae.training_forward_pass(step_input(random_input(12, D)))
    ours.save_model(tmp_path / "ours")
    loaded = TrainingSAE.load_from_disk(tmp_path / "ours")
    assert type(loaded) is kind.ours
    assert loaded.W_enc.stride() == (1, D)
    for name, value in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not list((tmp_path / "ours").glob(".saving*"))
    stock.save_model(tmp_path / "stock")
    fresh = kind.ours(kind.our_config(**options_of(kind)))
    fresh.load_weights_from_checkpoint(tmp_path / "stock")
    assert_same_step(fresh, stock, random_input(12, D))


@each
@rescaling
@pytest.mark.parametrize("fold", ["scaling factor", "whitening"])
def test_folds_equal_saelens(kind, rescale, fold):
    ours, stock = pair(kind, rescale_acts_by_decoder_norm=rescale)
    x = random_input(15, D)
    matrix = random_input(D, D, seed=9) + 3 * torch.eye(D)
    for sae in (ours, stock):
        for threshold in sae.buffers():
            threshold.fill_(0.5)
        if fold == "scaling factor":
            sae.fold_activation_norm_scaling_factor(2.5)
        else:
            sae.fold_activation_whitening(x[0], matrix, matrix.inverse())
    torch.testing.assert_close(ours(x), stock(x), **tightly)
    torch.testing.assert_close(ours.encode(x), stock.encode(x), **tightly)
    assert_same_threshold(ours, stock, **tightly)
