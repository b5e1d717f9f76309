"""The notebooks as a reader runs them: on small settings here, and marked slow, on those they come with."""

import itertools
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import nbformat
import pandas as pd
import pytest
import torch
from helpers import ROOT
from helpers.hub_server import HubServer
from helpers.notebooks import TRAIN, Reader, n_pictures, printed, read, stdout
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopKSAE
from safetensors.torch import load

from sae_lens_switch import SwitchSAE

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
TOPK, HUB, LEARNED, INSIDE = "sparse_topk", "hub_steer_ablate", "what_experts_learned", "look_inside"
REPO, SAE_ID = "user/saes", "layer_12/switch"


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Iterator[Reader]:
    with HubServer() as hub:
        reader = Reader(tmp_path_factory.mktemp("notebooks"), hub, small=True)
        yield reader
        reader.kernel.shutdown_kernel(now=True)


# As they are committed


def test_there_are_five():
    assert {path.stem for path in NOTEBOOKS} == {TRAIN, TOPK, HUB, LEARNED, INSIDE}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_holds_no_outputs(path):
    raw = json.loads(path.read_text())
    nbformat.validate(raw)
    code = [cell for cell in raw["cells"] if cell["cell_type"] == "code"]
    clean = all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert clean, f"clear all outputs, or: nbstripout {path}"
    assert all(cell["metadata"] == {} for cell in raw["cells"])
    assert raw["metadata"].keys() <= {"kernelspec", "language_info"}
    assert 10 <= len(raw["cells"]) <= 20
    assert "".join(raw["cells"][0]["source"]).startswith("# ")
    assert code[0]["source"] == read(TRAIN).cells[1].source.splitlines(keepends=True)  # the same header in all
    assert "SAE_LENS_SWITCH_NOTEBOOK_SMALL" in "".join(code[1]["source"])  # then the settings


def test_the_header_clones_the_project_where_it_is_not(tmp_path):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "examples" / "notebooks").mkdir(parents=True)
    elsewhere.mkdir()
    (project / "examples" / "offline.py").write_text("here = 1\n")
    (project / "examples" / "notebooks" / "any.ipynb").write_text("{}")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*git, *command], cwd=project, check=True)
    header, where = read(TRAIN).cells[1], nbformat.v4.new_code_cell("import offline, os\nprint(os.getcwd())")
    notebook = nbformat.v4.new_notebook(cells=[header])
    with pytest.raises(CellExecutionError, match="set REPOSITORY"):
        NotebookClient(notebook, resources={"metadata": {"path": str(elsewhere)}}).execute()
    header.source = header.source.replace('REPOSITORY = ""', f'REPOSITORY = "file://{project}"')
    notebook.cells = [header, where]
    NotebookClient(notebook, resources={"metadata": {"path": str(elsewhere)}}).execute()
    assert printed(notebook).strip().endswith(str(elsewhere / "sae-lens-switch" / "examples" / "notebooks"))


# As they run


def check_training(reader: Reader, explained: float) -> dict[str, Any]:
    show = {
        "ev": "seen.explained_variance",
        "l0": "seen.l0",
        "load": "seen.routing.load_E.tolist()",
        "density": "density_F.sum().item()",
        "ce": "[plain, with_sae, ablated]",
        "recovered": "recovered",
    }
    notebook, seen = reader.run(TRAIN, show)
    assert explained < seen["ev"] < 1
    sae = SAE.load_from_disk(reader.runs / "notebooks" / "switch")
    assert isinstance(sae, SwitchSAE)
    assert 0 < seen["l0"] <= sae.cfg.k
    # Both are the trainer's means over its last window.
    assert seen["density"] == pytest.approx(sae.cfg.metadata.l0, rel=1e-3)
    assert len(seen["load"]) == sae.cfg.n_experts
    assert 0 < min(seen["load"]) < max(seen["load"]) < 3 / sae.cfg.n_experts
    plain, with_sae, ablated = seen["ce"]
    assert seen["recovered"] == pytest.approx((ablated - with_sae) / (ablated - plain))
    assert f"explained variance {seen['ev']:.3f}" in printed(notebook)
    assert printed(notebook).count("«") >= sae.cfg.n_experts
    assert n_pictures(notebook) == 1
    return seen


def test_training_leaves_an_sae_that_explains_something(reader):
    check_training(reader, explained=0.3)


