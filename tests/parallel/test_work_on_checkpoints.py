"""Checkpoints of several processes: each file is checked once, by one of them, and what one cannot do none does."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.command_line import SWITCH, arguments
from helpers.parallel_runs import BATCH, command_together, config, go_on_together, tokens
from helpers.processes import on_processes
from helpers.resumed import make_sae

from sae_lens_switch import CheckpointError, SparseSAETrainer
from sae_lens_switch.parallel import DataParallelSAETrainer, ParallelSparseSAETrainer, data_parallel
from sae_lens_switch.parallel import checkpoints as parallel_checkpoints
from sae_lens_switch.parallel import resumable as resumable_module
from sae_lens_switch.parallel import runner as runner_module
from sae_lens_switch.parallel.agreement import first_does
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.training import checkpoints, manifest

STEPS = 12


def run_on(n: int, folder: Path, steps: int) -> None:
    fields = {"expert_parallel": n}
    go_on_together(n, folder, (steps, STEPS), make_sae, ParallelSparseSAETrainer, **fields)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The files whose every byte is read to check them."""
    found: list[str] = []
    fingerprint = manifest.fingerprint

    def noted(file: Path):
        found.append(str(file))
        return fingerprint(file)

    monkeypatch.setattr(manifest, "fingerprint", noted)
    return found


def files_of(checkpoint: Path) -> list[str]:
    return sorted(str(checkpoint / name) for name in manifest.read_manifest(checkpoint)["files"])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


# Checked by all


@pytest.mark.parametrize("by_name", [True, False])
def test_a_resumed_run_checks_each_file_once_and_each_process_its_share(by_name, tmp_path, read):
    runs = tmp_path / "runs"
    run_on(2, runs, 3)
    (checkpoint,) = runs.iterdir()

    def resumed() -> list[str]:
        read.clear()
        resume = str(checkpoint) if by_name else "latest"
        cfg = config(STEPS, expert_parallel=2, resume=resume, checkpoint_path=str(runs))
        trainer = ParallelSparseSAETrainer(cfg, make_sae(), tokens())
        assert trainer.resume(resume) == checkpoint
        return list(read)

    first, second = on_processes(2, resumed, tmp_path)
    assert sorted([*first, *second]) == files_of(checkpoint)
    assert 0 <= len(first) - len(second) <= 1


def test_one_process_checks_each_file_of_the_newest_checkpoint_once(tmp_path, read):
    runs = tmp_path / "runs"
    run_on(2, runs, 3)
    (checkpoint,) = runs.iterdir()
    settings = manifest.config_of(checkpoint)
    read.clear()
    assert checkpoints.latest(runs, settings) == checkpoint
    assert sorted(read) == files_of(checkpoint)
    with pytest.raises(CheckpointError, match="of another configuration: more"):
        checkpoints.latest(runs, settings | {"more": 1})


@pytest.mark.parametrize("name", ["cfg.json", "trainer.pt", "weights/*1-of*", "ranks/00001/state.pt"])
def test_a_damaged_file_is_found_whoever_reads_it(name, tmp_path):
    """All go back to the checkpoint before, and name the file if it is the only one."""
    runs = tmp_path / "runs"
    run_on(2, runs, 3)
    run_on(2, runs, 4)
    older, newer = runs / str(3 * BATCH), runs / str(4 * BATCH)
    damaged = next(newer.glob(name))
    flip_a_bit(damaged)

    def found() -> tuple[Path | None, str]:
        ranks = Ranks(1, "cpu", 60)
        with pytest.raises(CheckpointError) as error:
            first_does(ranks, lambda: checkpoints.verify(newer))
        return first_does(ranks, lambda: checkpoints.latest(runs)), str(error.value)

    message = f"checkpoint {newer} is damaged: {damaged.relative_to(newer)} is not what was written (SHA-256 differs)"
    assert on_processes(3, found, tmp_path) == [(older, message)] * 3


# Written by all or by none


def failing_once(function, rank: int = 1, error: Exception | None = None):
    """As ``function``, but that one process fails when it is first called there."""
    failures = [error or torch.OutOfMemoryError("CUDA out of memory")]

    def failing(*args, **kwargs):
        if torch.distributed.get_rank() == rank and failures:
            raise failures.pop()
        return function(*args, **kwargs)

    return failing


def without_memory_for_weights(monkeypatch) -> None:
    monkeypatch.setattr(resumable_module, "weight_parts", failing_once(resumable_module.weight_parts))


def without_memory_for_a_copy(monkeypatch) -> None:
    copying = SimpleNamespace(copy=copy.copy, deepcopy=failing_once(copy.deepcopy))
    monkeypatch.setattr(resumable_module, "copy", copying)


