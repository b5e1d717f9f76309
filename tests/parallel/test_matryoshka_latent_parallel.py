"""A Matryoshka BatchTopK SAE whose latents are divided, wherever its levels end, trains as on one process."""

import copy
import json

import pytest
import torch
from helpers import D, F, K
from helpers.command_line import arguments
from helpers.parallel_runs import (
    BATCH,
    alone,
    assert_same_run,
    command_together,
    config,
    go_on_together,
    latents_together,
    shared_bits,
    tokens,
)
from helpers.processes import on_processes
from helpers.saelens_pairs import step_input
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from torch.testing import assert_close

from sae_lens_switch import SparseMatryoshkaBatchTopKTrainingSAE, SparseMatryoshkaBatchTopKTrainingSAEConfig
from sae_lens_switch.parallel import LatentParallelSAETrainer, consolidate
from sae_lens_switch.parallel.matryoshka_shard import MatryoshkaLatentShard
from sae_lens_switch.parallel.ranks import Ranks

LOOSE = {"rtol": 2e-3, "atol": 2e-3}
WIDTHS = [7, 19, 31, F]  # F / 2 and F / 4 are inside levels


def make_sae(**fields) -> SparseMatryoshkaBatchTopKTrainingSAE:
    torch.manual_seed(0)
    fields = {"d_in": D, "d_sae": F, "k": K, "matryoshka_widths": WIDTHS, **fields}
    return SparseMatryoshkaBatchTopKTrainingSAE(SparseMatryoshkaBatchTopKTrainingSAEConfig(**fields))


def compare(n: int, folder, steps: int, make=make_sae, **fields) -> dict:
    """One process's run, once ``n`` have been found to train the same."""
    expected = alone(steps, make=make, **{name: value for name, value in fields.items() if name != "latent_parallel"})
    for one in (found := latents_together(n, folder, steps, make=make, **fields)):
        assert_same_run(one, expected, **LOOSE)
        assert shared_bits(one) == shared_bits(found[0])
        threshold = float(expected["buffers"]["topk_threshold"])
        assert float(one["buffers"]["topk_threshold"]) == pytest.approx(threshold, rel=2e-3)
    return expected


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
@pytest.mark.parametrize("of_levels", [False, True], ids=["AuxK of all", "AuxK of levels"])
@pytest.mark.parametrize(("n", "latent_parallel"), [(2, 2), (4, 2), (2, 1)])
def test_processes_train_what_one_does_with_dead_latents(n, latent_parallel, of_levels, optimizer, tmp_path):
    def make():
        return make_sae(k=2.7, use_matryoshka_aux_loss=of_levels)

    expected = compare(n, tmp_path, 20, make, optimizer=optimizer, latent_parallel=latent_parallel)
    assert any(row["losses/auxiliary_reconstruction_loss"] > 0 for row in expected["rows"])
    assert expected["rows"][-1]["metrics/topk_threshold"] > 0
    for width in WIDTHS[:-1]:
        assert expected["rows"][0][f"losses/inner_mse_loss_{width}"] > 0


@pytest.mark.parametrize("widths", [[5], [10], [3, 20, 25], [F]], ids=str)
def test_levels_may_end_on_any_process(widths, tmp_path):
    def make():
        return make_sae(matryoshka_widths=list(widths), normalize_activations="expected_average_only_in")

    compare(4, tmp_path, 8, make, max_grad_norm=0.2, n_batches_for_norm_estimate=3)


def test_a_level_without_dead_latents_on_a_process_or_on_all(tmp_path):
    """Latents that are never active: two of the first level, all of the last; those of the second are few."""

    def make():
        sae = make_sae(use_matryoshka_aux_loss=True, matryoshka_widths=[8, 16, F])
        with torch.no_grad():
            sae.b_enc[2:4] = sae.b_enc[16:] = -20
            sae.b_enc[:2] = sae.b_enc[4:8] = 2
        return sae

    expected = compare(2, tmp_path, 8, make)
    assert all(row["losses/auxiliary_reconstruction_loss"] > 0 for row in expected["rows"][4:])