def check_topk(reader: Reader) -> None:
    show = {
        "differences": "differences",
        "ms": "milliseconds.to_dict()",
        "speedup": "speedup.to_dict()",
        "trained": "type(trained).__name__",
        "difference": "difference",
        "ev": "seen.explained_variance",
    }
    notebook, seen = reader.run(TOPK, show)
    assert {"mse_loss", "sae_out", "gradient of W_enc", "gradient of W_dec"} < seen["differences"].keys()
    assert max(seen["differences"].values()) < 1e-4
    for width, times in seen["ms"].items():
        assert len(times) == 3
        assert min(times.values()) > 0
        for name, ms in times.items():
            assert seen["speedup"][width][name] == pytest.approx(times["SAELens's topk"] / ms)
    assert seen["trained"] == "SparseTopKTrainingSAE"
    assert type(SAE.load_from_disk(reader.runs / "notebooks" / "topk")) is TopKSAE
    assert seen["difference"] < 1e-4
    assert 0 < seen["ev"] < 1
    assert n_pictures(notebook) == 1


def test_sparse_topk_is_the_same_sae_timed_and_saved_as_plain_topk(reader):
    check_topk(reader)


def check_steering(reader: Reader) -> pd.DataFrame:
    """With a repository: up to the Hub and back. The table of ablations."""
    trained = reader.trained()
    reader.hub.log.clear()
    shutil.rmtree(reader.home, ignore_errors=True)  # what another test has loaded would not be fetched again
    show = {
        "attached": "(logits - model(tokens)).abs().max().item()",
        "chosen": "chosen",
        "M": "M",
        "plain": "plain.tolist()",
        "steered": "{name: p.tolist() for name, p in steered.items()}",
        "ablation": "ablation.to_dict('list')",
    }
    settings = {"HF_REPO = None": f"HF_REPO = {REPO!r}", "UPLOAD = False": "UPLOAD = True"}
    _, seen = reader.run(HUB, show, settings)
    files = reader.hub.repos[REPO].files()
    assert {f"{SAE_ID}/cfg.json", f"{SAE_ID}/sae_weights.safetensors", "README.md"} <= files.keys()
    there = load(files[f"{SAE_ID}/sae_weights.safetensors"].data)
    assert all(torch.equal(there[name], tensor) for name, tensor in SAE.load_from_disk(trained).state_dict().items())
    assert any(line.startswith("GET") and SAE_ID in line for line in reader.hub.log)

    assert seen["attached"] < 1e-2
    first, second = seen["chosen"]
    assert first // seen["M"] != second // seen["M"]
    plain, *steered = (torch.tensor(p) for p in (seen["plain"], *seen["steered"].values()))
    assert len(steered) == 3
    for one, other in itertools.combinations([plain, *steered], 2):  # one latent, the other, both: each its own way
        assert (one - other).abs().sum() > 0.02
    ablation = pd.DataFrame(seen["ablation"])
    assert ablation["% of the tokens"].sum() == pytest.approx(100)
    assert (ablation["loss on them"] > 0).all()
    return ablation


def test_to_the_hub_and_back_then_steered_and_ablated(reader):
    ablation = check_steering(reader)
    # The small model ends with the SAE's layer: nothing of an expert's tokens can reach the others.
    assert ablation["loss on the others"].abs().max() < 1e-4


def test_without_a_repository_the_sae_goes_to_a_folder_and_back(reader):
    reader.trained()
    reader.hub.log.clear()
    both = "zip(trained.state_dict().values(), sae.state_dict().values(), strict=True)"
    _, seen = reader.run(HUB, {"same": f"all(bool((p == q).all()) for p, q in {both})"}, cells=5)
    assert seen["same"]
    assert type(SAE.load_from_disk(reader.runs / "notebooks" / "hub" / SAE_ID)) is SwitchSAE
    assert reader.hub.log == []


def test_a_repository_is_only_read_unless_an_upload_is_asked_for(reader):
    reader.trained()
    settings = {"HF_REPO = None": f"HF_REPO = {REPO!r}"}
    if REPO not in reader.hub.repos:
        reader.run(HUB, settings=settings | {"UPLOAD = False": "UPLOAD = True"}, cells=5)
    commits = len(reader.hub.repos[REPO].commits)
    _, seen = reader.run(HUB, {"names": "sorted(globals())", "kind": "type(sae).__name__"}, settings, cells=5)
    assert seen["kind"] == "SwitchSAE"
    assert "trained" not in seen["names"]
    assert len(reader.hub.repos[REPO].commits) == commits


