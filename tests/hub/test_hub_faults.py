"""Faults of the network, and who may read and write."""

from functools import partial

import huggingface_hub
import pytest
import torch
from helpers import hub_server
from helpers.hub_saes import REPO, X, card_of, switch, upload, upload_with_card
from helpers.hub_server import HubServer
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from packaging.version import Version
from sae_lens import SAE

from sae_lens_switch.hub import verified_loader


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


@pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("1.21"), reason="repeats no upload after a lost connection"
)
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
