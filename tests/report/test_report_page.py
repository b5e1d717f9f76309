"""What the page says, and that no text of any origin can do harm in it."""

import json

import pytest
import torch
from helpers import E, F, M
from helpers.report_pages import HOSTILE, SECTIONS, Tags, dense, plots_of

from sae_lens_switch import SwitchSAE
from sae_lens_switch.report import load_run, write_report
from sae_lens_switch.report import write as write_module
from sae_lens_switch.report.page import environment
from sae_lens_switch.training.history import FILENAME, read_history

pytestmark = [
    pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]


def test_the_page_has_every_section_and_the_numbers(page, output):
    tags, plots = Tags(page), plots_of(page)
    assert tags.sections == SECTIONS
    sae, tokens, x, counts, acts = dense(output)
    load = torch.bincount(((x[counts] - sae.b_router) @ sae.W_router).argmax(-1), minlength=E) / counts.sum()
    assert plots["load"]["data"][0]["y"] == pytest.approx((100 * load).tolist(), rel=1e-3)
    dead = (acts == 0).all(0).all(0).view(E, M).sum(1).tolist()
    assert [series["y"] for series in plots["dead"]["data"] if "text" in series["name"]] == [dead]
    rows = read_history(output / FILENAME)
    assert plots["loss"]["data"][0]["y"] == [row["losses/mse_loss"] for row in rows]
    assert plots["loss"]["data"][0]["x"] == [64 * (i + 1) for i in range(6)]
    assert plots["balance"]["data"][0]["y"] == [row["routing/load_balance"] for row in rows]
    assert plots["load-history"]["data"][0]["z"][2] == pytest.approx(
        [E * row["routing/load"][2] for row in rows], rel=1e-4
    )
    assert sum(plots["density"]["data"][0]["y"]) + (load_run(output).density_F == 0).sum() == F
    assert sum(plots["gates"]["data"][0]["y"]) == pytest.approx(100, abs=0.1)
    cards = [a["id"] for tag, a in tags.found if tag == "article" and "id" in a]
    assert len(cards) == 8
    assert {int(card.removeprefix("latent-")) // M for card in cards} == set(range(E))
    anchors = {a["href"] for tag, a in tags.found if tag == "a"}
    assert anchors == {f"#{name}" for name in (*SECTIONS, *cards)}  # every link leads somewhere on the page


def test_text_and_names_from_anywhere_are_escaped(page, tmp_path, output):
    names = {"model_name": HOSTILE[0], "hook_name": HOSTILE[1], "dataset_path": HOSTILE[2]}
    sae = SwitchSAE.load_from_disk(output)
    for name, value in names.items():
        sae.cfg.metadata[name] = value
    sae.save_model(str(tmp_path / "sae"))
    (tmp_path / "metrics.json").write_text(json.dumps({HOSTILE[0]: 1.5}))
    for text in (page, write_report(tmp_path).read_text()):
        tags = Tags(text)
        assert [tag for tag, _ in tags.found].count("script") == 3
        assert not [tag for tag, _ in tags.found if tag in ("img", "iframe", "object", "link")]
        assert not [
            name for _, attributes in tags.found for name in attributes if name.startswith("on") or name == "src"
        ]
        assert HOSTILE[0] in tags.text
    for word in HOSTILE[:4]:
        assert word in Tags(page).text.replace("\u2423", "")


@pytest.mark.parametrize("word", HOSTILE)
def test_json_in_the_page_ends_no_script(word):
    text = environment().from_string("{{ value | tojson }}").render(value={word: [word]})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {word: [word]}


def test_the_page_is_small_beside_plotly(page):
    from plotly.offline import get_plotlyjs

    assert len(page.encode()) - len(get_plotlyjs().encode()) < 200_000
    assert "http" not in page.replace(get_plotlyjs().replace("\r\n", "\n"), "").lower().replace("http-equiv", "")


def test_latents_that_were_asked_for_are_shown(output, tmp_path):
    texts = write_report(output, tmp_path / "page.html", latents=[7, 39], n_latents=0, contexts=2)
    assert [a["id"] for tag, a in Tags(texts.read_text()).found if tag == "article" and "id" in a] == [
        "latent-7",
        "latent-39",
    ]


def test_a_token_with_much_of_the_variance_is_pointed_out(output, tmp_path, monkeypatch):
    for share, said in ((1.0, False), (0.0, True)):
        monkeypatch.setattr(write_module, "_OUTLIER", share)
        text = write_report(output, tmp_path / "page.html", contexts=3).read_text()
        assert ("of the variance of the activations" in Tags(text).text) == said
