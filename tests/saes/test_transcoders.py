"""Transcoders: their mathematics against dense references in float64, SAELens's classes, and their files."""

import pytest
import torch
from helpers import activations, largest_allocation, randomize
from helpers.transcoders import (
    KINDS,
    D,
    E,
    F,
    K,
    every_kind,
    every_width,
    fresh_transcoder,
    pairs,
    reference_losses,
    step_input,
    transcoder,
    with_and_without_skip,
)
from helpers.without_us import loaded_without_us
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopK
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUTranscoder,
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)

from sae_lens_switch import (
    SparseTopKTranscoder,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
    SwitchTrainingTranscoderConfig,
    SwitchTranscoder,
)

exactly = {"rtol": 0, "atol": 0}


@every_kind
@every_width
@with_and_without_skip
@pytest.mark.parametrize("aux", [0.0, 0.5])
def test_output_losses_and_all_gradients(kind, d_out, skip, aux):
    sae = transcoder(kind, d_out=d_out, skip_connection=skip, aux_loss_coefficient=aux)
    dead_F = torch.arange(F) % 3 == 1 if aux else None
    mine, theirs = (pairs(d_out=d_out).requires_grad_() for _ in range(2))
    output = sae.training_forward_pass(step_input(mine, dead_F))
    out, losses = reference_losses(sae, theirs, dead_F)
    torch.testing.assert_close(output.sae_out, out)
    torch.testing.assert_close(output.sae_in, theirs[:, D:])
    assert set(losses) == {name for name, loss in output.losses.items() if loss.requires_grad}
    for name, loss in losses.items():
        torch.testing.assert_close(output.losses[name], loss, msg=lambda text, name=name: f"{name}: {text}")
    names, parameters = zip(*sae.named_parameters(), strict=True)
    assert ("W_skip" in names) == skip
    ours = torch.autograd.grad(output.loss, (*parameters, mine))
    truth = torch.autograd.grad(sum(losses.values()), (*parameters, theirs))
    for name, a, b in zip((*names, "rows"), ours, truth, strict=True):
        # Targets get no gradient from the spread that scales the load balance, nor from a residual.
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}")


@every_kind
@with_and_without_skip
def test_forward_is_decode_of_encode_and_the_skip_connection(kind, skip):
    sae = transcoder(kind, skip_connection=skip)
    x = pairs()[:, :D].view(5, 6, D)
    torch.testing.assert_close(sae.decode(sae.encode(x)), sae.decode(sae.encode_sparse(x)))
    skipped = x @ sae.W_skip.T if skip else 0
    torch.testing.assert_close(sae(x), sae.decode(sae.encode(x)) + skipped)
    assert sae(x).shape == (5, 6, 7)


@every_width
@with_and_without_skip
def test_a_topk_transcoder_is_saelens_own_with_topk_for_its_relu(d_out, skip):
    """Outputs, and gradients of a loss, of SAELens's class with the same weights."""
    ours = transcoder("sparse_topk_transcoder", d_out=d_out, skip_connection=skip, rescale_acts_by_decoder_norm=False)
    fields = {"d_in": D, "d_out": d_out, "d_sae": F, "dtype": "float64", "apply_b_dec_to_input": False}
    theirs = SkipTranscoder(SkipTranscoderConfig(**fields)) if skip else Transcoder(TranscoderConfig(**fields))
    theirs.load_state_dict(ours.state_dict())
    theirs.activation_fn = TopK(K, use_sparse_activations=False)
    rows = pairs(d_out=d_out)
    x, y = rows[:, :D], rows[:, D:]
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.encode(x), theirs.encode(x))
    output = ours.training_forward_pass(step_input(rows))
    loss = (theirs(x) - y).square().sum(1).mean()
    torch.testing.assert_close(output.loss, loss)
    by_name = dict(theirs.named_parameters())
    names = [name for name, _ in ours.named_parameters()]
    actual = torch.autograd.grad(output.loss, list(ours.parameters()))
    expected = torch.autograd.grad(loss, [by_name[name] for name in names])
    for name, a, b in zip(names, actual, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


# Hooks, first batch, other dtypes


@every_kind
def test_a_step_with_a_hook_on_dense_latents_computes_the_same(kind):
    sae = transcoder(kind, skip_connection=True, aux_loss_coefficient=0.0)
    expected = sae.training_forward_pass(step_input(pairs()))
    seen = []
    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", lambda acts, hook: seen.append(acts))]):  # noqa: ARG005
        actual = sae.training_forward_pass(step_input(pairs()))
    assert seen[0].shape == (30, F)
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.sae_out, expected.sae_out)


