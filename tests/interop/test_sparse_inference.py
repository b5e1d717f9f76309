"""``encode_sparse`` and ``decode_sparse`` against SAELens's own ``encode``, ``decode`` and ``forward``."""

import pytest
import torch
from helpers import D, E, K, M, is_that_of_tiles, largest_allocation, random_input, switch_sae
from helpers.inference_saes import ALL, D_OUT, SAES, TOPK_K, F, with_few_active
from helpers.transcoders import every_kind, transcoder, with_and_without_skip
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig
from sae_lens.saes.sae import SAE, SAEMetadata
from sae_lens.saes.topk_sae import TopK, TopKTrainingSAE, TopKTrainingSAEConfig

from sae_lens_switch import (
    SparseBatchTopKTrainingSAE,
    SparseBatchTopKTrainingSAEConfig,
    SparseCodes,
    decode_sparse,
    encode_sparse,
)

tightly = {"rtol": 1e-9, "atol": 1e-10}
exactly = {"rtol": 0, "atol": 0}
every = pytest.mark.parametrize("name", ALL)
each_sae = pytest.mark.parametrize("name", SAES)


def assert_same_as_saelens(sae, x, **close) -> SparseCodes:
    """Latents, their reconstruction, and the whole forward pass."""
    acts = sae.encode(x)
    expected = sae.decode(acts)
    codes = encode_sparse(sae, x)
    torch.testing.assert_close(codes.to_dense(), acts, **close)
    torch.testing.assert_close(decode_sparse(sae, codes), expected, **close)
    torch.testing.assert_close(decode_sparse(sae, encode_sparse(sae, x), x), sae(x), **close)
    return codes


@every
@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (2, 1, 3)], ids=str)
def test_latents_reconstruction_and_forward_equal_saelens_for_any_leading_shape(name, lead):
    for sae in (ALL[name](), with_few_active(ALL[name](seed=4))):
        codes = assert_same_as_saelens(sae, random_input(*lead, D), **tightly)
        assert codes.batch_shape == lead
        assert codes.to_coo().shape == (*lead, F)
        assert decode_sparse(sae, codes).shape == (*lead, D_OUT if "transcoder" in name else D)


@every_kind
@with_and_without_skip
def test_transcoders_of_this_package_add_their_skip_connection_to_given_inputs(kind, skip):
    sae, x = transcoder(kind, skip_connection=skip), random_input(20, 12)
    codes = encode_sparse(sae, x)
    torch.testing.assert_close(decode_sparse(sae, codes, x), sae(x), **tightly)
    torch.testing.assert_close(decode_sparse(sae, codes), sae.decode(sae.encode(x)), **tightly)


@every
def test_the_codes_are_those_that_are_active_and_no_others(name):
    sae, x = with_few_active(ALL[name]()), random_input(200, D)
    codes, acts = encode_sparse(sae, x), sae.encode(x)
    if "topk" in name:
        assert codes.values.shape == (200, TOPK_K)
        assert (codes.values < 0).any() == name.startswith("abs")
    else:
        assert codes.offsets is not None
        assert torch.equal(codes.offsets.diff(), (acts != 0).sum(1))
        assert (codes.values > 0).all()
        assert 0 < len(codes.values) < 0.3 * acts.numel()


@each_sae
@pytest.mark.parametrize("apply_b_dec", [True, False], ids=["b_dec subtracted", "not"])
@pytest.mark.parametrize("normalize", ["none", "constant_norm_rescale", "layer_norm", "expected_average_only_in"])
def test_normalisation_and_the_bias_of_the_input_are_those_of_saelens(name, normalize, apply_b_dec):
    sae = SAES[name](normalize_activations=normalize, apply_b_dec_to_input=apply_b_dec)
    x = random_input(4, 9, D) * 3 + 1
    out = decode_sparse(sae, encode_sparse(sae, x))
    torch.testing.assert_close(out, sae(x), **tightly)
    torch.testing.assert_close(encode_sparse(sae, x).to_dense(), sae.encode(x), **tightly)


@every
def test_transcoders_normalise_their_input_only(name):
    if name in SAES:
        return
    sae, x = ALL[name](normalize_activations="layer_norm"), random_input(9, D) * 3 + 1
    assert_same_as_saelens(sae, x, **tightly)


