"""Training with the latents of a TopK SAE divided over processes gives what one process gives on the same batches."""

import pytest
import torch
from helpers import D, F, K, activations
from helpers.parallel_runs import BATCH, alone, assert_same_run, config, latents_together, shared_bits, tokens
from helpers.processes import on_processes
from helpers.resumed import make_sae

from sae_lens_switch import SparseSAETrainer, SparseTopKTrainingSAE
from sae_lens_switch.parallel import LatentParallelSAETrainer
from sae_lens_switch.planning.hardware import HARDWARE
from sae_lens_switch.planning.latent_plan import LatentPlan

OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
# TopK chooses among nearly equal latents, so that rounding grows.
LOOSE = {"rtol": 2e-3, "atol": 2e-3}


def topk(**fields):
    return lambda: make_sae("sparse_topk", **fields)


def compare(n: int, folder, steps: int, make, loose=LOOSE, **fields) -> dict:
    """One process's run, once ``n`` have been found to train the same."""
    alone_fields = {name: value for name, value in fields.items() if name != "latent_parallel"}
    expected = alone(steps, make=make, **alone_fields)
    found = latents_together(n, folder, steps, make=make, **fields)
    for one in found:
        assert_same_run(one, expected, **loose)
        assert shared_bits(one) == shared_bits(found[0])
    return expected


@OPTIMIZERS
@pytest.mark.parametrize("steps", [1, 30])
def test_two_processes_train_what_one_does_with_dead_latents(steps, optimizer, tmp_path):
    expected = compare(2, tmp_path, steps, topk(), optimizer=optimizer)
    if steps > 1:
        assert any(row["losses/auxiliary_reconstruction_loss"] > 0 for row in expected["rows"])


@OPTIMIZERS
def test_four_processes_divide_latents_and_data_at_once_and_clip(optimizer, tmp_path):
    compare(4, tmp_path, 15, topk(), optimizer=optimizer, latent_parallel=2, max_grad_norm=0.2)


@pytest.mark.slow
@OPTIMIZERS
def test_four_processes_divide_latents_alone(optimizer, tmp_path):
    compare(4, tmp_path, 30, topk(), optimizer=optimizer, max_grad_norm=0.2)


