"""The cost model against the SAEs themselves, and its command."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from torch.utils.flop_counter import FlopCounterMode

from sae_lens_switch import (
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)
from sae_lens_switch.cost import Cost, LatentPlan, Machine, Plan, describe, describe_plan
from sae_lens_switch.planning.hardware import HARDWARE
from sae_lens_switch.planning.step_cost import _MATRIX_PRODUCTS

SHAPE = {"d_in": 24, "d_sae": 160, "k": 4}
MACHINE = Machine(flops=1e11, gather=5e9, regather=2e10, stream=1e10, select=1e9, fresh=2e9)


@pytest.mark.parametrize(
    ("cost", "sae"),
    [
        (Cost("switch", n_experts=8, **SHAPE), SwitchTrainingSAE(SwitchTrainingSAEConfig(n_experts=8, **SHAPE))),
        (
            Cost("switch", n_experts=8, n_shared_experts=1, shared_width=40, **SHAPE),
            SwitchTrainingSAE(SwitchTrainingSAEConfig(n_experts=8, n_shared_experts=1, shared_width=40, **SHAPE)),
        ),
        (Cost("sparse_topk", **SHAPE), SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**SHAPE))),
        (Cost("topk", **SHAPE), TopKTrainingSAE(TopKTrainingSAEConfig(**SHAPE))),
    ],
    ids=lambda c: getattr(c, "architecture", ""),
)
def test_parameters_are_those_of_the_sae(cost, sae):
    assert cost.parameters == {name: p.numel() for name, p in sae.named_parameters()}
    assert cost.memory["weights"] == sum(p.numel() * p.element_size() for p in sae.parameters())


def test_flops_by_hand():
    """GPT-2's setting of the paper: 2MD of one expert, and the router."""
    cost = Cost("switch", d_in=768, d_sae=24576, k=32, n_experts=32, batch=4096)
    assert cost.paper_flops == 2 * 768 * 768 + 2 * 32 * 768 == 1_228_800
    assert cost.flops["encoder"] == 2 * 768 * 768
    assert cost.flops["decoder"] == cost.flops["latent gradient"] == 2 * 32 * 768
    assert cost.flops["router"] == 3 * 2 * 32 * 768
    assert Cost("sparse_topk", d_in=768, d_sae=24576, k=32).paper_flops == 2 * 24576 * 768
    shared = replace(cost, n_active_experts=2, n_shared_experts=1, shared_width=1536)
    assert shared.flops["encoder"] == 2 * 768 * (1536 + 2 * 720)
    assert shared.flops["decoder"] == cost.flops["decoder"]
    assert shared.bytes_moved["encoder"] == cost.bytes_moved["encoder"]  # of all latents either way
    assert shared.seconds(MACHINE)["top-k"] == 4096 * (1536 + 2 * 720) / MACHINE.select
    assert (
        sum(v for n, v in Cost("topk", d_in=8, d_sae=64, k=2).flops.items() if "coder" in n or "latent" in n)
        == 10 * 8 * 64
    )


def test_row_sparse_adam_costs_the_same_for_a_dictionary_of_any_width():
    """Constant width of the experts; the router grows, by design."""
    narrow, wide = (
        Cost("switch", d_in=256, d_sae=4096 * E, k=8, n_experts=E, batch=512, optimizer="row_sparse_adam")
        for E in (16, 4096)
    )
    for part in ("optimiser", "clipping and constraint", "weight gradients", "pre-bias gradient", "decoder"):
        assert wide.bytes_moved[part] == narrow.bytes_moved[part]
    assert wide.memory["gradients"] == narrow.memory["gradients"]
    assert replace(wide, optimizer="adam").bytes_moved["optimiser"] > 100 * wide.bytes_moved["optimiser"]


@pytest.mark.parametrize(
    ("trainer", "sae", "rows"),
    [
        ({"optimizer": "adam"}, SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**SHAPE)), 160),
        ({"optimizer": "row_sparse_adam"}, SwitchTrainingSAE(SwitchTrainingSAEConfig(n_experts=8, **SHAPE)), 8),
    ],
    ids=["adam", "row-sparse"],
)
def test_moments_by_hand_and_as_the_optimiser_keeps_them(trainer, sae, rows):
    n_experts = 8 if "n_experts" in sae.cfg.to_dict() else 1
    cost = Cost(sae.cfg.architecture(), n_experts=n_experts, batch=2, **SHAPE, **trainer)
    low = replace(cost, bytes_per_moment=2)
    assert low.bytes_moved["optimiser"] == 2 * rows * 24 * (3 * 4 + 4 * 2)  # weight, gradient; both moments twice
    assert cost.bytes_moved["optimiser"] == 2 * rows * 24 * 7 * 4
    assert cost.memory["optimiser"] - low.memory["optimiser"] == 2 * 2 * 2 * 24 * 160
    for kept, expected in (("float32", cost), ("bfloat16", low)):
        cfg = SparseSAETrainerConfig(8, 2, device="cpu", moments_dtype=kept, **trainer)
        optimizer = SparseSAETrainer(cfg, sae, torch.randn(8, 24)).optimizer
        for p in sae.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
        assert sum(t.nbytes for t in moments) == expected.memory["optimiser"]


