"""Training with the experts divided over processes gives what one process gives on the same batches."""

import os
import signal
import time

import pytest
import torch
from helpers import D, E, F, activations
from helpers.parallel_runs import (
    BATCH,
    alone,
    assert_same_run,
    config,
    shared_bits,
    signal_in_step,
    together,
    tokens,
)
from helpers.processes import PATIENCE, ended_processes, on_processes
from helpers.resumed import make_sae

from sae_lens_switch import SparseSAETrainer, SwitchTrainingSAE, TrainingDivergedError
from sae_lens_switch.parallel import ParallelSparseSAETrainer
from sae_lens_switch.parallel.expert_shard import ExpertShard
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.planning.hardware import HARDWARE
from sae_lens_switch.planning.plan import Plan
from sae_lens_switch.training.collapse_response import ExpertPlacement
from sae_lens_switch.training.interruption import SignalledError

OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])


@OPTIMIZERS
@pytest.mark.parametrize("steps", [1, 50])
def test_two_processes_train_what_one_does(steps, optimizer, tmp_path):
    expected = alone(steps, optimizer=optimizer)
    both = together(2, tmp_path, steps, optimizer=optimizer)
    for found in both:
        assert_same_run(found, expected)
    assert shared_bits(both[0]) == shared_bits(both[1])


@OPTIMIZERS
def test_four_processes_train_what_one_does_with_dead_latents_and_clipping(optimizer, tmp_path):
    sae = {"aux_loss_coefficient": 0.1, "aux_k": 4, "load_balance_coefficient": 1.0}
    fields = {"optimizer": optimizer, "max_grad_norm": 0.05}
    expected = alone(30, sae, **fields)
    for found in together(4, tmp_path, 30, sae, **fields):
        assert_same_run(found, expected)
    assert any(row["losses/auxiliary_reconstruction_loss"] > 0 for row in expected["rows"])


