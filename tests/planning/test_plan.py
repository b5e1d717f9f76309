"""Plans for clusters: memory, traffic, time, and the search for the fewest GPUs and the best number of experts."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import ROOT

from sae_lens_switch.planning.cluster_step import smallest
from sae_lens_switch.planning.hardware import HARDWARE
from sae_lens_switch.planning.latent_plan import LatentPlan
from sae_lens_switch.planning.plan import Plan, fastest
from sae_lens_switch.planning.step_cost import Cost
from sae_lens_switch.planning.traffic import received, skew, uneven_loads

H100, H200 = HARDWARE["h100"], HARDWARE["h200"]
PLAN = Plan(H100, d_in=768, d_sae=1 << 22, k=32, n_experts=256, n_ranks=16)


def test_alone_a_plan_is_the_cost_of_the_sae():
    alone = Plan(H100, 768, 24576, 32, 32, tokens_per_rank=8192, optimizer="adam", precision="float32", reserved=0)
    cost = Cost("switch", 768, 24576, 32, 32, batch=8192)
    assert alone.local == cost
    assert sum(alone.traffic.values()) == 0
    assert {name: alone.memory[name] for name in cost.memory} == cost.memory
    machine = H100.at("float32")
    assert alone.step_seconds == pytest.approx(cost.step_seconds(machine))


def test_traffic_by_hand_and_independent_of_the_width():
    sent = PLAN.traffic
    assert sent["tokens"] == 4096 * 768 * 4 * 15 / 16
    assert sent["statistics of the batch"] == 2 * 15 / 16 * 8 * (256 + 768 + 1) + 8 * 15
    assert sent["gradients of the router and losses"] == 2 * 15 / 16 * 4 * (2 * 768 + 768 * 256 + 3)
    assert replace(PLAN, d_sae=1 << 26).traffic == sent
    # With A = 2, a token goes out twice, its reconstruction comes back twice, and its gradient goes out twice.
    two = replace(PLAN, n_active_experts=2)
    for name in ("tokens", "parts of the reconstruction", "the gradient of the reconstruction"):
        assert two.traffic[name] == 2 * sent["tokens"]
    assert two.traffic["candidates"] == 4 * two.traffic["choices"] == 2 * 4096 * 32 * 4 * 15 / 16
    assert two.seconds()["all-to-all"] > 6 * PLAN.seconds()["all-to-all"]
    assert two.seconds()["latency"] == pytest.approx(11 / 6 * PLAN.seconds()["latency"])


def test_the_network_is_slower_than_a_node():
    within, beyond = (replace(PLAN, n_ranks=n).seconds() for n in (8, 16))
    assert within["all-to-all"] == pytest.approx(
        4096 * 768 * 4 * 7 / 8 / H100.link * replace(PLAN, n_ranks=8).skew, rel=1e-9
    )
    assert beyond["all-to-all"] == pytest.approx(PLAN.traffic["tokens"] * PLAN.skew * 8 / 15 / H100.network, rel=1e-9)
    assert beyond["sums and statistics"] > 5 * within["sums and statistics"]


def test_weights_and_moments_are_divided_among_ranks():
    one, four = (replace(PLAN, n_ranks=n).memory for n in (1, 4))
    for part in ("weights", "optimiser", "working copies"):
        assert four[part] == pytest.approx(one[part] / 4, rel=1e-3)
    assert four["router"] == pytest.approx(one["router"], rel=0.5)  # all of it, and the busiest has more tokens
    assert four["router"] > one["router"]


def test_moments_of_two_bytes_need_fewer_gpus():
    plan = Plan(HARDWARE["h100"], 2304, 10**9, 64, n_experts=1)
    whole, low = smallest(plan), smallest(replace(plan, bytes_per_moment=2))
    assert low.fits
    assert low.n_ranks < 0.8 * whole.n_ranks
    assert low.local.bytes_per_moment == 2


def test_latents_are_rounded_up_to_whole_experts():
    plan = Plan(H100, 8, 1001, 4, 4, n_ranks=2)
    assert plan.expert_width == 251
    assert plan.local.d_sae == 2 * 251


def test_the_fastest_number_of_experts_is_the_best_of_all():
    found = fastest(PLAN)
    assert found is not None
    times = {E: replace(PLAN, n_experts=E).step_seconds for E in (16 * 2**i for i in range(9))}
    assert found.n_experts == min(times, key=times.__getitem__)
    assert found.step_seconds < PLAN.step_seconds
    fixed = fastest(PLAN, [64])
    assert fixed is not None
    assert fixed.n_experts == 64


def test_the_smallest_plan_fits_and_no_smaller_one_does():
    found = smallest(replace(PLAN, d_sae=10_000_000))
    assert found.fits
    assert found.n_ranks == 4
    assert fastest(replace(found, n_experts=2, n_ranks=2)) is None
    wide = smallest(replace(PLAN, d_sae=100_000_000))
    assert wide.n_ranks % 8 == 0
    assert fastest(replace(wide, n_experts=wide.n_ranks - 8, n_ranks=wide.n_ranks - 8)) is None


def test_a_step_grows_as_the_root_of_the_width():
    """On GPUs that grow in number with the dictionary; the router's own sum and what each GPU reads do not count."""
    small, large = (fastest(replace(PLAN, d_sae=F, n_experts=N, n_ranks=N)) for F, N in ((10**8, 64), (10**10, 6400)))
    assert small is not None
    assert large is not None
    parts = [sum(p.seconds()[name] for name in ("router", "top-k")) for p in (small, large)]
    assert 5 < parts[1] / parts[0] < 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_ranks": 3}, "n_ranks must divide n_experts=256; got 3"),
        ({"n_active_experts": 300}, "n_active_experts must be at most n_experts=256; got 300"),
        ({"load_spread": -1.0}, "load_spread must be finite and not negative; got -1.0"),
        ({"d_in": 0}, "d_in must be a whole number, at least 1; got 0"),
        ({"n_experts": 0}, "n_experts must be at least 1; got 0"),
        ({"tokens_per_rank": 0}, "tokens_per_rank must be a whole number, at least 1; got 0"),
        ({"k": 16385}, "k must be at most n_active_experts . d_sae / n_experts = 16384; got 16385"),
        ({"reserved": -1.0}, "reserved must be a finite number of bytes, at least 0; got -1.0"),
    ],
)
def test_plans_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **change)


