"""Sweeps over several SAEs on one stream of activations."""

import copy
import dataclasses

import pytest
import torch
from helpers import (
    HOOK,
    D,
    F,
    K,
    activations,
    run_fields,
    training_config,
    training_sae,
)
from sae_lens import SAE
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.topk_sae import TopKSAE
from sae_lens.training import multi_sae_trainer

from sae_lens_switch import (
    MultiSAETrainingRunner,
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAEConfig,
    TrainerOptions,
)
from sae_lens_switch.common.substitution import constructing
from sae_lens_switch.training.multi_sae_trainer import MultiSAETrainer
from sae_lens_switch.training.runners import with_options

pytestmark = [
    pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]


def test_a_sweep_over_experts_and_k_on_one_stream_trains_each_as_if_alone(tmp_path, model, dataset):
    grid = {f"E{E}_k{k}": training_config(n_experts=E, k=k, dtype="float32") for E in (1, 2, 5) for k in (2, 4)}
    grid["topk"] = SparseTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K)
    known = {f.name for f in dataclasses.fields(MultiSAETrainingRunnerConfig)}

    def run(*names: str):
        saes = {}
        for name in names:
            torch.manual_seed(0)
            saes[name] = get_sae_training_class(grid[name].architecture())[0](copy.deepcopy(grid[name]))
        torch.manual_seed(1)  # SAELens's store mixes tokens by torch's own generator
        cfg = MultiSAETrainingRunnerConfig(
            saes={name: saes[name].cfg for name in names},
            hook_names=dict.fromkeys(names, HOOK),
            **{n: v for n, v in run_fields(tmp_path / "-".join(names), lr=1e-3).items() if n in known},
        )
        return MultiSAETrainingRunner(cfg, override_dataset=dataset, override_model=model, override_saes=saes).run()

    together = run(*grid)
    assert set(together) == set(grid)
    for name in grid:
        alone = run(name)[name].state_dict()
        for key, weight in together[name].state_dict().items():
            torch.testing.assert_close(weight, alone[key], rtol=0, atol=0, msg=f"{name} {key}")
    weights = {name: sae.state_dict()["W_dec"] for name, sae in together.items()}
    assert not any(torch.equal(weights["topk"], weights[name]) for name in grid if name != "topk")
    loaded = SAE.load_from_disk(tmp_path / "-".join(grid) / "output" / "E5_k4")
    assert (loaded.cfg.n_experts, loaded.cfg.k) == (5, 4)
    loaded = SAE.load_from_disk(tmp_path / "-".join(grid) / "output" / "topk")
    assert type(loaded) is TopKSAE


def test_our_trainers_in_a_sweep_equal_each_alone_bit_for_bit():
    batches = activations(8)
    cfg = SparseSAETrainerConfig(total_training_samples=8 * 64, train_batch_size_samples=64, lr=1e-2)
    options = {"few": {"n_experts": 2, "k": 5}, "many": {"n_experts": 8, "k": 2, "aux_loss_coefficient": 0.1}}
    options = {name: {"dtype": "float32", **fields} for name, fields in options.items()}
    saes = {name: training_sae(**fields) for name, fields in options.items()}
    with constructing(multi_sae_trainer, "SAETrainer", with_options(TrainerOptions())):
        hooks = dict.fromkeys(saes, HOOK)
        MultiSAETrainer(cfg, saes, hooks, iter([{HOOK: batch} for batch in batches])).fit()
    for name, fields in options.items():
        alone = training_sae(**fields)
        SparseSAETrainer(cfg, alone, iter(batches)).fit()
        for key, weight in alone.state_dict().items():
            torch.testing.assert_close(saes[name].state_dict()[key], weight, rtol=0, atol=0, msg=f"{name} {key}")
