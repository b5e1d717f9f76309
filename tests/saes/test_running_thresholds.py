"""The running thresholds of BatchTopK SAEs of every kind are in float64, whatever the dtype of their SAE."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import D, E, F, K, random_input
from helpers.contract import step_input
from sae_lens.saes.sae import TrainingSAE

from sae_lens_switch import (
    SparseBatchTopKTrainingSAE,
    SparseBatchTopKTrainingSAEConfig,
    SparseBatchTopKTrainingTranscoder,
    SparseBatchTopKTrainingTranscoderConfig,
    SparseMatryoshkaBatchTopKTrainingSAE,
    SparseMatryoshkaBatchTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
    SwitchTrainingTranscoder,
    SwitchTrainingTranscoderConfig,
)

SWITCH = {"n_experts": E, "activation": "batchtopk"}
MAKE: dict[str, Callable[..., Any]] = {
    "switch": lambda **f: SwitchTrainingSAE(SwitchTrainingSAEConfig(**SWITCH, **f)),
    "switch_transcoder": lambda **f: SwitchTrainingTranscoder(SwitchTrainingTranscoderConfig(**SWITCH, d_out=D, **f)),
    "sparse": lambda **f: SparseBatchTopKTrainingSAE(SparseBatchTopKTrainingSAEConfig(**f)),
    "sparse_transcoder": lambda **f: SparseBatchTopKTrainingTranscoder(
        SparseBatchTopKTrainingTranscoderConfig(d_out=D, **f)
    ),
    "matryoshka": lambda **f: SparseMatryoshkaBatchTopKTrainingSAE(
        SparseMatryoshkaBatchTopKTrainingSAEConfig(matryoshka_widths=[F // 2, F], **f)
    ),
}
each_kind = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())


def sae_of(make: Callable[..., Any], dtype: str = "float32") -> Any:
    torch.manual_seed(0)
    sae = make(d_in=D, d_sae=F, k=K, dtype=dtype, topk_threshold_lr=1e-3)
    sae.topk_threshold.fill_(0.7)  # which bfloat16 cannot say, nor the little that a step moves it by
    return sae


def assert_moves(sae: Any) -> None:
    assert sae.W_dec.dtype == torch.bfloat16
    assert sae.topk_threshold.dtype == torch.float64
    before = sae.topk_threshold.clone()
    x = random_input(64, sae.batch_width, dtype=torch.bfloat16)
    for _ in range(3):
        sae.training_forward_pass(step_input(x))
    change = (sae.topk_threshold - before).abs()
    assert 0 < change.max() < 0.01


@each_kind
def test_a_change_of_dtype_leaves_the_threshold_as_it_was(make):
    sae = sae_of(make)
    before = sae.topk_threshold.clone()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16):
        sae.to(dtype)
        assert sae.topk_threshold.dtype == torch.float64
        assert torch.equal(sae.topk_threshold, before)
    assert_moves(sae)


@each_kind
@pytest.mark.parametrize("saved_as", ["float32", "bfloat16"])
def test_the_threshold_of_an_sae_that_is_loaded_in_bfloat16_moves(make, saved_as, tmp_path):
    sae_of(make, saved_as).save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path, dtype="bfloat16")
    torch.testing.assert_close(loaded.topk_threshold.double().mean().item(), 0.7, rtol=2**-8, atol=0)
    assert_moves(loaded)
