"""The measured tables of README.md and docs/ are what the JSON files of the runs say."""

import re

import publish
import pytest
from helpers import ROOT


def test_every_page_shows_what_the_results_say(capsys):
    assert publish.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("page", publish.PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_number_that_is_changed_is_put_back(page):
    text = page.read_text()

    def changed(block: re.Match[str]) -> str:
        return block[1] + re.sub(r"\d", "0", block[2]) + block[3]

    spoiled = re.sub(r"(<!-- measured: [^\n]*\n)(.*?)(<!-- end -->)", changed, text, flags=re.DOTALL)
    assert spoiled != text
    assert publish.filled(spoiled) == text


def test_every_mark_has_a_table_an_end_and_a_page_that_is_written():
    marked = [p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("kernels/*.md"))]
    for page in marked:
        text = page.read_text()
        names = re.findall(r"<!-- measured: ([\w-]+) -->", text)
        assert set(names) <= publish.BLOCKS.keys(), page
        assert len(names) == text.count("<!-- end -->"), page
        assert not names or page in publish.PAGES, page


def test_speeds_against_saelens_stand_only_where_they_are_made_from_the_results():
    """A ratio typed by hand is one that will disagree with the next measurement."""
    for page in publish.PAGES[:3]:
        by_hand = re.sub(r"<!-- measured: .*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
        said = {publish.times(row) for row in publish.bench_rows().values()} - {"1"}
        assert not [ratio for ratio in said if re.search(rf"(?<![\d.]){re.escape(ratio)}", by_hand)], page


def test_no_result_names_a_path_of_the_machine_that_made_it():
    found = [*(ROOT / "docs").rglob("*.json"), *(ROOT / "docs").rglob("*.csv")]
    assert len(found) > 10
    for file in found:
        assert not re.search(r'"(/|~|[A-Z]:\\)[^"]*/|(^|[,\s])/(tmp|home|root|work|usr)/', file.read_text()), file