@pytest.mark.parametrize(
    "sae",
    [
        {"d_sae": 42, "rescale_acts_by_decoder_norm": False},  # 21 latents each
        {"k": 25},  # more than a process has
        {"normalize_activations": "expected_average_only_in", "apply_b_dec_to_input": True},
        {"normalize_activations": "layer_norm", "aux_loss_coefficient": 0.0},
        {"normalize_activations": "covariance_whitening", "decoder_init_norm": None},
        {"dtype": "float64", "k": 1},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_option_of_the_sae_trains_as_on_one_process(sae, tmp_path):
    compare(2, tmp_path, 10, topk(**sae), n_batches_for_norm_estimate=3)


def test_weights_in_bfloat16_have_masters_on_each_process(tmp_path):
    compare(2, tmp_path, 4, topk(dtype="bfloat16"), loose={"rtol": 3e-2, "atol": 3e-2})


def test_candidates_in_low_precision_give_nearly_the_same_losses(tmp_path):
    expected = alone(5, make=topk())
    for found in latents_together(2, tmp_path, 5, make=topk(encoder_precision="bfloat16")):
        errors = [[row["losses/mse_loss"] for row in one["rows"]] for one in (found, expected)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


def one_sided(first: int, end: int, **fields) -> SparseTopKTrainingSAE:
    """Only the latents from ``first`` to ``end`` are ever among the k best."""
    sae = make_sae("sparse_topk", **fields)
    with torch.no_grad():
        sae.b_enc.fill_(-20.0)
        sae.b_enc[first:end] = 20.0
    return sae


@OPTIMIZERS
@pytest.mark.parametrize(("first", "end"), [(0, F // 2), (F // 2, F)], ids=["the first's", "the second's"])
@pytest.mark.parametrize("aux", [0.0, 1.0])
def test_all_chosen_latents_may_be_one_process_s(first, end, aux, optimizer, tmp_path):
    def make():
        return one_sided(first, end, aux_loss_coefficient=aux)

    expected = compare(2, tmp_path, 8, make, optimizer=optimizer)
    fired = expected["density"] > 0
    assert fired[first:end].any()
    assert not fired[: first or end].all()


def test_of_latents_that_are_equal_exactly_k_are_chosen(tmp_path):
    """The second half is the first once more: every candidate has its like on the other process."""

    def make():
        sae = make_sae("sparse_topk", aux_loss_coefficient=0.0)
        with torch.no_grad():
            sae.W_enc[:, F // 2 :] = sae.W_enc[:, : F // 2]
            sae.W_dec[F // 2 :] = sae.W_dec[: F // 2]
        return sae

    def run() -> tuple[float, int]:
        trainer = LatentParallelSAETrainer(config(1, latent_parallel=2), make(), tokens())
        output = trainer.step(next(trainer.data_provider))
        return float(output.loss), len(output.codes.values)

    both = on_processes(2, run, tmp_path)
    trainer = SparseSAETrainer(config(1), make(), tokens())
    expected = float(trainer.step(next(trainer.data_provider)).loss)
    assert [loss for loss, _ in both] == pytest.approx([expected] * 2, rel=1e-5)
    assert sum(n for _, n in both) == K * BATCH


def test_shares_of_unequal_size_are_one_batch_and_training_ends_for_all_when_one_s_do(tmp_path):
    parts = [[b[:20] for b in activations(6, batch=BATCH)], [b[20:] for b in activations(4, batch=BATCH)]]

    def mine():
        return iter(parts[torch.distributed.get_rank()])

    expected = alone(6, make=topk(), source=iter(activations(4, batch=BATCH)))
    for found in latents_together(2, tmp_path, 6, make=topk(), source=mine):
        assert found["samples"] == 4 * BATCH
        assert_same_run(found, expected, **LOOSE)


def test_a_step_that_is_not_finite_on_one_process_is_skipped_by_all(tmp_path):
    bad = tokens()
    bad[3 * BATCH, 3] = torch.nan
    expected = alone(10, make=topk(), source=bad)
    assert expected["skipped"] == 2
    for found in latents_together(2, tmp_path, 10, make=topk(), source=bad):
        assert_same_run(found, expected, **LOOSE)
        assert found["skipped"] == 2


def test_a_new_sae_is_the_same_for_any_number_of_processes(tmp_path, monkeypatch):
    from sae_lens_switch.parallel import latent_shard
    from sae_lens_switch.parallel.ranks import Ranks

    monkeypatch.setattr(latent_shard, "_BLOCK", 16)  # blocks that lie across the parts
    cfg = make_sae("sparse_topk").cfg

    def fresh(n: int):
        def run() -> dict:
            torch.manual_seed(7 + torch.distributed.get_rank())  # the first process's seed counts
            sae = latent_shard.LatentShard.fresh(cfg, Ranks(n, "cpu", 60)).gathered()
            return {name: p.detach() for name, p in sae.named_parameters()}

        return run

    one = on_processes(1, fresh(1), tmp_path)[0]
    for found in on_processes(2, fresh(2), tmp_path):
        assert all(torch.equal(t, found[name]) for name, t in one.items())
    assert len(one["W_dec"].unique(dim=0)) == F
    torch.testing.assert_close(one["W_dec"].norm(dim=1), torch.full((F,), cfg.decoder_init_norm))


# What is on the wire, and in memory


def one_step(d_sae: int, n: int, aux: bool) -> dict:
    sae = make_sae("sparse_topk", d_sae=d_sae, aux_loss_coefficient=float(aux))
    if aux:  # the first ten never fire
        with torch.no_grad():
            sae.b_enc[:10] = -50
    trainer = LatentParallelSAETrainer(config(1000, latent_parallel=n, dead_feature_window=1000), sae, tokens())
    trainer.firing.last_fired_F -= 2000 * (trainer.sae.b_enc < -10).int()
    trainer.step(next(trainer.data_provider))  # which logs
    before = trainer.ranks.bytes_sent.copy()
    trainer.step(next(trainer.data_provider))
    sent = trainer.ranks.bytes_sent
    owned = [*trainer.sae.parameters()]
    owned += [t for state in trainer.optimizer.state.values() for t in state.values()]
    return {
        "sent": {what: sent[what] - before[what] for what in sent if sent[what] > before[what]},
        "latents": sum(t.numel() for t in owned if trainer.sae.cfg.d_sae in t.shape),
    }


@pytest.mark.parametrize(("n", "aux"), [(2, False), (2, True), (4, True)])
def test_what_a_step_sends_is_what_the_formula_says_at_any_width(n, aux, tmp_path):
    b = BATCH // n
    aux_k = min(D // 2, 10) if aux else 0
    for width in (F, 5 * F):
        for rank in on_processes(n, lambda d_sae=width: one_step(d_sae, n, aux), tmp_path):
            assert rank["sent"] == {
                "tokens": 4 * D * b * (n - 1),
                "candidates": 4 * (K + aux_k) * b * (n - 1),
                "borders": 8 * (1 + aux) * b * (n - 1),
                "parts of the reconstruction": 4 * D * (1 + aux) * b * (n - 1),
                "the gradient of the reconstruction": 4 * D * (1 + aux) * b * (n - 1),
                "gradients of b_dec and losses": 2 * (n - 1) * 4 * (D + 2) // n,
                "the norm of the gradients": 4 * (n - 1),
            }
            if not aux:
                plan = LatentPlan(HARDWARE["h100"], D, width, K, n_ranks=n, tokens_per_rank=b)
                assert rank["sent"] == {what: int(n_bytes) for what, n_bytes in plan.traffic.items()}
            assert rank["latents"] == 3 * (2 * D + 1) * width // n


# What is refused


@pytest.mark.parametrize(
    ("fields", "sae", "message"),
    [
        ({"latent_parallel": 3}, {}, "latent_parallel must divide the number of processes, 2; got 3"),
        ({}, {"d_sae": 41}, "latent_parallel must divide d_sae; got 2 and 41"),
        (
            {"expert_parallel": 2},
            {},
            "expert_parallel must be 1 for a sparse_topk SAE, whose latents",
        ),
        ({"cuda_graph": True}, {}, "cuda_graph must be False in a parallel run; got True"),
        ({}, {"normalize_activations": "layer_norm"}, "aux_loss_coefficient must be 0 with normalize_activations"),
    ],
)
def test_what_cannot_be_done_with_divided_latents_is_refused_on_every_process(fields, sae, message, tmp_path):
    def run() -> str:
        with pytest.raises(ValueError, match="must") as error:
            LatentParallelSAETrainer(config(5, **{"latent_parallel": 2, **fields}), topk(**sae)(), tokens())
        return str(error.value)

    assert all(found.startswith(message) for found in on_processes(2, run, tmp_path))


@pytest.mark.parametrize("architecture", ["switch", "standard"])
def test_latents_of_other_architectures_are_not_divided(architecture):
    with pytest.raises(
        ValueError, match=f"sae must be of architecture sparse_topk, sparse_batchtopk, .*transcoder; got {architecture}"
    ):
        LatentParallelSAETrainer(config(5, latent_parallel=2), make_sae(architecture), tokens())


def test_hooks_on_dense_latents_are_refused(tmp_path):
    def run() -> str:
        trainer = LatentParallelSAETrainer(config(5, latent_parallel=2), topk()(), tokens())
        trainer.sae.hook_sae_acts_post.add_hook(lambda acts, **_: acts)
        with pytest.raises(ValueError, match="must") as error:
            trainer.step(next(trainer.data_provider))
        return str(error.value)

    assert all("must have no hooks with latents on several" in message for message in on_processes(2, run, tmp_path))


def test_settings_that_differ_between_processes_are_refused_on_every_one(tmp_path):
    def run() -> str:
        rank = torch.distributed.get_rank()
        with pytest.raises(ValueError, match="must") as error:
            LatentParallelSAETrainer(config(5, latent_parallel=2), topk(k=3 - rank)(), tokens())
        return str(error.value)

    both = on_processes(2, run, tmp_path)
    assert both[0] == both[1]
    assert "sae.k is 3 on rank 0, 2 on rank 1" in both[0]


def test_one_process_refuses_latents_on_several():
    with pytest.raises(ValueError, match="latent_parallel must be 1 in a run of one process; got 2.*LatentParallel"):
        SparseSAETrainer(config(5, latent_parallel=2), topk()(), tokens())
