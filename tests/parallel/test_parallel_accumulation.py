"""Gradient accumulation with the dictionary divided over processes: parts of a batch, each of all processes."""

from collections.abc import Iterator
from itertools import cycle

import pytest
import torch
from helpers import E, F
from helpers.parallel_runs import BATCH, alone, assert_same_run, config, latents_together, shared_bits, together, tokens
from helpers.processes import on_processes
from helpers.resumed import make_sae

from sae_lens_switch.parallel import ParallelSparseSAETrainer
from sae_lens_switch.parallel.exchange import RoutedBatch

PARTS = 4


def in_the_order_of_parts(n: int) -> Iterator[torch.Tensor]:
    """Batches as a single process must read them, so that its parts are those of ``n`` processes together."""
    for batch in cycle(tokens().split(BATCH)):
        shares = [mine.tensor_split(PARTS) for mine in batch.tensor_split(n)]
        yield torch.cat([parts[i] for i in range(PARTS) for parts in shares])


def share() -> Iterator[torch.Tensor]:
    """This process's of the same batches."""
    rank, n = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return (batch.tensor_split(n)[rank] for batch in cycle(tokens().split(BATCH)))


def compare(n: int, folder, steps: int, sae: dict, *, over=together, make=None, **fields) -> None:
    fields |= {"gradient_accumulation_steps": PARTS}
    of_one = {name: value for name, value in fields.items() if not name.endswith("_parallel")}
    expected = alone(steps, sae, make=make, source=in_the_order_of_parts(n), **of_one)
    all_of_them = over(n, folder, steps, sae, make=make, source=share, **fields)
    for found in all_of_them:
        assert_same_run(found, expected)
        assert shared_bits(found) == shared_bits(all_of_them[0])


OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])


@OPTIMIZERS
@pytest.mark.parametrize(
    "sae",
    [
        {"aux_loss_coefficient": 0.1, "aux_k": 4},
        {"load_balance_scale": "d_in", "tie_router_bias": True},
        {"matryoshka_widths": [2, 5, F // E]},
        {"n_active_experts": 2, "aux_loss_coefficient": 0.1, "aux_k": 4},
        {"load_balancing": "bias", "n_active_experts": 2},
        {"router_z_loss_coefficient": 0.3},
    ],
    ids=str,
)
def test_experts_train_in_parts_as_on_one_process(sae, optimizer, tmp_path):
    compare(2, tmp_path, 12, sae, optimizer=optimizer, max_grad_norm=0.05)


@OPTIMIZERS
@pytest.mark.parametrize("architecture", ["sparse_topk", "sparse_batchtopk"])
def test_latents_train_in_parts_as_on_one_process(architecture, optimizer, tmp_path):
    make = lambda: make_sae(architecture, aux_loss_coefficient=0.3)  # noqa: E731
    compare(2, tmp_path, 12, {}, make=make, over=latents_together, optimizer=optimizer, max_grad_norm=0.05)


@pytest.mark.parametrize("n_active", [1, 2])
def test_rows_of_processes_divide_each_part(n_active, tmp_path):
    compare(4, tmp_path, 8, {"n_active_experts": n_active}, expert_parallel=2)


@pytest.mark.parametrize("n_active", [1, 2])
def test_each_part_counts_by_the_tokens_of_all_processes(n_active, tmp_path):
    """Of processes with different numbers of tokens; without a load balance nothing depends on the parts."""
    start = {"bias_start": "zeros", "router_start_std": None}  # not from the first part
    sae = {"n_active_experts": n_active, "load_balance_coefficient": 0.0, **start}

    def uneven() -> Iterator[torch.Tensor]:
        rank = torch.distributed.get_rank()
        return (batch[21:] if rank else batch[:21] for batch in cycle(tokens().split(BATCH)))

    expected = alone(12, sae, source=cycle(tokens().split(BATCH)))
    for found in together(2, tmp_path, 12, sae, source=uneven, gradient_accumulation_steps=PARTS):
        for rows in (found["rows"], expected["rows"]):
            for row in rows:
                row.pop("routing/load_balance", None)
        assert_same_run(found, expected)


def idle(n_idle: int):
    """Experts without tokens, so that a process has parts without any."""
    sae = make_sae()
    with torch.no_grad():
        sae.W_router[:, E - n_idle :] = -10 * tokens().mean(dim=0).unsqueeze(1)
    return sae


@pytest.mark.parametrize("n_idle", [2, 3])
def test_a_process_without_tokens_takes_part_in_every_part(n_idle, tmp_path):
    compare(2, tmp_path, 8, {}, make=lambda: idle(n_idle))


def test_a_batch_smaller_than_the_parts_has_as_many_parts_on_every_process(tmp_path):
    """Of the last batch the first process has one token and the second two."""
    last = tokens()[: BATCH + 3]

    def run() -> tuple[int, int, float]:
        cfg = config(2, expert_parallel=2, gradient_accumulation_steps=PARTS)
        mine = last[: BATCH // 2], last[BATCH : BATCH + 1]
        if torch.distributed.get_rank() == 1:
            mine = last[BATCH // 2 : BATCH], last[BATCH + 1 :]
        trainer = ParallelSparseSAETrainer(cfg, make_sae(), iter(mine))
        for batch in mine:
            output = trainer.step(batch)
        return trainer.n_training_samples, len(output.sae_in), float(output.loss)

    (seen, first, loss), (seen_too, second, same_loss) = on_processes(2, run, tmp_path)
    assert seen == seen_too == BATCH + 3
    assert first + second == 3  # one part, whose tokens went to their experts
    assert loss == same_loss


def test_the_facts_of_a_batch_are_those_of_its_parts_together():
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(30, 5, generator=generator, dtype=torch.float64) + 2
    sizes = [4, 9, 17]
    parts, loads = [], torch.tensor([[0.25, 0.75], [1.0, 0.0], [5 / 17, 12 / 17]], dtype=torch.float64)
    for x_BD, load_E in zip(batch.split(sizes), loads, strict=True):
        mean_D = x_BD.mean(dim=0)
        variance = (x_BD - mean_D).square().sum(dim=1).mean()
        counts = (len(x_BD) * load_E).round().long().tolist()
        parts.append(RoutedBatch(x_BD, len(x_BD), load_E, mean_D, variance, counts, counts[::-1]))
    whole = RoutedBatch.of_parts(parts)
    assert torch.equal(whole.x_BD, batch)
    assert whole.n_tokens == 30
    torch.testing.assert_close(whole.mean_D, batch.mean(dim=0))
    torch.testing.assert_close(whole.variance, (batch - batch.mean(dim=0)).square().sum(dim=1).mean())
    torch.testing.assert_close(whole.load_E, torch.tensor([15, 15], dtype=torch.float64) / 30)
    assert (whole.sent, whole.received) == ([15, 15], [15, 15])
