"""What processes tell each other, where each computes, and whose errors are whose."""

import os
from types import SimpleNamespace

import pytest
import torch
from helpers import D, F, K, randomize, training_sae
from helpers.parallel_runs import config, tokens
from helpers.processes import on_processes
from helpers.resumed import make_sae
from sae_lens_switch_kernels import RowGrads
from torch import nn

from sae_lens_switch import (
    SparseMatryoshkaBatchTopKTrainingSAE,
    SparseMatryoshkaBatchTopKTrainingSAEConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
)
from sae_lens_switch.parallel import (
    DataParallelSAETrainer,
    LatentParallelSAETrainer,
    ParallelSparseSAETrainer,
    RankLostError,
    ranked_trainer,
)
from sae_lens_switch.parallel import ranks as ranks_module
from sae_lens_switch.parallel.expert_shard import ExpertShard
from sae_lens_switch.parallel.latent_shard import LatentShard
from sae_lens_switch.parallel.matryoshka_shard import MatryoshkaLatentShard
from sae_lens_switch.parallel.ranks import Ranks, start_process_group
from sae_lens_switch.parallel.reduction import sum_gradients_over_data_
from sae_lens_switch.parallel.shard import LATENT_DIM


def topk(seed: int = 0) -> SparseTopKTrainingSAE:
    torch.manual_seed(seed)
    return SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K))


def switch(seed: int = 0):
    """Only the first has yet to be initialised from a batch."""
    sae = training_sae(seed, dtype="float32")
    sae.is_fresh = seed == 0
    return sae


def matryoshka() -> SparseMatryoshkaBatchTopKTrainingSAE:
    cfg = SparseMatryoshkaBatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, matryoshka_widths=[7, 19, F])
    return randomize(SparseMatryoshkaBatchTopKTrainingSAE(cfg))


# Messages


@pytest.mark.parametrize("n", [1, 3])
def test_everybodys_tensors_are_gathered_whatever_their_layout(n, tmp_path):
    def made(rank: int) -> list[torch.Tensor]:
        t = torch.arange(6.0).view(2, 3) + rank
        return [t, t.T, t[0, 0], t > 2 + rank, t.double(), t.long()[:, :0], t.bfloat16()]

    def gathered() -> list[torch.Tensor]:
        ranks = Ranks(1, "cpu", 60)
        return [ranks.gather(t, "numbers") for t in made(ranks.rank)]

    for found in on_processes(n, gathered, tmp_path):
        for t, *parts in zip(found, *map(made, range(n)), strict=True):
            assert torch.equal(t, torch.stack(parts))
            assert t.dtype == parts[0].dtype


def test_rows_of_gradients_are_counted_in_one_message(tmp_path):
    def summed():
        ranks, asked = Ranks(1, "cpu", 60), []
        n, gather = ranks.rank + 1, ranks.gather_objects
        ranks.gather_objects = lambda value: (asked.append(value), gather(value))[1]
        rows = RowGrads(True, torch.arange(n), torch.ones(n, D), torch.ones(n, D), torch.ones(n))
        sum_gradients_over_data_([], rows, ranks, nn.Parameter(torch.zeros(F, D)))
        return asked, rows.rows_R.tolist(), rows.d_bias_R.tolist()

    assert on_processes(3, summed, tmp_path) == [([n], [0, 1, 2], [3, 2, 1]) for n in (1, 2, 3)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), NotImplementedError("not here")])
def test_an_error_of_this_process_is_not_taken_for_a_lost_one(error, tmp_path):
    def run() -> float:
        ranks = Ranks(1, "cpu", 60)
        with pytest.raises(type(error)), ranks.heard("tokens", 5):
            raise error
        with pytest.raises(RankLostError, match="during tokens.*closed by peer"), ranks.heard("tokens", 5):
            raise RuntimeError("Connection closed by peer")
        return ranks.bytes_sent["tokens"]

    assert on_processes(1, run, tmp_path) == [10]


# Weights of all