def test_a_hook_on_the_reconstruction_sees_it_without_the_skip_connection():
    sae, rows, seen = transcoder("switch_transcoder", skip_connection=True), pairs(), []
    expected = sae.training_forward_pass(step_input(rows))
    with sae.hooks(fwd_hooks=[("hook_sae_recons", lambda out, hook: seen.append(out))]):  # noqa: ARG005
        actual = sae.training_forward_pass(step_input(rows))
        out = sae(rows[:, :D])
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(out, seen[1] + rows[:, :D] @ sae.W_skip.T)


def test_of_the_same_input_and_target_the_first_batch_starts_what_it_does_in_an_sae():
    (batch,) = activations(1, d_in=D)
    fields = {"d_in": D, "d_sae": F, "n_experts": E, "k": K}
    torch.manual_seed(0)
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(**fields))
    made = fresh_transcoder("switch_transcoder", d_out=None, dtype="float32")
    assert made.cfg.d_out == D
    with torch.no_grad():
        made.W_router.copy_(sae.W_router)
    W_enc = made.W_enc.detach().clone()
    sae.training_forward_pass(step_input(batch))
    made.training_forward_pass(step_input(torch.cat([batch, batch], dim=1)))
    for name in ("b_dec", "b_router", "W_router"):
        torch.testing.assert_close(getattr(made, name), getattr(sae, name), **exactly)
    torch.testing.assert_close(made.b_in, sae.b_dec, **exactly)
    torch.testing.assert_close(made.W_enc.detach(), W_enc)
    assert not made.is_fresh


def test_the_encoder_starts_at_the_size_of_the_targets():
    (batch,) = activations(1, d_in=D)
    made = fresh_transcoder("switch_transcoder", d_out=5, dtype="float32")
    W_enc, target = made.W_enc.detach().clone(), 100 * batch[:, :5] + 3
    made.training_forward_pass(step_input(torch.cat([batch, target], dim=1)))
    spread = [(t - t.mean(0)).square().sum(1).mean().sqrt() for t in (target, batch)]
    torch.testing.assert_close(made.W_enc.detach(), W_enc * (spread[0] / spread[1]))
    assert (made.b_dec - target.mean(0)).norm() < spread[0]


@pytest.mark.parametrize("bad", [0, D])
def test_a_first_batch_that_is_not_finite_starts_nothing(bad):
    made = fresh_transcoder("switch_transcoder")
    rows = pairs()
    rows[2, bad] = torch.nan
    with pytest.raises(ValueError, match="training step 3 got 1 NaN and 0 infinite values in 1 of 30 tokens"):
        made.training_forward_pass(step_input(rows))
    assert made.is_fresh


def test_tying_the_routers_bias_ties_it_to_that_of_the_input():
    made = transcoder("switch_transcoder", tie_router_bias=True)
    torch.testing.assert_close(made.effective_router_bias, made.b_in, **exactly)
    made.after_own_step()
    torch.testing.assert_close(made.b_router, made.b_in, **exactly)


@every_kind
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_step_works_in_every_dtype_and_under_autocast(kind, dtype):
    made = fresh_transcoder(kind, dtype=dtype, skip_connection=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "float32"):
        output = made.training_forward_pass(step_input(pairs().to(made.dtype)))
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == p.dtype for p in made.parameters())


def test_a_switch_step_makes_nothing_of_size_batch_times_latents():
    made = fresh_transcoder("switch_transcoder", d_sae=64 * 64, n_experts=64, dtype="float32", skip_connection=True)
    rows = pairs(64).float()
    made.training_forward_pass(step_input(rows)).loss.backward()  # the first batch's start
    largest = largest_allocation(lambda: made.training_forward_pass(step_input(rows)).loss.backward())
    assert largest < 64 * 64 * 64 * 4


def test_parameters_start_as_those_of_an_sae_but_for_the_decoders_directions():
    made = fresh_transcoder("switch_transcoder", skip_connection=True)
    assert not made.W_skip.any()
    assert made.W_skip.shape == (7, D)
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(F).double())
    torch.testing.assert_close(made.W_enc.norm(dim=0), torch.ones(F).double())
    assert made.W_enc.T.is_contiguous()


# Files


