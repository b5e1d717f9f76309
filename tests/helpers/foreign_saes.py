"""SAEs in the files of other projects, as these write them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers import D, E, F, K, random_input

X = random_input(23, D) * 3 + 1


def numbers(*shape: int, seed: int) -> Tensor:
    return random_input(*shape, seed=seed) * 0.4


def authors_state() -> dict[str, Tensor]:
    bias = numbers(D, seed=4)  # one storage for both, as in their runs
    matrices = {"encoder.weight": numbers(F, D, seed=1), "router.weight": numbers(E, D, seed=2)}
    return {"decoder": numbers(F, D, seed=3), "b_dec": bias, "b_router": bias, **matrices}


AUTHORS_CONFIG = {
    "trainer_class": "SwitchTrainer",
    "dict_class": "SwitchAutoEncoder",
    "activation_dim": D,
    "dict_size": F,
    "k": K,
    "experts": E,
    "heaviside": False,
    "lb_alpha": 3.0,
    "layer": 8,
    "lm_name": "openai-community/gpt2",
    "submodule_name": None,
}


def write_authors(folder: Path, state: Any = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(authors_state() if state is None else state, folder / "ae.pt")
    settings = {"trainer": AUTHORS_CONFIG | config, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def sparsify_state() -> dict[str, Tensor]:
    state = {"encoder.weight": numbers(F, D, seed=1), "encoder.bias": numbers(F, seed=2)}
    return state | {"W_dec": numbers(F, D, seed=3), "b_dec": numbers(D, seed=4)}


SPARSIFY_CONFIG = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": F,
    "k": K,
    "multi_topk": True,  # a loss of theirs; the SAE is the same
    "skip_connection": False,
    "transcode": False,
    "d_in": D,
}


def write_sparsify(folder: Path, state: dict[str, Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(sparsify_state() if state is None else state, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(SPARSIFY_CONFIG | config))
    return folder


def openai_state(k: int = K) -> dict[str, Any]:
    return {
        "pre_bias": numbers(D, seed=4),
        "latent_bias": numbers(F, seed=2),
        "stats_last_nonzero": torch.zeros(F, dtype=torch.long),
        "latents_activation_frequency": torch.ones(F),
        "latents_mean_square": torch.zeros(F),
        "encoder.weight": numbers(F, D, seed=1),
        "decoder.weight": numbers(F, D, seed=3).T,  # [D, F], stored column by column
        "activation": "TopK",
        "activation_state_dict": {"k": k, "postact_fn": "ReLU"},
    }


def write_openai(file: Path, state: Any = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(openai_state() if state is None else state, file)
    return file
