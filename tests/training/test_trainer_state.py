"""Interrupted anywhere and resumed, training ends with the same bits; SAELens's trainer and ours resume each other."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.faults import (
    ARCHITECTURES,
    BATCH,
    STEPS,
    data,
    everything,
    folders,
    interrupted_after,
    make_sae,
    make_trainer,
    uninterrupted,
    what_differs,
)
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_lens_switch.training import checkpoints

# Interrupted anywhere, and resumed

SETUPS: dict[str, dict[str, Any]] = {
    "adam": {},
    "row-sparse": {"optimizer": "row_sparse_adam"},
    "topk": {"sae": {"architecture": "sparse_topk", "aux_loss_coefficient": 0.5}, "dead_feature_window": 3},
    "norm estimated": {
        "sae": {"normalize_activations": "expected_average_only_in"},
        "n_batches_for_norm_estimate": 3,
    },
    "whitened": {
        "sae": {"normalize_activations": "covariance_whitening"},
        "n_batches_for_norm_estimate": 3,
    },
    "bfloat16": {"sae": {"dtype": "bfloat16"}},
    "bfloat16, row-sparse": {"sae": {"dtype": "bfloat16"}, "optimizer": "row_sparse_adam"},
    "bfloat16, topk": {"sae": {"architecture": "sparse_topk", "dtype": "bfloat16"}},
    "float64": {"sae": {"dtype": "float64"}},
    "auxk": {"sae": {"aux_loss_coefficient": 0.5}, "dead_feature_window": 3},
    "auxk, row-sparse": {
        "sae": {"aux_loss_coefficient": 0.5},
        "dead_feature_window": 3,
        "optimizer": "row_sparse_adam",
    },
    "schedules": {"sae": {"load_balance_warm_up_steps": 17}, "lr_warm_up_steps": 7, "lr_decay_steps": 12},
    "cosine": {"lr_scheduler_name": "cosineannealing", "lr_end": 1e-4, "lr_warm_up_steps": 5},
    "collapse countered": {
        "sae": {"load_balance_coefficient": 0.0},
        "on_collapse": "raise_coefficient",
        "collapse_share": 0.26,
        "collapse_patience": 12,
    },
    "reseeded": {
        "sae": {"load_balance_coefficient": 0.0},
        "on_collapse": "reseed",
        "collapse_share": 0.26,
        "collapse_patience": 12,
    },
}


@pytest.mark.parametrize("name", SETUPS)
def test_interrupted_again_and_again_training_ends_with_the_same_bits(name, tmp_path):
    setup = SETUPS[name]
    setup = {"feature_sampling_window": 9, **setup}
    estimates = setup.get("n_batches_for_norm_estimate", 0)
    for i, steps in enumerate([1, 2, 7, 19, STEPS - 1]):
        earlier = checkpoints.latest(tmp_path)
        trainer = make_trainer(
            tmp_path,
            interrupted_after(steps + estimates),
            resume=earlier and ("latest" if i % 2 else str(earlier)),
            **setup,
        )
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        assert trainer.n_training_steps == steps
        assert str(steps * BATCH) in folders(tmp_path)
    resumed = make_trainer(tmp_path, resume="latest", **setup)
    resumed.fit()
    if "on_collapse" in setup:
        assert resumed.n_interventions > 0
    if "dead_feature_window" in setup:
        assert resumed.dead_neurons.any()
    assert what_differs(everything(resumed), uninterrupted(**setup)) == []


def test_interrupted_where_a_window_of_statistics_ends(tmp_path):
    setup = {"feature_sampling_window": 5}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, interrupted_after(10), **setup).fit()
    resumed = make_trainer(tmp_path, resume="latest", **setup)
    resumed.fit()
    assert what_differs(everything(resumed), uninterrupted(**setup)) == []


def test_activations_that_end_where_a_window_of_statistics_ends(tmp_path):
    fields = {"feature_sampling_window": 5, "save_final_checkpoint": True}
    make_trainer(tmp_path, data("generator", 10), **fields).fit()
    assert folders(tmp_path) == [f"final_{10 * BATCH}"]


def test_interrupted_right_after_a_scheduled_checkpoint(tmp_path):
    setup = {"n_checkpoints": 2}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, interrupted_after(11), **setup).fit()
    assert folders(tmp_path) == [str(11 * BATCH)]  # written twice, there once
    resumed = make_trainer(tmp_path, resume="latest", **setup)
    resumed.fit()
    assert len(folders(tmp_path)) == 2
    assert what_differs(everything(resumed), uninterrupted()) == []


def test_interrupted_before_the_first_step_nothing_is_saved(tmp_path):
    setup = {"sae": {"normalize_activations": "expected_average_only_in"}, "n_batches_for_norm_estimate": 3}
    for n in (0, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path, interrupted_after(n), **setup).fit()
        assert folders(tmp_path) == []


def test_with_nothing_to_resume_from_training_starts_afresh(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        trainer = make_trainer(path, resume="latest")
        trainer.fit()
        assert what_differs(everything(trainer), uninterrupted()) == []
    with pytest.raises(ValueError, match="resume='latest' needs a checkpoint_path; it is None"):
        make_trainer(None, resume="latest").fit()


def test_a_finished_run_is_not_what_latest_means(tmp_path):
    make_trainer(tmp_path, save_final_checkpoint=True, n_checkpoints=2).fit()
    trainer = make_trainer(tmp_path)
    assert trainer.resume("latest").name == str(21 * BATCH)


def test_random_numbers_go_on_where_they_were(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, interrupted_after(5)).fit()
    expected = torch.rand(3)
    torch.manual_seed(99)
    make_trainer(tmp_path).resume("latest")
    assert torch.equal(torch.rand(3), expected)


def test_activations_that_end_before_the_place_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, interrupted_after(9)).fit()
    with pytest.raises(ValueError, match="activations ended after 4 of 9 batches"):
        make_trainer(tmp_path, data("generator", 4), resume="latest").fit()


# SAELens's own trainer


def stock_trainer(path: Path, batches: Iterator[Tensor], sae: Any, **fields: Any) -> SAETrainer[Any, Any]:
    ours = make_trainer(path, **fields)
    return SAETrainer(cfg=ours.cfg, sae=sae, data_provider=batches)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalize_activations", ["none", "expected_average_only_in"])
def test_a_checkpoint_of_saelens_own_trainer_is_resumed(architecture, normalize_activations, tmp_path):
    setup = {"n_batches_for_norm_estimate": 3}
    sae = {"architecture": architecture, "normalize_activations": normalize_activations}
    stock = stock_trainer(tmp_path, interrupted_after(15), make_sae(**sae), **setup)
    with pytest.raises(KeyboardInterrupt):
        stock.fit()
    stock.save_checkpoint("stock")
    ours = make_trainer(tmp_path, sae=sae, **setup)
    ours.resume(tmp_path / "stock")
    assert what_differs(shared(ours), shared(stock)) == []
    ours.fit()
    assert ours.n_training_steps == STEPS
    whole = stock_trainer(tmp_path, data("generator"), make_sae(**sae), **setup)
    whole.fit()
    for name, weight in whole.sae.state_dict().items():
        torch.testing.assert_close(ours.sae.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


def shared(trainer: Any) -> dict[str, Tensor]:
    return {name: t for name, t in everything(trainer).items() if not name.startswith("routing")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saelens_own_trainer_goes_on_from_a_checkpoint_of_ours(architecture, tmp_path):
    sae = {"architecture": architecture}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, interrupted_after(15), sae=sae).fit()
    saved = tmp_path / str(15 * BATCH)
    stock = stock_trainer(tmp_path, islice(data("generator"), 15, None), make_sae(**sae))
    stock.load_trainer_state(saved)
    stock.sae.load_weights_from_checkpoint(saved)
    ours = make_trainer(tmp_path, sae=sae)
    ours.resume(saved)
    assert what_differs(shared(ours), shared(stock)) == []
    stock.fit()
    ours.fit()
    assert stock.n_training_steps == STEPS
    for name, weight in stock.sae.state_dict().items():
        torch.testing.assert_close(ours.sae.state_dict()[name], weight, rtol=1e-3, atol=1e-4)
