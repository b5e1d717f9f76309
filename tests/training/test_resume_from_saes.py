"""What a run goes on from: an SAE that opens as one, and a checkpoint from after or before it diverged."""

import json
import math

import pytest
import torch
from helpers import D, E, F, K, activations, randomize, run_fields
from helpers.resumed import BATCH, SCALED, data, make_sae, make_trainer
from sae_lens import SAE, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopKSAE
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_switch import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    SparseSAETrainer,
    SparseTopKTrainingSAE,
    TrainingDivergedError,
)
from sae_lens_switch.report import load_run

# From an SAE that opens as one


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_sparse_topk_opens_as_a_topk_sae(tmp_path, dtype):
    sae = make_sae("sparse_topk", dtype=dtype)
    make_trainer(sae, steps=5, checkpoint_path=str(tmp_path), save_final_checkpoint=True).fit()
    opened = SAE.load_from_disk(tmp_path / f"final_{5 * BATCH}")
    assert type(opened) is TopKSAE
    assert opened.cfg.architecture() == "topk"
    x = activations(1, seed=9)[0].to(opened.dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.05, "atol": 0.05}
    assert torch.allclose(opened(x), sae.decode(sae.encode_sparse(x)), **tolerance)
    assert type(TrainingSAE.load_from_disk(tmp_path / f"final_{5 * BATCH}")) is SparseTopKTrainingSAE


@pytest.mark.parametrize("how", SCALED)
@pytest.mark.parametrize("architecture", ["switch", "sparse_topk", "standard"])
def test_the_sae_in_a_checkpoint_is_one_for_activations_as_they_are(architecture, how, tmp_path):
    batches = activations(80, batch=BATCH, scale=30.0)
    sae = make_sae(architecture, normalize_activations=how)
    the_trainer = make_trainer(
        sae, iter(batches), steps=60, checkpoint_path=str(tmp_path), n_checkpoints=1, n_batches_for_norm_estimate=5
    )
    seen = []
    write = the_trainer.write_checkpoint

    def recorded(folder):
        seen.append(the_trainer.activation_scaler.unscale(sae(the_trainer.activation_scaler(batches[-1]))).detach())
        write(folder)

    the_trainer.write_checkpoint = recorded
    the_trainer.fit()
    (checkpoint,) = tmp_path.iterdir()
    for loader in (SAE, TrainingSAE):
        opened = loader.load_from_disk(checkpoint)
        assert opened.cfg.normalize_activations == "none"
        error = (opened(batches[-1]) - seen[0]).norm() / seen[0].norm()
        assert error < 1e-4
    assert not (checkpoint / "activation_scaler.json").exists(), "SAELens's trainer would scale a second time"
    run = load_run(checkpoint)
    assert torch.allclose(run.sae(batches[-1]), opened(batches[-1]))


