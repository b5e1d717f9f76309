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
    "switch, biased": {"load_balancing": "bias"},
    "switch, overlap": {"expert_overlap_coefficient": 0.01},
    "switch with a shared expert": {"n_shared_experts": 1, "shared_width": 768},
}


def make_sae(architecture: str):
    options = {**SHAPE, "aux_loss_coefficient": 0.0}
    if architecture.startswith("switch"):
        options |= OPTIONS.get(architecture, {})
        return SwitchTrainingSAE(SwitchTrainingSAEConfig(**options, n_experts=32))
    return SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**options))


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "float32"])
@pytest.mark.parametrize(
    ("architecture", "at_most"),
    [
        ("switch", 76),
        ("switch, biased", 80),
        ("switch, overlap", 150),
        ("switch with a shared expert", 133),
        ("sparse_topk", 73),
    ],
)
def test_a_step_launches_few_kernels_and_never_waits(architecture, at_most, autocast, monkeypatch):
    launches = launches_of_a_step(make_sae(architecture), B, autocast, monkeypatch)
    assert launches.n <= at_most, f"{launches.n} launches, at most {at_most} so far; by place:\n{launches.table()}"
    assert launches.waits == []
    assert launches.n > at_most - 10, "fewer launches than ever: lower the bound"
