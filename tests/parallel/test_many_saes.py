"""Many SAEs on several processes: each is trained as on one, on the activations that all have made."""

import os
import signal

import pytest
import torch
from helpers import HOOK, D, E, F, K
from helpers.processes import ended_processes, on_processes
from sae_lens import LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training import multi_sae_trainer as multi_trainer_module

from sae_lens_switch import (
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
    TrainerOptions,
    TrainingDivergedError,
)
from sae_lens_switch.common.substitution import constructing
from sae_lens_switch.parallel import RankLostError
from sae_lens_switch.parallel.many_saes import HookExchange, ParallelMultiSAETrainer, deal
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.multi_sae_trainer import MultiSAETrainer
from sae_lens_switch.training.runners import with_options

BATCH, STEPS = 64, 8


def topk(d_sae: int = F, d_in: int = D) -> SparseTopKTrainingSAEConfig:
    return SparseTopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=K)


# Who trains what


def test_the_largest_saes_are_dealt_first_to_the_process_with_least():
    saes = {"a": topk(40), "b": topk(160), "c": topk(80), "d": topk(40), "e": topk(40)}
    hooks = dict.fromkeys(saes, HOOK)
    assert deal(saes, hooks, 2) == {"b": 0, "c": 1, "a": 1, "d": 1, "e": 0}
    assert deal(saes, hooks, 5) == {"b": 0, "c": 1, "a": 2, "d": 3, "e": 4}
    assert set(deal(saes, hooks, 1).values()) == {0}


def test_of_processes_with_equal_work_one_has_the_hook_already():
    hooks = {"a": "x", "b": "y", "c": "y", "d": "x"}
    assert deal({name: topk() for name in hooks}, hooks, 2) == {"a": 0, "b": 1, "c": 1, "d": 0}


def test_fewer_saes_than_processes_are_refused():
    with pytest.raises(ValueError, match="saes must be at least as many as the processes, 3, .*; got 2"):
        deal({"a": topk(), "b": topk()}, {"a": HOOK, "b": HOOK}, 3)


# What is handed over


def test_each_process_gets_all_activations_of_its_hooks_in_one_message(tmp_path):
    """Two processes share a hook, one has two; widths and numbers of tokens differ."""
    widths, sizes = {"x": 3, "y": 5, "z": 1}, [4, 1, 2]
    hook_names, owners = {"a": "x", "b": "y", "c": "x", "d": "z", "e": "z"}, {"a": 0, "b": 0, "c": 1, "d": 2, "e": 2}
    generator = torch.Generator().manual_seed(0)
    parts = [{h: torch.randn(n, width, generator=generator) for h, width in widths.items()} for n in sizes]

    def exchanged():
        ranks = Ranks(3, "cpu", 60)
        found = HookExchange(ranks, hook_names, owners)(parts[ranks.rank], sizes)
        return found, ranks.bytes_sent["activations"]

    results = on_processes(3, exchanged, tmp_path)
    for (found, n_bytes), hooks, n, rank in zip(results, (["x", "y"], ["x"], ["z"]), sizes, range(3), strict=True):
        assert list(found) == hooks
        for hook, t in found.items():
            assert torch.equal(t, torch.cat([part[hook] for part in parts]))
        elsewhere = sum(
            widths[h] for other, of_it in enumerate((["x", "y"], ["x"], ["z"])) for h in of_it if other != rank
        )
        assert n_bytes == 4 * n * elsewhere


# Training


def make_saes() -> dict:
    """Of three architectures and two hooks; activations are scaled for one, which trains on its own."""
    saes = {}
    for name, seed, normalize in (("switch", 0, "expected_average_only_in"), ("topk", 1, "none"), ("wide", 2, "none")):
        torch.manual_seed(seed)
        fields = {"d_in": D, "d_sae": F if name != "wide" else 2 * F, "k": K, "normalize_activations": normalize}
        if name == "switch":
            saes[name] = SwitchTrainingSAE(SwitchTrainingSAEConfig(n_experts=E, **fields))
        else:
            saes[name] = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**fields))
    return saes


HOOKS = {"switch": "x", "topk": "y", "wide": "x"}


def batches(n: int = 20) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{hook: torch.randn(BATCH, D, generator=generator) for hook in ("x", "y")} for _ in range(n)]


def config(folder, steps: int = STEPS, **fields) -> SAETrainerConfig:
    fields = {
        "n_checkpoints": 0,
        "checkpoint_path": str(folder),
        "save_final_checkpoint": False,
        "device": "cpu",
        "autocast": False,
        "lr": 3e-3,
        "lr_end": None,
        "lr_scheduler_name": "constant",
        "lr_warm_up_steps": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "lr_decay_steps": 0,
        "n_restart_cycles": 1,
        "dead_feature_window": 3,
        "feature_sampling_window": 5,
        "logger": LoggingConfig(log_to_wandb=False),
        "n_batches_for_norm_estimate": 3,
        **fields,
    }
    return SAETrainerConfig(total_training_samples=steps * BATCH, train_batch_size_samples=BATCH, **fields)


def trained(trainer: MultiSAETrainer) -> dict:
    saes = trainer.fit()
    return {
        name: {
            "weights": {n: p.detach().clone() for n, p in sae.named_parameters()},
            "rows": trainer.own_trainers()[name].history.rows,
            "density": trainer.own_trainers()[name].feature_sparsity,
        }
        for name, sae in saes.items()
    }


