"""What a run goes on from: longer than planned, and on its own data."""

import dataclasses
import json
import logging
import shutil

import pytest
import torch
from helpers import HOOK, D, E, F, K, activations, run_fields
from helpers.resumed import BATCH, SCALED, make_sae, make_trainer
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.training.prefetch import PrefetchingIterator
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_switch import (
    CheckpointError,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    SparseSAETrainer,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAEConfig,
    TrainerOptions,
    activation_batches,
)


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
    assert f"planned for {20 * BATCH} samples and now continues to {50 * BATCH}" in caplog.text


def test_a_run_in_the_middle_is_shortened(tmp_path, caplog):
    first = make_trainer(make_sae(), steps=40, checkpoint_path=str(tmp_path), n_checkpoints=3)
    first.fit()
    checkpoint = sorted(tmp_path.iterdir(), key=lambda p: int(p.name))[0]
    done = int(checkpoint.name) // BATCH
    rates = learning_rates(make_trainer(make_sae(), steps=20, resume=str(checkpoint)))
    assert rates == pytest.approx(learning_rates(make_trainer(make_sae(), steps=20))[done:])
    assert "now continues to" in caplog.text
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
    assert "now continues to" not in caplog.text


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
    assert f"planned for {6 * 64} samples and now continues to {12 * 64}" in caplog.text


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
    assert f"planned for {6 * 64} samples and now continues to {12 * 64}" in caplog.text
    for name in ("switch", "topk"):
        rows = [json.loads(line) for line in (tmp_path / "output" / name / "history.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, 13))
        assert [row["details/n_training_samples"] for row in rows] == [64 * step for step in range(1, 13)]


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


def test_a_pilot_is_extended_with_more_checkpoints_than_it_had_steps(tmp_path):
    make_trainer(make_sae(), steps=5, checkpoint_path=str(tmp_path), save_final_checkpoint=True).fit()
    longer = make_trainer(make_sae(), steps=40, checkpoint_path=str(tmp_path), n_checkpoints=20, resume="latest")
    longer.fit()
    assert longer.n_training_steps == 40


def test_several_saes_save_no_checkpoint_that_was_passed_before_they_resumed(tmp_path, model, dataset):
    fields = {"training_tokens": 12 * 64, "n_batches_for_norm_estimate": 2, "n_checkpoints": 5}

    def saved() -> list[int]:
        return sorted(int(p.parent.name) for p in (tmp_path / "checkpoints").glob("*/*/checkpoint.json"))

    several(tmp_path, model, dataset, TrainerOptions(), **fields).run()
    whole = saved()
    assert len(whole) == 5
    for folder in (tmp_path / "checkpoints").glob("*/*"):
        if int(folder.name) > whole[2]:
            shutil.rmtree(folder)
    several(tmp_path, model, dataset, TrainerOptions(resume="latest"), **fields).run()
    assert saved() == whole


@pytest.mark.parametrize("kind", ["one", "several"])
def test_what_reads_ahead_begins_where_the_run_goes_on(kind, tmp_path, model, dataset, monkeypatch):
    places = []

    def run(**options) -> None:
        fields = {"n_checkpoints": 2, "prefetch_llm_batches": True, "training_tokens": 12 * 64}
        if kind == "several":
            fields |= {"n_batches_for_norm_estimate": 2}
            runner = several(tmp_path, model, dataset, TrainerOptions(**options), **fields)
        else:
            sae = {"architecture": "switch", "d_in": D, "d_sae": F, "n_experts": E, "k": K}
            cfg = LanguageModelSAERunnerConfig(**sae, **run_fields(tmp_path, **fields), **options)
            runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)
        store, reading = runner.activations_store, PrefetchingIterator.__init__

        def noting(self, *args, **kwargs) -> None:
            places.append(store.n_dataset_processed)
            reading(self, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(PrefetchingIterator, "__init__", noting)
            runner.run()

    run()
    newest = max((tmp_path / "checkpoints").glob("*/*/checkpoint.json"), key=lambda p: int(p.parent.name)).parent
    read = int(load_file(newest / "activations_store_state.safetensors")["n_dataset_processed"])
    run(resume="latest")
    assert places == [0, read]
    assert read > 0
