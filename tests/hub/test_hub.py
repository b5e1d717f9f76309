"""Upload to and download from the Hub, by the real client over HTTP, against the small server in hub_server.py."""

import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import pytest
import sae_lens
import torch
import yaml
from helpers import D, E, F, K, hub_server, largest_allocation, random_input, switch_sae
from helpers.hub_server import HubServer
from huggingface_hub import ModelCard, constants, file_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import _http
from sae_lens import SAE
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors import SafetensorError
from safetensors.torch import save_file

from sae_lens_switch import (
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)
from sae_lens_switch.hub import upload_saes_to_huggingface, verified_loader

REPO = "user/saes"
X = random_input(7, D, dtype=torch.float32)
LOG_SPARSITY = torch.cat([torch.tensor([-10.0]), torch.linspace(-4, -1, F - 1)])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", server.writer)
        # Between the client's attempts nobody waits.
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", types.SimpleNamespace(sleep=lambda _: None, time=time.time))
        yield server


def switch(seed: int = 0, **fields):
    return switch_sae(seed, dtype="float32", **fields)


def described(sae, **metadata):
    """As a runner leaves it."""
    facts = {"model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre", "dataset_path": "user/texts"}
    for name, value in (facts | metadata).items():
        setattr(sae.cfg.metadata, name, value)
    return sae


def training_switch(**fields):
    torch.manual_seed(1)
    return SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=D, d_sae=F, n_experts=E, k=K, **fields))


def training_topk():
    torch.manual_seed(2)
    cfg = SparseTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, rescale_acts_by_decoder_norm=True)
    sae = SparseTopKTrainingSAE(cfg)
    with torch.no_grad():
        sae.W_dec.mul_(1 + torch.rand(F, 1))  # norms that a fold has to carry
        sae.b_enc.normal_()
        sae.b_dec.normal_()
    return sae


def upload(saes, **arguments):
    """Without card and pictures, where these are not what is tested."""
    return upload_saes_to_huggingface(saes, REPO, **{"show_progress": False, "add_default_readme": False, **arguments})


def upload_with_card(saes, **arguments):
    return upload(saes, add_default_readme=True, **arguments)


def card_of(hub, revision: str = "main") -> str:
    return hub.repos[REPO].files(revision)["README.md"].data.decode()


def config_of(hub, sae_id: str) -> dict:
    return json.loads(hub.repos[REPO].files()[f"{sae_id}/cfg.json"].data)


def nothing_sent(hub) -> bool:
    return not hub.repos and not hub.lfs and not hub.log


def in_fresh_process(hub, folder: Path, code: str, token: str | None = None) -> dict:
    """Runs code as a user would, with nothing of ours imported; returns its dict ``result``."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "PYTEST"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    if token is not None:
        environment["HF_TOKEN"] = token
    out = folder / "result.pt"
    code = f"import sys, torch\nresult = {{}}\n{code}\ntorch.save(result, {str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


# There and back


def test_the_signature_begins_as_saelens_has_it():
    stock = inspect.signature(sae_lens.upload_saes_to_huggingface).parameters
    ours = inspect.signature(upload_saes_to_huggingface).parameters
    assert list(ours)[: len(stock)] == list(stock)
    for name, parameter in stock.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind)
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in list(ours.values())[len(stock) :])


def test_there_and_back_by_the_code_in_the_card(hub, tmp_path):
    """With stock SAELens in a fresh process: topk without the plugin, switch with one import."""
    saes = {"layer_8/switch": described(training_switch()), "layer_8/topk": described(training_topk())}
    before = {name: p.clone() for sae in saes.values() for name, p in sae.state_dict().items()}
    info = upload_with_card(saes, log_sparsity={"layer_8/topk": LOG_SPARSITY}, license="mit")
    assert info.oid == hub.repos[REPO].branches["main"]
    after = {name: p for sae in saes.values() for name, p in sae.state_dict().items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    code = re.findall(r"```python\n(.*?)```", card_of(hub), re.DOTALL)
    (without,) = (block for block in code if "layer_8/topk" in block)
    (with_plugin,) = (block for block in code if "layer_8/switch" in block)
    assert "sae_lens_switch" not in without

    torch.save(X, tmp_path / "x.pt")
    expected = {name: sae(X).detach() for name, sae in saes.items()}
    result = in_fresh_process(
        hub,
        tmp_path,
        f"""
