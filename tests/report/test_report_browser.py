"""The page in a real browser."""

import base64
import json

import pytest
from helpers import E
from helpers.chromium import Chromium
from helpers.report_pages import plots_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page_file(page, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page)
    return file


VISIBLE = "[...document.querySelectorAll('.item')].filter(item => item.checkVisibility())"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_without_a_complaint_or_a_request(width, chromium, page_file):
    chromium.open(page_file, width)
    assert chromium.complaints() == []
    assert [url for url in chromium.requests() if not url.startswith(("data:", "blob:"))] == [page_file.as_uri()]
    assert chromium.run("window.hacked") is None
    assert chromium.run("document.documentElement.scrollWidth") <= width
    assert chromium.run("[...document.querySelectorAll('.table')].every(t => getComputedStyle(t).overflowX == 'auto')")


@pytest.mark.parametrize("width", [1280, 390])
def test_every_plot_is_drawn_within_its_place(width, chromium, page_file, page):
    chromium.open(page_file, width)
    drawn = chromium.run(
        """Object.fromEntries([...document.querySelectorAll('.plot')].map(place => {
            const marks = place.querySelectorAll('.point path, .js-line, .hm image, path.box');
            const svg = place.querySelector('svg.main-svg');
            return [place.id.replace('plot-', ''),
                    [marks.length, svg ? svg.getBoundingClientRect().right <= innerWidth : false]];
        }))"""
    )
    plots = plots_of(page)
    assert drawn.keys() == plots.keys()
    assert {
        "loss",
        "balance",
        "load",
        "load-history",
        "dead",
        "density",
        "density-by-expert",
        "router",
        "gates",
    } <= plots.keys()
    for name, (marks, fits) in drawn.items():
        data = plots[name]["data"]
        expected = {"bar": len(data[0].get("y", ())), "scatter": len(data), "heatmap": 1, "box": E}[data[0]["type"]]
        assert marks >= expected, name
        assert fits, name


def test_a_search_leaves_what_holds_the_words(chromium, page_file):
    chromium.open(page_file, 390)

    def search(words: str) -> list[str]:
        chromium.run(f"search.value = {json.dumps(words)}; search.dispatchEvent(new Event('input', {{bubbles: true}}))")
        return chromium.run(f"{VISIBLE}.map(item => item.textContent)")

    everything = search("")
    latents = [text for text in everything if text.startswith("Latent")]
    assert len(latents) == 8
    assert len([text for text in everything if text.startswith("Expert")]) == E
    name = latents[3].split(",")[0]
    assert search(name.upper() + ",") == [latents[3]]
    assert chromium.run("document.getElementById('found').textContent") == f"1 of {len(everything)}"
    for words in ("w5", "w7", "<img/src"):
        found = search(words)
        assert found == [text for text in everything if words in text]
        assert 0 < len(found) < len(everything)
    assert search("no such words") == []
    assert search("") == everything
    assert chromium.complaints() == []


def test_a_link_to_a_latent_leads_to_it(chromium, page_file):
    chromium.open(page_file, 1280)
    chromium.run("document.querySelector('#experts a').click()")
    chromium.run("new Promise(done => setTimeout(done, 100))")
    top = chromium.run("document.querySelector('article:target').getBoundingClientRect().top")
    assert 0 <= top < 844
    png = base64.b64decode(chromium.call("Page.captureScreenshot", format="png")["data"])
    assert png.startswith(b"\x89PNG")
