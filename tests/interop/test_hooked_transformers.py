"""Our SAEs attached to hooked models of both kinds: read, steered, ablated, patched, differentiated."""

import pytest
import torch
from helpers import (
    CONTEXT,
    HOOK,
    HOOK_SHAPES,
    HOOK_Z,
    D,
    E,
    F,
    K,
    M,
)
from helpers.hooked_models import FIRST, HOOKS, KINDS, LAST, MLP_OUT, closely, inside, sae_at, with_activations

pytestmark = [
    pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hook_name", HOOKS)
def test_an_attached_sae_stands_for_the_activations_and_shows_its_hooks(hook_name, kind, hooked, tokens, tmp_path):
    sae = sae_at(hook_name, kind, tmp_path)
    reshaping = sae.hook_z_reshaping_mode
    with torch.no_grad():
        plain = hooked(tokens)
        _, cache = hooked.run_with_cache_with_saes(tokens, saes=[sae])
        replaced = hooked.run_with_saes(tokens, saes=[sae])
        with_error = hooked.run_with_saes(tokens, saes=[sae], use_error_term=True)
    assert sae.hook_z_reshaping_mode == reshaping
    torch.testing.assert_close(with_error, plain, **closely)
    torch.testing.assert_close(hooked(tokens), plain, rtol=0, atol=0)

    sae.turn_off_forward_pass_hook_z_reshaping()
    expected = with_activations(hooked, hook_name, tokens, lambda x: sae(x.reshape(3, CONTEXT, D)).view(x.shape))
    torch.testing.assert_close(replaced, expected, **closely)
    assert not torch.allclose(replaced, plain, **closely)

    x_BD = cache[inside(hooked, sae, "hook_sae_input")].reshape(3, CONTEXT, D)
    latents = cache[inside(hooked, sae, "hook_sae_acts_post")]
    assert latents.shape == (3, CONTEXT, F)
    torch.testing.assert_close(latents, sae.encode(x_BD), **closely)
    assert 0 < (latents != 0).sum(-1).max() <= K
    recons = cache[inside(hooked, sae, "hook_sae_recons")]
    torch.testing.assert_close(recons.reshape(3, CONTEXT, D), sae(x_BD), **closely)
    if kind != "topk":
        for name, width in HOOK_SHAPES.items():
            assert cache[inside(hooked, sae, name)].reshape(3, CONTEXT, -1).shape[-1] == width
        probs = cache[inside(hooked, sae, "hook_sae_router_probs")]
        torch.testing.assert_close(
            probs, ((x_BD - sae.b_router) @ sae.W_router).softmax(-1), check_dtype=False, **closely
        )
        used = (latents != 0).view(3, CONTEXT, E, M).any(-1)
        assert (used.sum(-1) <= 1).all()
        assert used[probs.argmax(-1, keepdim=True) == torch.arange(E)].any()
        assert not used[probs.argmax(-1, keepdim=True) != torch.arange(E)].any()


@pytest.mark.parametrize("hook_name", HOOKS)
def test_steering_with_latents_of_two_experts_at_once_adds_their_decoder_rows(hook_name, hooked, tokens, tmp_path):
    sae = sae_at(hook_name, "switch", tmp_path)

    def steer(latents, hook):  # noqa: ARG001
        latents[..., FIRST] += 2.0
        latents[:, -3:, LAST] -= 1.5
        return latents

    with torch.no_grad(), hooked.saes(saes=[sae], use_error_term=True):
        steered = hooked.run_with_hooks(tokens, fwd_hooks=[(inside(hooked, sae, "hook_sae_acts_post"), steer)])
    pushed = torch.zeros(3, CONTEXT, D) + 2.0 * sae.W_dec[FIRST].detach()
    pushed[:, -3:] -= 1.5 * sae.W_dec[LAST].detach()
    expected = with_activations(hooked, hook_name, tokens, lambda x: x + pushed.view(x.shape))
    torch.testing.assert_close(steered, expected, **closely)
    assert not torch.allclose(steered, hooked(tokens), atol=1e-2)


@pytest.mark.parametrize("what", ["latent", "expert"])
@pytest.mark.parametrize("hook_name", HOOKS)
def test_ablation_takes_away_what_the_latents_wrote_and_nothing_else(hook_name, what, hooked, tokens, tmp_path):
    sae = sae_at(hook_name, "switch", tmp_path)
    with torch.no_grad():
        _, cache = hooked.run_with_cache_with_saes(tokens, saes=[sae])
    latents = cache[inside(hooked, sae, "hook_sae_acts_post")]
    busiest = int((latents != 0).sum((0, 1)).argmax())
    gone = slice(busiest, busiest + 1) if what == "latent" else slice(busiest // M * M, busiest // M * M + M)

    def ablate(latents, hook):  # noqa: ARG001
        latents[..., gone] = 0
        return latents

    with torch.no_grad(), hooked.saes(saes=[sae], use_error_term=True):
        ablated = hooked.run_with_hooks(tokens, fwd_hooks=[(inside(hooked, sae, "hook_sae_acts_post"), ablate)])
    written = (latents[..., gone] @ sae.W_dec[gone]).detach()
    expected = with_activations(hooked, hook_name, tokens, lambda x: x - written.view(x.shape))
    torch.testing.assert_close(ablated, expected, **closely)
    assert not torch.allclose(ablated, hooked(tokens), atol=1e-3)


def test_latents_patched_in_from_another_prompt_may_be_of_another_expert(hooked, tokens, tmp_path):
    sae = sae_at(HOOK, "switch", tmp_path)
    with torch.no_grad():
        _, cache = hooked.run_with_cache_with_saes(tokens, saes=[sae])
        patched = hooked.run_with_hooks_with_saes(
            tokens,
            saes=[sae],
            fwd_hooks=[(inside(hooked, sae, "hook_sae_acts_post"), lambda f, hook: (f + f.flip(0)) / 2)],  # noqa: ARG005
        )
    latents = cache[inside(hooked, sae, "hook_sae_acts_post")]
    used = ((latents + latents.flip(0)) != 0).view(3, CONTEXT, E, M).any(-1).sum(-1)
    assert used.max() == 2
    x_hat = (sae.decode(latents) + sae.decode(latents.flip(0))).detach() / 2
    torch.testing.assert_close(patched, with_activations(hooked, HOOK, tokens, lambda _: x_hat), **closely)


def test_saes_of_several_kinds_at_several_hooks_and_gradients_through_them(hooked, tokens, tmp_path):
    saes = [
        sae_at(HOOK_Z, "topk", tmp_path),
        sae_at(HOOK, "switch", tmp_path, seed=1),
        sae_at(MLP_OUT, "switch in training", tmp_path, seed=2),
    ]
    seen = {}

    def keep(name):
        def hook_fn(value, hook):  # noqa: ARG001
            value.retain_grad()
            seen[name] = value

        return hook_fn

    hooks = [
        (inside(hooked, sae, internal), keep((i, internal)))
        for i, sae in enumerate(saes)
        for internal in ("hook_sae_acts_post", "hook_sae_recons")
    ]
    hooked.run_with_hooks_with_saes(tokens, saes=saes, fwd_hooks=hooks).square().mean().backward()
    for i, sae in enumerate(saes):
        latents, recons = seen[i, "hook_sae_acts_post"], seen[i, "hook_sae_recons"]
        assert recons.grad.any()
        torch.testing.assert_close(latents.grad, recons.grad.reshape(3, CONTEXT, D) @ sae.W_dec.T, rtol=1e-4, atol=1e-7)
        assert all(p.grad is not None and p.grad.any() for p in sae.parameters()), sae.get_name()
