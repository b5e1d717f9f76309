"""Hooked models of both kinds, and tokens for them."""

import copy

import pytest
import torch
from helpers import (
    tiny_tokenizer,
)
from helpers.hooked_models import llama
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor


@pytest.fixture(scope="module")
def bridge():
    return SAETransformerBridge.boot_transformers(
        "meta-llama/Llama-2-7b-hf", hf_model=copy.deepcopy(llama()), tokenizer=tiny_tokenizer()
    )


@pytest.fixture(params=["HookedSAETransformer", "SAETransformerBridge"])
def hooked(request, model):
    return model if request.param == "HookedSAETransformer" else request.getfixturevalue("bridge")


@pytest.fixture
def tokens(dataset) -> Tensor:
    return torch.tensor(dataset[:3]["tokens"])
