"""Weights in one file or in several, read alike; and what is none of either is refused with a reason."""

import json
import re

import pytest
import torch
from helpers import training_sae
from sae_lens import SAE
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from safetensors.torch import load_file, save_file

from sae_lens_switch.common.atomic import replace_files
from sae_lens_switch.converters import sharded_safetensors
from sae_lens_switch.saes.weight_files import INDEX_FILENAME, file_name, split_by_size, write_index


@pytest.fixture
def folder(tmp_path):
    training_sae(dtype="float32").save_inference_model(tmp_path)
    return tmp_path


def split(folder, max_bytes: float) -> dict[str, str]:
    """Put the weights of the SAE in ``folder`` into several files."""
    weights = load_file(folder / SAE_WEIGHTS_FILENAME)
    number_of = split_by_size({name: t.nbytes for name, t in weights.items()}, max_bytes)
    n = max(number_of.values())
    file_of = {name: file_name(i, n) for name, i in number_of.items()}
    for file in set(file_of.values()):
        save_file({name: t for name, t in weights.items() if file_of[name] == file}, folder / file)
    write_index(folder, file_of, sum(t.nbytes for t in weights.values()))
    (folder / SAE_WEIGHTS_FILENAME).unlink()
    return file_of


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_an_sae_loads_alike_from_one_file_and_from_several(folder, dtype):
    expected = SAE.load_from_disk(folder, dtype=dtype, converter=sharded_safetensors)
    assert expected.cfg.to_dict() == SAE.load_from_disk(folder, dtype=dtype).cfg.to_dict()
    assert len(set(split(folder, 500).values())) > 2
    found = SAE.load_from_disk(folder, dtype=dtype, converter=sharded_safetensors)
    assert found.cfg.to_dict() == expected.cfg.to_dict()
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight)


def test_tensors_go_into_as_few_files_as_their_order_allows():
    sizes = {"a": 4, "b": 5, "c": 1, "d": 30, "e": 2, "f": 8}
    assert split_by_size(sizes, None) == dict.fromkeys(sizes, 1)
    assert split_by_size(sizes, 50) == dict.fromkeys(sizes, 1)
    assert split_by_size(sizes, 10) == {"a": 1, "b": 1, "c": 1, "d": 2, "e": 3, "f": 3}
    assert split_by_size(sizes, 1) == {name: i for i, name in enumerate(sizes, start=1)}
    assert file_name(1, 1) == SAE_WEIGHTS_FILENAME
    assert file_name(2, 13) == "sae_weights-00002-of-00013.safetensors"


def test_a_missing_file_is_named(folder):
    name = next(iter(split(folder, 500).values()))
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        sharded_safetensors(folder)


def test_a_missing_tensor_is_named(folder):
    file_of = split(folder, 500)
    write_index(folder, {**file_of, "W_other": file_of["W_dec"]}, 0)
    with pytest.raises(ValueError, match=f"there is no W_other in {file_of['W_dec']}"):
        sharded_safetensors(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"W_dec": 3}}'])
def test_what_is_no_index_is_refused(folder, content):
    (folder / INDEX_FILENAME).write_text(content)
    with pytest.raises(ValueError, match=f"{INDEX_FILENAME} must be an index of weights"):
        sharded_safetensors(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "folder/weights.safetensors"])
def test_an_index_names_files_of_its_own_folder_alone(folder, name):
    (folder / INDEX_FILENAME).write_text(json.dumps({"weight_map": {"W_dec": name}}))
    with pytest.raises(ValueError, match="must name files of its own folder"):
        sharded_safetensors(folder)


@pytest.mark.parametrize("save", ["save_model", "save_inference_model"])
def test_an_sae_is_not_saved_beside_weights_in_several_files(folder, save):
    split(folder, 500)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    message = f"path must be a folder without {INDEX_FILENAME}, of an SAE in other files; got {folder}"
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(training_sae(seed=1, dtype="float32"), save)(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_weights_in_several_files_are_not_put_beside_those_in_one(folder):
    def save(new):
        for name in (file_name(1, 2), file_name(2, 2), INDEX_FILENAME):
            (new / name).write_text("{}")
        return new / INDEX_FILENAME, new / file_name(1, 2)

    before = {file.name for file in folder.iterdir()}
    with pytest.raises(ValueError, match=f"path must be a folder without {SAE_WEIGHTS_FILENAME}, of an SAE in other"):
        replace_files(folder, save)
    assert {file.name for file in folder.iterdir()} == before


def test_a_folder_with_weights_in_both_forms_is_refused(folder):
    weights = (folder / SAE_WEIGHTS_FILENAME).read_bytes()
    split(folder, 500)
    (folder / SAE_WEIGHTS_FILENAME).write_bytes(weights)
    message = f"must hold weights in one form; got {SAE_WEIGHTS_FILENAME} and {INDEX_FILENAME}"
    with pytest.raises(ValueError, match=message):
        sharded_safetensors(folder)
