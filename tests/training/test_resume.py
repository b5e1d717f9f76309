"""What a run goes on from: longer than planned, on its own data, from an SAE that opens as one, after it diverged."""

import dataclasses
import json
import logging
import math

import pytest
import torch
from helpers import HOOK, D, E, F, K, activations, randomize, run_fields, training_sae
from sae_lens import SAE, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKSAE
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_switch import (
    CheckpointError,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAEConfig,
    TrainerOptions,
    TrainingDivergedError,
    activation_batches,
)
from sae_lens_switch.report import load_run

BATCH = 64
SCALED = ["expected_average_only_in", "covariance_whitening"]


def make_sae(architecture: str = "switch", **fields):
    torch.manual_seed(0)
    if architecture == "switch":
        return training_sae(**{"dtype": "float32", **fields})
    if architecture == "standard":
        return StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D, d_sae=F, **fields))
    return SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**{"d_in": D, "d_sae": F, "k": K, **fields}))


def make_trainer(sae, source=None, steps: int = 20, **fields) -> SparseSAETrainer:
    cfg = {"total_training_samples": steps * BATCH, "train_batch_size_samples": BATCH, "lr": 1e-2, **fields}
    return SparseSAETrainer(SparseSAETrainerConfig(**cfg), sae, data() if source is None else source)


def data(n: int = 60, scale: float = 1.0):
    return iter(activations(n, batch=BATCH, scale=scale))


def learning_rates(the_trainer: SparseSAETrainer) -> list[float]:
    """The rate of each step of fit."""
    rates, step = [], the_trainer.step

    def recorded(batch: Tensor):
        rates.append(the_trainer.optimizer.param_groups[0]["lr"])
        return step(batch)

    the_trainer.step = recorded  # type: ignore[method-assign]
    the_trainer.fit()
    return rates


# Longer than planned


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr_decay_steps": 0},
        {"lr_warm_up_steps": 3},
        {"lr_scheduler_name": "cosineannealing", "lr_end": 1e-4},
        {"lr_scheduler_name": "cosineannealingwarmrestarts", "n_restart_cycles": 2, "lr_end": 1e-4},
    ],
    ids=str,
)
def test_a_run_is_extended_under_the_schedule_of_its_new_length(options, optimizer, tmp_path, caplog):
    options = {**options, "optimizer": optimizer}
    first = make_trainer(make_sae(), steps=20, checkpoint_path=str(tmp_path), save_final_checkpoint=True, **options)
    first.fit()
    checkpoint = tmp_path / f"final_{20 * BATCH}"
    longer = make_trainer(make_sae(), steps=50, resume=str(checkpoint), **options)
    with caplog.at_level(logging.WARNING):
        rates = learning_rates(longer)
    planned = learning_rates(make_trainer(make_sae(), steps=50, **options))
    assert len(rates) == 30
    assert rates == pytest.approx(planned[20:], rel=1e-6)
    assert longer.n_training_samples == 50 * BATCH
    assert f"planned for {20 * BATCH} samples and goes on to {50 * BATCH}" in caplog.text


def test_a_run_in_the_middle_is_shortened(tmp_path, caplog):
    first = make_trainer(make_sae(), steps=40, checkpoint_path=str(tmp_path), n_checkpoints=3)
    first.fit()
    checkpoint = sorted(tmp_path.iterdir(), key=lambda p: int(p.name))[0]
    done = int(checkpoint.name) // BATCH
    rates = learning_rates(make_trainer(make_sae(), steps=20, resume=str(checkpoint)))
    assert rates == pytest.approx(learning_rates(make_trainer(make_sae(), steps=20))[done:])
    assert "goes on to" in caplog.text
    over = make_trainer(make_sae(), steps=3, resume=str(checkpoint))
    assert learning_rates(over) == []


def test_a_run_of_the_same_length_goes_on_to_the_bit_and_says_nothing(tmp_path, caplog):
    whole = make_trainer(make_sae(), checkpoint_path=str(tmp_path), n_checkpoints=1)
    whole.fit()
    (checkpoint,) = tmp_path.iterdir()
    resumed = make_trainer(make_sae(), resume=str(checkpoint), gradient_accumulation_steps=1)
    resumed.fit()
    for p, q in zip(resumed.sae.parameters(), whole.sae.parameters(), strict=True):
        assert torch.equal(p, q)
    assert "goes on to" not in caplog.text


def test_a_language_model_run_is_extended(tmp_path, model, dataset, caplog):
    def run(tokens: int, resume: str | None):
        cfg = LanguageModelSAERunnerConfig(
            architecture="switch", d_in=D, d_sae=F, n_experts=E, k=K, resume=resume,
            **run_fields(tmp_path, training_tokens=tokens, n_checkpoints=2),
        )  # fmt: skip
        runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)
        return runner.run()

    run(6 * 64, None)
    run(12 * 64, "latest")
    assert f"planned for {6 * 64} samples and goes on to {12 * 64}" in caplog.text


