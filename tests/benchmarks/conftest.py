"""What these tests import lies in folders of scripts."""

import sys

import pytest
from helpers import ROOT

sys.path[:0] = [str(ROOT / "examples" / "experiments"), str(ROOT / "benchmarks"), str(ROOT / "examples")]

import activations  # noqa: E402
from helpers import experiments  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("source")
    experiments.write_model(found / "model")
    experiments.write_text(found / "text")
    return found


@pytest.fixture(scope="module")
def cache(folder, tmp_path_factory):
    found = experiments.cache_of(folder, experiments.contexts(folder), tmp_path_factory.mktemp("cache"))
    list(found.fill())
    return found


@pytest.fixture(scope="module")
def layer(cache):
    return activations.Layer.of(cache, 0)
