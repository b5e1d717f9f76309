"""What a run of many SAEs writes for W&B, read back from the files of a real offline run."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from helpers import HOOK, D, E, F, K, run_fields, small_run_warnings, training_config
from helpers.wandb_runs import (
    EVALUATED,
    FIELDS,
    HISTOGRAMS_OF_SWITCH,
    LOGGED,
    OF_EVERY_SAE,
    OF_SPARSITY_WINDOW,
    OF_SWITCH,
    SPARSITY,
    artifacts,
    digests,
    history,
    logging,
    offline,
    written,
)
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig

from sae_lens_switch import MultiSAETrainingRunner, SparseTopKTrainingSAEConfig

pytestmark = small_run_warnings


@pytest.fixture(scope="module")
def many(tmp_path_factory, model, dataset):
    folder = tmp_path_factory.mktemp("many")
    taken = {f.name for f in fields(MultiSAETrainingRunnerConfig)}
    options = run_fields(folder, n_checkpoints=1, lr=1e-3, logger=logging(), **FIELDS)
    cfg = MultiSAETrainingRunnerConfig(
        saes={
            "routed": training_config(dtype="float32", aux_loss_coefficient=0.1),
            "flat": SparseTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K),
        },
        hook_names=HOOK,
        **{name: value for name, value in options.items() if name in taken},
    )
    torch.manual_seed(0)
    with offline(folder):
        MultiSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()
    records = written(folder)
    return SimpleNamespace(folder=folder, records=records, history=history(records))


def names_of_both(switch_names: set[str], every_name: set[str]) -> set[str]:
    return {f"routed/{name}" for name in switch_names | every_name} | {f"flat/{name}" for name in every_name}


def test_names_of_many_saes_begin_with_the_name_of_the_sae(many):
    assert many.history.keys() == LOGGED | SPARSITY
    of_step = names_of_both(OF_SWITCH, OF_EVERY_SAE) | {"details/n_training_samples"}
    for step in LOGGED - EVALUATED:
        assert many.history[step].keys() == of_step
    for step in SPARSITY:
        assert many.history[step].keys() == names_of_both(set(), OF_SPARSITY_WINDOW)
    for step in LOGGED:
        row = many.history[step]
        assert row.keys() >= of_step
        assert sum(row[f"routed/routing/load_expert_{e}"] for e in range(E)) == pytest.approx(1, rel=1e-5)
        assert row["routed/losses/mse_loss"] != row["flat/losses/mse_loss"]


def test_evaluations_of_many_saes_have_the_same_histograms_as_of_one(many):
    for step in EVALUATED:
        histograms = {name for name, v in many.history[step].items() if isinstance(v, dict) and "bins" in v}
        assert histograms == names_of_both(HISTOGRAMS_OF_SWITCH, {"weights/W_dec_norms"})
        assert sum(many.history[step]["routed/routing/load_histogram"]["values"]) == E


def test_checkpoints_and_final_models_of_many_saes_are_artifacts(many):
    (checkpoint,) = (many.folder / "checkpoints").glob("*/*")
    model_files, sparsity = ("cfg.json", "sae_weights.safetensors"), "sparsity.safetensors"
    expected = []
    for folder, aliases in ((checkpoint, {"latest"}), (many.folder / "output", {"latest", "final_model"})):
        for name in ("routed", "flat"):
            expected.append(("model", aliases, digests(folder / name, *model_files)))
            expected.append(("log_feature_sparsity", {"latest"}, digests(folder / name, sparsity)))
    assert artifacts(many.records) == expected
