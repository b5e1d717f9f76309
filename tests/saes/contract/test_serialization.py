"""Files of an SAE: what is saved comes back, and what is broken is refused by name."""

import copy
import json

import pytest
import sae_lens.saes.sae as host
import torch
from helpers import HOOK, D, E, F, M, random_input, randomize, switch_sae, training_sae
from helpers.contract import PARAMETERS, both_kinds, exactly, float32_sae, make, same_weights, step_input, with_norms
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sae_lens_switch import SwitchSAE, SwitchTrainingSAE

# Files


@both_kinds
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_save_model_and_load_from_disk_give_the_same_sae(tmp_path, kind, dtype):
    sae = make(kind, dtype=dtype, metadata=SAEMetadata(hook_name=HOOK, model_name="tiny"))
    before = copy.deepcopy(sae)
    weights_path, cfg_path = sae.save_model(tmp_path / "deep" / "folder")
    assert (weights_path, cfg_path) == (
        tmp_path / "deep" / "folder" / "sae_weights.safetensors",
        tmp_path / "deep" / "folder" / "cfg.json",
    )
    assert {p.name for p in weights_path.parent.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    assert same_weights(sae, before)
    loaded = (SAE if kind == "inference" else TrainingSAE).load_from_disk(weights_path.parent)
    assert type(loaded) is type(sae)
    assert loaded.cfg == sae.cfg
    assert same_weights(loaded, sae)
    assert all(p.requires_grad for p in loaded.parameters())
    assert loaded.W_enc.stride() == sae.W_enc.stride()
    x = random_input(7, D)
    torch.testing.assert_close(loaded(x), sae(x), **exactly)
    torch.testing.assert_close(loaded.encode_sparse(x).indices, sae.encode_sparse(x).indices, **exactly)


@pytest.mark.parametrize("load", [SwitchSAE.load_from_disk, SAE.load_from_disk])
def test_our_class_loads_as_well_as_saelens_base_class(tmp_path, load):
    switch_sae().save_model(tmp_path)
    assert type(load(tmp_path)) is SwitchSAE


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
def test_save_inference_model_loads_as_the_inference_sae_with_equal_outputs(tmp_path, dtype, normalize_activations):
    train = make("training", dtype=dtype, gate="one", k=5, normalize_activations=normalize_activations)
    before = copy.deepcopy(train)
    assert [p.name for p in train.save_inference_model(tmp_path)] == ["sae_weights.safetensors", "cfg.json"]
    assert same_weights(train, before)
    sae = SAE.load_from_disk(tmp_path)
    assert type(sae) is SwitchSAE
    assert (sae.cfg.k, sae.cfg.n_experts, sae.cfg.gate, sae.cfg.dtype) == (5, E, "one", dtype)
    assert sae.cfg.metadata.training_architecture == "switch"
    x = random_input(3, 7, D)
    torch.testing.assert_close(sae.encode(x), train.encode(x), **exactly)
    torch.testing.assert_close(sae(x), train(x), **exactly)


def test_a_tied_router_bias_reaches_the_inference_sae(tmp_path):
    train = training_sae(tie_router_bias=True)
    x = random_input(60, D) + 2
    optimizer = torch.optim.Adam(train.parameters(), lr=0.1)
    for step in range(3):
        train.training_forward_pass(step_input=step_input(x, step=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    train.save_inference_model(tmp_path)
    torch.testing.assert_close(SAE.load_from_disk(tmp_path)(x), train(x), **exactly)


def test_a_training_folder_also_opens_as_an_inference_sae_and_the_other_way_round(tmp_path):
    train = make("training")
    x = random_input(7, D)
    train.save_model(tmp_path / "training")
    torch.testing.assert_close(SAE.load_from_disk(tmp_path / "training")(x), train(x), **exactly)
    train.save_inference_model(tmp_path / "inference")
    again = TrainingSAE.load_from_disk(tmp_path / "inference")
    assert type(again) is SwitchTrainingSAE
    torch.testing.assert_close(again(x), train(x), **exactly)


def test_a_loaded_training_sae_keeps_its_biases_on_its_first_batch(tmp_path):
    train = make("training", normalize_decoder=False)
    train.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    loaded.training_forward_pass(step_input=step_input(random_input(30, D) + 9, step=0))
    assert same_weights(loaded, train)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_load_weights_from_checkpoint_restores_every_parameter(tmp_path, dtype):
    train = make("training", dtype=dtype)
    train.save_model(tmp_path)
    other = training_sae(seed=5, dtype=dtype)
    parameters = dict(other.named_parameters())
    other.load_weights_from_checkpoint(tmp_path)
    assert same_weights(other, train)
    assert dict(other.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in other.named_parameters())
    other.training_forward_pass(step_input=step_input(random_input(30, D) + 9, step=0))
    torch.testing.assert_close(other.b_dec, train.b_dec, **exactly)


def test_the_file_holds_plain_contiguous_tensors_under_the_names_of_saelens(tmp_path):
    sae = switch_sae()
    weights_path, _ = sae.save_model(tmp_path)
    file = load_file(weights_path)
    assert PARAMETERS.items() <= {name: tuple(t.shape) for name, t in file.items()}.items()
    for name in PARAMETERS:
        assert torch.equal(file[name], getattr(sae, name))


def test_loading_with_fold_w_dec_norm_equals_folding_after_loading(tmp_path):
    sae = with_norms(torch.tensor([0.2, 1.0, 3.0, 50.0]).repeat_interleave(M))
    sae.save_model(tmp_path)
    folded = SAE.load_from_disk(tmp_path, fold_W_dec_norm=True)
    sae.fold_W_dec_norm()
    assert same_weights(folded, sae)


def from_disk_like_the_hub(folder):
    def load(repo_id, folder_name, device, force_download, cfg_overrides):  # noqa: ARG001
        cfg, weights = host.sae_lens_disk_loader(folder, device, cfg_overrides)
        return cfg, weights, None

    return load


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_pretrained_gives_the_saved_sae_in_the_asked_dtype(tmp_path, dtype):
    sae = float32_sae()
    sae.save_model(tmp_path)
    loaded = SAE.from_pretrained("user/repo", "folder", dtype=dtype, converter=from_disk_like_the_hub(tmp_path))
    assert type(loaded) is SwitchSAE
    assert same_weights(loaded, sae.to(getattr(torch, dtype)))


def test_from_pretrained_folds_a_known_scaling_factor_into_the_router_too(tmp_path, monkeypatch):
    sae = switch_sae(dtype="float32", normalize_activations="expected_average_only_in")
    sae.save_model(tmp_path)
    monkeypatch.setattr(host, "get_norm_scaling_factor", lambda release, sae_id: 0.25)  # noqa: ARG005
    loaded = SAE.from_pretrained("user/repo", "folder", converter=from_disk_like_the_hub(tmp_path))
    assert loaded.cfg.normalize_activations == "none"
    sae.fold_activation_norm_scaling_factor(0.25)
    assert same_weights(loaded, sae)


def test_a_save_that_fails_leaves_the_files_before_it_whole(tmp_path, monkeypatch):
    sae = switch_sae()
    sae.save_model(tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def crash(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(host.json, "dump", crash)
    with pytest.raises(OSError, match="disk full"):
        randomize(sae, seed=5).save_model(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files


# Broken files


def broken(tmp_path, change, kind: str = "inference"):
    """A saved SAE whose weights file went through ``change``."""
    weights_path, _ = make(kind).save_model(tmp_path)
    weights = load_file(weights_path)
    change(weights)
    save_file(weights, weights_path)
    return tmp_path


@pytest.mark.parametrize("name", PARAMETERS)
@both_kinds
def test_a_weights_file_without_a_parameter_is_refused_by_name(tmp_path, name, kind):
    folder = broken(tmp_path, lambda weights: weights.pop(name), kind)
    with pytest.raises(ValueError, match=f"must hold {name}"):
        (SAE if kind == "inference" else TrainingSAE).load_from_disk(folder)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_misshaped_parameter_is_refused_with_both_shapes(tmp_path, name):
    def transpose_or_cut(weights):
        weights[name] = weights[name].T.contiguous() if weights[name].ndim == 2 else weights[name][1:].clone()

    folder = broken(tmp_path, transpose_or_cut)
    with pytest.raises(ValueError, match=name) as error:
        SAE.load_from_disk(folder)
    assert str(PARAMETERS[name]) in str(error.value)


def test_weights_that_do_not_fit_are_refused_by_load_weights_from_checkpoint_and_change_nothing(tmp_path):
    folder = broken(tmp_path, lambda weights: weights.update(W_dec=weights["W_dec"][1:].clone()), "training")
    sae = make("training", k=5)
    before = copy.deepcopy(sae)
    with pytest.raises(ValueError, match="W_dec"):
        sae.load_weights_from_checkpoint(folder)
    assert same_weights(sae, before)


def test_weights_of_another_number_of_experts_are_refused(tmp_path):
    switch_sae().save_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"n_experts": 2 * E}))
    with pytest.raises(ValueError, match="W_router must have shape"):
        SAE.load_from_disk(tmp_path)


def test_a_parameter_too_many_is_refused_by_name(tmp_path):
    folder = broken(tmp_path, lambda weights: weights.update(b_enc=torch.zeros(F)))
    with pytest.raises(RuntimeError, match="b_enc"):
        SAE.load_from_disk(folder)


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.999])
def test_a_truncated_weights_file_is_refused(tmp_path, keep):
    weights_path, _ = switch_sae().save_model(tmp_path)
    data = weights_path.read_bytes()
    weights_path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(SafetensorError):
        SAE.load_from_disk(tmp_path)


def test_a_garbled_header_is_refused(tmp_path):
    weights_path, _ = switch_sae().save_model(tmp_path)
    data = bytearray(weights_path.read_bytes())
    data[8:40] = b"\xff" * 32
    weights_path.write_bytes(data)
    with pytest.raises(SafetensorError):
        SAE.load_from_disk(tmp_path)


def test_a_training_run_cannot_be_read_with_an_impossible_config(tmp_path):
    switch_sae().save_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"k": M + 1}))
    with pytest.raises(ValueError, match="k must be at most"):
        SAE.load_from_disk(tmp_path)
