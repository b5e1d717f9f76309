"""Every hook of ``switch`` sees and edits, in inference and training; the error term; SAEs for ``hook_z``."""

import pytest
import torch
from helpers import HOOK_SHAPES, D, E, F, K, M, random_input, switch_sae, training_sae
from helpers.contract import RUN_TIME_NORMALISATIONS, both_kinds, exactly, hook_z_metadata, make, step_input, tightly
from sae_lens import SAE
from sae_lens.saes.sae import _disable_hooks
from torch import Tensor

from sae_lens_switch import SwitchTrainingSAE

# Hooks


def seeing(seen: dict[str, list[Tensor]], name: str):
    def read(value, hook):  # noqa: ARG001
        seen.setdefault(name, []).append(value.detach().clone())

    return read


@both_kinds
def test_every_hook_fires_once_in_forward_and_seeing_changes_nothing(kind):
    sae, x = make(kind), random_input(2, 3, D)
    plain = sae(x)
    seen: dict[str, list[Tensor]] = {}
    out = sae.run_with_hooks(x, fwd_hooks=[(name, seeing(seen, name)) for name in HOOK_SHAPES])
    assert {name: [tuple(v.shape) for v in values] for name, values in seen.items()} == {
        name: [(2, 3, width)] for name, width in HOOK_SHAPES.items()
    }
    torch.testing.assert_close(out, plain, **tightly)
    torch.testing.assert_close(seen["hook_sae_input"][0], x, **exactly)
    torch.testing.assert_close(seen["hook_sae_acts_post"][0], sae.encode(x), **tightly)
    torch.testing.assert_close(seen["hook_sae_recons"][0], plain, **tightly)
    probs = seen["hook_sae_router_logits"][0].softmax(-1)
    torch.testing.assert_close(seen["hook_sae_router_probs"][0], probs, **tightly)
    own = torch.arange(F) // M == probs.argmax(-1, keepdim=True)
    pre = (x - sae.b_dec) @ sae.W_enc
    torch.testing.assert_close(seen["hook_sae_acts_pre"][0][own], pre[own], **tightly)


def test_all_hooks_are_direct_attributes_as_disabling_them_needs():
    sae = switch_sae()
    assert set(sae.hook_dict) == {*HOOK_SHAPES, "hook_sae_error"}
    for name, hook in sae.hook_dict.items():
        assert getattr(sae, name) is hook


def test_disabled_hooks_are_silent_and_come_back():
    sae, x = switch_sae(), random_input(4, D)
    seen: dict[str, list[Tensor]] = {}
    with sae.hooks([(name, seeing(seen, name)) for name in HOOK_SHAPES]):
        with _disable_hooks(sae):
            sae(x)
        assert seen == {}
        sae(x)
        assert seen.keys() == HOOK_SHAPES.keys()


def test_run_with_cache_holds_every_hook():
    _, cache = switch_sae().run_with_cache(random_input(4, D))
    assert set(cache) == set(HOOK_SHAPES)


@both_kinds
def test_editing_pre_activations_changes_which_latents_are_selected(kind):
    sae, x = make(kind), random_input(20, D)
    probs = ((x - sae.b_router) @ sae.W_router).softmax(-1)
    gate, expert = probs.max(-1)

    def lift_the_first_latent_of_every_expert(pre, hook):  # noqa: ARG001
        pre = pre.clone()
        pre[:, ::M] = 100.0
        return pre

    sae.add_hook("hook_sae_acts_pre", lift_the_first_latent_of_every_expert)
    acts = sae.encode(x)
    sae.reset_hooks()
    rows = torch.arange(20)
    torch.testing.assert_close(acts[rows, expert * M], 100 * gate, **tightly)
    others = acts.clone()
    others[rows, expert * M] = 0
    assert ((others != 0).sum(1) <= K - 1).all()
    assert (others.view(20, E, M)[:, :, 0] == 0).all()


