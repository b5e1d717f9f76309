"""SAEs to upload, and what is then in the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from helpers import D, E, F, K, random_input, switch_sae
from sae_lens_switch import (
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)
from sae_lens_switch.hub import upload_saes_to_huggingface

REPO = "user/saes"
X = random_input(7, D, dtype=torch.float32)
LOG_SPARSITY = torch.cat([torch.tensor([-10.0]), torch.linspace(-4, -1, F - 1)])


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
