"""The real client of the Hub over HTTP, against the small server in hub_server.py."""

import time
import types

import pytest
from helpers.hub_server import HubServer
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http


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