@both_kinds
@pytest.mark.parametrize("in_place", [True, False])
def test_editing_activations_changes_the_output_by_the_decoder_row(kind, in_place):
    sae, x = make(kind), random_input(2, 4, D)

    def steer(acts, hook):  # noqa: ARG001
        if not in_place:
            acts = acts.clone()
        acts[..., 11] += 2.0
        return None if in_place else acts

    plain = sae(x)
    out = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", steer)])
    torch.testing.assert_close(out, plain + 2 * sae.W_dec[11], **tightly)
    torch.testing.assert_close(sae(x), plain, **exactly)


@pytest.mark.parametrize("dense", [True, False])
def test_editing_router_logits_reroutes_and_editing_probabilities_regates(dense):
    sae, x = switch_sae(), random_input(10, D)

    def encode():
        return sae.encode(x) if dense else sae.encode_sparse(x).to_dense()

    sae.add_hook("hook_sae_router_logits", lambda logits, hook: logits.index_fill(-1, torch.tensor(2), 99.0))  # noqa: ARG005
    acts = encode()
    sae.reset_hooks()
    assert (acts.view(10, E, M)[:, [0, 1, 3]] == 0).all()
    expected = ((x - sae.b_dec) @ sae.W_enc[:, 2 * M : 3 * M]).relu().topk(K).values
    torch.testing.assert_close(acts.topk(K).values, expected, **tightly)

    plain = encode()
    sae.add_hook("hook_sae_router_probs", lambda probs, hook: probs / 2)  # noqa: ARG005
    torch.testing.assert_close(encode(), plain / 2, **tightly)
    sae.reset_hooks()


@pytest.mark.parametrize(
    ("name", "shifted"),
    [
        ("hook_sae_input", lambda sae, x: sae(x + 1)),
        ("hook_sae_recons", lambda sae, x: sae(x) + 1),
        ("hook_sae_output", lambda sae, x: sae(x) + 1),
    ],
)
def test_editing_input_reconstruction_or_output_is_seen_downstream(name, shifted):
    sae, x = switch_sae(), random_input(10, D)
    expected = shifted(sae, x)
    out = sae.run_with_hooks(x, fwd_hooks=[(name, lambda value, hook: value + 1)])  # noqa: ARG005
    torch.testing.assert_close(out, expected, **tightly)


def test_backward_hooks_see_the_gradients_of_pre_and_post_activations():
    sae, x = switch_sae(), random_input(10, D)
    expert = ((x - sae.b_router) @ sae.W_router).argmax(-1)
    seen: dict[str, list[Tensor]] = {}

    def read(name):
        return lambda grad, hook: seen.setdefault(name, []).append(grad.clone())  # noqa: ARG005

    for name in ("hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_router_logits"):
        sae.add_hook(name, read(name), dir="bwd")
    sae(x).sum().backward()
    sae.reset_hooks()
    torch.testing.assert_close(seen["hook_sae_acts_post"][0], sae.W_dec.sum(1).expand(10, F), **tightly)
    own = torch.arange(F) // M == expert[:, None]
    assert (seen["hook_sae_acts_pre"][0][~own] == 0).all()
    assert seen["hook_sae_acts_pre"][0][own].any()
    assert seen["hook_sae_router_logits"][0].any()


def loss_and_gradients(sae: SwitchTrainingSAE, x: Tensor):
    sae.zero_grad()
    output = sae.training_forward_pass(step_input=step_input(x))
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in sae.named_parameters()}


@pytest.mark.parametrize("name", [n for n in HOOK_SHAPES if n != "hook_sae_output"])
def test_a_hook_that_only_sees_fires_in_the_training_pass_and_changes_neither_loss_nor_gradients(name):
    sae, x = make("training", normalize_decoder=False), random_input(30, D)
    plain, plain_gradients = loss_and_gradients(sae, x)
    seen: dict[str, list[Tensor]] = {}
    with sae.hooks([(name, seeing(seen, name))]):
        hooked, hooked_gradients = loss_and_gradients(sae, x)
    assert [tuple(v.shape) for v in seen[name]] == [(30, HOOK_SHAPES[name])]
    torch.testing.assert_close(hooked.loss, plain.loss, **tightly)
    torch.testing.assert_close(hooked.feature_acts.to_dense(), plain.feature_acts.to_dense(), **tightly)
    for parameter, gradient in plain_gradients.items():
        torch.testing.assert_close(hooked_gradients[parameter], gradient, **tightly)


