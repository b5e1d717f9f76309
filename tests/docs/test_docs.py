"""What README.md and the site say can be done: commands, files, fields and Python as written; and the site itself."""

import ast
import csv
import dataclasses
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import sae_lens
import sae_lens_switch_kernels
import torch
from helpers import CONTEXT, HOOK, ROOT, D, F, K, randomize, switch_sae
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

import sae_lens_switch
from sae_lens_switch import cost, train

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [ROOT / "kernels" / "README.md", ROOT / "CONTRIBUTING.md"]
TEXTS = {str(p.relative_to(ROOT)): p.read_text() for p in [*PAGES, *OTHERS]}
CONFIGS = {
    name: value
    for module in (sae_lens, sae_lens_switch)
    for name, value in vars(module).items()
    if dataclasses.is_dataclass(value) and isinstance(value, type)
} | {"MultiSAETrainingRunnerConfig": MultiSAETrainingRunnerConfig}


def blocks(text: str, language: str) -> list[tuple[str, bool]]:
    """Code of the fenced blocks in a language, and whether a page says that it cannot run by itself."""
    found = re.findall(rf"(<!-- not run: [^\n]* -->\n)?^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(found) == len(re.findall(rf"^```{language}$", text, re.MULTILINE))
    return [(code, bool(mark)) for mark, code in found]


def commands(text: str) -> list[list[str]]:
    """Of the sh blocks, and of code in running text that begins with python or make."""
    lines = [
        line for code, _ in blocks(text, "sh") for line in code.replace("\\\n", " ").splitlines() if line.strip()
    ] + re.findall(r"(?<!`)`((?:python|make) [^`]+)`", text)
    return [shlex.split(line, comments=True) for line in lines if shlex.split(line, comments=True)]


ALL_COMMANDS = sorted({tuple(c) for text in TEXTS.values() for c in commands(text)})
PYTHON_BLOCKS = [
    pytest.param(code, id=f"{page}-{i}")
    for page, text in TEXTS.items()
    for i, (code, _) in enumerate(blocks(text, "python"))
]


# --- Commands, files, fields


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=" ".join)
def test_commands_are_there(command, capsys):
    program, *arguments = command
    if program == "make":
        assert arguments[0] in re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "python" and arguments[0] == "-m":
        module, *flags = arguments[1:]
        spec = importlib.util.find_spec(module)
        assert spec is not None
        if module == "venv":
            return
        if module == "sae_lens_switch.train" and "--config" not in flags:
            flags = ["cpu" if flag == "cuda" else flag for flag in flags]
            assert train.main([*flags, "--dry-run"] if "--d-in" in flags else ["--help"]) == 0, capsys.readouterr().err
        elif module == "sae_lens_switch.cost":
            cost.main([f for f in flags if f != "--measure"])
        origin = Path(str(spec.origin))
        if spec.submodule_search_locations is not None:  # a package runs by its __main__
            origin = origin.with_name("__main__.py")
        assert 'if __name__ == "__main__":' in origin.read_text()
    elif program == "python":
        script = ROOT / arguments[0]
        source = "".join(p.read_text() for p in script.parent.glob("*.py"))
        for flag in (a for a in arguments[1:] if a.startswith("--")):
            assert f'"{flag}"' in source
    else:
        assert program in ("pip", "saebench/bin/pip")


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_are_named_exist(page):
    text = TEXTS[page]
    named = re.findall(r"(?<![\w/.-])((?:benchmarks|docs|examples|kernels|sae_lens_switch|tests)/[\w./-]*)", text)
    for file in named:
        assert (ROOT / file.rstrip(".")).exists(), file
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target = urlsplit(link)
        if target.scheme or not target.path:
            continue
        file = (ROOT / page).parent / unquote(target.path)
        assert file.exists(), link


def tables(text: str) -> Iterator[list[list[str]]]:
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        yield [[cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("|"))] for row in table.splitlines()]


@pytest.mark.parametrize("page", TEXTS)
def test_fields_in_tables_exist_and_have_the_defaults_that_are_said(page):
    known: dict[str, set[Any]] = {}
    for config in CONFIGS.values():
        for field in dataclasses.fields(config):
            known.setdefault(field.name, set()).add(repr(field.default))
    for header, _, *rows in tables(TEXTS[page]):
        if header[0] != "field":
            continue
        for row in rows:
            names = re.findall(r"`(\w+)`", row[0])
            values = [value.strip("` ") for value in row[1].split(",")]
            assert len(names) == len(values) > 0
            for name, value in zip(names, values, strict=True):
                assert name in known, name
                defaults = {float(d) if re.fullmatch(r"[\d.]+", d) else d.replace("'", '"') for d in known[name]}
                assert (float(value) if re.fullmatch(r"[\d.]+", value) else value) in defaults, (name, value)


