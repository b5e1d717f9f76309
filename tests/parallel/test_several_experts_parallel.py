"""Several active experts, and either way to balance them, with the experts divided over processes: as on one."""

import pytest
import torch
from helpers import D, E, F, K
from helpers.command_line import SWITCH, arguments
from helpers.parallel_runs import (
    BATCH,
    alone,
    assert_same_run,
    command_together,
    config,
    go_on_together,
    shared_bits,
    together,
    tokens,
)
from helpers.processes import on_processes
from helpers.resumed import make_sae
from sae_lens import SAE

from sae_lens_switch import SparseSAETrainer
from sae_lens_switch.parallel import ParallelSparseSAETrainer
from sae_lens_switch.parallel.expert_shard import ExpertShard
from sae_lens_switch.parallel.pair_shard import PairShard
from sae_lens_switch.parallel.pairs import among_best
from sae_lens_switch.parallel.shard_classes import expert_shard_class
from sae_lens_switch.planning.hardware import HARDWARE
from sae_lens_switch.planning.plan import Plan

TWO = {"n_active_experts": 2}
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])


@OPTIMIZERS
@pytest.mark.parametrize(("n", "steps"), [(2, 1), (2, 50), (4, 20)])
def test_several_processes_train_what_one_does(n, steps, optimizer, tmp_path):
    """On four, of one expert each, both experts of a token are never the same process's."""
    expected = alone(steps, TWO, optimizer=optimizer)
    all_of_them = together(n, tmp_path, steps, TWO, optimizer=optimizer)
    for found in all_of_them:
        assert_same_run(found, expected)
        assert shared_bits(found) == shared_bits(all_of_them[0])


@pytest.mark.parametrize(
    "sae",
    [
        {"n_active_experts": 3, "gate": "renormalized"},
        {"n_active_experts": 2, "gate": "one"},
        {"n_active_experts": E},
        {"load_balancing": "bias"},
        {"load_balancing": "bias", "n_active_experts": 2, "load_balance_bias_rate": 0.1},
        {"router_z_loss_coefficient": 0.3},
        {"router_z_loss_coefficient": 0.3, "n_active_experts": 2, "load_balance_scale": "d_in"},
        {"n_active_experts": 2, "normalize_activations": "expected_average_only_in", "tie_router_bias": True},
        {"n_active_experts": 2, "normalize_activations": "layer_norm", "bias_start": "mean"},
        {"n_active_experts": 2, "normalize_decoder": False, "apply_b_dec_to_input": False},
        {"n_active_experts": 2, "k": 15},
    ],
    ids=str,
)
def test_every_option_of_the_sae_trains_as_on_one_process(sae, tmp_path):
    fields = {"n_batches_for_norm_estimate": 3}
    expected = alone(12, sae, **fields)
    for found in together(2, tmp_path, 12, sae, **fields):
        assert_same_run(found, expected)


@pytest.mark.parametrize(("n", "optimizer"), [(2, "adam"), (4, "row_sparse_adam")])
@pytest.mark.parametrize(
    "sae",
    [
        {**TWO, "aux_k": 4},
        {**TWO, "aux_k": 7, "gate": "renormalized"},
        {"n_active_experts": 3, "k": 1, "aux_k": F, "gate": "one"},
        {"load_balancing": "bias"},
        {"router_z_loss_coefficient": 0.3, "aux_k": 2, "normalize_decoder": False},
    ],
    ids=str,
)
def test_dead_latents_of_all_experts_of_a_token_reconstruct_its_residual(sae, n, optimizer, tmp_path):
    sae = {"aux_loss_coefficient": 0.3, **sae}
    expected = alone(20, sae, optimizer=optimizer)
    for found in together(n, tmp_path, 20, sae, optimizer=optimizer):
        assert_same_run(found, expected)
    assert sum(row["losses/auxiliary_reconstruction_loss"] > 0 for row in expected["rows"]) > 1