def test_a_prediction_is_the_sum_of_its_parts_and_follows_the_machine():
    cost = Cost("switch", d_in=768, d_sae=24576, k=32, n_experts=32)
    assert cost.step_seconds(MACHINE) == pytest.approx(sum(cost.seconds(MACHINE).values()))
    assert cost.seconds(replace(MACHINE, select=2e9))["top-k"] == cost.seconds(MACHINE)["top-k"] / 2
    twice = Machine(**{name: 2 * value for name, value in vars(MACHINE).items()})
    assert cost.step_seconds(twice) == pytest.approx(cost.step_seconds(MACHINE) / 2)
    dense = Cost("topk", d_in=768, d_sae=24576, k=32)
    assert dense.step_seconds(MACHINE) > 5 * cost.step_seconds(MACHINE)
    text = describe(cost, MACHINE)
    assert "1,228,800 as the paper counts" in text
    for part in (*cost.parameters, *cost.flops, *cost.memory, *cost.bytes_moved, *cost.seconds(MACHINE)):
        assert part in text


def test_this_machine_can_be_measured():
    measured = Machine.this_one(d_in=64, k=8, expert_width=100)
    assert 1e8 < measured.flops < 1e15
    assert 1e7 < measured.stream < 1e14
    assert torch.isfinite(torch.tensor(list(vars(measured).values()))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gated"}, "architecture must be switch, sparse_topk or topk; got 'gated'"),
        ({"architecture": "topk", "n_experts": 2}, "n_experts must be 1 unless architecture is 'switch'; got 2"),
        ({"n_experts": 7}, "n_experts must divide d_sae=160; got 7"),
        ({"n_experts": 8, "k": 21}, "k must be at most d_sae / n_experts = 20; got 21"),
        ({"architecture": "topk", "n_shared_experts": 1}, "n_shared_experts must be 0 unless architecture is 'switch'"),
        ({"n_shared_experts": -1}, "n_shared_experts must be a whole number, at least 0; got -1"),
        ({"shared_width": 8}, "shared_width must be None without shared experts; got 8"),
        (
            {"n_experts": 7, "n_shared_experts": 1, "shared_width": 9},
            "n_experts must divide d_sae=160 less the 9",
        ),
        ({"n_shared_experts": 1, "shared_width": 160}, "n_experts must divide d_sae=160 less the 160 latents"),
        (
            {"n_experts": 9, "n_shared_experts": 1, "k": 33},
            "k must be at most the latents of a token's experts and the shared ones, 32; got 33",
        ),
        ({"batch": 0}, "batch must be a whole number, at least 1; got 0"),
    ],
)
def test_shapes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Cost(**{"architecture": "switch", **SHAPE, **options})


def test_a_machine_needs_positive_numbers():
    with pytest.raises(ValueError, match="stream must be positive; got 0"):
        replace(MACHINE, stream=0)


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "sae_lens_switch.cost", *arguments], capture_output=True, text=True)


def test_the_command_prints_the_table_and_refuses_what_it_cannot_use():
    shape = ("--d-in", "768", "--d-sae", "24576")
    described = [f"--{name}={value}" for name, value in vars(MACHINE).items()]
    done = run_command(*shape, "--n-experts", "32", *described)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == describe(Cost("switch", 768, 24576, 32, 32), MACHINE)
    for arguments, message in (
        ((*shape, "--n-experts", "31"), "error: n_experts must divide d_sae=24576; got 31"),
        ((*shape, described[0]), "missing: --gather, --regather, --stream, --select, --fresh"),
    ):
        refused = run_command(*arguments)
        assert refused.returncode != 0
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr


def test_matrix_products_of_saelens_topk_are_those_that_torch_counts():
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=6, d_sae=40, k=3))
    step = TrainStepInput(
        sae_in=torch.randn(16, 6), coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )
    with FlopCounterMode(display=False) as counter:
        sae.training_forward_pass(step).loss.backward()
    flops = Cost("topk", 6, 40, 3, batch=16).flops
    assert counter.get_total_flops() == 16 * sum(flops[name] for name in _MATRIX_PRODUCTS)


def test_the_command_plans_a_cluster_and_refuses_what_does_not_fit():
    wide = ("--plan", "--d-in", "768", "--d-sae", "4194304")
    done = run_command(*wide, "--n-ranks", "16", "--n-experts", "256", "--load-spread", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == describe_plan(Plan(HARDWARE["h100"], 768, 4194304, 32, 256, n_ranks=16))
    assert "4,194,304 latents of 768 numbers in 256 experts of 16,384, 1 active, k 32" in done.stdout
    done = run_command(*wide, "--n-ranks", "16", "--architecture", "sparse_topk")
    assert done.stdout.strip() == describe_plan(LatentPlan(HARDWARE["h100"], 768, 4194304, 32, n_ranks=16))
    assert "4,194,304 latents of 768 numbers, k 32" in done.stdout
    for arguments, message in (
        ((*wide, "--n-ranks", "1", "--reserved-gb", "60"), "n_ranks must be larger: 1 of h100 do not have the memory"),
        ((*wide, "--architecture", "topk"), "architecture must be 'switch' or 'sparse_topk' with --plan; got 'topk'"),
        ((*wide, "--architecture", "sparse_topk", "--n-experts", "8"), "n_experts must be 1 unless architecture is"),
        ((*wide, "--architecture", "sparse_topk", "--n-active-experts", "2"), "n_active_experts must be 1 unless"),
        ((*wide, "--n-ranks", "16", "--n-experts", "24"), "n_ranks must divide n_experts=24; got 16"),
    ):
        refused = run_command(*arguments)
        assert refused.returncode != 0
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
