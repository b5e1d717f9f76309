"""What the tests of SAELens's contract share: SAEs of both kinds, and the dense formulas that they are held against."""

import pytest
import torch
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from torch import Tensor, nn

from helpers import HOOK_Z, D, E, F, randomize, switch_sae, training_config
from sae_lens_switch import SwitchSAE, SwitchTrainingSAE

PARAMETERS = {
    "W_enc": (D, F),
    "W_dec": (F, D),
    "b_dec": (D,),
    "W_router": (D, E),
    "b_router": (D,),
}
RUN_TIME_NORMALISATIONS = ["layer_norm", "constant_norm_rescale"]
ROUTER = ("W_router", "b_router")
exactly = {"rtol": 0, "atol": 0}
tightly = {"rtol": 1e-10, "atol": 1e-10}


def make(kind: str, **options):
    """A randomised inference or training SAE with the same weights."""
    if kind == "inference":
        return switch_sae(**options)
    return randomize(SwitchTrainingSAE(training_config(**options)))


both_kinds = pytest.mark.parametrize("kind", ["inference", "training"])


def step_input(x: Tensor, coefficient: float = 0.5, step: int = 1) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x,
        coefficients={"load_balance": coefficient},
        dead_neuron_mask=torch.zeros(F, dtype=torch.bool),
        n_training_steps=step,
        is_logging_step=False,
    )


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def hook_z_metadata() -> SAEMetadata:
    return SAEMetadata(hook_name=HOOK_Z)


def with_norms(norms: Tensor, kind: str = "inference", **options):
    sae = make(kind, **options)
    with torch.no_grad():
        W = sae.W_dec.double()
        sae.W_dec.copy_(W / W.norm(dim=1, keepdim=True) * norms[:, None])
    return sae


def float32_sae() -> SwitchSAE:
    return switch_sae(dtype="float32")
