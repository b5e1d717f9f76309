"""How many kernels a whole training step launches on a GPU, counted on torch's meta device at the sizes of docs/gpu."""

import pytest
from helpers.launches import launches_of_a_step

from sae_lens_switch import (
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)

pytest.importorskip("triton")
B, SHAPE = 8192, {"d_in": 768, "d_sae": 24576, "k": 32, "device": "meta", "dtype": "float32"}

OPTIONS = {
    "biased": {"load_balancing": "bias"},
    "overlap": {"expert_overlap_coefficient": 0.01},
    "a shared expert": {"n_shared_experts": 1, "shared_width": 768},
    "two per token": {"n_active_experts": 2},
}


def make_sae(architecture: str, **fields):
    options = {**SHAPE, "aux_loss_coefficient": 0.0, **fields}
    if architecture.startswith("switch"):
        _, n_experts, *which = architecture.split(maxsplit=2)
        options |= {} if not which else OPTIONS[which[0].removeprefix("with ")]
        return SwitchTrainingSAE(SwitchTrainingSAEConfig(**options, n_experts=int(n_experts)))
    return SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**options))


def test_torchs_grouped_product_launches_two_more_kernels_and_never_waits(monkeypatch):
    from sae_lens_switch_kernels.triton_backend import grouped_library

    monkeypatch.delenv("SAE_LENS_SWITCH_GROUPED", raising=False)
    monkeypatch.setattr(grouped_library, "_is_hopper", lambda _: True)
    launches = launches_of_a_step(make_sae("switch 32"), B, True, monkeypatch)
    assert sum(n for (_, name), n in launches.places.items() if name == "_grouped_mm") == 4
    assert launches.n == 32, launches.table()
    assert launches.waits == []


@pytest.mark.parametrize(
    ("architecture", "autocast", "at_most"),
    [
        ("switch 32", True, 30),
        ("switch 128", True, 30),
        ("switch 128", False, 29),
        ("switch 32", False, 41),  # sparse products: in float32 dense ones would take twice as long
        ("switch 32 biased", True, 33),
        ("switch 32 biased", False, 44),
        ("switch 32 overlap", True, 108),
        ("switch 32 overlap", False, 118),
        ("switch 32 with a shared expert", True, 87),
        ("switch 32 with a shared expert", False, 82),
        ("sparse_topk", True, 47),
        ("sparse_topk", False, 43),
    ],
)
def test_a_step_launches_few_kernels_and_never_waits(architecture, at_most, autocast, monkeypatch):
    launches = launches_of_a_step(make_sae(architecture), B, autocast, monkeypatch)
    assert launches.n <= at_most, f"{launches.n} launches, at most {at_most} so far; by place:\n{launches.table()}"
    assert launches.waits == []
    assert launches.n > at_most - 10, "fewer launches than ever: lower the bound"


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("with_", ["", " with two per token", " with a shared expert"])
def test_a_captured_step_with_dead_latents_never_waits(with_, autocast, monkeypatch):
    sae = make_sae(f"switch 32{with_}", aux_loss_coefficient=1 / 32)
    assert sae.can_mask_dead
    launches = launches_of_a_step(sae, B, autocast, monkeypatch, cuda_graph=True)
    assert any("dead_latents" in place for place, _ in launches.places)
    assert launches.waits == []
