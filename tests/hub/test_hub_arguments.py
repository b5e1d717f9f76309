"""Configs, ids and arguments that cannot be used."""

import json

import pytest
import torch
from helpers import D, E, F, largest_allocation
from helpers.hub_saes import REPO, nothing_sent, switch, training_topk, upload
from sae_lens import SAE

from sae_lens_switch.hub import upload_saes_to_huggingface

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