x = torch.load("x.pt")
{without}
result["out"], result["type"] = sae(x).detach(), type(sae).__module__
result["sparsity"] = SAE.from_pretrained_with_cfg_and_sparsity({REPO!r}, "layer_8/topk")[2]
try:
    SAE.from_pretrained({REPO!r}, "layer_8/switch")
except KeyError as error:
    result["error"] = repr(error)
try:
    SAE.from_pretrained({REPO!r}, "layer_8/none")
except Exception as error:
    result["missing"] = str(error)
assert "sae_lens_switch" not in sys.modules
{with_plugin}
result["switch"], result["switch_type"] = sae(x).detach(), type(sae).__name__
""",
    )
    assert (result["type"], result["switch_type"]) == ("sae_lens.saes.topk_sae", "SwitchSAE")
    torch.testing.assert_close(result["out"], expected["layer_8/topk"])
    torch.testing.assert_close(result["switch"], expected["layer_8/switch"])
    assert torch.equal(result["sparsity"], LOG_SPARSITY)
    assert result["error"] == "KeyError('switch')"
    assert "`KeyError: 'switch'`" in card_of(hub)
    assert "Entry Not Found" in result["missing"]
    assert "layer_8/none/cfg.json" in result["missing"]


def test_what_is_committed_is_for_inference_and_whole(hub, tmp_path):
    training_switch().save_model(tmp_path / "checkpoint")  # as training leaves it
    training_topk().save_inference_model(tmp_path / "final")
    (tmp_path / "final" / "runner_cfg.json").write_text("{}")
    (tmp_path / "final" / "trainer_state.pt").write_bytes(b"not ours to publish")
    save_file({"sparsity": LOG_SPARSITY}, tmp_path / "checkpoint" / "sparsity.safetensors")
    torch.manual_seed(3)
    upload({"checkpoint": tmp_path / "checkpoint", "final": str(tmp_path / "final"), "sae": switch()})
    assert hub.repos[REPO].messages == ["initial commit", "Upload SAEs checkpoint, final, sae"]
    files = hub.repos[REPO].files()
    assert set(files) == {
        ".gitattributes",
        *(f"{i}/{name}" for i in ("checkpoint", "final", "sae") for name in ("cfg.json", "sae_weights.safetensors")),
        "checkpoint/sparsity.safetensors",
        "final/runner_cfg.json",
    }
    weights = (tmp_path / "final" / "sae_weights.safetensors").read_bytes()
    assert files["final/sae_weights.safetensors"].data == weights
    for sae_id in ("checkpoint", "final", "sae"):
        cfg = config_of(hub, sae_id)
        assert cfg["architecture"] == ("topk" if sae_id == "final" else "switch")
        assert "decoder_init_norm" not in cfg
        assert cfg["metadata"]["weights_sha256"] == files[f"{sae_id}/sae_weights.safetensors"].sha256
        requires = cfg["metadata"].get("requires")
        assert requires is None if sae_id == "final" else requires.startswith("sae_lens_switch>=")
    assert config_of(hub, "checkpoint")["metadata"]["training_architecture"] == "switch"


def test_other_architectures_and_unfolded_checkpoints(hub, tmp_path):
    standard = StandardSAE(StandardSAEConfig(d_in=D, d_sae=F))
    standard.b_dec.data.normal_()
    sae = training_switch(normalize_activations="expected_average_only_in")
    sae.b_dec.data.normal_()
    with pytest.raises(ValueError, match="normalize_activations='expected_average_only_in'"):
        upload({"sae": sae})
    assert nothing_sent(hub)
    sae.save_model(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="fold_activation_norm_scaling_factor"):
        upload({"sae": tmp_path / "checkpoint"})
    ActivationScaler(scaling_factor=2.5).save(str(tmp_path / "checkpoint" / "activation_scaler.json"))
    upload({"standard": standard, "folded": tmp_path / "checkpoint"})
    assert config_of(hub, "folded")["normalize_activations"] == "none"
    torch.testing.assert_close(SAE.from_pretrained(REPO, "standard")(X), standard(X))
    torch.testing.assert_close(SAE.from_pretrained(REPO, "folded")(X), sae(X * 2.5) / 2.5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_folders(hub, tmp_path, dtype):
    training_topk().to(getattr(torch, dtype)).save_inference_model(tmp_path / "topk")
    switch().to(getattr(torch, dtype)).save_model(tmp_path / "switch")
    upload({"topk": tmp_path / "topk", "switch": tmp_path / "switch"})
    for name in ("topk", "switch"):
        assert config_of(hub, name)["dtype"].removeprefix("torch.") == dtype
        torch.testing.assert_close(
            SAE.from_pretrained(REPO, name)(X), SAE.load_from_disk(tmp_path / name, dtype="float32")(X)
        )


def test_a_revision_is_a_branch_of_its_own(hub):
    upload({"sae": switch(0)})
    main = hub.repos[REPO].branches["main"]
    upload_with_card({"sae": switch(1)}, hf_revision="v2/wide")
    assert hub.repos[REPO].branches["main"] == main
    load = partial(SAE.from_pretrained, REPO, "sae")
    assert torch.equal(load()(X), switch(0)(X))
    assert torch.equal(load(converter=partial(verified_loader, revision="v2/wide"))(X), switch(1)(X))
    assert torch.equal(load(converter=partial(verified_loader, revision=main))(X), switch(0)(X))
    assert 'revision="v2/wide"' in card_of(hub, "v2/wide")
    (code,) = re.findall(r"```python\n(.*?)```", card_of(hub, "v2/wide"), re.DOTALL)
    exec(code, scope := {})
    assert torch.equal(scope["sae"](X), switch(1)(X))
    with pytest.raises(HfHubHTTPError, match="Revision Not Found"):
        load(converter=partial(verified_loader, revision="v3"))


# The card


def test_the_card_says_what_the_saes_are(hub):
    evaluations = {"reconstruction_quality": {"explained_variance": 0.8125}, "sparsity": {"l0": torch.tensor(2.5)}}
    load = [0.1, 0.2, 0.3, 0.4]
    upload_with_card(
        {"switch": described(switch()), "topk": described(training_topk())},
        metrics={"switch": evaluations},
        expert_load={"switch": load},
        log_sparsity={"switch": LOG_SPARSITY},
        license="apache-2.0",
        tags=["layer-8"],
    )
    card = ModelCard(card_of(hub))
    data = card.data.to_dict()
    assert data["library_name"] == "saelens"
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == ["gpt2"]  # by the name it has on the Hub
    assert data["datasets"] == ["user/texts"]
    assert {"saelens", "sparse-autoencoder", "switch", "topk", "layer-8"} <= set(data["tags"])
    assert data["metrics"] == ["explained_variance", "l0"]
    results = {r.metric_type: (r.metric_value, r.dataset_type) for r in card.data.eval_results}
    assert results == {"explained_variance": (0.8125, "user/texts"), "l0": (2.5, "user/texts")}

    lines = card.text.splitlines()
    tables = [line for line in lines if line.startswith("| `switch`")]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in tables]
    about, routing, evaluation, dead = cells
    assert about == ["switch", "switch", "12", "40", "3", "gpt2-small", "blocks.8.hook_resid_pre", "user/texts"]
    assert routing == ["switch", str(E), str(F // E), str(K), "probability", "10", "25", "40", "tokens"]
    assert evaluation == ["switch", "user/texts", "0.8125", "2.5"]
    assert dead == ["switch", "1", str(F)]
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", card.text)
    assert pictures == ["switch/summary.png", "topk/summary.png"]
    for picture in pictures:
        assert hub.repos[REPO].files()[picture].data.startswith(b"\x89PNG")
    measured = config_of(hub, "switch")["metadata"]["measured"]
    assert measured["evaluations"] == {"explained_variance": 0.8125, "l0": 2.5}
    assert measured["expert_load"] == load
    density = 10 ** LOG_SPARSITY.double()
    density[0] = 0
    torch.testing.assert_close(
        torch.tensor(measured["expert_firings"], dtype=torch.float64), density.view(E, -1).sum(1) / density.sum()
    )


def test_a_second_upload_keeps_what_is_there(hub):
    upload_with_card({"first": described(switch())}, metrics={"first": {"l0": 3}}, log_sparsity={"first": LOG_SPARSITY})
    text = card_of(hub).replace("library_name: saelens", "library_name: saelens\nlanguage: en\nlicense: mit")
    text = text.replace("# saes\n", "# Our SAEs\n\nHow they were made.\n") + "\n## Thanks\n"
    hub.repos[REPO].put("README.md", text.encode())
    upload_with_card({"second": described(training_topk(), dataset_path="user/other")}, eval_dataset="user/held-out")
    card = ModelCard(card_of(hub))
    assert card.data.language == "en"
    assert card.data.license == "mit"
    assert card.data.datasets == ["user/texts", "user/other"]
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("l0", 3.0)]
    assert "# Our SAEs\n\nHow they were made." in card.text
    assert card.text.rstrip().endswith("## Thanks")
    assert card.text.count("| `first` | `switch` |") == 1
    assert card.text.count("| `second` | `topk` |") == 1
    assert {"first/summary.png", "second/summary.png"} <= hub.repos[REPO].files().keys()

    commit, n_commits = hub.repos[REPO].branches["main"], len(hub.repos[REPO].commits)
    again = {"second": described(training_topk(), dataset_path="user/other")}
    assert upload_with_card(again).oid == commit
    assert len(hub.repos[REPO].commits) == n_commits

    # The same weights keep their numbers, others do not, nor the sparsity that was measured on the old ones.
    upload_with_card({"first": SAE.from_pretrained(REPO, "first")}, log_sparsity={"first": LOG_SPARSITY})
    assert config_of(hub, "first")["metadata"]["measured"]["evaluations"] == {"l0": 3.0}
    sae = SAE.from_pretrained(REPO, "first")
    sae.b_dec.data += 1
    upload_with_card({"first": sae})
    assert config_of(hub, "first")["metadata"]["measured"] == {}
    assert "first/sparsity.safetensors" not in hub.repos[REPO].files()
    assert ModelCard(card_of(hub)).data.eval_results is None
    assert ModelCard(card_of(hub)).data.metrics is None


@pytest.mark.parametrize("readme", ["# By hand\n\nNo front matter.\n", "---\nlicense: mit\n---\n# By hand\n"])
def test_a_card_of_somebody_else_is_extended(hub, readme):
    upload({"sae": switch()})
    hub.repos[REPO].put("README.md", readme.encode())
    hub.repos[REPO].put("broken/cfg.json", b"[1, 2")
    upload_with_card({"other": switch(1)})
    card = ModelCard(card_of(hub))
    assert card.text.strip().startswith("# By hand")
    assert "`sae`" in card.text
    assert "`other`" in card.text
    assert card.data.library_name == "saelens"


@pytest.mark.parametrize(
    "readme",
    [
        b"---\n- a\n- list\n---\n# Mine\n",
        b"---\na: [b\n---\n# Mine\n",
        b"---\n1: 2\n---\n# Mine\n",
        b"# Mine \xff\n",
        b"# Mine\n<!-- sae-lens-switch: each upload rewrites from here ... -->\n",
    ],
)
def test_a_card_that_cannot_be_read_is_left_alone(hub, readme):
    upload({"sae": switch()})
    head = hub.repos[REPO].put("README.md", readme)
    with pytest.raises(ValueError, match=r"README.md of user/saes cannot be extended"):
        upload_with_card({"other": switch(1)})
    assert hub.repos[REPO].branches["main"] == head
    upload({"other": switch(1)})
    assert hub.repos[REPO].files()["README.md"].data == readme


HOSTILE = [
    "<script>alert(1)</script>",
    "x | <img src=x onerror=alert(1)> |",
    "[click](javascript:alert(1)) ![](https://evil.example/x.png)",
    "```` ``` ` **bold** __bold__ # h $x$",
    "a: {b: [c]}\n---\nlicense: evil\n---",
    '"); import os; os.system("x") #',
    "<!-- sae-lens-switch: ... to here -->",
    "--- &amp; &#60;b&#62; \\",
]


def test_names_cannot_become_markup_yaml_or_code(hub):
    saes, metrics = {}, {}
    for i, text in enumerate(HOSTILE):
        sae_id = f"{i} {text}".replace("\n", " ").replace("\\", "").replace("/", "").strip()
        saes[sae_id] = described(switch(), model_name=text, hook_name=text, dataset_path=text, requires=text)
        metrics[sae_id] = {text: 1.5}
    upload_with_card(saes, metrics=metrics, eval_dataset="user/texts", license="mit", tags=["a: [b", "--- x"])
    text = card_of(hub)
    data = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert data["license"] == "mit"
    assert data["metrics"] == sorted(HOSTILE)
    assert {"a: [b", "--- x"} <= set(data["tags"])
    assert [entry["name"] for entry in data["model-index"]] == sorted(saes)
    body = ModelCard(text).text
    assert body.count("<!--") == body.count("-->") == 2
    # Outside of our own comments the only tags are <code>, and no line of a table has more cells than its head.
    assert set(re.findall(r"<[^!>]*>", re.sub(r"<!--.*?-->", "", body))) <= {"<code>", "</code>"}
    for word in ("javascript:", "onerror=", "**bold**", "](https://evil"):
        assert word not in body
    for block in re.split(r"\n\n+", body):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1
    # The code in the card is one call, with the id as it is.
    (code,) = re.findall(r"^```python\n(.*?)\n```$", body, re.DOTALL | re.MULTILINE)
    called = []
    loader = types.SimpleNamespace(from_pretrained=lambda *arguments: called.append(arguments))
    code = code.replace("from sae_lens import SAE\n", "").replace("import sae_lens_switch ", "")
    exec(code, {"SAE": loader, "os": None})
    assert called == [(REPO, min(saes))]
    assert torch.equal(SAE.from_pretrained(REPO, min(saes))(X), switch()(X))


def test_configs_of_others_in_the_repository_may_be_anything(hub):
    """They are shown in the card, as far as they make sense."""
    values = [None, True, -1, 0, 10**30, 1e999, "<b>", ["<b>"], {"<b>": "<b>"}]
    for i, value in enumerate(values):
        fields = ("architecture", "d_in", "d_sae", "k", "n_experts", "gate")
        metadata = ("model_name", "hook_name", "dataset_path", "context_size", "requires", "weights_sha256", "measured")
        cfg = {name: value for name in fields} | {"metadata": {name: value for name in metadata}}
        measured = ("evaluations", "expert_load", "expert_firings", "dead_latents", "eval_dataset")
        if i % 2:
            cfg["metadata"]["measured"] = {name: value for name in measured}
        upload({"sae": switch()})
        hub.repos[REPO].put(f"theirs/{i}/cfg.json", json.dumps(cfg).encode())
    cfg["metadata"]["measured"] = {"evaluations": {"<b>": 1, "x": "<b>"}, "expert_load": ["<b>"], "eval_dataset": "<b>"}
    cfg["metadata"]["requires"] = "os; import evil>=<b>"
    hub.repos[REPO].put("theirs/last/cfg.json", json.dumps(cfg).encode())
    upload_with_card({"mine": switch(1)})
    body = ModelCard(card_of(hub)).text
    assert all(f"`theirs/{i}`" in body for i in [*range(len(values)), "last"])
    assert "<b>" not in body
    assert "evil" not in "".join(re.findall(r"```.*?```", body, re.DOTALL))


def test_without_matplotlib_there_is_no_picture(hub, monkeypatch):
    for module in [m for m in sys.modules if m.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    upload_with_card({"sae": switch()})
    assert "sae/summary.png" not in hub.repos[REPO].files()
    assert "summary.png" not in card_of(hub)


# Faults of the network


@pytest.mark.parametrize(
    ("method", "path", "action"),
    [("PUT", "/lfs/upload/", "drop"), ("PUT", "/lfs/upload/", "error"), ("POST", "/commit/main", "error")],
)
def test_an_interrupted_upload_changes_nothing_and_can_be_repeated(hub, method, path, action):
    upload({"old": switch(0)})
    head, files = hub.repos[REPO].branches["main"], dict(hub.repos[REPO].files())
    hub.fault(method, path, action=action)
    with pytest.raises((RuntimeError, HfHubHTTPError)):
        upload_with_card({"old": switch(1), "new": switch(2)})
    assert hub.repos[REPO].branches["main"] == head
    assert hub.repos[REPO].files() == files
    hub.heal()
    hub.log.clear()
    upload_with_card({"old": switch(1), "new": switch(2)})
    assert hub.repos[REPO].messages[1:] == ["Upload SAE old", "Upload SAEs old, new"]
    # What had arrived is not sent again.
    assert sum(line.startswith("PUT") for line in hub.log) == (0 if "commit" in path else 2)
    for seed, sae_id in ((1, "old"), (2, "new")):
        assert torch.equal(SAE.from_pretrained(REPO, sae_id)(X), switch(seed)(X))


def test_one_lost_connection_is_made_good(hub):
    hub.fault("PUT", "/lfs/upload/", times=1, action="drop")
    upload({"sae": switch()})
    assert sum(line.startswith("PUT") for line in hub.log) == 2
    assert torch.equal(SAE.from_pretrained(REPO, "sae")(X), switch()(X))


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(hub, monkeypatch):
    upload({"sae": switch()})
    reply = HubServer.preupload

    def meanwhile(self, repo, **arguments):
        self.repos[repo].put("README.md", b"# theirs\n")
        return reply(self, repo, **arguments)

    routes = [(m, p, meanwhile if function is reply else function) for m, p, function in hub_server._ROUTES]
    monkeypatch.setattr(hub_server, "_ROUTES", routes)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        upload_with_card({"other": switch(1)})
    assert card_of(hub) == "# theirs\n"


def test_a_download_cut_short_is_no_sae(hub):
    upload({"sae": switch()})
    hub.fault("GET", "/cdn/", action="cut")
    with pytest.raises(Exception, match="Consistency check failed|peer closed|Connection|size"):
        SAE.from_pretrained(REPO, "sae")
    hub.heal()
    assert torch.equal(SAE.from_pretrained(REPO, "sae")(X), switch()(X))


# Who may


def test_a_private_repository_and_its_tokens(hub, monkeypatch):
    upload({"sae": switch()}, private=True)
    assert hub.repos[REPO].private
    load = partial(SAE.from_pretrained, REPO, "sae")
    monkeypatch.setenv("HF_TOKEN", hub.reader)
    assert torch.equal(load()(X), switch()(X))
    with pytest.raises(HfHubHTTPError, match=r"403(.|\n)*needs a token that may write there"):
        upload({"other": switch(1)})
    monkeypatch.delenv("HF_TOKEN")
    assert torch.equal(load(converter=partial(verified_loader, token=hub.reader), force_download=True)(X), switch()(X))
    for arguments in ({}, {"converter": verified_loader}):
        with pytest.raises(RepositoryNotFoundError, match=r"private or gated repo,\s+make sure you are authenticated"):
            SAE.from_pretrained(REPO, "not-in-the-cache", **arguments)
    with pytest.raises(HfHubHTTPError, match=r"401(.|\n)*needs a token that may write there"):
        upload({"other": switch(1)})
    assert list(hub.repos[REPO].messages) == ["initial commit", "Upload SAE sae"]


# Weights that are not what they should be


def tampered(data: bytes) -> bytes:
    """One bit of the last number of a safetensors file."""
    return data[:-4] + bytes([data[-4] ^ 1]) + data[-3:]


def test_tampered_weights_are_refused_by_the_verified_loader(hub):
    upload({"sae": switch()})
    weights = hub.repos[REPO].files()["sae/sae_weights.safetensors"]
    good, weights.data = weights.data, tampered(weights.data)  # under the digest that the Hub states
    load = partial(SAE.from_pretrained, REPO, "sae", converter=verified_loader)
    with pytest.raises(ValueError, match="damaged or replaced"):
        load()
    weights.data = good
    with pytest.raises(ValueError, match="damaged or replaced"):
        load()  # what is damaged stays in the client's cache ...
    assert torch.equal(load(force_download=True)(X), switch()(X))  # ... until it is fetched again

    hub.repos[REPO].put("sae/sae_weights.safetensors", tampered(good))  # and its digest with it
    with pytest.raises(ValueError, match=f"recorded SHA-256, {weights.sha256}"):
        load()


def test_without_a_record_the_hubs_own_digest_is_compared(hub):
    upload({"sae": switch()})
    cfg = config_of(hub, "sae")
    del cfg["metadata"]["weights_sha256"]
    hub.repos[REPO].put("sae/cfg.json", json.dumps(cfg).encode())
    load = partial(SAE.from_pretrained, REPO, "sae", converter=verified_loader)
    assert torch.equal(load()(X), switch()(X))
    weights = hub.repos[REPO].files()["sae/sae_weights.safetensors"]
    weights.data = tampered(weights.data)
    with pytest.raises(ValueError, match="damaged or replaced"):
        load(force_download=True)
    weights.lfs = False
    with pytest.raises(ValueError, match="cannot be verified"):
        load(force_download=True)


@pytest.mark.usefixtures("hub")
def test_the_verified_loader_names_what_is_there():
    upload({"a/b": switch(), "c": switch()}, log_sparsity={"c": LOG_SPARSITY})
    with pytest.raises(ValueError, match=r"of SAE 'a'; it has configs of a/b, c"):
        SAE.from_pretrained(REPO, "a", converter=verified_loader)
    load = partial(SAE.from_pretrained_with_cfg_and_sparsity, REPO, converter=verified_loader)
    assert torch.equal(load("c")[2], LOG_SPARSITY)
    assert load("a/b")[2] is None
    for sae_id in ("../c", "/c", "a\\b", "..", ""):
        with pytest.raises(ValueError, match="relative path"):
            load(sae_id)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_pickled_weights_are_refused_and_not_unpickled(hub, tmp_path):
    marker = tmp_path / "executed"
    poison = pickle.dumps(Evil(marker))
    folder = tmp_path / "sae"
    switch().save_model(folder)
    (folder / "sae_weights.safetensors").write_bytes(poison)
    with pytest.raises(ValueError, match="must be one that SAELens can load"):
        upload({"sae": folder})
    (folder / "sae_weights.safetensors").rename(folder / "sae_weights.pt")
    with pytest.raises(
        FileNotFoundError, match=r"must hold sae_weights.safetensors.*there is cfg.json, sae_weights.pt"
    ):
        upload({"sae": folder})
    assert nothing_sent(hub)

    upload({"sae": switch()})
    hub.repos[REPO].put("sae/sae_weights.safetensors", poison)
    cfg = config_of(hub, "sae")
    cfg["metadata"]["weights_sha256"] = hub.repos[REPO].files()["sae/sae_weights.safetensors"].sha256
    hub.repos[REPO].put("sae/cfg.json", json.dumps(cfg).encode())
    with pytest.raises(SafetensorError):
        SAE.from_pretrained(REPO, "sae")
    with pytest.raises(ValueError, match="no safetensors file"):
        SAE.from_pretrained(REPO, "sae", converter=verified_loader)
    assert not marker.exists()
    pickle.loads(poison)
    assert marker.exists()  # it would have worked


# Configs and ids of strangers

BAD_CONFIGS = {
    "a billion experts": {"n_experts": 10**9},
    "a billion experts in as many latents": {"n_experts": 10**9, "d_sae": 10**9, "k": 1},
    "a billion experts as a float": {"n_experts": 1e9},
    "more latents than a tensor can have": {"d_sae": 10**18, "n_experts": 1, "k": 1},
    "experts as a string": {"n_experts": "4"},
    "experts as a list": {"n_experts": [4]},
    "k as a float": {"k": 3.5},
    "k as a bool": {"k": True},
    "k above an expert's width": {"k": F},
    "no d_in": {"d_in": None},
    "d_in as a string": {"d_in": "12"},
    "another d_in": {"d_in": D + 1},
    "a negative d_sae": {"d_sae": -F},
    "an unknown gate": {"gate": "__import__('os')"},
    "an unknown dtype": {"dtype": "object"},
}


def hostile_config(changes: dict) -> str:
    sae = switch()
    return json.dumps(sae.cfg.to_dict() | changes)


@pytest.mark.parametrize("changes", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_bad_config_is_not_uploaded(hub, tmp_path, changes):
    switch().save_model(tmp_path)
    (tmp_path / "cfg.json").write_text(hostile_config(changes))

    def attempt():
        with pytest.raises(ValueError, match=r"must be|multiple"):
            upload({"good": switch(), "bad": tmp_path})

    assert largest_allocation(attempt) < 1e6
    assert nothing_sent(hub)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "must be JSON"),
        ("[]", "JSON object"),
        ('{"metadata": 3}', "JSON object"),
        ('{"architecture": "nonsense"}', "architecture of SAE 'bad' must be one of"),
        ('{"architecture": ["switch"]}', "architecture of SAE 'bad' must be one of"),
        ('{"architecture": "topk", "d_in": 12, "d_sae": 40, "k": 1000}', "SAELens can load and run"),
        ('{"architecture": "topk", "d_in": 12, "d_sae": 1000000000, "k": 3}', "SAELens can load and run"),
    ],
)
def test_a_config_that_is_none_is_not_uploaded(hub, tmp_path, text, match):
    training_topk().save_inference_model(tmp_path)
    (tmp_path / "cfg.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        upload({"bad": tmp_path})
    assert nothing_sent(hub)


def test_bad_configs_from_the_hub_allocate_nothing(hub):
    upload({"sae": switch()})
    for name, changes in BAD_CONFIGS.items():
        if name == "an unknown dtype":
            continue  # from_pretrained has its own
        hub.repos[REPO].put("sae/cfg.json", hostile_config(changes).encode())

        # Where torch itself counts the bytes it is asked for, the error is torch's.
        error, match = (RuntimeError, "overflow") if "than a tensor" in name else (ValueError, "must")

        def attempt(error=error, match=match):
            with pytest.raises(error, match=match):
                SAE.from_pretrained(REPO, "sae")

        assert largest_allocation(attempt) < 1e6, name


IDS = [
    "../x",
    "a/../x",
    "/x",
    "a//b",
    "a/",
    "",
    ".",
    "..",
    "a\\b",
    "C:/x",
    "~/x",
    "a\nb",
    "a\0b",
    ".git/x",
    " a",
    "x" * 300,
]


@pytest.mark.parametrize("sae_id", [*IDS, "a/cfg.json", "README.md", 3, None])
def test_ids_that_leave_their_folder_are_refused(hub, tmp_path, monkeypatch, sae_id):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="an SAE's id must be a relative path"):
        upload({"good": switch(), sae_id: switch()})
    assert nothing_sent(hub)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"metrics": {"other": {"l0": 1}}}, "metrics must be by the ids of saes_dict, sae; got 'other'"),
        ({"metrics": {"sae": {"l0": "many"}}}, r"metrics\['sae'\] must hold numbers; got 'many' for l0"),
        ({"metrics": {"sae": {"q": {"l0": float("nan")}}}}, "finite numbers by name; got nan for q/l0"),
        ({"metrics": {"sae": 3}}, "finite numbers by name"),
        ({"expert_load": {"sae": [0.5, 0.5]}}, r"expert_load\['sae'\] must be shares"),
        ({"expert_load": {"sae": [0.5] * E}}, "must be shares that sum to 1"),
        ({"expert_load": {"sae": [float("nan")] * E}}, "must be shares that sum to 1"),
        ({"expert_load": {"sae": 1}}, "must be shares that sum to 1"),
        ({"log_sparsity": {"sae": "dense"}}, "must be a tensor"),
        ({"log_sparsity": {"sae": torch.zeros(F + 1)}}, f"sparsity of SAE 'sae' must be {F} numbers"),
        ({"log_sparsity": {"sae": torch.full((F,), torch.nan)}}, f"{F} of them NaN"),
        ({"base_model": "../gpt2"}, "base_model must be an id on the Hub"),
        ({"datasets": ["user/texts", "a b"]}, "datasets must be an id on the Hub"),
        ({"eval_dataset": 3}, "eval_dataset must be an id on the Hub"),
        ({"license": "mit\nevil: true"}, "license must be one of the Hub's identifiers"),
        ({"tags": "sae"}, "tags must be a sequence"),
        ({"tags": ["a\nb"]}, "tags must be a sequence"),
    ],
)
def test_arguments_that_cannot_be_used(hub, arguments, match):
    with pytest.raises(ValueError, match=match):
        upload({"sae": switch()}, **arguments)
    assert nothing_sent(hub)


def test_saes_and_repositories_that_cannot_be_used(hub, tmp_path):
    with pytest.raises(ValueError, match="at least one SAE"):
        upload({})
    with pytest.raises(ValueError, match="must be an SAE or a folder; got int"):
        upload({"sae": 3})
    with pytest.raises(FileNotFoundError, match=r"must hold cfg.json"):
        upload({"sae": tmp_path / "nowhere"})
    for repo_id in ("user/../x", "a/b/c", "https://evil.example/x", "", None):
        with pytest.raises(ValueError, match="hf_repo_id must be"):
            upload_saes_to_huggingface({"sae": switch()}, repo_id, show_progress=False)
    assert nothing_sent(hub)
