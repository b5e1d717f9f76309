"""A run, and its report, for all tests of the report."""

import pytest
from helpers import tiny_dataset
from helpers.report_pages import save_language_model, train

from sae_lens_switch.report import write_report


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("report") / "language model")


@pytest.fixture(scope="session")
def output(tmp_path_factory, language_model):
    """A run's output folder, with the text that it is reported on beside the SAE."""
    folder = tmp_path_factory.mktemp("run")
    output = train(folder, language_model, tiny_dataset())
    tiny_dataset(12).save_to_disk(output / "held_out")
    return output


@pytest.fixture(scope="session")
def page(output):
    return write_report(output, n_latents=8).read_text()
