import os
import signal

# Before torch: small matrices only get slower on more threads. Nothing may look for the hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import torch

# Before Triton: without a GPU its kernels are interpreted.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import pytest

# Before its import: a failing assert there shows its values, as one in a test does.
pytest.register_assert_rewrite("helpers")

from helpers import tiny_dataset, tiny_model  # noqa: E402
from helpers.pretended_gpu import Constructions, Copies  # noqa: E402
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY  # noqa: E402

# A suite in the background ignores SIGINT, one under nohup SIGHUP; tests, and processes they start, must not.
for signum, usual in {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}.items():
    if signal.getsignal(signum) is signal.SIG_IGN:
        signal.signal(signum, usual)


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was():
    """Whatever others leave behind: SAELens's runner its handlers of signals, SAEDashboard its variables."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    variables, classes = dict(os.environ), dict(SAE_TRAINING_CLASS_REGISTRY)
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)
    SAE_TRAINING_CLASS_REGISTRY.clear()
    SAE_TRAINING_CLASS_REGISTRY.update(classes)


@pytest.fixture
def copies():
    """What is copied from the host to torch's meta device, by name."""
    found: list[str] = []
    with torch.no_grad(), Copies(found), Constructions(found):
        yield found


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def dataset():
    return tiny_dataset()


# Coverage leaves out what they test, kernels in an interpreter and forked processes, and would slow them most.
UNSEEN = ("tests/kernels/triton_backend/", "tests/parallel/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(UNSEEN):
            item.add_marker("no_cover")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("campaign", "the randomised trials of tests/campaign")
    group.addoption("--campaign-seed", type=int, default=0, help="another seed, other trials")
    group.addoption("--campaign-count", type=int, help="trials of each kind, in place of its own number")
