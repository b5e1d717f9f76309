"""Transcoders under our trainer and SAELens's, on pairs of activations that are given."""

import pytest
import torch
from helpers import activations, trainer
from helpers.transcoders import D, E, F, K, every_kind, fresh_transcoder
from torch import Tensor

from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig, activation_batches

BATCH, D_OUT = 64, 7


def learnable(n: int = 20 * BATCH) -> tuple[Tensor, Tensor]:
    """Inputs, and targets that a layer of ReLUs makes of them."""
    generator = torch.Generator().manual_seed(5)
    (x,) = activations(1, batch=n, d_in=D)
    W_in, W_out = torch.randn(D, 30, generator=generator), torch.randn(30, D_OUT, generator=generator)
    return x, ((x - x.mean(0)) @ W_in).relu() @ W_out / 10


def made(kind: str, **fields):
    return fresh_transcoder(kind, d_out=D_OUT, dtype="float32", **fields)


def trainer_of(sae, source=None, steps: int = 20, **fields) -> SparseSAETrainer:
    cfg = {"total_training_samples": steps * BATCH, "train_batch_size_samples": BATCH, "lr": 3e-3, **fields}
    x, y = learnable()
    source = activation_batches(x, BATCH, targets=y) if source is None else source
    return SparseSAETrainer(SparseSAETrainerConfig(**cfg), sae, source)


def explained(sae) -> float:
    x, y = learnable()
    with torch.no_grad():
        error = (sae(x) - y).square().sum(1).mean()
    return 1 - float(error / (y - y.mean(0)).square().sum(1).mean())


@every_kind
@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
def test_it_learns_what_makes_the_targets(kind, optimizer, skip):
    sae = made(kind, skip_connection=skip)
    before = explained(sae)
    trainer_of(sae, steps=200, optimizer=optimizer, lr=1e-2, lr_decay_steps=50).fit()
    assert explained(sae) > max(0.6, before + 0.5)
    assert sae.W_skip is None or sae.W_skip.any()


@every_kind
def test_saelens_trainer_takes_the_same_steps(kind):
    x, y = learnable(8 * BATCH)
    batches = list(torch.cat([x, y], dim=1).split(BATCH))
    ours, theirs = (made(kind, skip_connection=True) for _ in range(2))
    trainer(theirs, batches, lr=1e-3, lr_end=1e-4).fit()
    trainer_of(ours, iter(batches), steps=8, lr=1e-3, lr_end=1e-4, lr_decay_steps=0).fit()
    for name, t in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], t, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@every_kind
@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
def test_a_resumed_run_ends_at_the_same_bits(kind, optimizer, tmp_path):
    options = {"optimizer": optimizer, "checkpoint_path": str(tmp_path)}
    whole = trainer_of(made(kind, skip_connection=True), n_checkpoints=1, **options)
    whole.fit()
    (checkpoint,) = tmp_path.iterdir()
    resumed = trainer_of(made(kind, skip_connection=True), resume=str(checkpoint), **options)
    resumed.fit()
    assert resumed.n_training_samples == whole.n_training_samples
    for name, t in whole.sae.state_dict().items():
        assert torch.equal(resumed.sae.state_dict()[name], t), name


def test_a_checkpoint_of_another_transcoder_is_refused(tmp_path):
    trainer_of(made("switch_transcoder"), n_checkpoints=1, checkpoint_path=str(tmp_path)).fit()
    (checkpoint,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match="skip_connection was False, is True"):
        trainer_of(made("switch_transcoder", skip_connection=True), resume=str(checkpoint)).fit()
    other = made("switch_transcoder", hook_name_out="blocks.3.hook_mlp_out")
    with pytest.raises(ValueError, match=r"hook_name_out was None, is 'blocks\.3\.hook_mlp_out'"):
        trainer_of(other, resume=str(checkpoint)).fit()


