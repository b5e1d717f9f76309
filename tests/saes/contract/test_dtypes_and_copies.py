"""Other dtypes, copies, and the meta device."""

import copy
import io
import pickle

import pytest
import torch
from helpers import D, M, random_input, randomize, switch_config, switch_sae, training_config, training_sae
from helpers.contract import (
    ROUTER,
    RUN_TIME_NORMALISATIONS,
    both_kinds,
    exactly,
    float32_sae,
    hook_z_metadata,
    make,
    same_weights,
    step_input,
)
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE

from sae_lens_switch import SwitchSAE, SwitchTrainingSAE

NORMALISATIONS = ["none", "expected_average_only_in", "layer_norm", "constant_norm_rescale", "covariance_whitening"]


# Dtype


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@both_kinds
def test_half_precision_leaves_the_router_in_float32_bit_for_bit(kind, half):
    sae = make(kind, dtype="float32")
    router = [getattr(sae, name).detach().clone() for name in ROUTER]
    for to in (half, torch.float32, half):
        sae.to(to)
        assert sae.W_enc.dtype == sae.W_dec.dtype == sae.b_dec.dtype == to
        for name, before in zip(ROUTER, router, strict=True):
            torch.testing.assert_close(getattr(sae, name).detach(), before, **exactly)
            assert getattr(sae, name).requires_grad


def test_a_half_precision_copy_routes_every_token_as_the_original_does():
    sae, x = float32_sae(), random_input(500, D, dtype=torch.bfloat16)
    half = copy.deepcopy(sae).to(torch.bfloat16)
    expert = sae.encode_sparse(x).indices[:, 0] // M
    assert torch.equal(half.encode_sparse(x).indices[:, 0] // M, expert)
    assert half.encode(x).dtype == half(x).dtype == half.decode(half.encode_sparse(x)).dtype == torch.bfloat16
    error = (half(x).float() - sae(x)).square().sum() / sae(x).square().sum()
    assert error < 1e-3


def test_gradients_follow_their_parameters_through_a_change_of_dtype():
    sae = float32_sae()
    sae(random_input(5, D)).sum().backward()
    sae.to(torch.bfloat16)
    for parameter in sae.parameters():
        assert parameter.grad.dtype == parameter.dtype


@pytest.mark.parametrize("saved_as", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("load", [SAE.load_from_disk, TrainingSAE.load_from_disk], ids=["SAE", "TrainingSAE"])
def test_the_router_comes_back_bit_for_bit_when_loaded_in_bfloat16(tmp_path, saved_as, load):
    sae = float32_sae() if load == SAE.load_from_disk else make("training", dtype="float32")
    expected = {name: getattr(sae, name).detach().clone() for name in ROUTER}
    sae.to(getattr(torch, saved_as)).save_model(tmp_path)
    loaded = load(tmp_path, dtype="bfloat16")
    assert loaded.W_enc.dtype == torch.bfloat16
    assert torch.equal(loaded.W_enc, sae.W_enc.bfloat16())
    for name, before in expected.items():
        torch.testing.assert_close(getattr(loaded, name).detach(), before, **exactly)


@pytest.mark.parametrize("load_as", ["float32", "float64"])
def test_the_router_of_a_bfloat16_file_comes_back_bit_for_bit_in_wider_dtypes(tmp_path, load_as):
    sae = float32_sae()
    expected = {name: getattr(sae, name).detach().clone() for name in ROUTER}
    sae.to(torch.bfloat16).save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path, dtype=load_as)
    for name, before in expected.items():
        torch.testing.assert_close(getattr(loaded, name).detach(), before.to(getattr(torch, load_as)), **exactly)


@pytest.mark.parametrize("saved_as", ["float32", "bfloat16", "float16"])
def test_the_router_comes_back_as_it_was_when_loaded_in_float16(tmp_path, saved_as):
    sae = float32_sae()
    expected = {name: getattr(sae, name).detach().clone() for name in ROUTER}
    sae.to(getattr(torch, saved_as)).save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path, dtype="float16")
    for name, before in expected.items():
        # float16 has no exponent for the last bits of a small number
        torch.testing.assert_close(getattr(loaded, name).detach(), before, rtol=0, atol=2**-24)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_training_pass_works_in_every_dtype(dtype):
    sae, x = training_sae(dtype=dtype), random_input(30, D, dtype=torch.float32) + 1
    output = sae.training_forward_pass(step_input=step_input(x, step=0))
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for n, p in sae.named_parameters() if n != "b_router")
    torch.testing.assert_close(sae.b_dec.float(), sae.b_router, rtol=1e-2, atol=1e-2)


