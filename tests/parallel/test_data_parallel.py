"""Processes that divide the data, with all experts or some of them, train what one process trains."""

import pytest
import torch
from helpers import D, F, activations
from helpers.parallel_runs import BATCH, alone, assert_same_run, config, result, shared_bits, together, tokens
from helpers.processes import on_processes
from helpers.resumed import make_sae
from helpers.saelens_pairs import KINDS, both, options_of
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from torch import Tensor

from sae_lens_switch import SparseSAETrainer
from sae_lens_switch.parallel import DataParallelSAETrainer, ParallelSparseSAETrainer
from sae_lens_switch.parallel.batch_of_all import over_batch_of_all
from sae_lens_switch.parallel.ranks import Ranks

OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])


def make_stock(kind, **fields):
    return kind.stock(kind.stock_config(**options_of(kind, **{"dtype": "float32", **fields})))


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


def of_one(make, steps: int = 15, source=None, **fields) -> dict:
    torch.manual_seed(0)
    trainer = SparseSAETrainer(config(steps, **fields), make(), tokens() if source is None else source)
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
@pytest.mark.parametrize("fields", [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.2}], ids=str)
@pytest.mark.parametrize("n", [2, 4])
def test_a_batchtopk_sae_of_saelens_chooses_from_the_batch_of_all(kind, n, fields, tmp_path):
    def make():
        return make_stock(kind, aux_loss_coefficient=1.0)

    # A part of a step is the same of every process's share: rows are dealt out to where one process has them.
    parts = fields.get("gradient_accumulation_steps", 1)
    batches = activations(15, batch=BATCH)
    shares = [batch.view(parts, n, -1, D).transpose(0, 1).reshape(n, -1, D) for batch in batches]
    expected = of_one(make, source=iter(batches), **fields)

    def run() -> dict:
        torch.manual_seed(torch.distributed.get_rank())
        mine = iter([of_one[torch.distributed.get_rank()] for of_one in shares])
        trainer = DataParallelSAETrainer(config(15, **fields), make(), mine)
        sae = trainer.fit()
        assert type(sae.activation_fn) is BatchTopK
        assert "update_topk_threshold" not in vars(sae)
        return result(trainer, sae)

    found = on_processes(n, run, tmp_path)
    threshold = expected["buffers"]["topk_threshold"]
    assert threshold > 0
    for one in found:
        assert_same_run(one, expected, rtol=2e-3, atol=2e-3)
        assert shared_bits(one) == shared_bits(found[0])
        assert float(one["buffers"]["topk_threshold"]) == pytest.approx(float(threshold), rel=1e-3)
    assert any(row["losses/auxiliary_reconstruction_loss"] > 0 for row in expected["rows"])


def test_processes_with_other_numbers_of_tokens_have_as_many_parts(tmp_path):
    """Of 4 and 5 tokens ``chunk`` makes 4 parts and 3, of which all processes must take part in each."""

    def run() -> dict:
        mine = [batch[: 4 + torch.distributed.get_rank()] for batch in activations(3)]
        trainer = DataParallelSAETrainer(config(3, gradient_accumulation_steps=4), make_stock(KINDS[0]), iter(mine))
        for batch in mine:
            trainer.step(batch)
        weights = {name: t.detach().clone() for name, t in trainer.sae.state_dict().items()}
        return {"weights": weights, "buffers": {}, "samples": trainer.n_training_samples}

    first, second = on_processes(2, run, tmp_path, timeout=30)
    assert first["samples"] == second["samples"] == 3 * 9
    assert shared_bits(first) == shared_bits(second)


def chosen_of_all(sae, batch, folder) -> Tensor:
    """The latents of a batch of which two processes have a half each."""

    def run() -> Tensor:
        with over_batch_of_all(sae, Ranks(1, "cpu", 60)):
            return sae.encode(batch.chunk(2)[torch.distributed.get_rank()])

    return torch.cat(on_processes(2, run, folder))


def test_all_chosen_latents_may_be_of_one_process_s_tokens(tmp_path):
    batch = tokens()[:BATCH].clone()
    batch[: BATCH // 2] = 0
    sae = make_stock(KINDS[0], k=8.3)
    acts = chosen_of_all(sae, batch, tmp_path)
    assert torch.equal(acts, sae.encode(batch))
    assert int((acts[BATCH // 2 :] > 0).sum()) == int(8.3 * BATCH)


def test_a_class_that_chooses_in_its_own_way_still_does():
    class Own(KINDS[0].stock):
        def update_topk_threshold(self, acts_topk):
            self.topk_threshold = acts_topk.amax().double()

    sae = Own(KINDS[0].stock_config(**options_of(KINDS[0])))
    own = sae.activation_fn
    with over_batch_of_all(sae, Ranks.__new__(Ranks)):
        assert sae.activation_fn is own
        sae.update_topk_threshold(torch.ones(1))
    assert sae.topk_threshold == 1


def test_of_many_equal_pre_activations_in_bfloat16_exactly_as_many_are_chosen(tmp_path):
    n, k = 1000, 10.3035
    sae = make_stock(KINDS[0], dtype="bfloat16", k=k)
    acts = chosen_of_all(sae, tokens()[:1].bfloat16().expand(n, D), tmp_path)
    counts = (acts > 0).sum(0).sort(descending=True).values
    assert counts[:12].tolist() == [n] * 10 + [int(k * n) - 10 * n, 0]  # 303, which bfloat16 does not have


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


@both
def test_a_sparse_batchtopk_sae_is_left_to_the_trainer_that_chooses_from_all(kind):
    with pytest.raises(ValueError, match=f"another architecture than sparse_{kind.name}, which LatentParallelSAETr"):
        DataParallelSAETrainer(config(5), make_batchtopk(kind), tokens())


@pytest.mark.parametrize("make", [lambda: make_sae("sparse_topk"), make_batchtopk], ids=["topk", "batchtopk"])
def test_an_sae_without_experts_cannot_have_them_divided(make):
    with pytest.raises(ValueError, match="sae must be of architecture switch.*DataParallelSAETrainer.*got sparse_"):
        ParallelSparseSAETrainer(config(5, expert_parallel=2), make(), tokens())