@pytest.mark.parametrize("how", SCALED)
@pytest.mark.parametrize("architecture", ["switch", "sparse_topk", "standard"])
@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
def test_training_goes_on_from_such_a_checkpoint_to_the_bit(architecture, how, optimizer, tmp_path):
    if (architecture, optimizer) == ("standard", "row_sparse_adam"):
        optimizer = "adam"
    options = {"n_batches_for_norm_estimate": 5, "optimizer": optimizer}
    whole = make_trainer(
        make_sae(architecture, normalize_activations=how),
        data(scale=30.0), checkpoint_path=str(tmp_path), n_checkpoints=1, **options,
    )  # fmt: skip
    whole.fit()
    (checkpoint,) = tmp_path.iterdir()
    resumed = make_trainer(
        make_sae(architecture, normalize_activations=how), data(scale=30.0), resume=str(checkpoint), **options
    )
    resumed.fit()
    for (name, p), q in zip(resumed.sae.named_parameters(), whole.sae.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_so_does_a_run_of_a_language_model(tmp_path, model, dataset, monkeypatch):
    def run(**options):
        fields = {"n_batches_for_norm_estimate": 2, "n_checkpoints": 2, **run_fields(tmp_path)}
        sae = {"d_in": D, "d_sae": F, "k": K, "n_experts": E, "normalize_activations": SCALED[0]}
        cfg = LanguageModelSAERunnerConfig(architecture="switch", **sae, **fields, **options)
        return LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()

    run()
    first = min(tmp_path.glob("checkpoints/*/*"), key=lambda p: int(p.name))
    kept = load_file(first / "training" / "sae_weights.safetensors")
    seen = []

    def look(trainer, batch: Tensor):
        seen.append({n: p.detach().clone() for n, p in trainer.sae.named_parameters()})
        return step(trainer, batch)

    step = SparseSAETrainer.step
    monkeypatch.setattr(SparseSAETrainer, "step", look)
    run(resume=str(first))
    for name, p in seen[0].items():
        assert torch.equal(p, kept[name]), name


def test_saelens_s_trainer_refuses_such_a_checkpoint_instead_of_scaling_twice(tmp_path):
    sae = make_sae(normalize_activations=SCALED[0])
    make_trainer(sae, checkpoint_path=str(tmp_path), n_checkpoints=1, n_batches_for_norm_estimate=5).fit()
    (checkpoint,) = tmp_path.iterdir()
    stock = SAETrainer(SAETrainerConfig(10 * BATCH, BATCH, lr=1e-2, lr_end=1e-3), make_sae(), data())
    with pytest.raises(FileNotFoundError, match="activation_scaler.json"):
        stock.load_trainer_state(checkpoint)


def test_a_checkpoint_as_version_0_1_wrote_it_goes_on_to_the_bit(tmp_path):
    """Weights for scaled activations, with the scaler beside them."""
    options = {"n_batches_for_norm_estimate": 5}
    whole = make_trainer(make_sae(normalize_activations=SCALED[0]), data(), **options)
    whole.fit()
    first = make_trainer(make_sae(normalize_activations=SCALED[0]), data(), **options)
    first._estimate_normalization()
    for _ in range(8):
        first.step(next(first.data_provider))
        first.n_training_steps += 1
    folder = tmp_path / "old"
    folder.mkdir()
    first.sae.save_model(folder)
    first.save_trainer_state(folder)
    resumed = make_trainer(make_sae(normalize_activations=SCALED[0]), data(), resume=str(folder), **options)
    resumed.fit()
    for p, q in zip(resumed.sae.parameters(), whole.sae.parameters(), strict=True):
        assert torch.equal(p, q)


# After it diverged


def diverging(n_good: int, n: int = 60):
    batches = activations(n, batch=BATCH)
    return iter([*batches[:n_good], *(torch.full_like(b, math.nan) for b in batches[n_good:])])


def test_a_diverged_run_that_is_resumed_by_name_has_its_steps_before_it_again(tmp_path):
    the_trainer = make_trainer(make_sae(), diverging(8), steps=40, checkpoint_path=str(tmp_path), max_skipped_steps=4)
    with pytest.raises(TrainingDivergedError, match="The last good weights are saved"):
        the_trainer.fit()
    (checkpoint,) = tmp_path.iterdir()
    assert checkpoint.name.startswith("diverged_")
    again = make_trainer(make_sae(), diverging(8), steps=40, resume=str(checkpoint), max_skipped_steps=4)
    with pytest.raises(TrainingDivergedError):
        again.fit()
    assert again.n_training_steps - the_trainer.n_training_steps == 4, "four bad steps, not one"
    mended = make_trainer(make_sae(), data(), steps=40, resume=str(checkpoint), max_skipped_steps=4)
    mended.fit()
    assert all(torch.isfinite(p).all() for p in mended.sae.parameters())


def test_weights_that_are_not_finite_are_neither_trained_nor_saved(tmp_path):
    sae = randomize(make_sae())
    with torch.no_grad():
        sae.W_dec[3, 1] = math.nan
    the_trainer = make_trainer(sae, checkpoint_path=str(tmp_path))
    with pytest.raises(ValueError, match="weights of the SAE must be finite to train it; those of W_dec are not"):
        the_trainer.fit()
    assert list(tmp_path.iterdir()) == []

    sae = make_sae()
    the_trainer = make_trainer(sae, steps=40, checkpoint_path=str(tmp_path), max_skipped_steps=4)
    step, spoilt_at = the_trainer.step, 3

    def spoiling(batch: Tensor):
        if the_trainer.n_training_steps == spoilt_at:
            sae.b_dec.data[0] = math.nan
        return step(batch)

    the_trainer.step = spoiling
    with pytest.raises(TrainingDivergedError, match="Nothing is saved, since these weights are not finite: b_dec"):
        the_trainer.fit()
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_which_every_step_was_skipped_gives_no_sae():
    the_trainer = make_trainer(make_sae(), diverging(0), steps=4)
    with pytest.raises(TrainingDivergedError, match="all 4 steps were skipped .* the SAE is as it was"):
        the_trainer.fit()


def test_a_checkpoint_from_before_gradient_accumulation_is_no_other_run(tmp_path):
    """A manifest of a version without gradient accumulation."""
    make_trainer(make_sae(), checkpoint_path=str(tmp_path), n_checkpoints=1).fit()
    (checkpoint,) = tmp_path.iterdir()
    config = json.loads((checkpoint / "checkpoint.json").read_text())["config"]["trainer"]
    assert "gradient_accumulation_steps" not in config
    make_trainer(make_sae(), resume=str(checkpoint), gradient_accumulation_steps=2).fit()