def alone(cfg: SAETrainerConfig, options: TrainerOptions, skipped: int = 0) -> dict:
    with constructing(multi_trainer_module, "SAETrainer", with_options(options)):
        trainer = MultiSAETrainer(cfg, make_saes(), HOOKS, iter(batches()[skipped:]))
    return trained(trainer)


def parallel(cfg: SAETrainerConfig, options: TrainerOptions, skipped: int = 0) -> ParallelMultiSAETrainer:
    """This process's; of every batch it has a part, of another length than the others'."""
    saes = make_saes()
    ranks = Ranks(torch.distributed.get_world_size(), "cpu", 60)
    owners = deal({name: sae.cfg for name, sae in saes.items()}, HOOKS, ranks.size)
    ends = [0, *(BATCH * (r + 1) // ranks.size - 5 for r in range(ranks.size - 1)), BATCH]
    mine = slice(ends[ranks.rank], ends[ranks.rank + 1])
    source = iter([{hook: t[mine] for hook, t in batch.items()} for batch in batches()[skipped:]])
    own = {name: sae for name, sae in saes.items() if owners[name] == ranks.rank}
    with constructing(multi_trainer_module, "SAETrainer", with_options(options)):
        return ParallelMultiSAETrainer(cfg, own, HOOKS, source, ranks=ranks, owners=owners)


def assert_same(together: list[dict], single: dict) -> None:
    merged = {name: result for results in together for name, result in results.items()}
    assert sum(map(len, together)) == len(merged)
    assert merged.keys() == single.keys()
    for name, result in merged.items():
        for p, t in result["weights"].items():
            assert torch.equal(t, single[name]["weights"][p]), (name, p)
        assert torch.equal(result["density"], single[name]["density"])
        losses = [[row["losses/overall_loss"] for row in r["rows"]] for r in (result, single[name])]
        assert losses[0] == losses[1]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_each_sae_is_trained_to_the_bit_as_on_one_process(n, tmp_path):
    """Only one process estimates a scale, from batches that all draw."""
    single = alone(config(tmp_path), TrainerOptions())
    together = on_processes(n, lambda: trained(parallel(config(tmp_path), TrainerOptions())), tmp_path)
    assert_same(together, single)


@pytest.mark.parametrize("then", [1, 2, 3])
def test_a_checkpoint_of_two_processes_continues_to_the_bit_on_any_number(then, tmp_path):
    single = alone(config(tmp_path / "alone"), TrainerOptions())
    cfg = config(tmp_path / "run", n_checkpoints=1)
    options = TrainerOptions(keep_checkpoints=1)
    on_processes(2, lambda: trained(parallel(cfg, options)), tmp_path)
    (checkpoint,) = (tmp_path / "run").iterdir()
    checkpoints.verify(checkpoint)
    done = int(checkpoint.name) // BATCH

    def resumed() -> dict:
        trainer = parallel(cfg, options, 3 + done)
        trainer.load_checkpoint(checkpoint)
        return trained(trainer)

    assert_same(on_processes(then, resumed, tmp_path), single)


def test_a_checkpoint_of_other_settings_is_refused_on_all_processes(tmp_path):
    on_processes(2, lambda: trained(parallel(config(tmp_path / "run", n_checkpoints=1), TrainerOptions())), tmp_path)
    (checkpoint,) = (tmp_path / "run").iterdir()

    def resumed() -> str:
        trainer = parallel(config(tmp_path / "run", lr=1e-4), TrainerOptions(), 3)
        with pytest.raises(checkpoints.CheckpointError) as caught:
            trainer.load_checkpoint(checkpoint)
        return str(caught.value)

    first, second = on_processes(2, resumed, tmp_path)
    assert first == second
    assert "lr was 0.003, is 0.0001" in first


def test_activations_that_end_on_one_process_end_training_on_all(tmp_path):
    def run() -> int:
        trainer = parallel(config(tmp_path), TrainerOptions())
        if trainer.ranks.rank == 1:
            source = trainer.data_provider
            trainer.data_provider = iter([next(source) for _ in range(3 + 4)])
        with pytest.raises(StopIteration):
            trainer.fit()
        return trainer.n_training_samples

    assert on_processes(2, run, tmp_path) == [4 * BATCH] * 2


def test_an_sae_that_diverges_on_one_process_stops_the_others(tmp_path):
    def run() -> str:
        trainer = parallel(config(tmp_path / "run"), TrainerOptions(max_skipped_steps=2))
        name = min(trainer.own_trainers())
        if trainer.ranks.rank == 1:
            trainer.own_trainers()[name].sae.W_dec.data.fill_(torch.nan)
        with pytest.raises((TrainingDivergedError, RankLostError)) as error:
            trainer.fit()
        return f"{type(error.value).__name__}: {error.value}"

    first, second = on_processes(2, run, tmp_path)
    assert first.startswith("RankLostError: rank 0 of 2 has lost another one")
    assert second.startswith("TrainingDivergedError: ")
    assert not (tmp_path / "run").exists()


def test_a_process_that_dies_stops_the_others(tmp_path):
    def run() -> None:
        trainer = parallel(config(tmp_path), TrainerOptions())
        if trainer.ranks.rank == 1:
            one, *_ = trainer.own_trainers().values()
            one.step = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment]
        with pytest.raises(RankLostError, match="rank 0 of 2 has lost another one"):
            trainer.fit()

    first, second = ended_processes(2, run, tmp_path, timeout=20)
    assert first == [None]
    assert second is None