# Copies


def round_trip_pickle(sae):
    return pickle.loads(pickle.dumps(sae))


def round_trip_torch_save(sae):
    file = io.BytesIO()
    torch.save(sae, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


copies = pytest.mark.parametrize("copied", [copy.deepcopy, round_trip_pickle, round_trip_torch_save])


@copies
@both_kinds
@pytest.mark.parametrize("normalize_activations", NORMALISATIONS)
def test_a_copy_computes_the_same_and_shares_nothing_with_the_original(copied, kind, normalize_activations):
    sae = make(kind, normalize_activations=normalize_activations)
    twin = copied(sae)
    x = random_input(7, D)
    assert type(twin) is type(sae)
    assert twin.cfg == sae.cfg
    assert twin.cfg is not sae.cfg
    assert same_weights(twin, sae)
    expected = sae(x)
    torch.testing.assert_close(twin(x), expected, **exactly)

    randomize(twin, seed=77)
    torch.testing.assert_close(sae(x), expected, **exactly)
    with twin.hooks([("hook_sae_acts_post", lambda acts, hook: acts * 0)]):  # noqa: ARG005
        torch.testing.assert_close(sae(x), expected, **exactly)
    assert {id(h) for h in twin.hook_dict.values()}.isdisjoint({id(h) for h in sae.hook_dict.values()})
    assert all(getattr(twin, name) is hook for name, hook in twin.hook_dict.items())


@copies
@pytest.mark.parametrize("normalize_activations", RUN_TIME_NORMALISATIONS)
def test_original_and_copy_may_be_used_between_each_others_encode_and_decode(copied, normalize_activations):
    sae = switch_sae(normalize_activations=normalize_activations)
    twin = copied(sae)
    x, y = random_input(4, D), random_input(4, D, seed=8) * 100
    expected = sae(x)
    acts = sae.encode(x)
    twin_acts = twin.encode(y)
    torch.testing.assert_close(sae.decode(acts), expected, **exactly)
    torch.testing.assert_close(twin.decode(twin_acts), sae(y), **exactly)


@copies
@pytest.mark.parametrize("used_before", [False, True])
def test_copies_of_a_hook_z_sae_reshape_on_their_own(copied, used_before):
    sae = switch_sae(reshape_activations="hook_z", metadata=hook_z_metadata())
    x, y = random_input(4, 3, D // 3), random_input(4, 2, D // 2)
    expected_x, expected_y = copy.deepcopy(sae)(x), copy.deepcopy(sae)(y)
    if used_before:
        sae(x)
    twin = copied(sae)
    torch.testing.assert_close(twin(y), expected_y, **exactly)
    torch.testing.assert_close(sae(x), expected_x, **exactly)
    sae.turn_off_forward_pass_hook_z_reshaping()
    torch.testing.assert_close(twin(y), expected_y, **exactly)
    off = copied(sae)
    assert off(y.reshape(4, D)).shape == (4, D)


def test_a_copy_of_a_trained_sae_does_not_start_over():
    sae, x = training_sae(), random_input(30, D) + 3
    sae.training_forward_pass(step_input=step_input(x, step=0))
    assert sae.b_dec.any()
    twin = round_trip_pickle(sae)
    twin.training_forward_pass(step_input=step_input(x * 10, step=0))
    assert same_weights(twin, sae)


# Meta device


@both_kinds
def test_an_sae_can_be_built_on_the_meta_device_without_touching_data(kind):
    cfg = (switch_config if kind == "inference" else training_config)(device="meta", d_sae=2**26, n_experts=2**10)
    sae = (SwitchSAE if kind == "inference" else SwitchTrainingSAE)(cfg)
    assert {p.device.type for p in sae.parameters()} == {"meta"}
    assert sae.W_dec.shape == (2**26, D)
