"""SAELens's SAEs beside ours on sparse kernels, same weights: TopK, AbsTopK, BatchTopK, Matryoshka BatchTopK."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from sae_lens.saes.abstopk_sae import AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

from helpers import D, randomize
from sae_lens_switch import (
    SparseAbsTopKTrainingSAE,
    SparseAbsTopKTrainingSAEConfig,
    SparseBatchTopKTrainingSAE,
    SparseBatchTopKTrainingSAEConfig,
    SparseMatryoshkaBatchTopKTrainingSAE,
    SparseMatryoshkaBatchTopKTrainingSAEConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
)

F, K, TOPK_K = 42, 3.7, 5
tightly = {"rtol": 1e-9, "atol": 1e-10}


class Kind(NamedTuple):
    name: str  # SAELens's
    ours: type
    our_config: type
    stock: type
    stock_config: type
    options: dict[str, Any]
    autocast_error: float = 0.06  # of a gradient, in units of its norm


TOPK = Kind(
    "topk",
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    {"k": TOPK_K},
    autocast_error=0.05,
)
ABSTOPK = Kind(
    "abstopk",
    SparseAbsTopKTrainingSAE,
    SparseAbsTopKTrainingSAEConfig,
    AbsTopKTrainingSAE,
    AbsTopKTrainingSAEConfig,
    {"k": TOPK_K},
)
KINDS = [
    Kind(
        "batchtopk",
        SparseBatchTopKTrainingSAE,
        SparseBatchTopKTrainingSAEConfig,
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        {},
    ),
    Kind(
        "matryoshka_batchtopk",
        SparseMatryoshkaBatchTopKTrainingSAE,
        SparseMatryoshkaBatchTopKTrainingSAEConfig,
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {"matryoshka_widths": [5, 19, F]},
    ),
]
both = pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
_ALL = [TOPK, ABSTOPK, *KINDS]
each = pytest.mark.parametrize("kind", _ALL, ids=[kind.name for kind in _ALL])
rescaling = pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "as they are"])


def options_of(kind: Kind, **options) -> dict[str, Any]:
    return copy.deepcopy({"d_in": D, "d_sae": F, "k": K, "dtype": "float64", **kind.options, **options})


def pair(kind: Kind, seed: int = 0, **options) -> tuple[Any, Any]:
    """Ours and SAELens's with the same random weights."""
    ours = randomize(kind.ours(kind.our_config(**options_of(kind, **options))), seed)
    stock = kind.stock(kind.stock_config(**options_of(kind, **options)))
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def step_input(x: Tensor, dead: Tensor | None = None) -> TrainStepInput:
    return TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=3, is_logging_step=False)


def dead_latents(n: int, seed: int = 5) -> Tensor:
    mask = torch.zeros(F, dtype=torch.bool)
    mask[torch.randperm(F, generator=torch.Generator().manual_seed(seed))[:n]] = True
    return mask


def loss_and_gradients(sae, x: Tensor, dead: Tensor | None = None):
    sae.zero_grad()
    output = sae.training_forward_pass(step_input(x, dead))
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in sae.named_parameters()}


def assert_same_step(ours, stock, x: Tensor, dead: Tensor | None = None, close=tightly) -> None:
    (a, a_grads), (b, b_grads) = loss_and_gradients(ours, x, dead), loss_and_gradients(stock, x, dead)
    assert list(a.losses) == list(b.losses)
    for name in a.losses:
        torch.testing.assert_close(a.losses[name], b.losses[name], **close)
    torch.testing.assert_close(a.loss, b.loss, **close)
    torch.testing.assert_close(a.sae_out, b.sae_out, **close)
    torch.testing.assert_close(a.feature_acts.to_dense(), b.feature_acts.detach(), **close)
    assert a.feature_acts.is_coalesced()
    assert not a.feature_acts.requires_grad
    for name in b_grads:
        torch.testing.assert_close(a_grads[name], b_grads[name], **close, msg=lambda m, name=name: f"{name}: {m}")
    assert_same_threshold(ours, stock, **close)
    if "topk_threshold" in a.metrics:
        torch.testing.assert_close(a.metrics["topk_threshold"], ours.topk_threshold, rtol=0, atol=0)
        assert ours.topk_threshold.dtype == torch.float64


def assert_same_threshold(ours, stock, **close) -> None:
    """Both have one, or neither."""
    mine, theirs = (dict(sae.named_buffers()).get("topk_threshold") for sae in (ours, stock))
    assert (mine is None) == (theirs is None)
    if mine is not None:
        torch.testing.assert_close(mine, theirs, **close)