def test_rows_of_processes_divide_the_data(tmp_path):
    expected = alone(12, TWO)
    for found in together(4, tmp_path, 12, TWO, expert_parallel=2):
        assert_same_run(found, expected)


def test_weights_in_bfloat16_have_masters_on_each_process(tmp_path):
    sae = {**TWO, "dtype": "bfloat16"}
    expected = alone(10, sae)
    for found in together(2, tmp_path, 10, sae):
        assert_same_run(found, expected, rtol=3e-2, atol=3e-2)


def only_two_experts(first: int, **fields):
    """Every token goes to experts ``first`` and the next."""
    sae = make_sae(**TWO, **fields)
    with torch.no_grad():
        away = -10 * tokens().mean(dim=0).unsqueeze(1)
        chosen = [first, first + 1]
        sae.W_router[:, [e for e in range(E) if e not in chosen]] = away
    assert not sae.is_fresh
    return sae


@OPTIMIZERS
@pytest.mark.parametrize(("n", "first", "is_tied"), [(2, 0, False), (2, 1, False), (2, 2, True), (4, 1, False)])
def test_experts_and_processes_without_tokens_are_trained_as_on_one_process(n, first, is_tied, optimizer, tmp_path):
    fields = {"optimizer": optimizer}
    make = lambda: only_two_experts(first, tie_router_bias=is_tied)  # noqa: E731
    expected = alone(12, make=make, **fields)
    for found in together(n, tmp_path, 12, make=make, **fields):
        assert_same_run(found, expected)
    idle = [e for e in range(E) if e not in (first, first + 1)]
    assert (expected["density"].view(E, -1)[idle] == 0).all()


def only_some_are_dead(expert: int, n: int):
    """The first ``n`` latents of one expert never fire; every token has all experts, and most of the other latents."""
    sae = make_sae(n_active_experts=E, k=F, aux_loss_coefficient=0.3, aux_k=5)
    first = expert * F // E
    mean = tokens().mean(dim=0)
    with torch.no_grad():
        sae.W_enc *= (mean @ sae.W_enc).sign()
        sae.W_enc[:, first : first + n] = -10 * mean.unsqueeze(1)
    return sae