def test_the_coefficient_of_a_scale_is_the_one_said():
    said = re.findall(r'^\| `"(variance|d_in)"`.*\| ([\d.]+) \|$', TEXTS["docs/architectures.md"], re.MULTILINE)
    assert len(said) == 2
    for scale, coefficient in said:
        cfg = sae_lens_switch.SwitchTrainingSAEConfig(d_in=4, d_sae=64, n_experts=2, k=2, load_balance_scale=scale)
        assert cfg.load_balance_coefficient == float(coefficient)


def test_the_guides_tables_are_what_the_experiments_found():
    with open(ROOT / "docs" / "experiments" / "results.csv", newline="") as file:
        results = list(csv.DictReader(file))

    def mean(name: str, experiment: str, **settings: str) -> float:
        rows = [r for r in results if r["experiment"] == experiment and settings.items() <= r.items()]
        return statistics.fmean(float(r[name]) for r in rows)

    of_title = {header[0]: (header[1:], rows) for header, _, *rows in tables(TEXTS["docs/training.md"])}
    coefficients, (one_pass, four_passes, load, dead) = of_title["coefficient"]
    for i, c in enumerate(coefficients, 1):
        for row, name, form in ((one_pass, "fvu", ".3f"), (load, "load_max", ".1f"), (dead, "dead_latents", ".0f")):
            assert row[i] == f"{mean(name, 'coefficient', load_balance_coefficient=c):{form}}", (row[0], c)
        if four_passes[i]:
            assert four_passes[i] == f"{mean('fvu', 'coefficient, more passes', load_balance_coefficient=c):.3f}", c
    experts, (here, _) = of_title["experts"]
    topk = mean("mse", "fixed width", architecture="sparse_topk", k="16")
    for i, n in enumerate(experts, 1):
        switch = mean("mse", "fixed width", architecture="switch", k="16", n_experts=n)
        assert here[i] == f"{100 * (switch / topk - 1):+.0f}%", n


# --- Python


@pytest.mark.parametrize("code", PYTHON_BLOCKS)
def test_python_compiles_its_imports_are_there_and_its_configs_can_be_made(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("sae_lens", "sae_lens_switch"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module}.{name.name}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CONFIGS:
            known = inspect.signature(CONFIGS[node.func.id]).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                assert {k.arg for k in node.keywords} <= set(known)
            elif all(not isinstance(n, ast.Name) or n.id in CONFIGS for k in node.keywords for n in ast.walk(k.value)):
                eval(compile(ast.Expression(node), "<block>", "eval"), dict(CONFIGS))


@pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning")
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
@pytest.mark.parametrize("page", [n for n, text in TEXTS.items() if n.startswith("docs/") and blocks(text, "python")])
def test_a_pages_python_runs_in_the_order_it_is_read(page, model, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metadata = SAEMetadata(hook_name=HOOK, context_size=CONTEXT, prepend_bos=True, model_name="tiny")
    given = {
        "model": model,
        "dataset": dataset,
        "tokens": torch.tensor(dataset[:3]["tokens"]),
        "sae": randomize(switch_sae(dtype="float32", metadata=metadata)),
        "dense": randomize(TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=K))),
        "__name__": "page",
    }
    for code, cannot_run in blocks(TEXTS[page], "python"):
        if not cannot_run:
            exec(compile(code, page, "exec"), given)


# --- The site


class Page(HTMLParser):
    """What a page links to, what it makes a browser fetch, and what can be linked to in it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.ids: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {value for name, value in attrs if name in ("id", "name")}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.append(given["href"])
        self.fetched += [value for name, value in attrs if name in ("src", "data", "poster")]
        self.fetched += re.findall(r"url\((.*?)\)", given.get("style") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="of the docs extra")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def test_links_within_the_site_lead_somewhere_and_nothing_is_fetched_from_elsewhere(site):
    pages = {file.resolve(): Page(file) for file in site.rglob("*.html")}
    assert len(pages) >= len(PAGES)
    for file, page in pages.items():
        for link in [*page.links, *page.fetched]:
            target = urlsplit(link)
            if target.scheme or target.netloc:
                assert link in page.links, f"{file.name} fetches {link}"
                continue
            if file.name == "404.html":  # written for the root of a server
                continue
            aim = (file.parent / unquote(target.path)).resolve() if target.path else file
            assert aim.exists(), f"{file.name}: {link}"
            if target.fragment and aim in pages and target.fragment != "__skip":
                assert unquote(target.fragment) in pages[aim].ids, f"{file.name}: {link}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text()), style


def test_the_api_has_every_public_name(site):
    ids = {i for file in site.glob("api*.html") for i in Page(file).ids}
    for module in (sae_lens_switch, sae_lens_switch_kernels):
        for name in module.__all__:
            assert f"{module.__name__}.{name}" in ids, name