@every_kind
@with_and_without_skip
def test_checkpoints_come_back_as_they_were(kind, skip, tmp_path):
    sae = transcoder(kind, skip_connection=skip)
    sae.save_model(tmp_path)
    again = type(sae).load_from_disk(tmp_path)
    assert type(again) is type(sae)
    assert again.cfg == sae.cfg
    for name, t in sae.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], t, **exactly)
    if kind != "sparse_batchtopk_transcoder":
        torch.testing.assert_close(SAE.load_from_disk(tmp_path)(pairs()[:, :D]), sae(pairs()[:, :D]), **exactly)


@pytest.mark.parametrize(
    ("kind", "loaded"), [("switch_transcoder", SwitchTranscoder), ("sparse_topk_transcoder", SparseTopKTranscoder)]
)
@with_and_without_skip
def test_a_trained_transcoder_is_saved_for_inference(kind, loaded, skip, tmp_path):
    sae = transcoder(kind, skip_connection=skip, d_out=17)
    sae.save_inference_model(tmp_path)
    again = SAE.load_from_disk(tmp_path)
    assert type(again) is loaded
    assert (again.cfg.d_out, again.cfg.skip_connection, again.cfg.k) == (17, skip, K)
    x = pairs()[:, :D]
    torch.testing.assert_close(again(x), sae(x))
    torch.testing.assert_close(again.encode(x).to_sparse().indices(), sae.encode(x).to_sparse().indices())
    again.save_model(tmp_path / "again")
    torch.testing.assert_close(SAE.load_from_disk(tmp_path / "again")(x), again(x), **exactly)


def test_a_batchtopk_transcoder_is_saved_as_saelens_jumprelu_transcoder(tmp_path):
    x, made = pairs()[:, :D], {}
    for skip in (False, True):
        made[tmp_path / str(skip)] = sae = transcoder("sparse_batchtopk_transcoder", skip_connection=skip, d_out=17)
        sae.topk_threshold.fill_(0.4)
        sae.save_inference_model(tmp_path / str(skip))
    for sae, found in zip(made.values(), loaded_without_us([*made], x), strict=True):
        skip = sae.cfg.skip_connection
        assert found["class"] == (JumpReLUSkipTranscoder if skip else JumpReLUTranscoder).__name__
        norms = sae.W_dec.norm(dim=1)
        scaled = ((x @ sae.W_enc + sae.b_enc) * norms).relu()
        truth = (scaled * (scaled > 0.4) / norms) @ sae.W_dec + sae.b_dec + (x @ sae.W_skip.T if skip else 0)
        torch.testing.assert_close(found["out"], truth)


# What cannot be


@every_kind
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input must be False for a transcoder; got True"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations must be 'none' for a transcoder; got 'layer_"),
        ({"reshape_activations": "hook_z"}, "reshape_activations must be 'none' for a transcoder; got 'hook_z'"),
        ({"d_out": 0}, "d_out must be a whole number, at least 1 or None; got 0"),
        ({"skip_connection": 1}, "skip_connection must be .*; got 1"),
        ({"hook_name_out": ""}, "hook_name_out must be text that is not empty or None; got ''"),
    ],
)
def test_a_config_no_transcoder_can_have(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        fresh_transcoder(kind, **fields)


@every_kind
def test_what_a_transcoder_refuses(kind):
    sae = transcoder(kind)
    with pytest.raises(
        ValueError, match=r"d_in \+ d_out must be the width of the activations, 12; got d_in \+ d_out=19"
    ):
        sae.training_forward_pass(step_input(pairs()[:, :D]))
    with pytest.raises(NotImplementedError, match="no common scale"):
        sae.fold_activation_norm_scaling_factor(2.0)
    with pytest.raises(NotImplementedError, match="no common mean"):
        sae.fold_activation_whitening(*(torch.zeros(1) for _ in range(3)))
    with pytest.warns(DeprecationWarning, match="use_error_term"):
        sae.use_error_term = True
    with pytest.raises(ValueError, match="use_error_term must be False for a transcoder"):
        sae(pairs()[:, :D])


def test_every_transcoder_has_the_fields_of_the_sae_it_is_like():
    assert set(KINDS) == {cfg.architecture() for _, cfg, _ in KINDS.values()}
    cfg = SwitchTrainingTranscoderConfig(d_in=D, d_sae=F, n_experts=E, k=K, hook_name_out="blocks.0.hook_mlp_out")
    assert cfg.metadata.hook_name_out == "blocks.0.hook_mlp_out"
    assert randomize(KINDS["switch_transcoder"][0](cfg)).cfg.d_out == D