@pytest.mark.parametrize(("expert", "optimizer"), [(1, "adam"), (3, "row_sparse_adam")])
def test_dead_latents_of_one_process_alone(expert, optimizer, tmp_path):
    """Fewer than aux_k, and none at all on the other process."""
    fields = {"optimizer": optimizer, "lr": 1e-5}
    make = lambda: only_some_are_dead(expert, 3)  # noqa: E731
    expected = alone(6, make=make, **fields)
    for found in together(2, tmp_path, 6, make=make, **fields):
        assert_same_run(found, expected)
    assert (expected["density"] == 0).nonzero().flatten().tolist() == [expert * F // E + i for i in range(3)]
    assert expected["rows"][-1]["losses/auxiliary_reconstruction_loss"] > 0


@pytest.mark.parametrize("first", [0, 2])
def test_dead_latents_where_a_process_has_no_tokens(first, tmp_path):
    def make():
        sae = only_two_experts(first)
        sae.cfg.aux_loss_coefficient = 0.3
        return sae

    expected = alone(12, make=make)
    for found in together(2, tmp_path, 12, make=make):
        assert_same_run(found, expected)
    assert expected["rows"][-1]["losses/auxiliary_reconstruction_loss"] > 0


def test_a_step_that_is_not_finite_on_one_process_is_skipped_by_all(tmp_path):
    bad = tokens()
    bad[:, 3] = torch.where(torch.arange(len(bad)) % 97 == 0, torch.nan, bad[:, 3])
    sae = {**TWO, "load_balancing": "bias"}
    expected = alone(20, sae, source=bad)
    assert 0 < expected["skipped"] < 20
    for found in together(2, tmp_path, 20, sae, source=bad):
        assert_same_run(found, expected)
        assert found["skipped"] == expected["skipped"]


def gradients(sae: dict, n: int) -> dict[str, torch.Tensor]:
    """Of the first step, before clipping."""
    trainer = ParallelSparseSAETrainer(config(1, expert_parallel=n), make_sae(**sae), tokens())
    trainer.optimizer.clipped_step = lambda *_: torch.tensor(True)
    trainer.optimizer.zero_grad = lambda: None
    trainer.step(next(trainer.data_provider))
    return {name: p.grad for name, p in trainer.sae.named_parameters()}


@pytest.mark.parametrize("gate", ["probability", "renormalized", "one"])
def test_gradients_are_those_of_a_dense_computation(gate, tmp_path):
    """In float64, of all latents of all experts, masked."""
    fields = {**TWO, "gate": gate, "dtype": "float64", "load_balance_coefficient": 0.0}
    found = on_processes(2, lambda: gradients(fields, 2), tmp_path)
    sae = make_sae(**fields)
    x = next(SparseSAETrainer(config(1), sae, tokens()).data_provider).double()
    sae._before_forward(x, x)
    M = F // E
    probs = ((x - sae.effective_router_bias) @ sae.W_router).softmax(-1)
    chosen = probs.topk(2).indices
    own = torch.zeros_like(probs).scatter(1, chosen, 1.0)
    gates = {"probability": probs, "one": torch.ones_like(probs)}.get(gate, probs / (probs * own).sum(1, keepdim=True))
    acts = ((x - sae.b_dec) @ sae.W_enc).relu() * (own * gates).repeat_interleave(M, dim=1)
    kept = torch.zeros_like(acts).scatter(1, acts.topk(sae.cfg.k).indices, 1.0)
    loss = ((acts * kept) @ sae.W_dec + sae.b_dec - x).square().sum(1).mean()
    loss.backward()
    for name, p in sae.named_parameters():
        if p.grad is None:
            continue
        parts = [part[name] for part in found]
        ours = torch.cat(parts, {"W_enc": 1, "W_dec": 0}[name]) if name in ("W_enc", "W_dec") else parts[0]
        torch.testing.assert_close(ours, p.grad, rtol=1e-8, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


def test_the_best_of_all_experts_are_found_whatever_their_order():
    generator = torch.Generator().manual_seed(0)
    ranked = torch.rand(50, 3, 7, generator=generator)
    chosen = among_best(ranked, 5)
    assert (chosen.flatten(1).sum(1) == 5).all()
    least = torch.where(chosen, ranked, 9.0).flatten(1).amin(1)
    most_left = torch.where(chosen, -1.0, ranked).flatten(1).amax(1)
    assert (least >= most_left).all()
    assert (among_best(torch.zeros(4, 2, 3), 6)).all()


# Files, the wire, and what is refused


@pytest.mark.parametrize("sae", [TWO, {**TWO, "load_balancing": "bias", "k": 12}], ids=str)
def test_a_run_resumed_on_one_two_and_four_processes_ends_like_one_without_a_stop(sae, tmp_path):
    expected = alone(12, sae)
    for n, until in ((2, 3), (4, 6), (1, 9), (2, 12)):
        make = lambda: make_sae(**sae)  # noqa: E731
        fields = {"expert_parallel": n}
        found = go_on_together(n, tmp_path / "checkpoints", (until, 12), make, ParallelSparseSAETrainer, **fields)
    for one in found:
        assert_same_run(one, expected, rtol=2e-3, atol=2e-4)


def test_the_command_leaves_an_ordinary_sae(tmp_path, model, dataset):
    argv = [*SWITCH, *arguments(tmp_path), "--n-active-experts", "2", "--expert-parallel", "2"]

    assert command_together(2, tmp_path, argv, model, dataset) == [0, 0]
    sae = SAE.load_from_disk(tmp_path / "output")
    assert (sae.cfg.n_active_experts, sae.cfg.n_experts, sae.cfg.k) == (2, E, K)
    assert len(sae.W_dec) == sae.cfg.d_sae
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def one_step(d_sae: int, **fields) -> dict:
    trainer = ParallelSparseSAETrainer(
        config(1000, expert_parallel=2), make_sae(d_sae=d_sae, **TWO, **fields), tokens()
    )
    for _ in range(4 if fields else 1):  # until latents are dead
        trainer.step(next(trainer.data_provider))
    before = trainer.ranks.bytes_sent.copy()
    trainer.step(next(trainer.data_provider))
    sent = trainer.ranks.bytes_sent
    batch, other = trainer.sae.batch, 1 - trainer.ranks.rank
    out, back = batch.sent[other], batch.received[other]
    of_step = {what: sent[what] - before[what] for what in sent if sent[what] > before[what]}
    return {"sent": of_step, "out": out, "back": back}


def test_what_a_step_sends_is_what_the_formula_says_at_any_width(tmp_path):
    """Tokens go out and gradients with them; candidates and reconstructions come home."""
    k = make_sae().cfg.k
    for width in (F, 5 * F):
        for rank in on_processes(2, lambda d=width: one_step(d), tmp_path):
            sent, C = rank["sent"], min(k, width // E)
            assert sent["tokens"] == sent["the gradient of the reconstruction"] == 4 * D * rank["out"]
            assert sent["parts of the reconstruction"] == 4 * D * rank["back"]
            assert sent["candidates"] == 4 * C * rank["back"]
            assert sent["choices"] == C * rank["out"]
            assert sent["experts"] == 8 * rank["out"]
            planned = Plan(
                HARDWARE["h100"], D, width, k, E, n_ranks=2, tokens_per_rank=BATCH // 2, n_active_experts=2
            ).traffic
            assert planned.keys() == sent.keys()
            for name, n_bytes in planned.items():
                assert sent[name] == pytest.approx(n_bytes, rel=0.35), name  # even loads


def test_what_dead_latents_add_to_it(tmp_path):
    k, aux_k = make_sae().cfg.k, 4
    for rank in on_processes(2, lambda: one_step(5 * F, aux_loss_coefficient=0.3, aux_k=aux_k), tmp_path):
        sent = rank["sent"]
        assert sent["tokens"] == 4 * D * rank["out"]
        assert sent["the gradient of the reconstruction"] == 2 * 4 * D * rank["out"]
        assert sent["parts of the reconstruction"] == 2 * 4 * D * rank["back"]
        assert sent["candidates"] == 4 * (k + aux_k) * rank["back"]
        assert sent["choices"] == (k + aux_k) * rank["out"]
        assert sent["dead latents"] == 8 * E // 2


def test_the_cheaper_way_is_taken_wherever_it_can_be():
    assert expert_shard_class(make_sae().cfg) is ExpertShard
    for fields in (TWO, {"load_balancing": "bias"}, {"router_z_loss_coefficient": 0.1}):
        assert expert_shard_class(make_sae(**fields).cfg) is PairShard


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        ({**TWO, "matryoshka_widths": [3, F // E]}, "matryoshka_widths must be None with experts on several"),
        ({**TWO, "n_shared_experts": 1, "shared_width": 8}, "n_shared_experts must be 0 with experts on several"),
        ({**TWO, "activation": "batchtopk"}, "activation must be 'topk' with experts on several processes"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_is_not_divided_is_refused_by_name(sae, message, tmp_path):
    def run() -> str:
        fields = {**sae, "d_sae": F + sae.get("shared_width", 0)}
        with pytest.raises(ValueError) as error:  # noqa: PT011
            ParallelSparseSAETrainer(config(1, expert_parallel=2), make_sae(**fields), tokens())
        return str(error.value)

    assert all(message in found for found in on_processes(2, run, tmp_path))
