"""Files of other projects that are not what they claim."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import D, E, F, K, M
from helpers.foreign_saes import (
    X,
    authors_state,
    numbers,
    openai_state,
    sparsify_state,
    write_authors,
    write_openai,
    write_sparsify,
)
from sae_lens import SAE
from torch import Tensor

from sae_lens_switch.interop.converters import Converter, authors_switch, openai_topk, sparsify_topk

WRITERS: dict[str, tuple[Converter, Any]] = {
    "authors": (authors_switch, lambda folder, state: write_authors(folder, state) / "ae.pt"),
    "sparsify": (sparsify_topk, lambda folder, state: write_sparsify(folder, state) / "sae.safetensors"),
    "openai": (openai_topk, lambda folder, state: write_openai(folder / "8.pt", state)),
}
STATES = {"authors": authors_state, "sparsify": sparsify_state, "openai": openai_state}
KEYS = [
    (name, key) for name, state in STATES.items() for key, t in state().items() if getattr(t, "dtype", 0) == X.dtype
]


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_every_key_must_be_there_in_its_shape_and_finite(tmp_path, name, key):
    converter, write = WRITERS[name]
    state = STATES[name]()
    spoilt = state[key].clone()
    spoilt[-1:] = float("nan") if key != "b_dec" else float("inf")
    # The shapes of all others follow from that of the encoder.
    leading = key == "encoder.weight"
    for bad, message in (
        (None, f"{key} must be a matrix; got nothing" if leading else rf"missing: \['{key}'\]"),
        (state[key][:-2], "shape|dict_size is|num_latents is" if leading else f"{key} must have shape"),
        (state[key].long(), f"{key} must be a dense tensor .* got torch.strided, torch.int64"),
        (spoilt, f"{key} holds NaN or infinite values"),
    ):
        damaged = {k: v for k, v in state.items() if k != key} | ({} if bad is None else {key: bad})
        file = write(tmp_path, {k: v.clone() if isinstance(v, Tensor) else v for k, v in damaged.items()})
        with pytest.raises(ValueError, match=message) as error:
            SAE.load_from_disk(tmp_path, converter=converter)
        assert file.name in str(error.value)


@pytest.mark.parametrize("name", WRITERS)
def test_an_unknown_key_is_refused(tmp_path, name):
    converter, write = WRITERS[name]
    file = write(tmp_path, STATES[name]() | {"W_skip": torch.zeros(D, D)})
    with pytest.raises(ValueError, match=rf"{file.name} must hold .* unknown: \['W_skip'\]"):
        SAE.load_from_disk(tmp_path, converter=converter)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, name, share):
    converter, write = WRITERS[name]
    file = write(tmp_path, None)
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        SAE.load_from_disk(tmp_path, converter=converter)


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", ["authors", "openai"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_objects_are_refused_and_not_run(tmp_path, name, legacy):
    converter, write = WRITERS[name]
    file, trace = write(tmp_path / "sae", None), tmp_path / "trace"
    torch.save(STATES[name]() | {"extra": Bomb(trace)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="which are never loaded"):
        SAE.load_from_disk(tmp_path / "sae", converter=converter)
    assert not trace.exists()
    torch.load(file, weights_only=False)  # it would have
    assert trace.exists()


@pytest.mark.parametrize("name", ["authors", "openai"])
def test_a_tensor_larger_than_its_file_is_refused(tmp_path, name):
    converter, write = WRITERS[name]
    huge = torch.zeros(1, 1, dtype=torch.float64).expand(1 << 30, D)
    file = write(tmp_path, STATES[name]() | {"encoder.weight": huge})
    (tmp_path / "config.json").unlink(missing_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"experts": 1, "k": 1}))
    with pytest.raises(ValueError, match=f"{file.name}.*(shape|claims)"):
        SAE.load_from_disk(tmp_path, converter=converter)
    consistent = {"decoder": huge, "b_dec": torch.zeros(D), "b_router": torch.zeros(D), "router.weight": huge[:1]}
    if name == "authors":
        write(tmp_path, consistent | {"encoder.weight": huge})
        (tmp_path / "config.json").write_text(json.dumps({"experts": 1, "k": 1}))
        with pytest.raises(ValueError, match="encoder.weight claims 12884901888 numbers"):
            SAE.load_from_disk(tmp_path, converter=converter)


def test_other_things_than_state_dicts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold a state dict; got list"):
        SAE.load_from_disk(write_openai(tmp_path / "1.pt", [1, 2]), converter=openai_topk)
    with pytest.raises(ValueError, match="encoder.weight must be a matrix; got nothing"):
        SAE.load_from_disk(write_authors(tmp_path / "a", {"weights": X, 3: X}), converter=authors_switch)
    sparse = authors_state() | {"decoder": numbers(F, D, seed=3).to_sparse()}
    with pytest.raises(ValueError, match="decoder must be a dense tensor .* got torch.sparse_coo"):
        SAE.load_from_disk(write_authors(tmp_path / "b", sparse), converter=authors_switch)


def test_the_authors_variant_with_an_expert_that_is_always_on_is_refused(tmp_path):
    state = authors_state() | {"router.weight": numbers(E - 1, D, seed=2)}
    with pytest.raises(ValueError, match="one row fewer than experts=4.*always on"):
        SAE.load_from_disk(write_authors(tmp_path, state), converter=authors_switch)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"k": "3"}, "k must be a whole number, at least 1; got '3'"),
        ({"k": True}, "k must be a whole number"),
        ({"k": M + 1}, f"k must be at most d_sae / n_experts = {F} / {E} = {M}"),
        ({"experts": 10**9}, r"router.weight must have shape \(1000000000, 12\)"),
        ({"experts": None}, "experts must be a whole number, at least 1; got None"),
        ({"dict_size": 10**12}, f"dict_size is {10**12}, but ae.pt has {F}"),
        ({"activation_dim": D + 1}, f"activation_dim is {D + 1}, but ae.pt has {D}"),
        ({"heaviside": "yes"}, "heaviside must be true or false; got 'yes'"),
    ],
)
def test_settings_of_the_authors_that_are_wrong(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        SAE.load_from_disk(write_authors(tmp_path, **config), converter=authors_switch)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"transcode": True}, "transcode is true: it predicts another module's output"),
        ({"skip_connection": True}, "skip_connection is true"),
        ({"signed": True}, "signed is true"),
        ({"activation": "groupmax"}, "activation must be 'topk'; got 'groupmax'"),
        ({"k": F + 1}, f"k must be at most the number of latents, {F}; got {F + 1}"),
        ({"k": 0}, "k must be a whole number, at least 1; got 0"),
        ({"num_latents": 0, "expansion_factor": "32"}, "expansion_factor must be a whole number"),
        ({"num_latents": 10**12}, f"num_latents is {10**12}, but sae.safetensors has {F}"),
        ({"d_in": D + 1}, f"d_in is {D + 1}, but sae.safetensors has {D}"),
    ],
)
def test_settings_of_sparsify_that_are_wrong(tmp_path, config, message):
    with pytest.raises(ValueError, match=f"cfg.json: {message}"):
        SAE.load_from_disk(write_sparsify(tmp_path, **config), converter=sparsify_topk)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "ReLU"}, "activation must be 'TopK'; got 'ReLU'"),
        ({"activation_state_dict": 3}, "activation_state_dict must hold k and postact_fn; got int"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "postact_fn must be 'ReLU'.*'Identity'"),
        ({"activation_state_dict": {"k": F + 1, "postact_fn": "ReLU"}}, "k must be at most the number of latents"),
        ({"activation_state_dict": {"postact_fn": "ReLU"}}, "k must be a whole number, at least 1; got None"),
    ],
)
def test_settings_of_openai_that_are_wrong(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"8.pt: {message}"):
        SAE.load_from_disk(write_openai(tmp_path / "8.pt", openai_state() | change), converter=openai_topk)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, '{"trainer": 3}'])
def test_configs_that_are_no_tables_are_refused(tmp_path, text):
    folder = write_authors(tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        SAE.load_from_disk(folder, converter=authors_switch)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="ae.pt"):
        SAE.load_from_disk(tmp_path, converter=authors_switch)
    folder = write_authors(tmp_path / "run")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        SAE.load_from_disk(folder, converter=authors_switch)
    file = write_openai(tmp_path / "two" / "1.pt")
    shutil.copy(file, file.with_name("2.pt"))
    with pytest.raises(ValueError, match=r"holds 2 files, name one of them: \['1.pt', '2.pt'\]"):
        SAE.load_from_disk(file.parent, converter=openai_topk)
