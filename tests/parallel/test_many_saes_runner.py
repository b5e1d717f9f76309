"""SAELens's runner of many SAEs on several processes: what each reads, trains, leaves and resumes from."""

import json
import os
import signal

import pytest
import torch
from helpers import HOOK, D, E, F, K, run_fields
from helpers.processes import on_processes
from sae_lens import SAE
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.saes.standard_sae import StandardTrainingSAEConfig
from safetensors.torch import load_file

from sae_lens_switch import (
    MultiSAETrainingRunner,
    SparseSAETrainer,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAEConfig,
    TrainerOptions,
)
from sae_lens_switch.parallel import ParallelMultiSAETrainingRunner, multi_runner
from sae_lens_switch.training import checkpoints

OTHER = "blocks.0.hook_resid_pre"


def runner(folder, model, dataset, n: int, options: TrainerOptions | None = None, **fields):
    known = MultiSAETrainingRunnerConfig.__dataclass_fields__
    fields = {name: v for name, v in run_fields(folder, **fields).items() if name in known}
    saes = {
        "switch": SwitchTrainingSAEConfig(
            n_experts=E, d_in=D, d_sae=F, k=K, normalize_activations="expected_average_only_in"
        ),
        "topk": SparseTopKTrainingSAEConfig(d_in=D, d_sae=2 * F, k=K),
        "standard": StandardTrainingSAEConfig(d_in=D, d_sae=F),
    }
    hook_names = {"switch": HOOK, "topk": OTHER, "standard": HOOK}
    fields = {"n_batches_for_norm_estimate": 2, **fields, "hook_names": hook_names}
    torch.manual_seed(0)
    cfg = MultiSAETrainingRunnerConfig(saes=saes, **fields)
    make = MultiSAETrainingRunner if n == 0 else ParallelMultiSAETrainingRunner
    return make(cfg, override_dataset=dataset, override_model=model, options=options)


@pytest.mark.parametrize("prefetch", [False, 2])
def test_a_run_leaves_the_ordinary_folders_of_all_saes(prefetch, tmp_path, model, dataset):
    def run() -> list[str]:
        the_runner = runner(tmp_path, model, dataset, 2, n_checkpoints=1, prefetch_llm_batches=prefetch)
        assert the_runner.activations_store.train_batch_size_tokens == 32
        return list(the_runner.run())

    assert on_processes(2, run, tmp_path) == [["topk"], ["switch", "standard"]]
    for name, architecture in (("switch", "switch"), ("topk", "topk"), ("standard", "standard")):
        sae = SAE.load_from_disk(tmp_path / "output" / name)
        assert sae.cfg.architecture() == architecture
        assert sae.cfg.metadata.hook_name == (OTHER if name == "topk" else HOOK)
        rows = [json.loads(line) for line in (tmp_path / "output" / name / "history.jsonl").read_text().splitlines()]
        assert [row["details/n_training_samples"] for row in rows] == [64 * (i + 1) for i in range(6)]
        assert len(load_file(tmp_path / "output" / name / "sparsity.safetensors")["sparsity"]) == sae.cfg.d_sae
    cfg = json.loads((tmp_path / "output" / "runner_cfg.json").read_text())
    assert cfg["saes"].keys() == {"switch", "topk", "standard"}
    assert not cfg["logger"]["run_name"].endswith("-rank1")


def test_each_process_runs_the_model_on_its_own_part_of_the_data(tmp_path, model, dataset):
    def run() -> list:
        the_runner = runner(tmp_path, model, dataset, 2)
        return [tuple(map(int, row["tokens"])) for row in the_runner.activations_store.dataset]

    first, second = on_processes(2, run, tmp_path)
    assert len(first) + len(second) == len(dataset)
    assert abs(len(first) - len(second)) <= 1
    assert {tuple(map(int, row["tokens"])) for row in dataset} == {*first, *second}


@pytest.mark.parametrize("then", [1, 2])
def test_an_interrupted_run_resumes_on_any_number_of_processes(then, tmp_path, model, dataset, monkeypatch):
    step = SparseSAETrainer._train_step

    def interrupting(self, **kwargs):
        if self.n_training_steps == 2 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, **kwargs)

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            runner(tmp_path, model, dataset, 2).run()

    with monkeypatch.context() as patched:
        patched.setattr(SparseSAETrainer, "_train_step", interrupting)
        on_processes(2, interrupted, tmp_path)
    (manifest,) = (tmp_path / "checkpoints").glob("*/*/checkpoint.json")
    assert json.loads(manifest.read_text())["n_training_samples"] == 4 * 64
    read = [
        int(load_file(f)["n_dataset_processed"])
        for f in manifest.parent.glob("ranks/*/activations_store_state.safetensors")
    ]
    assert len(read) == 2

    def resumed() -> int:
        the_runner = runner(tmp_path, model, dataset, then, TrainerOptions(resume="latest"))
        places, returned = [], multi_runner.return_to_place

        def noting(store, *rest):
            returned(store, *rest)
            places.append(store.n_dataset_processed)

        monkeypatch.setattr(multi_runner, "return_to_place", noting)
        the_runner.run()
        return places[0]

    assert on_processes(then, resumed, tmp_path) == (read if then == 2 else [sum(read)])
    for name in ("switch", "topk", "standard"):
        rows = [json.loads(line) for line in (tmp_path / "output" / name / "history.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, 7))
    with pytest.raises(checkpoints.CheckpointError, match="one on several resumes under torchrun"):
        runner(tmp_path, model, dataset, 0, TrainerOptions(resume=str(manifest.parent))).run()


def test_settings_that_differ_between_processes_are_refused(tmp_path, model, dataset):
    def run() -> None:
        rank = torch.distributed.get_rank()
        with pytest.raises(
            ValueError, match="settings must be the same on all processes; lr is 0.1 on rank 0, 0.2 on rank 1"
        ):
            runner(tmp_path, model, dataset, 2, lr=0.1 * (rank + 1), lr_end=0.0)

    on_processes(2, run, tmp_path)


def test_given_saes_are_trained_and_needed_only_where_they_are_owned(tmp_path, model, dataset):
    def run() -> bool:
        known = runner(tmp_path, model, dataset, 2)
        mine = dict(known.saes)
        again = ParallelMultiSAETrainingRunner(known.cfg, dataset, model, mine)
        with pytest.raises(ValueError, match="override_saes must have the SAEs that rank . trains, .*; got none"):
            ParallelMultiSAETrainingRunner(known.cfg, dataset, model, {})
        return all(again.saes[name] is sae for name, sae in mine.items()) and again.saes.keys() == mine.keys()

    assert on_processes(2, run, tmp_path) == [True, True]
