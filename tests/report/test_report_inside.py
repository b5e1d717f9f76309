"""The sections that look inside: their numbers are those of the analysis on the same text."""

import pytest
import torch
from helpers import E, F, M, switch_sae
from helpers.report_pages import HOSTILE, Tags, dense, plots_of

from sae_lens_switch.analysis import CoActivation, compare_saes, count_labels, mutual_information, router_alignment
from sae_lens_switch.report import load_run, write_report
from sae_lens_switch.report.inside import together

pytestmark = [
    pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]


def test_neighbours_and_alignment_are_those_of_the_weights(page, output):
    plots, sae = plots_of(page), load_run(output).sae
    for name, W in (("decoder", sae.W_dec), ("encoder", sae.W_enc.T)):
        unit = torch.nn.functional.normalize(W.detach(), dim=1)
        cosine = (unit @ unit.T).fill_diagonal_(-2)
        same = torch.arange(F)[:, None] // M == torch.arange(F) // M
        for trace, mask in zip(plots[f"nearest-{name}"]["data"], (same, ~same), strict=True):
            expected = cosine.where(mask, torch.tensor(-2.0)).amax(1)
            assert sum(trace["y"]) == F
            counted = [x for x, n in zip(trace["x"], trace["y"], strict=True) for _ in range(int(n))]
            assert (torch.tensor(counted) - expected.sort().values).abs().max() < 0.021  # half a bin
    found = router_alignment(sae, n_permutations=200)
    own, null = plots["alignment-encoder"]["data"]
    assert own["y"] == pytest.approx(found.encoder.cosine_E.tolist(), abs=1e-4)
    assert null["y"] == pytest.approx(found.encoder.null_cosine_PE.mean(0).tolist(), abs=1e-4)


def test_choices_are_those_of_the_text(page, output):
    plots = plots_of(page)
    sae, tokens, x, counts, _ = dense(output)
    experts = ((x - sae.b_router) @ sae.W_router).argmax(-1)
    of_tokens = count_labels(experts[counts], tokens[counts], E)
    places = torch.arange(tokens.shape[1] - 1).expand(len(tokens), -1)
    of_places = count_labels(experts[:, 1:][counts[:, 1:]], places[counts[:, 1:]], E)
    found = [mutual_information(c) for c in (of_tokens, of_places)]
    beyond, shuffled = plots["information"]["data"]
    assert beyond["y"] == pytest.approx([one.corrected for one in found], abs=1e-3)
    assert shuffled["y"] == pytest.approx([one.shuffled for one in found], abs=1e-3)
    for row in plots["clusters"]["data"][0]["z"]:
        assert sum(row) == pytest.approx(1, abs=1e-3)
    assert len(plots["places"]["data"][0]["z"]) == E
    assert not any("<" in label for label in plots["clusters"]["layout"]["yaxis"]["ticktext"])  # plotly reads HTML
    assert HOSTILE[0] not in plots["clusters"]["layout"]["yaxis"]["ticktext"]


def test_another_sae_is_compared_on_the_same_activations(output, tmp_path):
    other = switch_sae(dtype="float32")
    other.cfg.metadata = load_run(output).sae.cfg.metadata
    other.save_model(str(tmp_path / "other"))
    page = write_report(output, tmp_path / "page.html", n_latents=0, compare=tmp_path / "other").read_text()
    sae, _, x, counts, _ = dense(output)
    expected = compare_saes({"this SAE's": sae, "the other's": other}, x[counts], n_tokens=1024)
    plots = plots_of(page)
    assert plots["cka"]["data"][0]["x"] == list(expected.names)
    for name, value_RR in (("cka", expected.cka_RR), ("rsa", expected.rsa_RR)):
        found = torch.tensor(plots[name]["data"][0]["z"], dtype=torch.float64)
        torch.testing.assert_close(found, value_RR, atol=2e-3, rtol=0)
    assert "similarity" in Tags(page).sections
    switch_sae().save_model(str(tmp_path / "foreign"))
    with pytest.raises(ValueError, match="compare must be an SAE of the same activations"):
        write_report(output, tmp_path / "page.html", compare=tmp_path / "foreign")


def test_experts_chosen_together_have_a_section_where_tokens_have_several():
    assert together(None) is None
    counts = torch.tensor([[9, 4, 5], [4, 9, 5], [5, 5, 10]])
    section = together(CoActivation(counts, torch.full((3, 3), 5.0).fill_diagonal_(torch.nan)))
    assert section.plots[0].data[0]["z"][0] == [None, 0.8, 1.0]