def test_an_editing_hook_works_in_the_training_pass():
    sae, x = make("training", normalize_decoder=False), random_input(30, D)
    plain, _ = loss_and_gradients(sae, x)

    def steer(acts, hook):  # noqa: ARG001
        return acts.index_add(1, torch.tensor([11]), torch.full((30, 1), 2.0, dtype=acts.dtype))

    with sae.hooks([("hook_sae_acts_post", steer)]):
        hooked, _ = loss_and_gradients(sae, x)
    torch.testing.assert_close(hooked.sae_out, plain.sae_out + 2 * sae.W_dec[11], **tightly)
    difference = hooked.feature_acts.to_dense() - plain.feature_acts.to_dense()
    assert (difference[:, 11] == 2).all()
    expected = (hooked.sae_out - x).square().sum(-1).mean()
    torch.testing.assert_close(hooked.losses["mse_loss"], expected, **tightly)


# Error term


@pytest.mark.filterwarnings("ignore:Setting use_error_term:DeprecationWarning")
@pytest.mark.parametrize("normalize_activations", ["none", *RUN_TIME_NORMALISATIONS])
def test_the_error_term_restores_the_input_and_survives_ablation(normalize_activations):
    sae = switch_sae(normalize_activations=normalize_activations)
    x = random_input(2, 5, D)
    plain = sae(x)
    sae.use_error_term = True
    seen: dict[str, list[Tensor]] = {}

    def ablate(acts, hook):  # noqa: ARG001
        return torch.zeros_like(acts)

    with sae.hooks([("hook_sae_error", seeing(seen, "error")), ("hook_sae_input", seeing(seen, "input"))]):
        torch.testing.assert_close(sae(x), x, **tightly)
        ablated = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", ablate)], reset_hooks_end=False)
    for error in seen["error"]:
        torch.testing.assert_close(error, x - plain, **tightly)
    assert len(seen["input"]) == 2  # the clean pass is silent
    assert not torch.allclose(ablated, x)


# hook_z


@pytest.mark.parametrize("lead", [(3,), (2, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
def test_hook_z_heads_are_joined_on_the_way_in_and_split_on_the_way_out(lead, normalize_activations):
    options = {"normalize_activations": normalize_activations}
    joined = switch_sae(**options)
    sae = switch_sae(reshape_activations="hook_z", metadata=hook_z_metadata(), **options)
    x = random_input(*lead, 3, D // 3)
    flat = x.reshape(*lead, D)
    assert sae.hook_z_reshaping_mode
    torch.testing.assert_close(sae.encode(x), joined.encode(flat), **exactly)
    sae.decode(sae.encode(x))
    torch.testing.assert_close(sae.decode(sae.encode_sparse(x)), joined(flat).reshape(x.shape), **tightly)
    torch.testing.assert_close(sae(x), joined(flat).reshape(x.shape), **tightly)
    sae.turn_off_forward_pass_hook_z_reshaping()
    torch.testing.assert_close(sae(flat), joined(flat), **exactly)
    sae.turn_on_forward_pass_hook_z_reshaping()
    torch.testing.assert_close(sae(x), joined(flat).reshape(x.shape), **tightly)


def test_a_training_sae_for_hook_z_takes_the_stores_flat_activations():
    sae = training_sae(reshape_activations="hook_z", metadata=hook_z_metadata())
    assert not sae.hook_z_reshaping_mode
    assert sae(random_input(4, D)).shape == (4, D)


def test_a_hook_z_sae_comes_back_from_disk_as_one(tmp_path):
    train = make("training", reshape_activations="hook_z", metadata=hook_z_metadata())
    train.save_inference_model(tmp_path)
    sae = SAE.load_from_disk(tmp_path)
    x = random_input(4, 3, D // 3)
    assert sae.hook_z_reshaping_mode
    torch.testing.assert_close(sae(x), train(x.reshape(4, D)).reshape(x.shape), **exactly)
