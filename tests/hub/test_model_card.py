"""The model card."""

import json
import re
import sys
import types

import pytest
import torch
import yaml
from helpers import E, F, K
from helpers.hub_saes import (
    LOG_SPARSITY,
    REPO,
    X,
    card_of,
    config_of,
    described,
    switch,
    training_topk,
    upload,
    upload_with_card,
)
from helpers.transcoders import transcoder
from huggingface_hub import ModelCard
from sae_lens import SAE


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
    assert routing == ["switch", str(E), "1", str(F // E), str(K), "probability", "10", "25", "40", "tokens"]
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


def test_the_card_names_both_hooks_and_widths_of_a_transcoder(hub):
    made = transcoder("switch_transcoder", dtype="float32")
    upload_with_card({"mlp": described(made, hook_name_out="blocks.8.hook_mlp_out")})
    row, *_ = (line for line in card_of(hub).splitlines() if line.startswith("| `mlp`"))
    cells = [cell.strip(" `") for cell in row.strip("|").split("|")]
    assert "12 to 7" in cells
    assert "blocks.8.hook_resid_pre to blocks.8.hook_mlp_out" in cells
    assert "import sae_lens_switch" in card_of(hub)


def test_the_card_counts_shared_latents_apart_from_those_of_experts(hub):
    sae = described(switch(n_shared_experts=1, shared_width=16))
    upload_with_card({"shared": sae, "none": described(switch())}, log_sparsity={"shared": LOG_SPARSITY})
    rows = [line for line in card_of(hub).splitlines() if line.startswith(("| `shared`", "| `none`"))]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in rows]
    routing = {row[0]: row[1:5] for row in cells[2:4]}
    assert routing == {"shared": [str(E), "1", "6", "16"], "none": [str(E), "1", str(F // E), ""]}
    density = (10**LOG_SPARSITY)[16:].view(E, 6).sum(1)
    firings = torch.tensor(config_of(hub, "shared")["metadata"]["measured"]["expert_firings"])
    torch.testing.assert_close(firings, density / density.sum())


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