@every_kind
def test_gradients_of_parts_add_up(kind):
    if kind == "sparse_batchtopk_transcoder":
        pytest.skip("each part is a batch of its own")
    fields = {"load_balance_coefficient": 0.0} if kind == "switch_transcoder" else {"aux_loss_coefficient": 0.0}
    saes = [made(kind, **fields) for _ in range(2)]
    for sae, parts in zip(saes, (1, 2), strict=True):
        trainer_of(sae, steps=1, lr_decay_steps=0, gradient_accumulation_steps=1).fit()  # the first batch's start
        trainer_of(sae, steps=3, lr_decay_steps=0, gradient_accumulation_steps=parts).fit()
    for p, q in zip(*(sae.parameters() for sae in saes), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_a_step_whose_target_is_not_finite_is_skipped():
    x, y = learnable(4 * BATCH)
    y[BATCH + 3, 2] = torch.inf
    sae = made("switch_transcoder")
    ran = trainer_of(sae, iter(torch.cat([x, y], dim=1).split(BATCH)), steps=4)
    ran.fit()
    assert ran.n_skipped_steps == 1
    assert all(torch.isfinite(p).all() for p in sae.parameters())


def test_a_collapsed_router_is_reseeded_from_the_inputs():
    sae = made("switch_transcoder", load_balance_coefficient=0.0)
    with torch.no_grad():
        sae.W_router.zero_()
    sae.is_fresh = False
    ran = trainer_of(sae, steps=10, on_collapse="reseed", collapse_patience=2)
    ran.fit()
    assert ran.n_interventions > 0
    experts = (learnable()[0] - sae.b_router) @ sae.W_router
    assert len(experts.argmax(1).unique()) > 1


def test_statistics_are_of_latents_and_of_targets():
    ran = trainer_of(made("switch_transcoder"), steps=20)
    output = None
    for _ in range(3):
        output = ran.step(next(ran.data_provider))
        ran.n_training_steps += 1
    assert output is not None
    log = ran.build_train_step_log_dict(output, ran.n_training_samples)
    x, y = output.sae_out, output.sae_in
    assert y.shape == (BATCH, D_OUT)
    expected = 1 - (x - y).square().sum(1).mean() / (y - y.mean(0)).square().sum(1).mean()
    assert log["metrics/explained_variance"] == pytest.approx(expected.item(), rel=1e-4)
    assert log["metrics/l0"] <= K
    assert len(ran.routing.load_E) == E
    assert ran.dead_neurons.shape == (F,)


# Pairs from tensors


def test_batches_of_pairs_keep_inputs_and_targets_together_in_every_epoch():
    x = torch.arange(4 * 10.0).view(10, 4)
    y = x[:, :3] * 100
    batches = activation_batches(x, 5, targets=y)
    seen = [next(batches) for _ in range(4)]
    for batch in seen:
        torch.testing.assert_close(batch[:, 4:], batch[:, :3] * 100)
    assert sorted(torch.cat(seen[:2])[:, 0].tolist()) == x[:, 0].tolist()
    place = batches.state_dict()
    following = next(batches)
    again = activation_batches(x, 5, targets=y)
    again.load_state_dict(place)
    assert torch.equal(next(again), following)
    with pytest.raises(ValueError, match="activations must be those that the checkpoint was trained on"):
        activation_batches(x, 5, targets=y + 1).load_state_dict(place)


@pytest.mark.parametrize(
    ("source", "targets", "message"),
    [
        (torch.zeros(10, 4), torch.zeros(9, 3), r"targets must have shape \(10, 'd_out'\).*; got \(9, 3\)"),
        (torch.zeros(2, 5, 4), torch.zeros(10, 3), r"targets must have shape \(2, 5, 'd_out'\).*; got \(10, 3\)"),
        (iter([]), torch.zeros(10, 3), "targets must be None unless the source is a tensor; got a list_iterator"),
    ],
)
def test_targets_that_do_not_fit(source, targets, message):
    with pytest.raises(ValueError, match=message):
        activation_batches(source, 5, targets=targets)
