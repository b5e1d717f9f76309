"""Runs that are logged or resumed, and SAELens's other runners."""

import copy
import json
from dataclasses import fields

import pytest
import sae_lens.llm_sae_training_runner as host_runner
import sae_lens.training.sae_trainer as host_trainer
import torch
from helpers import HOOK, D, F, K, random_input, randomize, run_fields, small_run_warnings
from helpers.runs import SAE_FIELDS, both_configs, exactly, our_config, same_tensors, stored_activations
from sae_lens import SAE, LanguageModelSAETrainingRunner, LoggingConfig, StandardTrainingSAEConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunner, SyntheticSAERunnerConfig
from torch import Tensor

from sae_lens_switch import SwitchSAE, SwitchTrainingSAE, SwitchTrainingSAEConfig

pytestmark = small_run_warnings


# Logging


class Wandb:
    """Stands in for wandb: remembers what is logged."""

    def __init__(self) -> None:
        self.logged: list[dict] = []

    def log(self, values: dict, step: int | None = None) -> None:  # noqa: ARG002
        self.logged.append(dict(values))

    def init(self, **options) -> None:
        json.dumps(options["config"])

    def finish(self) -> None: ...

    def Histogram(self, values):  # noqa: N802
        return values


def test_a_logged_run_evaluates_in_training_and_logs_router_and_losses(tmp_path, model, dataset, monkeypatch):
    wandb = Wandb()
    for module in (host_trainer, host_runner):
        monkeypatch.setattr(module, "wandb", wandb)
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=1, eval_every_n_wandb_logs=3)
    monkeypatch.setattr(logger, "log", lambda *_, **__: None)
    cfg = our_config(tmp_path, logger=logger, feature_sampling_window=4)
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)
    sae = runner.run()
    assert sae.training
    trained = [entry for entry in wandb.logged if "losses/load_balance_loss" in entry]
    evaluated = [entry for entry in wandb.logged if "weights/W_router_norms" in entry]
    assert len(trained) == 6
    assert len(evaluated) == 2
    assert all("metrics/expert_load_entropy" in entry for entry in trained)
    for entry in evaluated:
        assert entry["model_performance_preservation"]["ce_loss_with_sae"] > 0
        assert 0 < entry["sparsity"]["l0"] <= K
        assert entry["weights/W_dec_norms"].shape == (F,)
    assert any("sparsity/below_1e-5" in entry for entry in wandb.logged)


# Resuming


@both_configs
def test_a_run_resumed_from_its_checkpoint_goes_on_from_there(make_config, tmp_path, model, dataset):
    cfg = make_config(tmp_path, n_checkpoints=1, training_tokens=8 * 64)
    LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*")
    state = torch.load(checkpoint / "trainer_state.pt")
    assert 0 < state["n_training_steps"] < 8

    seen = []

    class Recording(host_trainer.SAETrainer):
        def fit(self):
            optimizer = copy.deepcopy(self.optimizer.state_dict())
            seen.append((self.n_training_steps, self.n_training_samples, optimizer, copy.deepcopy(self.sae)))
            return super().fit()

    resumed = make_config(tmp_path / "second", resume_from_checkpoint=str(checkpoint), training_tokens=8 * 64)
    runner = LanguageModelSAETrainingRunner(resumed, override_dataset=dataset, override_model=model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_runner, "SAETrainer", Recording)
        sae = runner.run()
    ((n_steps, n_samples, optimizer, at_start),) = seen
    assert (n_steps, n_samples) == (state["n_training_steps"], state["n_training_samples"])
    for index, saved in state["optimizer"]["state"].items():
        assert same_tensors(optimizer["state"][index], saved)
    assert same_tensors(at_start.state_dict(), TrainingSAE.load_from_disk(checkpoint).state_dict())
    x = stored_activations(model, dataset).reshape(-1, D)
    assert ((sae.b_dec - x.mean(0)).norm() < (torch.zeros(D) - x.mean(0)).norm()).item()
    torch.testing.assert_close(SAE.load_from_disk(tmp_path / "second" / "output")(x), sae(x), **exactly)


def test_a_run_can_start_from_a_saved_sae_without_moving_its_biases(tmp_path, model, dataset):
    saved = randomize(SwitchTrainingSAE(SwitchTrainingSAEConfig(**SAE_FIELDS, normalize_decoder=False)))
    saved.save_model(tmp_path / "saved")
    cfg = our_config(tmp_path, from_pretrained_path=str(tmp_path / "saved"), lr=1e-30, lr_end=0.0, lr_decay_steps=0)
    sae = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()
    assert same_tensors(sae.state_dict(), saved.state_dict())


def test_a_fresh_run_starts_its_biases_in_the_data(tmp_path, model, dataset):
    cfg = our_config(tmp_path, lr=1e-12)
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)
    seen = []
    runner.sae.add_hook("hook_sae_input", lambda x, hook: seen.append(x.detach().clone()))  # noqa: ARG005
    sae = runner.run()

    def summed_distance(point: Tensor) -> float:
        return (seen[0] - point).norm(dim=1).sum().item()

    at_start = summed_distance(sae.b_dec)
    assert at_start < summed_distance(seen[0].mean(0)) < summed_distance(torch.zeros(D))
    for seed in range(20):
        aside = random_input(D, seed=seed, dtype=torch.float32)
        assert at_start < summed_distance(sae.b_dec + 0.5 * aside)
    torch.testing.assert_close(sae.b_dec, sae.b_router, rtol=1e-4, atol=1e-4)


# Other runners of SAELens


def test_the_multi_sae_runner_trains_switch_beside_other_architectures(tmp_path, model, dataset):
    cfg = MultiSAETrainingRunnerConfig(
        saes={
            "switch": SwitchTrainingSAEConfig(**SAE_FIELDS),
            "whitened": SwitchTrainingSAEConfig(**SAE_FIELDS, normalize_activations="covariance_whitening"),
            "standard": StandardTrainingSAEConfig(d_in=D, d_sae=F),
        },
        hook_names={"switch": HOOK, "whitened": "blocks.0.hook_resid_pre", "standard": HOOK},
        n_batches_for_norm_estimate=2,
        **{
            name: value
            for name, value in run_fields(tmp_path).items()
            if name in {f.name for f in fields(MultiSAETrainingRunnerConfig)}
        },
    )
    saes = MultiSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()
    x = stored_activations(model, dataset)
    for name in ("switch", "whitened"):
        loaded = SAE.load_from_disk(tmp_path / "output" / name)
        assert type(loaded) is SwitchSAE
        torch.testing.assert_close(loaded(x), saes[name](x), **exactly)


def test_the_synthetic_runner_trains_and_evaluates_switch(tmp_path):
    cfg = SyntheticSAERunnerConfig(
        synthetic_model=SyntheticModelConfig(num_features=20, hidden_dim=D, seed=0),
        sae=SwitchTrainingSAEConfig(**SAE_FIELDS),
        training_samples=10 * 64,
        batch_size=64,
        eval_samples=128,
        output_path=str(tmp_path / "output"),
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    result = SyntheticSAERunner(cfg).run()
    assert 0 < result.final_eval.sae_l0 <= K
    assert 0 <= result.final_eval.mcc <= 1
    assert type(SAE.load_from_disk(tmp_path / "output")) is SwitchSAE