def without_memory_for_moments(monkeypatch) -> None:
    monkeypatch.setattr(resumable_module, "optimizer_parts", failing_once(resumable_module.optimizer_parts))


def unable_to_read_back(monkeypatch) -> None:
    failing = failing_once(parallel_checkpoints.fingerprint, error=OSError(5, "Input/output error"))
    monkeypatch.setattr(parallel_checkpoints, "fingerprint", failing)


@pytest.mark.parametrize(
    "fault",
    [without_memory_for_weights, without_memory_for_a_copy, without_memory_for_moments, unable_to_read_back],
)
def test_a_checkpoint_that_one_process_cannot_write_is_given_up_by_all(fault, tmp_path, monkeypatch, caplog):
    def run() -> tuple[int, list[str], int]:
        fault(monkeypatch)
        fields = {"checkpoint_path": str(tmp_path / "runs"), "n_checkpoints": 2, "n_batches_for_norm_estimate": 3}
        cfg = config(STEPS, expert_parallel=2, **fields)
        sae = make_sae(normalize_activations="expected_average_only_in")
        trainer = ParallelSparseSAETrainer(cfg, sae, tokens())
        trainer.fit()
        said = [m for m in caplog.messages if "could not be saved" in m and m.count("rank 1: ") == 1]
        return trainer.n_training_steps, sorted(f.name for f in (tmp_path / "runs").iterdir()), len(said)

    assert on_processes(2, run, tmp_path) == [(STEPS, ["576"], 1)] * 2


def test_an_sae_that_one_process_cannot_write_ends_the_command_on_all(tmp_path, monkeypatch, model, dataset):
    monkeypatch.setattr(runner_module, "weight_parts", failing_once(runner_module.weight_parts))
    argv = [*SWITCH, *arguments(tmp_path), "--expert-parallel", "2"]
    assert command_together(2, tmp_path, argv, model, dataset) == [1, 1]
    assert not list((tmp_path / "output").iterdir())


# The place in each process's own activations


class Own(Iterator[torch.Tensor]):
    """Batches of this process alone, that know their place."""

    def __init__(self, place=None) -> None:
        self.at, self.returned_to = 0, []
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.place = {"of": rank} if place is None else place

    def __next__(self) -> torch.Tensor:
        self.at += 1
        return tokens()[self.at * 8 : self.at * 8 + 8]

    def state_dict(self) -> dict:
        return {"at": self.at, **self.place}

    def load_state_dict(self, state: dict) -> None:
        self.returned_to.append({name: value for name, value in state.items() if name != "at"})
        self.at = state["at"]


def written_by_two(folder: Path, place=None) -> None:
    def run() -> None:
        trainer = DataParallelSAETrainer(config(STEPS), make_sae("sparse_topk"), Own(place))
        for _ in range(3):
            trainer.step(next(trainer.data_provider))
            trainer.n_training_steps += 1
        trainer.save_checkpoint("saved", folder)

    on_processes(2, run, folder.parent)


def resumed_on(n: int, folder: Path) -> list[tuple[list[dict], int]]:
    """Where the activations of each process returned to by name, and how many batches on they are."""

    def run() -> tuple[list[dict], int]:
        trainer = DataParallelSAETrainer(config(STEPS), make_sae("sparse_topk"), own := Own())
        trainer.resume(folder / "saved")
        return own.returned_to, own.at

    return on_processes(n, run, folder.parent)


def test_processes_return_to_their_own_place_and_others_to_none_of_theirs(tmp_path):
    written_by_two(tmp_path / "runs")
    assert resumed_on(2, tmp_path / "runs") == [([{"of": 0}], 3), ([{"of": 1}], 3)]
    assert resumed_on(3, tmp_path / "runs") == [([], 3)] * 3
    trainer = SparseSAETrainer(config(STEPS), make_sae("sparse_topk"), own := Own())
    trainer.resume(tmp_path / "runs" / "saved")
    assert (own.returned_to, own.at) == ([], 3)


def test_the_first_ones_place_is_not_that_of_others_in_checkpoints_of_earlier_versions_either(tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(data_parallel, "_without_place", lambda state: state)
        written_by_two(tmp_path / "runs")
    assert resumed_on(3, tmp_path / "runs") == [([], 3)] * 3
    assert resumed_on(2, tmp_path / "runs") == [([{"of": 0}], 3), ([{"of": 1}], 3)]


def test_a_place_that_all_processes_had_is_that_of_any_number(tmp_path):
    place = {"order": torch.arange(3), "epochs": [1, 2]}
    written_by_two(tmp_path / "runs", place)
    for returned_to, at in resumed_on(3, tmp_path / "runs"):
        assert at == 3
        assert [(p["order"].tolist(), p["epochs"]) for p in returned_to] == [([0, 1, 2], [1, 2])]
