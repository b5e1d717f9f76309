"""A BatchTopK SAE whose latents are divided chooses over the whole batch of all processes, as one process does."""

import pytest
import torch
from helpers import D, F, K, activations
from helpers.parallel_runs import BATCH, alone, assert_same_run, config, latents_together, result, shared_bits, tokens
from helpers.processes import on_processes
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE

from sae_lens_switch import SparseBatchTopKTrainingSAE, SparseBatchTopKTrainingSAEConfig
from sae_lens_switch.parallel import LatentParallelSAETrainer, consolidate

OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
LOOSE = {"rtol": 2e-3, "atol": 2e-3}


def make_sae(first: int = 0, end: int = F, **fields) -> SparseBatchTopKTrainingSAE:
    """Of which only the latents from ``first`` to ``end`` are ever active."""
    torch.manual_seed(0)
    sae = SparseBatchTopKTrainingSAE(SparseBatchTopKTrainingSAEConfig(**{"d_in": D, "d_sae": F, "k": K, **fields}))
    with torch.no_grad():
        sae.b_enc[:first] = sae.b_enc[end:] = -20
    return sae


def compare(n: int, folder, steps: int, make=make_sae, **fields) -> dict:
    """One process's run, once ``n`` have been found to train the same."""
    expected = alone(steps, make=make, **{name: value for name, value in fields.items() if name != "latent_parallel"})
    found = latents_together(n, folder, steps, make=make, **fields)
    for one in found:
        assert_same_run(one, expected, **LOOSE)
        assert shared_bits(one) == shared_bits(found[0])
        threshold = float(expected["buffers"]["topk_threshold"])
        assert float(one["buffers"]["topk_threshold"]) == pytest.approx(threshold, rel=2e-3)
    return expected


@OPTIMIZERS
def test_two_processes_train_what_one_does_with_dead_latents_and_a_threshold(optimizer, tmp_path):
    expected = compare(2, tmp_path, 20, lambda: make_sae(k=2.7), optimizer=optimizer)
    assert any(row["losses/auxiliary_reconstruction_loss"] > 0 for row in expected["rows"])
    assert expected["rows"][-1]["metrics/topk_threshold"] > 0


@OPTIMIZERS
@pytest.mark.parametrize(("n", "latent_parallel"), [(4, 2), (2, 1)])
def test_processes_that_divide_the_data_choose_from_one_batch(n, latent_parallel, optimizer, tmp_path):
    compare(n, tmp_path, 15, optimizer=optimizer, latent_parallel=latent_parallel, max_grad_norm=0.2)


@pytest.mark.parametrize(("first", "end"), [(0, F // 2), (F // 2, F)], ids=["the first's", "the second's"])
@pytest.mark.parametrize("k", [K, 25])
def test_all_chosen_latents_may_be_one_process_s(first, end, k, tmp_path):
    compare(2, tmp_path, 6, lambda: make_sae(first, end, k=k, aux_loss_coefficient=0.0))


def test_shares_of_unequal_size_are_one_batch(tmp_path):
    parts = [[b[:20] for b in activations(5, batch=BATCH)], [b[20:] for b in activations(5, batch=BATCH)]]
    expected = alone(5, make=make_sae, source=iter(activations(5, batch=BATCH)))
    for found in latents_together(2, tmp_path, 5, make=make_sae, source=lambda: iter(parts[dist_rank()])):
        assert_same_run(found, expected, **LOOSE)


def dist_rank() -> int:
    return torch.distributed.get_rank()


def test_candidates_of_all_go_to_all(tmp_path):
    def run() -> dict:
        trainer = LatentParallelSAETrainer(config(1000, latent_parallel=2), make_sae(), tokens())
        trainer.step(next(trainer.data_provider))  # which logs
        before = trainer.ranks.bytes_sent.copy()
        trainer.step(next(trainer.data_provider))
        sent = trainer.ranks.bytes_sent
        return {what: sent[what] - before[what] for what in sent if sent[what] > before[what]}

    for sent in on_processes(2, run, tmp_path):
        assert sent == {
            "tokens": 4 * D * BATCH // 2,
            "candidates": 4 * K * BATCH,
            "parts of the reconstruction": 4 * D * BATCH // 2,
            "the gradient of the reconstruction": 4 * D * BATCH // 2,
            "the least active latent": 4,
            "gradients of b_dec and losses": 4 * (D + 2),
            "the norm of the gradients": 4,
        }


@pytest.mark.parametrize("sae", [{}, {"normalize_activations": "expected_average_only_in"}])
def test_a_run_resumes_on_other_processes_and_ends_as_an_ordinary_sae(sae, tmp_path):
    fields = {"checkpoint_path": str(tmp_path / "runs"), "resume": "latest", "n_batches_for_norm_estimate": 3}
    expected = alone(12, make=lambda: make_sae(**sae), n_batches_for_norm_estimate=3)

    def part(n: int, until: int) -> list[dict]:
        def run() -> dict:
            more = {"save_final_checkpoint": until == 12, "latent_parallel": n}
            trainer = LatentParallelSAETrainer(config(12, **fields, **more), make_sae(**sae), tokens())
            if until == 12:
                whole = trainer.fit().gathered()
                return result(trainer, whole) | {"threshold": float(whole.topk_threshold)}
            trainer.resume()
            trainer._estimate_normalization()
            while trainer.n_training_steps < until:
                trainer.maybe_reset_sparsity()
                trainer._step_and_log(trainer._next_batch(), trainer._progress())
            trainer.save_checkpoint(str(trainer.n_training_samples))
            return {}

        return on_processes(n, run, tmp_path)

    part(2, 4)
    part(1, 8)
    found = part(2, 12)
    for one in found:
        assert_same_run(one, expected, **LOOSE)
    final = tmp_path / "runs" / f"final_{12 * BATCH}"
    used = SAE.load_from_disk(consolidate(final, tmp_path / "used"))
    trained = TrainingSAE.load_from_disk(consolidate(final, tmp_path / "trained", for_training=True))
    assert isinstance(used, JumpReLUSAE)
    assert isinstance(trained, SparseBatchTopKTrainingSAE)
    assert float(trained.topk_threshold) == pytest.approx(found[0]["threshold"], rel=1e-6)  # a file's are float32
    torch.testing.assert_close(used.threshold, torch.full_like(used.threshold, found[0]["threshold"]))
    for name, weight in found[0]["weights"].items():
        assert torch.equal(trained.get_parameter(name), weight)
    trained.save_inference_model(tmp_path / "by SAELens")
    expected_use = SAE.load_from_disk(tmp_path / "by SAELens")
    assert used.cfg.to_dict() == expected_use.cfg.to_dict()
    for name, weight in expected_use.state_dict().items():
        assert torch.equal(used.get_parameter(name), weight), name