@each_sae
def test_heads_are_flattened_and_given_back(name):
    sae = SAES[name](reshape_activations="hook_z", metadata=SAEMetadata(hook_name="blocks.0.attn.hook_z"))
    x = random_input(3, 5, 2, D // 2)
    codes = assert_same_as_saelens(sae, x, **tightly)
    assert codes.batch_shape == (3, 5)
    with pytest.raises(ValueError, match=rf"x must be \[..., n_heads, d_head\] with n_heads \* d_head = {D}; got"):
        encode_sparse(sae, random_input(3, D))


@every
@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_tokens_have_no_codes(name, lead):
    sae = ALL[name]()
    codes = encode_sparse(sae, torch.zeros(*lead, D))
    assert codes.to_dense().shape == (*lead, F)
    assert decode_sparse(sae, codes).shape == sae.decode(sae.encode(torch.zeros(*lead, D))).shape


@pytest.mark.parametrize("name", ["standard", "jumprelu", "gated", "transcoder", "jumprelu_skip_transcoder"])
def test_a_token_may_have_no_active_latent_or_all_of_them(name):
    sae, x = ALL[name](), random_input(6, D)
    for shift, n in ((-99.0, 0), (99.0, F)):
        for bias in ("b_enc", "b_gate", "b_mag"):
            if getattr(sae, bias, None) is not None:
                sae.get_parameter(bias).data.fill_(shift)
        codes = assert_same_as_saelens(sae, x, **tightly)
        assert codes.values.shape == (6 * n,)


def test_a_negative_threshold_lets_nothing_negative_through():
    sae, x = ALL["jumprelu"](), random_input(60, D)
    assert (sae.threshold < 0).any()
    sae.threshold.data.sub_(2)
    assert (assert_same_as_saelens(sae, x, **tightly).values > 0).all()


def test_a_token_that_is_nan_stays_nan():
    for name, make in SAES.items():
        sae, x = make(), random_input(3, D)
        x[1, 2] = torch.nan
        out = decode_sparse(sae, encode_sparse(sae, x))
        assert out[1].isnan().all(), name
        torch.testing.assert_close(out[::2], sae(x)[::2], **tightly)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precisions_stay_as_near_to_the_exact_latents_as_saelens_does(name, dtype):
    exact, x = with_few_active(ALL[name]()), random_input(300, D)
    sae = with_few_active(ALL[name]()).to(dtype)
    exact.load_state_dict({key: t.double() for key, t in sae.state_dict().items()})
    codes = encode_sparse(sae, x)
    assert codes.values.dtype == decode_sparse(sae, codes).dtype == dtype
    assert encode_sparse(sae, x.to(dtype).double()).values.dtype == dtype
    truth = exact.encode(x.to(dtype).double())
    size = truth.norm()
    theirs = (sae.encode(x).double() - truth).norm() / size
    assert (codes.to_dense().double() - truth).norm() / size <= 1.5 * theirs + 1e-6
    truth = exact.decode(codes.to_dense().double())
    assert (decode_sparse(sae, codes).double() - truth).norm() <= 0.02 * truth.norm()


def test_under_autocast_latents_keep_the_dtype_of_the_sae():
    for name in ("topk", "jumprelu", "gated"):
        sae, x = with_few_active(SAES[name](dtype="float32")), random_input(300, D, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            codes = encode_sparse(sae, x)
            out = decode_sparse(sae, codes)
        assert codes.values.dtype == out.dtype == torch.float32
        error = codes.to_dense() - sae.encode(x)
        assert 0 < error.norm() < 0.2 * sae.encode(x).norm(), name


@every
def test_gradients_are_those_of_saelens_where_the_input_requires_one(name):
    sae, x = with_few_active(ALL[name]()), random_input(2, 9, D)
    upstream = random_input(2, 9, D_OUT if "transcoder" in name else D, seed=5)
    found = []
    for sparse in (True, False):
        leaf = x.clone().requires_grad_()
        sae.zero_grad()
        (decode_sparse(sae, encode_sparse(sae, leaf), leaf) if sparse else sae(leaf)).backward(upstream)
        found.append({"x": leaf.grad} | {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][key], **tightly, msg=lambda m, key=key: f"{key}: {m}")


@every
def test_without_such_an_input_there_is_no_graph_and_edited_codes_have_gradients(name):
    sae, x = ALL[name](), random_input(4, D)
    codes = encode_sparse(sae, x)
    assert not codes.values.requires_grad
    edited = SparseCodes(codes.values.clone().requires_grad_(), codes.indices, F, codes.offsets, codes.lead)
    decode_sparse(sae, edited).sum().backward()
    assert edited.values.grad.abs().sum() > 0
    with torch.inference_mode():
        codes = encode_sparse(sae, x)
    torch.testing.assert_close(decode_sparse(sae, codes), sae.decode(sae.encode(x)), **tightly)


@every
def test_no_tensor_of_tokens_times_latents_is_made_outside_a_tile(name):
    B, width = 2048, 1024
    sae = ALL[name](d_in=6, d_sae=width, dtype="float32", **({"d_out": 6} if "transcoder" in name else {}))
    sae, x = with_few_active(sae), random_input(B, 6, dtype=torch.float32)
    if "topk" not in name:  # a few hundred of a thousand latents of six inputs would be as large as a tile
        sae.get_parameter("b_gate" if name == "gated" else "b_enc").data.sub_(2 * sae.W_enc.norm(dim=0))
    assert is_that_of_tiles(largest_allocation(lambda: decode_sparse(sae, encode_sparse(sae, x), x)), width, B)
    assert largest_allocation(lambda: sae(x)) >= 4 * B * width, "the census can see a dense tensor"


@every
def test_hooks_on_input_and_reconstruction_fire_and_those_on_dense_latents_are_refused(name):
    sae, x = ALL[name](), random_input(4, D)
    sae.add_hook("hook_sae_input", lambda t, hook: t * 1.5)  # noqa: ARG005
    sae.add_hook("hook_sae_recons", lambda t, hook: t + 1)  # noqa: ARG005
    assert_same_as_saelens(sae, x, **tightly)
    for hook in ("hook_sae_acts_pre", "hook_sae_acts_post"):
        sae.reset_hooks()
        sae.add_hook(hook, lambda t, hook: t)  # noqa: ARG005
        with pytest.raises(ValueError, match=f"sae must have no hooks on dense latents.*got hooks at {hook}"):
            encode_sparse(sae, x)


def test_batchtopk_works_as_it_is_saved(tmp_path):
    fields = {"d_in": D, "d_sae": F, "k": 4.5, "dtype": "float64", "decoder_init_norm": 1.0}
    trained = SparseBatchTopKTrainingSAE(SparseBatchTopKTrainingSAEConfig(**fields))
    trained.topk_threshold.fill_(0.7)
    trained.save_inference_model(tmp_path)
    sae = SAE.load_from_disk(tmp_path)
    assert type(sae) is JumpReLUSAE
    codes = assert_same_as_saelens(sae, random_input(50, D), **tightly)
    assert 50 < len(codes.values) < 25 * F


def test_saes_of_this_package_answer_for_themselves():
    sae, x = switch_sae(), random_input(3, 4, D)
    codes = encode_sparse(sae, x)
    assert codes.values.shape == (3, 4, K)
    torch.testing.assert_close(codes.to_dense(), sae.encode(x), **exactly)
    torch.testing.assert_close(decode_sparse(sae, codes), sae(x), **tightly)
    assert not codes.values.requires_grad
    trained, x = SparseBatchTopKTrainingSAE(SparseBatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=4.5)), x.float()
    with torch.inference_mode():
        codes = encode_sparse(trained, x)
        expected = decode_sparse(trained, codes)
    torch.testing.assert_close(decode_sparse(trained, codes), expected, **exactly)


def test_saes_that_it_does_not_know_are_refused_by_name():
    x = random_input(3, D)
    pursuit = MatchingPursuitSAE(MatchingPursuitSAEConfig(d_in=D, d_sae=F, dtype="float64"))
    with pytest.raises(ValueError, match="exactly one of StandardSAE, .*, JumpReLUSkipTranscoder; got a MatchingPurs"):
        encode_sparse(pursuit, x)
    training = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=F, k=3, dtype="float64"))
    with pytest.raises(ValueError, match="got a TopKTrainingSAE; one in training: save_inference_model, and load"):
        encode_sparse(training, x)

    class Mine(JumpReLUSAE):
        pass

    sae = ALL["jumprelu"]()
    with pytest.raises(ValueError, match="got a Mine"):
        decode_sparse(Mine(sae.cfg), encode_sparse(sae, x))


def test_what_does_not_fit_is_named():
    sae, x = ALL["topk"](), random_input(3, D)
    with pytest.raises(ValueError, match=rf"x must be \[..., d_in\] with d_in = {D}; got shape \(3, {D - 1}\)"):
        encode_sparse(sae, x[:, 1:])
    with pytest.raises(ValueError, match=r"x must be .*; got shape \(\)"):
        encode_sparse(sae, x[0, 0])
    with pytest.raises(ValueError, match=f"codes must be of d_sae={F} latents; got {E * M}"):
        decode_sparse(sae, encode_sparse(switch_sae(), x))
    sae.activation_fn = TopK(2)
    assert encode_sparse(sae, x).values.shape == (3, 2)
    torch.testing.assert_close(encode_sparse(sae, x).to_dense(), sae.encode(x), **tightly)
    sae.activation_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match="sae.activation_fn of a TopKSAE must be TopK or AbsTopK; got GELU"):
        encode_sparse(sae, x)
