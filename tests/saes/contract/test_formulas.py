"""Shapes, initialisation and the mathematics of ``switch``, for inputs of any shape, against the dense formulas."""

import pytest
import torch
from helpers import HOOK, D, E, F, K, M, random_input, switch_config, switch_sae, training_config, training_sae
from helpers.contract import PARAMETERS, ROUTER, both_kinds, exactly, make, tightly
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from torch import Tensor

from sae_lens_switch import SwitchSAE, SwitchTrainingSAE


def dense_oracle(sae: SwitchSAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """f and x_hat of x [B, D] by the formulas of the paper, with every latent of every expert computed."""
    probs = ((x - sae.b_router) @ sae.W_router).softmax(-1)
    expert = probs.argmax(-1)
    pre = ((x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x) @ sae.W_enc).relu()
    own = torch.arange(F) // M == expert[:, None]
    kth = pre.where(own, torch.tensor(-1.0, dtype=x.dtype)).sort(descending=True).values[:, sae.cfg.k - 1, None]
    gate = probs.gather(-1, expert[:, None]) if sae.cfg.gate == "probability" else 1.0
    acts = pre * own * (pre >= kth) * gate
    return acts, acts @ sae.W_dec + sae.b_dec


# Shapes and initialisation


@both_kinds
def test_parameters_have_the_names_and_shapes_of_saelens(kind):
    sae = make(kind)
    assert {name: tuple(p.shape) for name, p in sae.named_parameters()} == PARAMETERS
    assert not dict(sae.named_buffers())
    assert all(p.requires_grad for p in sae.parameters())
    assert (sae.dtype, sae.device) == (torch.float64, torch.device("cpu"))
    assert not hasattr(sae, "b_enc")


@pytest.mark.parametrize(
    ("options", "norm"),
    [({}, 1.0), ({"normalize_decoder": False, "decoder_init_norm": 0.1}, 0.1), ({"decoder_init_norm": None}, None)],
)
def test_the_decoder_starts_at_decoder_init_norm_and_the_encoder_as_its_transpose(options, norm):
    sae = training_sae(**options)
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T, **exactly)
    if norm is not None:
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((F,), norm).double())
    else:
        assert sae.W_dec.norm(dim=1).std() > 1e-3
    assert not sae.b_dec.any()
    assert sae.W_enc.untyped_storage().data_ptr() != sae.W_dec.untyped_storage().data_ptr()
    assert sae.b_dec.untyped_storage().data_ptr() != sae.b_router.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("args", "kwargs", "device", "dtype"),
    [
        (("cpu",), {}, "cpu", torch.float64),
        ((torch.device("cpu"),), {}, "cpu", torch.float64),
        ((torch.float32,), {}, "cpu", torch.float32),
        (("cpu", torch.float32), {}, "cpu", torch.float32),
        ((torch.zeros(1, dtype=torch.bfloat16),), {}, "cpu", torch.bfloat16),
        ((), {"dtype": torch.float16}, "cpu", torch.float16),
        ((), {"device": "cpu", "dtype": torch.bfloat16}, "cpu", torch.bfloat16),
        (("meta",), {}, "meta", torch.float64),
        ((), {"device": "meta", "dtype": torch.bfloat16}, "meta", torch.bfloat16),
    ],
    ids=str,
)
@both_kinds
def test_to_in_every_spelling_moves_parameters_attributes_and_config(kind, args, kwargs, device, dtype):
    sae = make(kind)
    assert sae.to(*args, **kwargs) is sae
    assert (sae.dtype, str(sae.device)) == (dtype, device)
    assert (sae.cfg.dtype, sae.cfg.device) == (str(dtype).removeprefix("torch."), device)
    assert {p.device.type for p in sae.parameters()} == {device}
    for name, parameter in sae.named_parameters():
        assert parameter.dtype == (torch.promote_types(dtype, torch.float32) if name in ROUTER else dtype)


def test_get_name_is_that_of_every_sae():
    sae = switch_sae(metadata=SAEMetadata(model_name="tiny", hook_name=HOOK))
    assert sae.get_name() == f"sae_tiny_{HOOK}_{F}"


def test_from_dict_builds_the_sae_of_the_architecture():
    assert type(SAE.from_dict(switch_config().to_dict())) is SwitchSAE
    assert type(TrainingSAE.from_dict(training_config().to_dict())) is SwitchTrainingSAE


# The mathematics, for inputs of any shape


@both_kinds
@pytest.mark.parametrize(
    "options",
    [{}, {"gate": "one"}, {"apply_b_dec_to_input": False}, {"k": M}, {"k": 1}, {"n_experts": 1, "k": 7}],
    ids=str,
)
def test_encode_decode_and_forward_follow_the_formulas(kind, options):
    if options.get("n_experts") == 1:
        sae = make(kind, **options)
        x = random_input(50, D)
        pre = ((x - sae.b_dec) @ sae.W_enc).relu()
        top = pre.topk(7)
        acts = torch.zeros_like(pre).scatter(1, top.indices, top.values)
        out = acts @ sae.W_dec + sae.b_dec
    else:
        sae = make(kind, **options)
        x = random_input(50, D)
        acts, out = dense_oracle(sae, x)
    torch.testing.assert_close(sae.encode(x), acts, **tightly)
    torch.testing.assert_close(sae.decode(acts), out, **tightly)
    torch.testing.assert_close(sae(x), out, **tightly)


