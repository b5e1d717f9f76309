"""Weights that are not what they should be."""

import json
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.hub_saes import LOG_SPARSITY, REPO, X, config_of, nothing_sent, switch, upload
from sae_lens import SAE
from safetensors import SafetensorError

from sae_lens_switch.hub import verified_loader


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
