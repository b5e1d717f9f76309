"""Which SAE of a run the report is about."""

import shutil

import pytest
import torch
from helpers import D, K, tiny_dataset
from helpers.report_pages import Tags, plots_of, train

from sae_lens_switch.report import find_sae, load_run, write_report

pytestmark = [
    pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]


def test_the_sae_is_found_from_what_a_user_has(tmp_path, output):
    assert find_sae(output) == output
    shutil.copytree(output, tmp_path / "quickstart" / "sae")
    assert find_sae(tmp_path / "quickstart") == tmp_path / "quickstart" / "sae"
    for name in ("900", "final_1000", "diverged_80"):
        shutil.copytree(output, tmp_path / "checkpoints" / "abc" / name)
    assert find_sae(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "abc" / "final_1000"
    shutil.copytree(output, tmp_path / "checkpoints" / "another" / "900")
    with pytest.raises(ValueError, match=r"RUN must hold one SAE; .* has 4: abc/900"):
        find_sae(tmp_path / "checkpoints")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there is no cfg\.json in"):
        find_sae(tmp_path / "empty")
    with pytest.raises(ValueError, match="is no folder"):
        find_sae(tmp_path / "nowhere")


@pytest.mark.parametrize("normalize", ["expected_average_only_in", "covariance_whitening"])
def test_a_checkpoint_is_the_sae_of_the_raw_activations(normalize, tmp_path, language_model):
    fields = {"save_final_checkpoint": True, "n_batches_for_norm_estimate": 3, "normalize_activations": normalize}
    output = train(tmp_path, language_model, tiny_dataset(), **fields)
    x = torch.randn(50, D)
    final, checkpoint = (load_run(folder).sae for folder in (output, tmp_path / "checkpoints"))
    torch.testing.assert_close(checkpoint(x), final(x))
    assert write_report(tmp_path / "checkpoints", contexts=0).exists()


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_architectures_without_experts_have_a_page_too(architecture, tmp_path, language_model):
    fields = {
        "architecture": architecture,
        "save_final_checkpoint": True,
        **({"k": K} if architecture == "topk" else {}),
    }
    train(tmp_path, language_model, tiny_dataset(), **fields)
    tiny_dataset(8).save_to_disk(tmp_path / "text")
    for run in (tmp_path / "output", tmp_path / "checkpoints"):
        page = write_report(run, dataset=str(tmp_path / "text"), n_latents=4).read_text()
        sections = [name for name in Tags(page).sections if name != "density"]  # of windows that were not empty
        assert sections == ["summary", "curves", "neighbours", "similarity", "duplicates", "latents"]
        assert len(plots_of(page)["density"]["data"][0]["y"]) == 40


def test_shared_latents_are_shown_as_such_and_belong_to_no_expert(tmp_path, language_model):
    output = train(tmp_path, language_model, tiny_dataset(), n_shared_experts=1, shared_width=16)
    tiny_dataset(12).save_to_disk(output / "held_out")
    text = write_report(output, n_latents=10, latents=[3, 39], threshold=0.5).read_text()
    tags, plots = Tags(text), plots_of(text)
    assert "40 latents, 16 of them shared, 4 experts" in tags.text
    assert "Of the 16 shared latents," in tags.text
    assert "Latent 3, shared" in tags.text
    assert "Latent 39, expert 3" in tags.text
    assert all(len(series["y"]) == 4 for name in ("load", "dead") for series in plots[name]["data"])
    assert len(plots["duplicates"]["data"][0]["z"]) == 5
    assert sum(plots["density"]["data"][0]["y"]) == (load_run(output).density_F > 0).sum()
