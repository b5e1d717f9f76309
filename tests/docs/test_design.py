"""docs/design.md and CONTRIBUTING.md are a map of the code as it is."""

import re

import pytest
from helpers import ROOT

PAGES = {name: (ROOT / name).read_text() for name in ("docs/design.md", "CONTRIBUTING.md")}
_ROOMS = ("sae_lens_switch", "kernels", "tests", "examples", "benchmarks", "docs")
FILES = [
    path.relative_to(ROOT).as_posix()
    for room in _ROOMS
    for path in (ROOT / room).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
] + [path.name for path in ROOT.iterdir() if path.is_file()]


def there_is(name: str) -> bool:
    """A file of this name, or whose path ends so; or a folder of it."""
    return any(f"/{file}".endswith(f"/{name}") or f"/{name.rstrip('/')}/" in f"/{file}" for file in FILES)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_folder_it_names_is_there(page):
    trees = re.findall(r"^```text\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    quoted = " ".join([*re.findall(r"`([^`\n]+)`", PAGES[page]), *trees])
    named = re.findall(r"(?<![\w./*-])(?:[\w.-]+/)*(?:[\w.-]+\.(?:py|md|toml|json|ipynb)|[\w.-]+/)(?![\w*<-])", quoted)
    assert len(set(named)) > 8
    assert sorted({name for name in named if not name.startswith(".") and not there_is(name)}) == []


def test_the_reading_list_says_how_long_its_files_are():
    rows = re.findall(r"^\| `([\w./]+)` \| (\d+) \|", PAGES["docs/design.md"], re.MULTILINE)
    lengths = {file: len((ROOT / file).read_text().splitlines()) for file, _ in rows}
    for file, said in rows:
        assert abs(int(said) - lengths[file]) <= max(15, 0.15 * lengths[file]), (file, lengths[file])
    said = re.search(r"about ([\d,]+) lines", PAGES["docs/design.md"])
    assert abs(int(said[1].replace(",", "")) - sum(lengths.values())) < 0.1 * sum(lengths.values())


def test_the_rooms_it_draws_are_all_there_are():
    (tree,) = re.findall(r"^```text\n(.*?)^```", PAGES["docs/design.md"], re.MULTILINE | re.DOTALL)
    drawn = set(re.findall(r"^ {4}([\w/]+)/ ", tree, re.MULTILINE))
    packages = [ROOT / "sae_lens_switch", ROOT / "kernels" / "sae_lens_switch_kernels"]
    assert drawn == {p.name for package in packages for p in package.iterdir() if (p / "__init__.py").exists()}