def several(folder, model, dataset, options: TrainerOptions, **fields):
    """A run of two SAEs on one stream."""
    known = {f.name for f in dataclasses.fields(MultiSAETrainingRunnerConfig)}
    fields = {n: v for n, v in run_fields(folder, **fields).items() if n in known}
    sae = {"d_in": D, "d_sae": F, "k": K}
    saes = {
        "switch": SwitchTrainingSAEConfig(n_experts=E, normalize_activations=SCALED[0], **sae),
        "topk": SparseTopKTrainingSAEConfig(**sae),
    }
    torch.manual_seed(0)  # SAELens's store mixes tokens by torch's own generator
    cfg = MultiSAETrainingRunnerConfig(saes=saes, hook_names=dict.fromkeys(saes, HOOK), **fields)
    return MultiSAETrainingRunner(cfg, override_dataset=dataset, override_model=model, options=options)


def test_several_saes_on_one_stream_are_extended(tmp_path, model, dataset, caplog):
    fields = {"n_checkpoints": 2, "n_batches_for_norm_estimate": 2}
    several(tmp_path, model, dataset, TrainerOptions(), training_tokens=6 * 64, **fields).run()
    several(tmp_path, model, dataset, TrainerOptions(resume="latest"), training_tokens=12 * 64, **fields).run()
    assert f"planned for {6 * 64} samples and goes on to {12 * 64}" in caplog.text


def test_several_saes_go_on_from_weights_for_scaled_activations(tmp_path, model, dataset, monkeypatch):
    fields = {"n_checkpoints": 2, "n_batches_for_norm_estimate": 2}
    several(tmp_path, model, dataset, TrainerOptions(), **fields).run()
    first = min(tmp_path.glob("checkpoints/*/*"), key=lambda p: int(p.name))
    kept = load_file(first / "switch" / "training" / "sae_weights.safetensors")
    seen = {}

    def look(trainer, batch: Tensor):
        seen.setdefault(
            trainer.sae.cfg.architecture(), {n: p.detach().clone() for n, p in trainer.sae.named_parameters()}
        )
        return step(trainer, batch)

    step = SparseSAETrainer.step
    monkeypatch.setattr(SparseSAETrainer, "step", look)
    several(tmp_path, model, dataset, TrainerOptions(resume=str(first)), **fields).run()
    assert seen.keys() == {"switch", "sparse_topk"}
    for name, p in seen["switch"].items():
        assert torch.equal(p, kept[name]), name
    assert not (first / "topk" / "training").exists()


@pytest.mark.parametrize("normalize_activations", ["none", *SCALED])
def test_a_finished_run_is_extended_from_its_final_checkpoint_if_it_can_be(normalize_activations, tmp_path):
    def make(steps: int, **fields):
        sae = make_sae(normalize_activations=normalize_activations)
        return make_trainer(
            sae, steps=steps, checkpoint_path=str(tmp_path), n_batches_for_norm_estimate=5, resume="latest", **fields
        )

    first = make(20, n_checkpoints=1, save_final_checkpoint=True)
    first.fit()
    (scheduled,) = (int(p.name) // BATCH for p in tmp_path.iterdir() if p.name.isdigit())
    again = make(20)
    assert len(learning_rates(again)) == 20 - scheduled, "not longer: as it was stopped before"
    longer = make(30)
    done = 20 if normalize_activations == "none" else scheduled
    assert len(learning_rates(longer)) == 30 - done


# On its own data


@pytest.mark.parametrize("other", ["shorter", "others", "wider contexts"])
def test_a_place_in_other_activations_is_refused(other, tmp_path):
    x = torch.cat(activations(12, batch=BATCH))
    make_trainer(make_sae(), x, checkpoint_path=str(tmp_path), n_checkpoints=1).fit()
    (checkpoint,) = tmp_path.iterdir()
    source = {"shorter": x[: 2 * BATCH], "others": x + 1, "wider contexts": torch.cat([x, x])}[other]
    resumed = make_trainer(make_sae(), source, resume=str(checkpoint))
    with pytest.raises(ValueError, match="activations must be those that the checkpoint was trained on"):
        resumed.fit()
    make_trainer(make_sae(), x.clone(), resume=str(checkpoint)).fit()


def test_a_place_of_an_earlier_version_beyond_the_end_is_refused():
    batches = activation_batches(torch.cat(activations(5)), 64)
    with pytest.raises(ValueError, match="batch must be between 0 and 5, the batches per epoch; got 7"):
        batches.load_state_dict({"epoch": 0, "batch": 7})
    batches.load_state_dict({"epoch": 0, "batch": 5})
    assert len(next(batches)) == 64


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hook_name": "blocks.0.hook_resid_pre"}, "hook_name was 'blocks.1.*', is 'blocks.0"),
        ({"context_size": 8}, "context_size was 16, is 8"),
    ],
)
def test_a_language_model_run_goes_on_at_the_same_place_of_the_model(changed, message, tmp_path, model, dataset):
    def run(**fields):
        cfg = LanguageModelSAERunnerConfig(
            architecture="switch", d_in=D, d_sae=F, n_experts=E, k=K, **run_fields(tmp_path, n_checkpoints=2, **fields)
        )
        return LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()

    run()
    with pytest.raises(CheckpointError, match=f"is of other activations: {message}"):
        run(**changed, resume="latest")


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


def explained(sae, x: Tensor) -> float:
    with torch.no_grad():
        return float(1 - (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())


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
    assert again.n_training_steps - the_trainer.n_training_steps == 3, "four bad steps, not one"
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
