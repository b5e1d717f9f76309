import os

# Before torch: small matrices only get slower on more threads. Nothing may look for the hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import torch

# Before Triton: without a GPU its kernels are interpreted.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import pytest
from helpers import tiny_dataset, tiny_model


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def dataset():
    return tiny_dataset()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("campaign", "the randomised trials of tests/campaign")
    group.addoption("--campaign-seed", type=int, default=0, help="another seed, other trials")
    group.addoption("--campaign-count", type=int, help="trials of each kind, in place of its own number")