def check_learned(reader: Reader) -> None:
    trained = reader.trained()
    show = {
        "load": "load_E.tolist()",
        "typical": "typical.counts.tolist()",
        "closest": "closest_E.tolist()",
        "pairs": "{t: found.n_pairs for t, found in duplicates.items()}",
        "table": "alike.values.tolist()",
        "drawn": "drawn.n_pairs",
    }
    notebook, seen = reader.run(LEARNED, show)
    sae = SAE.load_from_disk(trained)
    E, M = sae.cfg.n_experts, sae.cfg.d_sae // sae.cfg.n_experts
    unit_FD = torch.nn.functional.normalize(sae.W_dec.detach().double(), dim=1)
    cosine_FF = (unit_FD @ unit_FD.T).triu(1)
    assert {float(t): n for t, n in seen["pairs"].items()} == {
        float(t): int((cosine_FF > float(t)).sum()) for t in seen["pairs"]
    }
    expert_F = torch.arange(sae.cfg.d_sae) // M
    across = cosine_FF[(expert_F[:, None] != expert_F) & (cosine_FF > min(map(float, seen["pairs"])))]
    expected = across.sort(descending=True).values[:10].tolist()
    assert expected
    assert [row[0] for row in seen["table"]] == pytest.approx(expected, abs=1e-5)
    for _, i, expert_i, _, j, expert_j, _ in seen["table"]:
        assert (expert_i, expert_j) == (i // M, j // M)
    assert seen["drawn"] == 0 or min(map(float, seen["pairs"])) < 0.3
    assert sum(seen["load"]) == pytest.approx(1)
    assert len(seen["closest"]) == E
    assert all(counts[0] > 0 for counts in seen["typical"])
    assert n_pictures(notebook) == 4
    assert all(f"expert {e}, " in printed(notebook) for e in range(E))


def test_what_a_cell_prints_is_whole_however_it_comes():
    cell = nbformat.v4.new_code_cell()
    parts = ('{"a": 1}', "\n")
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=part) for part in parts]
    cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="a warning"))
    assert stdout(cell.outputs) == '{"a": 1}\n'


def test_what_the_experts_learned(reader):
    check_learned(reader)


def check_inside(reader: Reader) -> None:
    trained = reader.trained()
    if not (reader.runs / "notebooks" / "topk").exists():
        reader.run(TOPK)
    show = {
        "across": "nearest['decoder'].across_F.tolist()",
        "alignment": "[alignment.encoder.r_squared, alignment.encoder.p, alignment.decoder.p]",
        "told": "{name: [m.bits, m.corrected, m.expert_entropy] for name, m in told.items()}",
        "shares": "share_TE.sum(1).tolist()",
        "names": "alike.names",
        "cka": "alike.cka_RR.tolist()",
        "rsa": "alike.rsa_RR.tolist()",
    }
    notebook, seen = reader.run(INSIDE, show)
    sae = SAE.load_from_disk(trained)
    expert_F = torch.arange(sae.cfg.d_sae) // (sae.cfg.d_sae // sae.cfg.n_experts)
    unit_FD = torch.nn.functional.normalize(sae.W_dec.detach().double(), dim=1)
    cosine_FF = (unit_FD @ unit_FD.T).masked_fill(expert_F[:, None] == expert_F, -1)
    assert seen["across"] == pytest.approx(cosine_FF.amax(1).tolist(), abs=1e-5)
    assert all(0 < value <= 1 for value in seen["alignment"])
    for bits, corrected, entropy in seen["told"].values():
        assert corrected < bits <= entropy + 1e-9
    assert seen["told"]["token"][1] > seen["told"]["position"][1]
    assert seen["shares"] == pytest.approx([1] * len(seen["shares"]))
    names = ["activations", *(f"{a} {b}" for a in ("switch", "topk") for b in ("codes", "reconstruction"))]
    assert seen["names"] == names
    for matrix in (seen["cka"], seen["rsa"]):
        assert [row[i] for i, row in enumerate(matrix)] == pytest.approx([1] * 5)
        assert matrix[2][4] > matrix[1][3] > 0  # reconstructions are more alike than codes
    assert n_pictures(notebook) == 4


def test_a_look_inside(reader):
    check_inside(reader)


# With the real model, on the settings that they come with


@pytest.mark.slow
def test_all_of_them_on_their_own_settings(tmp_path):
    with HubServer() as hub:
        reader = Reader(tmp_path / "project", hub, small=False)
        try:
            seen = check_training(reader, explained=0.75)
            assert seen["recovered"] > 0.95
            check_topk(reader)
            ablation = check_steering(reader)
            assert (ablation["loss on them"] > ablation["loss on the others"]).all()
            check_learned(reader)
            check_inside(reader)
        finally:
            reader.kernel.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [HUB, LEARNED])
def test_where_no_sae_is_the_first_notebook_makes_it(name, tmp_path):
    with HubServer() as hub:
        reader = Reader(tmp_path / "project", hub, small=True)
        try:
            reader.run(name, cells=5)
            assert (reader.runs / "notebooks" / "switch" / "cfg.json").exists()
        finally:
            reader.kernel.shutdown_kernel(now=True)
