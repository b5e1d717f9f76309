"""What runs write for W&B, read back from the files of real offline runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from helpers import D, E, F, K, M, activations, run_fields, small_run_warnings, training_sae
from helpers.wandb_runs import (
    BATCH,
    EVALUATED,
    FIELDS,
    HISTOGRAMS_OF_SWITCH,
    LOGGED,
    OF_EVERY_SAE,
    OF_SPARSITY_WINDOW,
    OF_SWITCH,
    SPARSITY,
    STEPS,
    WINDOW,
    artifacts,
    digests,
    history,
    logging,
    offline,
    written,
)

from sae_lens_switch import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    SparseSAETrainer,
    SparseSAETrainerConfig,
)

pytestmark = small_run_warnings
OF_EVALUATION = {
    *("model_performance_preservation", "reconstruction_quality", "shrinkage", "sparsity", "token_stats"),
    "weights/W_dec_norms",
}


def describes(histogram: dict[str, Any], values: torch.Tensor) -> bool:
    counts, bins = np.histogram(values.double().numpy(), bins=64)
    same_ends = histogram["bins"] == pytest.approx(bins.tolist(), rel=1e-5, abs=1e-7)
    return histogram["_type"] == "histogram" and same_ends and sum(histogram["values"]) == counts.sum()


def run(architecture: str, folder: Path, model, dataset, **options: Any) -> SimpleNamespace:
    """A run, with the outputs of its steps beside what it has written."""
    own = {"d_in": D, "d_sae": F, "k": K, "lr": 1e-3, "logger": logging(), "n_checkpoints": 1, **FIELDS, **options}
    cfg = LanguageModelSAERunnerConfig(architecture=architecture, **run_fields(folder, **own))
    torch.manual_seed(0)
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)
    outputs, logits, step = [], [], SparseSAETrainer.step
    if architecture == "switch":
        hook = runner.sae.hook_sae_router_logits
        hook.register_forward_hook(lambda _, __, out: logits.append(out.detach()) if runner.sae.training else None)
    with offline(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseSAETrainer, "step", lambda self, batch: outputs.append(step(self, batch)) or outputs[-1])
        runner.run()
    records = written(folder)
    seen = {"outputs": outputs, "logits": logits, "records": records, "history": history(records)}
    return SimpleNamespace(cfg=cfg, folder=folder, **seen)


@pytest.fixture(scope="module")
def switch(tmp_path_factory, model, dataset):
    return run("switch", tmp_path_factory.mktemp("switch"), model, dataset, n_experts=E, aux_loss_coefficient=0.1)


def counted(outputs: list[Any]) -> Iterator[dict[str, torch.Tensor]]:
    """Statistics of the routing after each step, from nothing but the codes."""
    since_F, running_E, fired_F = torch.zeros(F), torch.full((E,), 1 / E), torch.zeros(F)
    for step, output in enumerate(outputs):
        codes = output.codes
        expert_B = codes.indices[:, 0] // M
        assert torch.equal(codes.indices // M, expert_B[:, None].expand(-1, K))
        load_E = torch.bincount(expert_B, minlength=E) / BATCH
        dead_before_F = since_F > WINDOW
        fires_F = torch.bincount(codes.indices[codes.values > 0], minlength=F)
        since_F = torch.where(fires_F > 0, 0, since_F + 1)
        running_E = 0.98 * running_E + 0.02 * load_E
        fired_F = fires_F + (0 if step % 4 == 0 else fired_F)
        yield {
            "load": load_E,
            "running load": running_E,
            "dead before": dead_before_F.view(E, M).sum(1),
            "dead": (since_F > WINDOW).view(E, M).sum(1),
            "density": fired_F.view(E, M).float().mean(1) / (BATCH * (step % 4 + 1)),
        }


def test_rows_hold_saelens_names_and_the_routers_beside_them(switch):
    assert switch.history.keys() == LOGGED | SPARSITY
    for step in LOGGED - EVALUATED:
        assert switch.history[step].keys() == OF_EVERY_SAE | OF_SWITCH
    for step in EVALUATED:
        assert switch.history[step].keys() == OF_EVERY_SAE | OF_SWITCH | OF_EVALUATION | HISTOGRAMS_OF_SWITCH
    for step in SPARSITY:
        assert switch.history[step].keys() == OF_SPARSITY_WINDOW


def test_losses_and_metrics_are_those_of_the_step(switch):
    for step in LOGGED:
        row, output = switch.history[step], switch.outputs[step]
        assert row["losses/overall_loss"] == pytest.approx(output.loss.item())
        for name in ("mse_loss", "load_balance_loss", "auxiliary_reconstruction_loss"):
            assert row[f"losses/{name}"] == pytest.approx(output.losses[name].item())
        x, error = output.sae_in, output.sae_out.detach() - output.sae_in
        explained = 1 - error.square().sum() / (x - x.mean(0)).square().sum()
        assert row["metrics/explained_variance"] == pytest.approx(explained.item(), abs=1e-5)
        assert row["metrics/l0"] == pytest.approx((output.codes.values > 0).sum().item() / BATCH)
        assert row["details/n_training_samples"] == (step + 1) * BATCH
        assert row["details/skipped_steps"] == 0
        assert row["details/load_balance_coefficient"] == pytest.approx(0.3)
    assert switch.history[7]["losses/auxiliary_reconstruction_loss"] > 0
    assert switch.history[1]["details/current_learning_rate"] == pytest.approx(1e-3)


def test_routing_is_what_the_codes_say(switch):
    for step, expected in enumerate(counted(switch.outputs)):
        if step not in LOGGED:
            continue
        row, load_E = switch.history[step], expected["load"]
        assert row["routing/expert_load_max"] == pytest.approx(load_E.max().item())
        assert row["routing/expert_load_min"] == pytest.approx(load_E.min().item())
        assert row["routing/expert_load_entropy"] == pytest.approx(torch.special.entr(load_E).sum().item(), rel=1e-5)
        loads = [row[f"routing/load_expert_{e}"] for e in range(E)]
        assert loads == pytest.approx(expected["running load"].tolist(), rel=1e-5)
        assert sum(loads) == pytest.approx(1, rel=1e-5)
        assert 1 / E < row["routing/gate_mean"] < 1
        dead = [row[f"routing/dead_latents_expert_{e}"] for e in range(E)]
        assert dead == expected["dead before"].tolist()
        assert row["sparsity/dead_features"] == expected["dead"].sum()
        assert (row["routing/dead_experts"], row["routing/interventions"]) == (0, 0)
        scale = switch.outputs[step].sae_in.var(dim=0, correction=0).sum().item()
        assert row["losses/load_balance_loss"] == pytest.approx(0.3 * scale * row["routing/load_balance"], rel=1e-4)
    assert sum(dead) > 0


def test_histograms_on_evaluation_steps_describe_the_experts(switch):
    for step, expected in enumerate(counted(switch.outputs)):
        if step not in EVALUATED:
            continue
        row = switch.history[step]
        assert describes(row["routing/load_histogram"], expected["running load"])
        assert describes(row["routing/dead_latents_histogram"], expected["dead"])
        assert describes(row["routing/latent_density_histogram"], expected["density"])
        norms = row["weights/W_dec_norms"]
        assert norms["bins"] == pytest.approx([1] * 65, abs=1e-6)
        assert sum(norms["values"]) == F
        assert sum(row["weights/W_router_norms"]["values"]) == E


def test_gates_are_the_probabilities_of_the_chosen_experts(switch):
    for step in LOGGED:
        row = switch.history[step]
        gates_B, expert_B = switch.logits[step].softmax(dim=1).max(dim=1)
        assert row["routing/gate_mean"] == pytest.approx(gates_B.mean().item(), rel=1e-5)
        load_E, P_E = expert_B.bincount(minlength=E) / BATCH, switch.logits[step].softmax(dim=1).mean(0)
        assert row["routing/load_balance"] == pytest.approx(E * (load_E * P_E).sum().item(), rel=1e-5)
        assert step not in EVALUATED or describes(row["routing/gates_histogram"], gates_B)


def test_evaluations_and_sparsity_are_saelens_own(switch):
    for step in EVALUATED:
        row = switch.history[step]
        assert row["model_performance_preservation"]["ce_loss_with_sae"] > 0
        assert 0 < row["sparsity"]["l0"] <= K
        assert row["reconstruction_quality"]["explained_variance"] < 1
    fired = torch.cat([output.codes.indices[output.codes.values > 0] for output in switch.outputs[4:]])
    never = F - len(fired.unique())
    assert switch.history[8]["sparsity/below_1e-6"] == never > 0
    assert sum(switch.history[8]["plots/feature_density_line_chart"]["values"]) == F


def test_the_config_is_written(switch):
    (record,) = [record.run for record in switch.records if record.HasField("run")]
    assert (record.project, record.display_name) == ("tested", "tiny run")
    config = {update.key: json.loads(update.value_json) for update in record.config.update}
    config.pop("_wandb")
    assert config == json.loads(json.dumps(switch.cfg.to_dict()))
    assert config["sae"]["architecture"] == "switch"
    assert (config["sae"]["n_experts"], config["sae"]["aux_loss_coefficient"], config["lr"]) == (E, 0.1, 1e-3)


def test_weights_and_sparsity_of_checkpoint_and_final_model_are_artifacts(switch):
    (checkpoint,) = (switch.folder / "checkpoints").glob("*/*")
    assert checkpoint.name == str(5 * BATCH)  # the first step past half of the tokens
    model_files, sparsity = ("cfg.json", "sae_weights.safetensors"), "sparsity.safetensors"
    output = switch.folder / "output"
    assert artifacts(switch.records) == [
        ("model", {"latest"}, digests(checkpoint, *model_files)),
        ("log_feature_sparsity", {"latest"}, digests(checkpoint, sparsity)),
        ("model", {"final_model", "latest"}, digests(output, *model_files)),
        ("log_feature_sparsity", {"latest"}, digests(output, sparsity)),
    ]
    metadata = [json.loads(r.artifact.metadata) for r in switch.records if r.HasField("artifact")]
    assert [m["lr"] for m in metadata] == [1e-3] * 4


def test_sparse_topk_logs_saelens_names_and_nothing_of_a_router(tmp_path, model, dataset):
    topk = run("sparse_topk", tmp_path, model, dataset, checkpoint_path=None)
    assert topk.history.keys() == LOGGED | SPARSITY
    for step in LOGGED:
        evaluation = OF_EVALUATION if step in EVALUATED else set()
        assert topk.history[step].keys() == OF_EVERY_SAE | evaluation
        assert topk.history[step]["losses/mse_loss"] == pytest.approx(topk.outputs[step].losses["mse_loss"].item())
    # Without a folder for checkpoints they go to W&B all the same.
    assert [(kind, aliases) for kind, aliases, _ in artifacts(topk.records)] == [
        ("model", {"latest"}),
        ("log_feature_sparsity", {"latest"}),
        ("model", {"final_model", "latest"}),
        ("log_feature_sparsity", {"latest"}),
    ]
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_skipped_is_logged_even_where_it_is_evaluated(value, tmp_path):
    batches = activations(STEPS)
    batches[3][5, 2] = value
    cfg = SparseSAETrainerConfig(
        total_training_samples=STEPS * BATCH, train_batch_size_samples=BATCH, lr=1e-3, logger=logging()
    )
    with offline(tmp_path):
        wandb.init()
        SparseSAETrainer(cfg, training_sae(), batches).fit()
        wandb.finish()
    rows = history(written(tmp_path))
    assert [rows[step]["details/skipped_steps"] for step in sorted(LOGGED)] == [0, 1, 1, 1]
    assert "routing/load_histogram" in rows[3]
    assert sum(rows[7]["routing/gates_histogram"]["values"]) == BATCH