@pytest.mark.parametrize(
    ("trainer_class", "field", "make"),
    [
        (ParallelSparseSAETrainer, "expert_parallel", switch),
        (LatentParallelSAETrainer, "latent_parallel", topk),
    ],
    ids=["experts", "latents"],
)
def test_processes_with_the_same_latents_begin_and_end_with_the_same_weights(trainer_class, field, make, tmp_path):
    """Of four processes whose SAEs differ, those of the first row count."""

    def run() -> dict[str, torch.Tensor]:
        rank = torch.distributed.get_rank()
        trainer = trainer_class(config(4, **{field: 2}), make(rank), tokens())
        shard, counted = trainer.sae, make(rank % 2)
        for name in LATENT_DIM.keys() & dict(shard.named_parameters()).keys():
            assert torch.equal(shard.get_parameter(name), shard.part(name, counted.get_parameter(name))), name
        assert shard.is_fresh == make(0).is_fresh
        trainer.fit()
        return {name: p.detach().clone() for name, p in shard.named_parameters()}

    found = on_processes(4, run, tmp_path)
    for first, other in ((0, 2), (1, 3)):
        for name, p in found[first].items():
            assert torch.equal(p, found[other][name]), name


# Devices


@pytest.mark.parametrize(
    ("shard_class", "make"),
    [(ExpertShard, lambda: switch(1)), (LatentShard, topk), (MatryoshkaLatentShard, matryoshka)],
    ids=["experts", "latents", "levels"],
)
def test_a_part_and_the_whole_are_made_where_the_process_computes(shard_class, make, tmp_path):
    """The meta device stands in for a GPU."""

    def run() -> list[str]:
        ranks = Ranks(1, "cpu", 60)
        ranks.device = torch.device("meta")
        shard = shard_class.of(make(), ranks)
        whole = shard.gathered()
        return [t.device.type for t in (*shard.parameters(), *whole.parameters())] + [shard.cfg.device]

    (found,) = on_processes(1, run, tmp_path)
    assert set(found) == {"meta"}


def test_levels_are_where_the_weights_have_been_moved(tmp_path):
    def loss_of(sae) -> float:
        trainer = LatentParallelSAETrainer(config(1, latent_parallel=1), sae, tokens())
        return float(trainer.step(next(trainer.data_provider)).loss)

    def run() -> tuple[float, float]:
        ranks = Ranks(1, "cpu", 60, "latent_parallel")
        ranks.device = torch.device("meta")
        cfg = matryoshka().cfg
        cfg.device = "meta"
        shard = MatryoshkaLatentShard(cfg, ranks)
        ranks.device = torch.device("cpu")
        shard.to_empty(device="cpu").to("cpu")
        shard.load_state_dict(matryoshka().state_dict())
        return loss_of(shard), loss_of(matryoshka())

    ((moved, expected),) = on_processes(1, run, tmp_path)
    assert moved == expected


def test_cuda_is_the_gpu_of_this_process(tmp_path, monkeypatch):
    def run() -> list[str]:
        os.environ["LOCAL_RANK"] = "3"
        chosen = []
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(ranks_module, "DeviceMesh", SimpleNamespace(from_group=lambda *_, **__: None))
        for device in ("cuda", torch.device("cuda"), "cuda:1"):
            assert not start_process_group(device, 60)
            chosen.append(Ranks(1, device, 60).device)
        return [str(device) for device in chosen]

    assert on_processes(1, run, tmp_path) == [["cuda:3"] * 4 + ["cuda:1"] * 2]


@pytest.mark.parametrize(
    ("trainer_class", "architecture"),
    [
        (ParallelSparseSAETrainer, "switch"),
        (LatentParallelSAETrainer, "sparse_topk"),
        (DataParallelSAETrainer, "standard"),
    ],
)
def test_a_trainer_computes_on_the_device_of_its_process(trainer_class, architecture, tmp_path, monkeypatch):
    """That is a CPU here, which stands in for a GPU; the config asks for ``cuda``."""

    def run() -> tuple[str, str, int]:
        os.environ["LOCAL_RANK"] = "2"
        chosen = []
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
        monkeypatch.setattr(ranked_trainer, "Ranks", lambda row, _, *rest: Ranks(row, "cpu", *rest))
        trainer = trainer_class(config(2, device="cuda"), make_sae(architecture), tokens())
        trainer.fit()
        assert chosen == ["cuda:2"]
        return trainer.cfg.device, trainer.sae.cfg.device, trainer.n_training_steps

    assert on_processes(1, run, tmp_path) == [("cpu", "cpu", 2)]
