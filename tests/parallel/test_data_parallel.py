"""Processes that divide the data, with all experts or some of them, train what one process trains."""

import pytest
import torch
from helpers import D, F, K
from helpers.parallel_runs import BATCH, alone, assert_same_run, config, result, shared_bits, together, tokens
from helpers.processes import on_processes
from helpers.resumed import make_sae
from helpers.saelens_pairs import KINDS, both, options_of
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig

from sae_lens_switch import SparseSAETrainer
from sae_lens_switch.parallel import DataParallelSAETrainer, ParallelSparseSAETrainer

OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])


def make_stock_batchtopk():
    return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K))


def make_batchtopk(kind=KINDS[0]):
    return kind.ours(kind.our_config(**options_of(kind, dtype="float32")))


@OPTIMIZERS
@pytest.mark.parametrize(("n", "expert_parallel"), [(2, 1), (4, 2)])
def test_experts_and_data_are_divided_at_once(n, expert_parallel, optimizer, tmp_path):
    sae = {"aux_loss_coefficient": 0.1}
    fields = {"optimizer": optimizer, "max_grad_norm": 0.2}
    expected = alone(15, sae, **fields)
    found = together(n, tmp_path, 15, sae, expert_parallel=expert_parallel, **fields)
    for one in found:
        assert_same_run(one, expected)
        assert shared_bits(one) == shared_bits(found[0])


def divided(n: int, folder, make, steps: int = 15, **fields) -> list[dict]:
    def run() -> dict:
        torch.manual_seed(torch.distributed.get_rank())  # the first process's weights count
        trainer = DataParallelSAETrainer(config(steps, **fields), make(), tokens())
        return result(trainer, trainer.fit())

    return on_processes(n, run, folder)


def of_one(make, steps: int = 15, **fields) -> dict:
    torch.manual_seed(0)
    trainer = SparseSAETrainer(config(steps, **fields), make(), tokens())
    return result(trainer, trainer.fit())


@OPTIMIZERS
@pytest.mark.parametrize("n", [2, 4])
def test_a_sparse_topk_sae_is_trained_as_on_one_process(n, optimizer, tmp_path):
    def make():
        return make_sae("sparse_topk", aux_loss_coefficient=1.0)

    fields = {"optimizer": optimizer, "gradient_accumulation_steps": 4 // n}
    expected = of_one(make, optimizer=optimizer)
    found = divided(n, tmp_path, make, **fields)
    for one in found:
        assert_same_run(one, expected, rtol=2e-3, atol=2e-3)
        assert shared_bits(one) == shared_bits(found[0])


def test_an_sae_of_saelens_is_trained_as_on_one_process(tmp_path):
    def make():
        return StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D, d_sae=F, l1_coefficient=0.1))

    expected = of_one(make)
    for found in divided(2, tmp_path, make):
        assert_same_run(found, expected, rtol=2e-3, atol=2e-3)


@both
@OPTIMIZERS
def test_a_batchtopk_sae_chooses_from_each_part_of_a_batch_as_one_process_does(kind, optimizer, tmp_path):
    def make():
        return make_batchtopk(kind)

    expected = of_one(make, optimizer=optimizer, gradient_accumulation_steps=2)
    found = divided(2, tmp_path, make, optimizer=optimizer)
    bits = [shared_bits(one) for one in found]
    assert bits[0] == bits[1]
    for one in (expected, *found):  # one process moves the threshold once per part, two move it once per step
        del one["buffers"]["topk_threshold"]
        for row in one["rows"]:
            del row["metrics/topk_threshold"]
    for one in found:
        assert_same_run(one, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("make", [make_stock_batchtopk, make_batchtopk], ids=["SAELens's", "sparse"])
def test_buffers_are_the_same_on_all_processes(make, tmp_path):
    def run() -> float:
        return float(DataParallelSAETrainer(config(10), make(), tokens()).fit().topk_threshold)

    first, second = on_processes(2, run, tmp_path)
    assert first == second > 0


def test_the_threshold_moves_to_the_mean_of_all_parts_and_not_in_a_skipped_step(tmp_path):
    batches = tokens().split(BATCH)
    batches[2][-1, 1] = torch.inf  # in the second process's part

    def run() -> list[float]:
        torch.manual_seed(0)
        mine = iter([batch.chunk(2)[torch.distributed.get_rank()] for batch in batches])
        trainer = DataParallelSAETrainer(config(5), make_batchtopk(), mine)
        found = []
        for _ in range(5):
            trainer.step(next(trainer.data_provider))
            trainer.n_training_steps += 1
            found.append(float(trainer.sae.topk_threshold))
        assert trainer.n_skipped_steps == 1
        return found

    first, second = on_processes(2, run, tmp_path)
    assert first == second
    assert first[2] == first[1]
    assert len(set(first)) == 4
    torch.manual_seed(0)
    sae = make_batchtopk()
    active = [sae.encode_sparse(part).values.detach() for part in batches[0].chunk(2)]
    least = sum(float(values[values > 0].min()) for values in active) / 2
    assert first[0] == pytest.approx(sae.cfg.topk_threshold_lr * least, rel=1e-5)


def test_a_run_resumes_on_two_four_and_one_process(tmp_path):
    runs = tmp_path / "runs"

    def fields(**more) -> dict:
        return {"checkpoint_path": str(runs), "resume": "latest", "optimizer": "row_sparse_adam", **more}

    def make():
        return make_sae("sparse_topk")

    expected = of_one(make, steps=12, optimizer="row_sparse_adam")

    def part(until: int) -> int:
        trainer = DataParallelSAETrainer(config(12, **fields()), make(), tokens())
        trainer.resume()
        while trainer.n_training_steps < until:
            trainer.maybe_reset_sparsity()
            trainer._step_and_log(trainer._next_batch(), trainer._progress())
        trainer.save_checkpoint(str(trainer.n_training_samples))
        return trainer.n_training_samples

    assert on_processes(2, lambda: part(4), tmp_path) == [4 * BATCH] * 2
    assert on_processes(4, lambda: part(8), tmp_path) == [8 * BATCH] * 4
    trainer = SparseSAETrainer(config(12, **fields()), make(), tokens())
    assert_same_run(result(trainer, trainer.fit()), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("switch", {}, "sae must be of another architecture than switch"),
        ("sparse_topk", {"expert_parallel": 2}, "expert_parallel must be 1"),
        ("sparse_topk", {"latent_parallel": 2}, "latent_parallel must be 1"),
        ("sparse_topk", {"cuda_graph": True}, "cuda_graph must be False"),
    ],
)
def test_what_cannot_be_divided_by_data_alone_is_refused(architecture, fields, message):
    with pytest.raises(ValueError, match=message):
        DataParallelSAETrainer(config(5, **fields), make_sae(architecture), tokens())


@pytest.mark.parametrize("make", [lambda: make_sae("sparse_topk"), make_batchtopk], ids=["topk", "batchtopk"])
def test_an_sae_without_experts_cannot_have_them_divided(make):
    with pytest.raises(ValueError, match="sae must be of architecture switch.*DataParallelSAETrainer.*got sparse_"):
        ParallelSparseSAETrainer(config(5, expert_parallel=2), make(), tokens())