def test_codes_of_a_step_are_each_token_s(tmp_path):
    sae, batch = make_sae(), tokens()[:BATCH]

    def run() -> torch.Tensor:
        shard = MatryoshkaLatentShard.of(sae, Ranks(2, "cpu", 60))
        mine = batch.chunk(2)[torch.distributed.get_rank()]
        shard.begin(len(mine), None)
        return shard.training_forward_pass(step_input(mine)).codes.to_dense()

    assert_close(torch.cat(on_processes(2, run, tmp_path), dim=1), sae.encode(batch).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d_sae", [F, 2 * F])
def test_parts_of_each_level_are_sent_whatever_the_width(d_sae, tmp_path):
    def run() -> dict:
        sae = make_sae(d_sae=d_sae, matryoshka_widths=[7, 19, d_sae], use_matryoshka_aux_loss=True)
        trainer = LatentParallelSAETrainer(config(1000, latent_parallel=2), sae, tokens())
        trainer.step(next(trainer.data_provider))  # which logs
        before = trainer.ranks.bytes_sent.copy()
        trainer.step(next(trainer.data_provider))
        return {what: n - before[what] for what, n in trainer.ranks.bytes_sent.items()}

    for sent in on_processes(2, run, tmp_path):
        assert (
            sent["parts of the reconstruction"] == sent["the gradient of the reconstruction"] == 3 * 4 * D * BATCH // 2
        )
        assert sent["candidates"] == 4 * K * BATCH


def test_a_run_resumes_on_other_processes_and_ends_as_an_ordinary_sae(tmp_path):
    fields = {"optimizer": "row_sparse_adam", "latent_parallel": 2}
    for until in (5, 12):
        found = go_on_together(2, tmp_path / "runs", (until, 12), make_sae, LatentParallelSAETrainer, **fields)
        fields["save_final_checkpoint"] = True
    expected = alone(12, make=make_sae, optimizer="row_sparse_adam")
    for one in found:
        assert_same_run(one, expected, **LOOSE)
    final = tmp_path / "runs" / f"final_{12 * BATCH}"
    trained = TrainingSAE.load_from_disk(consolidate(final, tmp_path / "trained", for_training=True))
    used = SAE.load_from_disk(consolidate(final, tmp_path / "used"))
    assert isinstance(used, JumpReLUSAE)
    assert isinstance(trained, SparseMatryoshkaBatchTopKTrainingSAE)
    assert trained.cfg.matryoshka_widths == WIDTHS
    for name, weight in found[0]["weights"].items():
        assert torch.equal(trained.get_parameter(name), weight)
    trained.save_inference_model(tmp_path / "by SAELens")
    for name, weight in SAE.load_from_disk(tmp_path / "by SAELens").state_dict().items():
        assert torch.equal(used.get_parameter(name), weight), name


def test_a_new_sae_is_the_same_on_any_number_of_processes(tmp_path):
    cfg = make_sae(matryoshka_widths=[7, 19]).cfg  # which the whole completes

    def fresh(n: int):
        def run() -> dict:
            torch.manual_seed(7 + torch.distributed.get_rank())
            sae = MatryoshkaLatentShard.fresh(copy.deepcopy(cfg), Ranks(n, "cpu", 60)).gathered()
            assert sae.cfg.matryoshka_widths == [7, 19, F]
            return {name: p.detach() for name, p in sae.named_parameters()}

        return on_processes(n, run, tmp_path)

    (one,) = fresh(1)
    for found in (*fresh(2), *fresh(4)):
        assert all(torch.equal(t, found[name]) for name, t in one.items())


def test_the_command_divides_data_or_latents(tmp_path, model, dataset):
    argv = ["--architecture", "sparse_matryoshka_batchtopk", "--d-in", str(D), "--d-sae", str(F), "-k", str(K)]
    argv += ["--matryoshka-widths", "7", "19", str(F), *arguments(tmp_path)]
    for n, latent_parallel in ((2, 1), (2, 2)):
        given = [*argv, "--latent-parallel", str(latent_parallel)]
        assert command_together(n, tmp_path, given, model, dataset) == [0] * n
        sae = SAE.load_from_disk(tmp_path / "output")
        assert isinstance(sae, JumpReLUSAE)
        rows = [json.loads(line) for line in (tmp_path / "output" / "history.jsonl").read_text().splitlines()]
        assert all(row["losses/inner_mse_loss_7"] > 0 for row in rows)
        assert rows[-1]["metrics/topk_threshold"] == pytest.approx(float(sae.threshold[0]), rel=1e-4)