@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (2, 1, 3), (1, 2, 2, 3), (2, 1, 2, 1, 3)], ids=str)
@both_kinds
def test_any_leading_dimensions_equal_the_flattened_input(kind, lead):
    sae = make(kind)
    x = random_input(*lead, D)
    flat = x.reshape(-1, D)
    acts, codes = sae.encode(x), sae.encode_sparse(x)
    assert acts.shape == (*lead, F)
    assert codes.values.shape == codes.indices.shape == (*lead, K)
    assert codes.d_sae == F
    torch.testing.assert_close(acts.reshape(-1, F), sae.encode(flat), **tightly)
    torch.testing.assert_close(codes.to_dense(), acts, **exactly)
    torch.testing.assert_close(codes.to_coo().to_dense(), acts, **exactly)
    assert codes.to_coo().is_sparse
    for out in (sae.decode(acts), sae.decode(codes), sae(x)):
        assert out.shape == (*lead, D)
        torch.testing.assert_close(out.reshape(-1, D), sae(flat), **tightly)


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
@both_kinds
def test_an_empty_batch_gives_empty_results(kind, lead):
    sae = make(kind)
    x = torch.zeros(*lead, D, dtype=torch.float64)
    codes = sae.encode_sparse(x)
    assert codes.values.shape == (*lead, K)
    assert codes.to_dense().shape == sae.encode(x).shape == codes.to_coo().shape == (*lead, F)
    assert sae.decode(codes).shape == sae.decode(codes.to_dense()).shape == sae(x).shape == (*lead, D)


@pytest.mark.parametrize("k", [1, K, M])
def test_at_most_k_latents_are_active_all_of_one_expert_and_none_negative(k):
    sae = switch_sae(k=k)
    acts = sae.encode(random_input(300, D))
    assert ((acts != 0).sum(1) <= k).all()
    assert (acts >= 0).all()
    experts_used = (acts.view(-1, E, M) != 0).any(2).sum(1)
    assert (experts_used <= 1).all()
    if k < 5:
        assert (acts != 0).sum(1).double().mean() > 0.8 * k


def test_decode_is_linear_in_any_dense_latents_mixed_over_experts():
    sae = switch_sae()
    f, g = random_input(6, F, seed=3), random_input(6, F, seed=4)
    origin = sae.decode(torch.zeros(6, F, dtype=torch.float64))
    torch.testing.assert_close(origin, sae.b_dec.expand(6, D), **exactly)
    mixed = sae.decode(2 * f - 3 * g)
    torch.testing.assert_close(mixed - origin, 2 * (sae.decode(f) - origin) - 3 * (sae.decode(g) - origin), **tightly)
    one_latent = torch.eye(F, dtype=torch.float64)
    torch.testing.assert_close(sae.decode(one_latent), sae.W_dec + sae.b_dec, **tightly)


def test_encode_returns_a_fresh_tensor_that_may_be_edited_in_place():
    sae, x = switch_sae(), random_input(6, D)
    with torch.no_grad():
        acts = sae.encode(x)
        expected = acts.clone()
        expected[:, 5] = 7.0
        acts[:, 5] = 7.0
        torch.testing.assert_close(sae.decode(acts), expected @ sae.W_dec + sae.b_dec, **tightly)
        torch.testing.assert_close(sae.encode(x)[:, 6:], expected[:, 6:], **exactly)


@both_kinds
def test_inputs_and_parameters_get_the_gradients_of_the_dense_formulas(kind):
    sae = make(kind)
    x = random_input(2, 9, D).requires_grad_()
    leaves = [x, *sae.parameters()]
    upstream = random_input(2, 9, D, seed=5)
    ours = torch.autograd.grad(sae(x), leaves, upstream)
    oracle = torch.autograd.grad(dense_oracle(sae, x.reshape(-1, D))[1].reshape(2, 9, D), leaves, upstream)
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a, b, **tightly)


def test_decode_gives_dense_latents_their_gradient_those_not_active_too():
    sae = switch_sae()
    acts = sae.encode(random_input(4, D)).detach().requires_grad_()
    sae.decode(acts).sum().backward()
    torch.testing.assert_close(acts.grad, sae.W_dec.sum(1).expand(4, F), **tightly)


def test_an_untrained_and_a_training_sae_encode_like_the_inference_sae_with_their_weights():
    train, inference = make("training"), switch_sae(seed=9)
    inference.load_state_dict(train.state_dict())
    x = random_input(3, 5, D)
    for mode in (True, False):
        train.train(mode)
        torch.testing.assert_close(train.encode(x), inference.encode(x), **exactly)
        torch.testing.assert_close(train.encode_with_hidden_pre(x)[0], inference.encode(x), **exactly)
        torch.testing.assert_close(train(x), inference(x), **exactly)


def test_inputs_of_another_dtype_are_cast_to_that_of_the_sae():
    sae = switch_sae()
    x = random_input(5, D, dtype=torch.float32)
    assert sae(x).dtype == sae.encode(x).dtype == sae.encode_sparse(x).values.dtype == torch.float64
    torch.testing.assert_close(sae(x), sae(x.double()), **exactly)


@both_kinds
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_encode_and_decode_need_no_gradients(kind, mode):
    sae, x = make(kind), random_input(2, 3, D)
    expected = sae(x)
    with mode():
        torch.testing.assert_close(sae(x), expected, **exactly)
        torch.testing.assert_close(sae.decode(sae.encode_sparse(x)), expected, **tightly)
        assert not sae(x).requires_grad