@pytest.mark.parametrize(
    "sae",
    [
        {"load_balance_scale": "d_in", "tie_router_bias": True},
        {"normalize_activations": "expected_average_only_in", "bias_start": "mean"},
        {"normalize_activations": "layer_norm", "gate": "renormalized"},
        {"normalize_decoder": False, "router_start_std": None, "apply_b_dec_to_input": False},
        {"matryoshka_widths": [2, 5, F // E], "aux_loss_coefficient": 0.1},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_option_of_the_sae_trains_as_on_one_process(sae, tmp_path):
    fields = {"n_batches_for_norm_estimate": 3}
    expected = alone(10, sae, **fields)
    for found in together(2, tmp_path, 10, sae, **fields):
        assert_same_run(found, expected)


def idle_experts(first: int, **fields) -> SwitchTrainingSAE:
    """Of the experts, those from ``first`` on get no token: all tokens lie on the other side of the router."""
    sae = make_sae(**fields)
    with torch.no_grad():
        sae.W_router[:, first:] = -10 * tokens().mean(dim=0).unsqueeze(1)
    assert not sae.is_fresh
    return sae


@OPTIMIZERS
@pytest.mark.parametrize(
    ("first", "sae"),
    [(1, {}), (2, {}), (3, {}), (2, {"matryoshka_widths": [4, F // E]}), (2, {"tie_router_bias": True})],
)
def test_experts_and_processes_without_tokens_are_trained_as_on_one_process(first, sae, optimizer, tmp_path):
    fields = {"optimizer": optimizer}
    make = lambda: idle_experts(first, **sae)  # noqa: E731
    expected = alone(12, make=make, **fields)
    for found in together(2, tmp_path, 12, make=make, **fields):
        assert_same_run(found, expected)
    assert (expected["density"].view(E, -1)[first:] == 0).all()


@pytest.mark.parametrize(
    ("n", "optimizer", "fields"),
    [(2, "adam", {}), (4, "row_sparse_adam", {}), (4, "adam", {"expert_parallel": 2}), (2, "adam", {"first": 3})],
)
def test_an_expert_without_tokens_becomes_a_twin_of_another_processs(n, optimizer, fields, tmp_path, monkeypatch):
    monkeypatch.setattr(ExpertPlacement, "two_of", lambda *_: [0, 1])  # the same two tokens, alone and together
    first, fields = fields.get("first", 1), {k: v for k, v in fields.items() if k != "first"}
    fields |= {"optimizer": optimizer, "on_collapse": "reseed", "collapse_patience": 3}
    make = lambda: idle_experts(first, tie_router_bias=True)  # noqa: E731
    expected = alone(12, make=make, **{k: v for k, v in fields.items() if k != "expert_parallel"})
    for found in together(n, tmp_path, 12, make=make, **fields):
        assert_same_run(found, expected)
    assert expected["rows"][-1]["routing/interventions"] > 0
    assert (expected["density"].view(E, -1)[first:] > 0).any(dim=1).all()


def test_a_new_sae_is_the_same_for_any_number_of_processes(tmp_path):
    def fresh() -> dict:
        torch.manual_seed(5)
        cfg = make_sae().cfg
        n = torch.distributed.get_world_size()
        return ExpertShard.fresh(cfg, Ranks(n, "cpu", 60.0)).gathered().state_dict()

    (one,), (two, _), (four, *_) = (on_processes(n, fresh, tmp_path / str(n)) for n in (1, 2, 4))
    for name, t in one.items():
        assert torch.equal(t, two[name]), name
        assert torch.equal(t, four[name]), name
    assert one["W_router"].abs().max() <= D**-0.5
    assert len(one["W_router"].unique()) == D * E


def test_weights_in_bfloat16_have_masters_on_each_process(tmp_path):
    expected = alone(10, {"dtype": "bfloat16"})
    for found in together(2, tmp_path, 10, {"dtype": "bfloat16"}):
        assert_same_run(found, expected, rtol=2e-2, atol=2e-2)


def test_latents_of_one_batch_are_those_of_one_process(tmp_path):
    """Received tokens are in the order of the whole batch, so that sums over tokens have the same order."""

    def gradients() -> dict:
        trainer = ParallelSparseSAETrainer(config(1, expert_parallel=2), make_sae(), tokens())
        trainer.optimizer.clipped_step = lambda *_: torch.tensor(True)
        trainer.optimizer.zero_grad = lambda: None
        trainer.step(next(trainer.data_provider))
        rows = trainer.sae.batch.x_BD
        return {"W_dec": trainer.sae.W_dec.grad, "W_enc": trainer.sae.W_enc.grad.T, "tokens": rows}

    found = on_processes(2, gradients, tmp_path)
    trainer = SparseSAETrainer(config(1), make_sae(), tokens())
    trainer.optimizer.clipped_step = lambda *_: torch.tensor(True)
    trainer.optimizer.zero_grad = lambda: None
    batch = next(trainer.data_provider)
    trainer.step(batch)
    chosen = trainer.sae.encode_routed(batch)[1].experts_BA.flatten()
    for rank, part in enumerate(found):
        assert torch.equal(part["tokens"], batch[chosen // (E // 2) == rank])
    for name, whole in {"W_dec": trainer.sae.W_dec.grad, "W_enc": trainer.sae.W_enc.grad.T}.items():
        torch.testing.assert_close(torch.cat([part[name] for part in found]), whole, rtol=1e-5, atol=1e-6)


def test_a_step_that_is_not_finite_on_one_process_is_skipped_by_all(tmp_path):
    bad = tokens()
    bad[:, 3] = torch.where(torch.arange(len(bad)) % 97 == 0, torch.nan, bad[:, 3])
    expected = alone(20, source=bad)
    assert 0 < expected["skipped"] < 20
    for found in together(2, tmp_path, 20, source=bad):
        assert_same_run(found, expected)
        assert found["skipped"] == expected["skipped"]


def test_a_run_that_diverges_ends_on_all_processes(tmp_path):
    def run() -> str:
        source = torch.full((5 * BATCH, D), torch.inf)
        trainer = ParallelSparseSAETrainer(config(20, expert_parallel=2, max_skipped_steps=3), make_sae(), source)
        with pytest.raises(TrainingDivergedError) as error:
            trainer.fit()
        return str(error.value)

    assert all("3 steps in a row were skipped" in message for message in on_processes(2, run, tmp_path))


# What is on the wire, and in memory


def one_step(d_sae: int, n: int) -> dict:
    trainer = ParallelSparseSAETrainer(config(1000, expert_parallel=n), make_sae(d_sae=d_sae), tokens())
    trainer.step(next(trainer.data_provider))  # which starts the SAE
    before = trainer.ranks.bytes_sent.copy()
    x_BD = next(trainer.data_provider)
    chosen = trainer.sae._router_logits(x_BD).argmax(dim=1)
    trainer.step(x_BD)
    sent = trainer.ranks.bytes_sent
    owned = [*trainer.sae.parameters()]
    owned += [t for state in trainer.optimizer.state.values() for t in state.values()]
    sae = trainer.sae
    return {
        "sent": {what: sent[what] - before[what] for what in sent if sent[what] > before[what]},
        "away": int((chosen // (E // n) != trainer.ranks.row_rank).sum()),
        "latents": sum(t.numel() for t in owned if sae.cfg.d_sae in t.shape),
        "messages": len([what for what in sent if sent[what] > before[what]]),
    }


@pytest.mark.parametrize("n", [2, 4])
def test_what_a_step_sends_is_what_the_formula_says_at_any_width(n, tmp_path):
    found = {d_sae: on_processes(n, lambda d=d_sae: one_step(d, n), tmp_path) for d_sae in (F, 5 * F)}
    for width, ranks in found.items():
        for rank in ranks:
            shared, losses = 2 * D + D * E, 3
            assert rank["sent"] == {
                "tokens": 4 * D * rank["away"],
                "statistics of the batch": 2 * (n - 1) * 8 * (E + D + 1) // n + 8 * (n - 1),
                "gradients of the router and losses": 2 * (n - 1) * 4 * (shared + losses) // n,
                "the norm of the gradients": 4 * (n - 1),
            }
            planned = Plan(HARDWARE["h100"], D, width, 1, E, n_ranks=n, tokens_per_rank=BATCH // n).traffic
            assert {what: int(n_bytes) for what, n_bytes in planned.items() if what != "tokens"} == {
                what: n_bytes for what, n_bytes in rank["sent"].items() if what != "tokens"
            }
        assert sum(rank["away"] for rank in ranks) * 4 * D == pytest.approx(
            n * planned["tokens"], rel=0.3
        )  # even loads
        assert sum(rank["latents"] for rank in ranks) == 3 * 2 * width * D
        assert {rank["latents"] for rank in ranks} == {3 * 2 * width * D // n}


# How it ends


def test_training_ends_for_all_when_the_activations_of_one_process_do(tmp_path):
    def run() -> tuple[int, int]:
        rank = torch.distributed.get_rank()
        mine = iter(activations(3 + 2 * rank, batch=BATCH // 2 + rank))
        trainer = ParallelSparseSAETrainer(config(50, expert_parallel=2), make_sae(), mine)
        trainer.fit()
        return trainer.n_training_steps, trainer.n_training_samples

    assert on_processes(2, run, tmp_path) == [(3, 3 * (BATCH + 1))] * 2


def test_a_signal_to_one_process_stops_all_before_the_same_step(tmp_path):
    def run() -> tuple[str, int]:
        trainer = ParallelSparseSAETrainer(config(50, expert_parallel=2), make_sae(), tokens())
        signal_in_step(trainer, 4)
        with pytest.raises(SignalledError) as error:
            trainer.fit()
        return str(error.value), trainer.n_training_steps

    both = on_processes(2, run, tmp_path)
    assert both[0] == both[1] == ("training was interrupted by SIGTERM", 6)


def test_the_others_stop_with_a_message_when_a_process_dies_in_mid_step(tmp_path):
    def run() -> None:
        trainer = ParallelSparseSAETrainer(config(50, expert_parallel=2, rank_timeout=20), make_sae(), tokens())
        receive = trainer.sae.receive

        def killed_at_three(batch):
            if trainer.n_training_steps == 3 and trainer.ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return receive(batch)

        trainer.sae.receive = killed_at_three
        trainer.fit()

    survivor, killed = ended_processes(2, run, tmp_path)
    assert killed is None
    assert "RankLostError: rank 0 of 2 has lost another one, during" in survivor


@pytest.mark.parametrize("place", ["receive", "exchange"])
def test_the_others_stop_within_the_time_allowed_when_a_process_hangs(place, tmp_path):
    def run() -> None:
        trainer = ParallelSparseSAETrainer(config(50, expert_parallel=2, rank_timeout=5), make_sae(), tokens())
        owner = trainer.sae if place == "receive" else trainer.ranks
        if trainer.ranks.rank == 1:
            setattr(owner, place, lambda *_: signal.pause())
        trainer.fit()

    started = time.monotonic()
    outcomes = ended_processes(2, run, tmp_path, timeout=5, kill_after_first=True)
    assert "RankLostError: rank 0 of 2 has lost another one" in outcomes[0]
    assert time.monotonic() - started < PATIENCE / 2


# What is refused


@pytest.mark.parametrize(
    ("fields", "sae", "message"),
    [
        ({"expert_parallel": 3}, {}, "expert_parallel must divide the number of processes, 2; got 3"),
        ({}, {"n_experts": 5}, "expert_parallel must divide n_experts; got 2 and 5"),
        ({}, {"n_shared_experts": 2, "shared_width": 12}, "n_shared_experts must be 0 with experts on several"),
        ({}, {"expert_overlap_coefficient": 0.1}, "expert_overlap_coefficient must be 0 with experts on several"),
        ({"latent_parallel": 2}, {}, "latent_parallel must be 1 for a switch SAE, whose experts are divided; got 2"),
    ],
)
def test_what_no_parallel_run_can_do_is_refused_on_every_process(fields, sae, message, tmp_path):
    def run() -> str:
        with pytest.raises(ValueError, match="must") as error:
            ParallelSparseSAETrainer(config(5, **{"expert_parallel": 2, **fields}), make_sae(**sae), tokens())
        return str(error.value)

    assert all(found.startswith(message) for found in on_processes(2, run, tmp_path))


def test_settings_that_differ_between_processes_are_refused_on_every_one(tmp_path):
    def run() -> str:
        rank = torch.distributed.get_rank()
        cfg = config(5, expert_parallel=2, lr=(1e-3, 2e-3)[rank])
        with pytest.raises(ValueError, match="must") as error:
            ParallelSparseSAETrainer(cfg, make_sae(k=3 - rank), tokens())
        return str(error.value)

    both = on_processes(2, run, tmp_path)
    assert both[0] == both[1]
    assert "sae.k is 3 on rank 0, 2 on rank 1" in both[0]
    assert "trainer.lr is 0.001 on rank 0, 0.002 on rank 1" in both[0]


def test_one_process_refuses_experts_on_several():
    with pytest.raises(ValueError, match="expert_parallel must be 1 in a run of one process; got 2"):
        SparseSAETrainer(config(5, expert_parallel=2), make_sae(), tokens())


def test_a_process_that_torchrun_has_not_started_is_told_how(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="must be started by torchrun"):
        ParallelSparseSAETrainer(config(5, expert_parallel=2), make_sae(), tokens())