@pytest.mark.parametrize(("name", "value"), [("network", 0.0), ("gpus_per_node", 0), ("memory", float("inf"))])
def test_hardware_that_cannot_be_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*; got {value}"):
        replace(H100, **{name: value})


def test_the_owner_of_an_expert_routes_the_tokens_it_receives_once_more():
    """Logits at home, logits and gradients at the owner, where there may be more; of several experts only at home."""
    once = 2 * 4096 * 768 * 256 / H100.flops["float32"]
    uneven = replace(PLAN, load_spread=0.5)
    assert uneven.skew > 1.1
    assert uneven.seconds()["router"] == pytest.approx((1 + 3 * uneven.skew) * once)
    assert uneven.memory["router"] == pytest.approx(16 * 768 * 256 + 12 * 4096 * 256 * uneven.skew)
    for other in (replace(PLAN, n_ranks=1), replace(PLAN, n_active_experts=2)):
        assert other.seconds()["router"] == pytest.approx(3 * once)
        assert other.memory["router"] == 16 * 768 * 256 + 12 * 4096 * 256


def test_a_given_number_of_experts_is_divided_among_as_many_gpus_as_divide_it():
    found = smallest(replace(PLAN, d_sae=12_000_000, n_experts=1, n_ranks=1), [6])
    assert (found.n_experts, found.n_ranks) == (6, 6)
    with pytest.raises(ValueError, match="n_experts must be at least 1; got 0"):
        smallest(PLAN, [0])


def test_a_dictionary_too_large_for_every_cluster_is_refused():
    with pytest.raises(ValueError, match="d_sae must be smaller, or the GPUs larger: d_in=768, d_sae=100000000000"):
        smallest(replace(PLAN, d_sae=10**11), most_ranks=64)
    with pytest.raises(ValueError, match="needs more than 8 of h100"):
        smallest(replace(PLAN, reserved=1e12), most_ranks=8)


# Divided latents


TOPK = LatentPlan(H100, d_in=768, d_sae=1 << 22, k=32, n_ranks=16)


def test_divided_latents_of_one_gpu_are_the_cost_of_the_sae():
    options = {"optimizer": "adam", "precision": "float32", "reserved": 0}
    alone = LatentPlan(H100, 768, 24576, 32, tokens_per_rank=8192, **options)
    cost = Cost("sparse_topk", 768, 24576, 32, batch=8192)
    assert sum(alone.traffic.values()) == 0
    assert alone.step_seconds == pytest.approx(cost.step_seconds(H100.at("float32")))
    assert sum(alone.memory.values()) == sum(cost.memory.values())


def test_all_gpus_encode_all_tokens_but_each_decodes_as_many_codes_as_its_own_have():
    twice = replace(TOPK, n_ranks=32).seconds()
    assert twice["encoder"] == pytest.approx(TOPK.seconds()["encoder"], rel=0.05)
    assert twice["top-k"] == pytest.approx(TOPK.seconds()["top-k"])
    assert twice["decoder"] == pytest.approx(TOPK.seconds()["decoder"])
    wider = replace(TOPK, d_sae=1 << 24)
    assert wider.traffic == TOPK.traffic
    assert wider.seconds()["top-k"] == pytest.approx(4 * TOPK.seconds()["top-k"])
    switch = fastest(Plan(H100, 768, 1 << 22, 32, n_experts=16, n_ranks=16))
    assert switch is not None
    assert switch.step_seconds < TOPK.step_seconds / 3


def test_the_smallest_plan_of_divided_latents_fits_and_no_smaller_one_does():
    found = smallest(replace(TOPK, d_sae=10_000_000))
    assert found.fits
    assert found.on(found.n_ranks // 2) is None
    assert found.width * found.n_ranks >= 10_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_ranks": 0}, "n_ranks must be a whole number, at least 1; got 0"),
        ({"k": 0}, "k must be a whole number, at least 1; got 0"),
        ({"d_sae": 16}, "k must be at most d_sae=16; got 32"),
    ],
)
def test_plans_of_divided_latents_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TOPK, **change)


def test_uneven_routing():
    load_E = uneven_loads(64, 0.5)
    assert load_E.sum() == pytest.approx(1)
    assert np.log(load_E).std() == pytest.approx(0.5, rel=0.3)
    tokens_N = received(load_E, 8, 100_000)
    assert tokens_N.sum() == 100_000
    np.testing.assert_allclose(tokens_N / 100_000, load_E.reshape(8, 8).sum(1), atol=0.006)
    assert skew(64, 0.0, 8, 1_000_000) < 1.02
    assert skew(64, 0.5, 64, 1_000_000) > skew(64, 0.5, 8, 1_000_000) > 1.05
    with pytest.raises(ValueError, match="n_ranks must divide the number of experts, 64; got 7"):
        received(load_E, 7, 100)
    with pytest.raises(ValueError, match="shares that add up to 1; their sum is 2"):
        received(2 * load_E, 8, 100)


def test_the_h200_is_the_one_that_was_measured():
    def ms(folder, name):
        return json.loads((ROOT / "docs" / "gpu" / folder / "primitives.json").read_text())["cases"][name]

    at = "B 8,192 D 768 F 24,576 k 32, fp32"
    one_pass = 8192 * 32 * 768 * 4
    assert H200.machine.stream == pytest.approx(ms("4-kernels", "ceiling, copy")["per_second"], rel=0.02)
    for precision, name in {"float32": "fp32", "tf32": "tf32", "bfloat16": "bf16"}.items():
        measured = ms("4-kernels", f"ceiling, {name}")["per_second"]
        assert H200.flops[precision] == pytest.approx(measured, rel=0.02)
    decode, grads = ms("1-first", f"sparse_decode, {at}")["ms"], ms("1-first", f"latent_weight_grads, {at}")["ms"]
    assert H200.machine.gather == pytest.approx(one_pass / decode * 1e3, rel=0.02)
    assert H200.machine.regather == pytest.approx(2 * one_pass / grads * 1e3, rel=0.02)
