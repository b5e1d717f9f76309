"""``switch`` in SAELens's evaluations and in hooked models."""

import math

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
    randomize,
    small_run_warnings,
    switch_sae,
    tiny_tokenizer,
    training_sae,
)
from helpers.runs import exactly
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

pytestmark = small_run_warnings


def sae_for(hook_name: str, kind: str = "inference", **options):
    metadata = SAEMetadata(hook_name=hook_name, context_size=CONTEXT, prepend_bos=True)
    if hook_name == HOOK_Z:
        options["reshape_activations"] = "hook_z"
    if kind == "training":
        return training_sae(metadata=metadata, dtype="float32", **options)
    return switch_sae(metadata=metadata, dtype="float32", **options)


def store_for(model, sae, dataset) -> ActivationsStore:
    return ActivationsStore.from_sae(
        model,
        sae,
        dataset,
        streaming=False,
        store_batch_size_prompts=4,
        n_batches_in_buffer=4,
        train_batch_size_tokens=32,
        total_tokens=1024,
    )


@pytest.mark.parametrize("kind", ["inference", "training"])
@pytest.mark.parametrize("hook_name", [HOOK, HOOK_Z])
@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
def test_run_evals_measures_everything(kind, hook_name, normalize_activations, model, dataset):
    sae = sae_for(hook_name, kind, normalize_activations=normalize_activations)
    reshaping = sae.hook_z_reshaping_mode
    store = store_for(model, sae, dataset)
    metrics, featurewise = run_evals(
        sae, store, model, ActivationScaler(), get_eval_everything_config(4, 2, 2), exclude_special_tokens=[0]
    )
    assert sae.hook_z_reshaping_mode == reshaping
    flat = [value for group in metrics.values() for value in group.values()]
    assert all(math.isfinite(value) for value in flat), metrics
    assert 0 < metrics["sparsity"]["l0"] <= K
    assert len(featurewise["feature_density"]) == len(featurewise["encoder_norm"]) == F


def test_run_evals_scores_a_perfect_sae_as_perfect(model, dataset):
    sae = sae_for(HOOK, n_experts=1, d_sae=2 * D, k=D)
    with torch.no_grad():  # x = relu(x) - relu(-x)
        for parameter in sae.parameters():
            parameter.zero_()
        sae.W_dec.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
        sae.W_enc.copy_(sae.W_dec.T)
    store = store_for(model, sae, dataset)
    metrics, _ = run_evals(sae, store, model, ActivationScaler(), get_eval_everything_config(4, 1, 1))
    assert metrics["reconstruction_quality"]["explained_variance"] == pytest.approx(1, abs=1e-5)
    assert metrics["reconstruction_quality"]["mse"] == pytest.approx(0, abs=1e-6)
    assert metrics["model_performance_preservation"]["ce_loss_score"] == pytest.approx(1, abs=1e-3)
    assert metrics["sparsity"]["l0"] == pytest.approx(D)


@pytest.fixture
def tokens(dataset) -> Tensor:
    return torch.tensor(dataset[:3]["tokens"])


def direct(model, sae, tokens: Tensor, edit=lambda acts: acts) -> Tensor:
    """The model's logits with the hook's activations replaced by hand."""
    return model.run_with_hooks(
        tokens,
        fwd_hooks=[(sae.cfg.metadata.hook_name, lambda x, hook: sae.decode(edit(sae.encode(x))))],  # noqa: ARG005
    )


@pytest.mark.parametrize("hook_name", [HOOK, HOOK_Z])
@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
def test_a_hooked_transformer_runs_with_the_sae_and_caches_its_hooks(hook_name, normalize_activations, model, tokens):
    sae = sae_for(hook_name, normalize_activations=normalize_activations)
    plain = model(tokens)
    expected = direct(model, sae, tokens)
    torch.testing.assert_close(model.run_with_saes(tokens, saes=[sae]), expected, **exactly)
    logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for name, width in HOOK_SHAPES.items():
        assert cache[f"{hook_name}.{name}"].shape[:2] == (3, CONTEXT)
        assert cache[f"{hook_name}.{name}"][0, 0].numel() == width  # hook_z's output is split into heads again
    assert (cache[f"{hook_name}.hook_sae_acts_post"].count_nonzero(dim=-1) <= K).all()
    with_error = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    torch.testing.assert_close(with_error, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(tokens), plain, **exactly)
    assert not torch.allclose(expected, plain)


def test_interventions_on_latents_and_router_reach_the_models_logits(model, tokens):
    sae = sae_for(HOOK)

    def steer(acts, hook):  # noqa: ARG001
        acts[..., 7] += 3

    out = model.run_with_hooks_with_saes(tokens, saes=[sae], fwd_hooks=[(f"{HOOK}.hook_sae_acts_post", steer)])
    expected = direct(
        model, sae, tokens, lambda acts: acts.index_add(-1, torch.tensor([7]), torch.full((3, CONTEXT, 1), 3.0))
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

    def only_expert_one(logits, hook):  # noqa: ARG001
        return logits.index_fill(-1, torch.tensor(1), 1e4)

    _, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    with model.saes(saes=[sae]), model.hooks([(f"{HOOK}.hook_sae_router_logits", only_expert_one)]):
        _, forced = model.run_with_cache(tokens)
    name = f"{HOOK}.hook_sae_acts_post"
    used = [(c[name].view(-1, E, M) != 0).any(2).any(0).tolist() for c in (cache, forced)]
    assert sum(used[0]) > 1
    assert used[1] == [False, True, False, False]


def test_attached_saes_can_be_added_replaced_and_reset(model, tokens):
    plain, first, second = model(tokens), sae_for(HOOK), randomize(sae_for(HOOK), seed=4)
    model.add_sae(first)
    torch.testing.assert_close(model(tokens), expected_first := model(tokens), **exactly)
    with model.saes(saes=[second]):
        assert model.acts_to_saes == {HOOK: second}
        assert not torch.allclose(model(tokens), expected_first)
    assert model.acts_to_saes == {HOOK: first}
    torch.testing.assert_close(model(tokens), expected_first, **exactly)
    model.reset_saes()
    torch.testing.assert_close(model(tokens), plain, **exactly)
    assert not torch.allclose(expected_first, plain)


def test_gradients_flow_from_the_models_loss_through_the_sae(model, tokens):
    sae = sae_for(HOOK)
    seen = {}

    def keep(acts, hook):  # noqa: ARG001
        acts.retain_grad()
        seen["acts"] = acts

    model.run_with_hooks_with_saes(
        tokens, saes=[sae], fwd_hooks=[(f"{HOOK}.hook_sae_acts_post", keep)]
    ).square().mean().backward()
    assert seen["acts"].grad.shape == (3, CONTEXT, F)
    assert seen["acts"].grad.count_nonzero() > (seen["acts"] != 0).sum()  # latents not active have theirs too
    assert all(p.grad is not None and p.grad.any() for p in sae.parameters())


def test_a_transformer_bridge_runs_with_the_sae(tokens):
    transformers = pytest.importorskip("transformers")
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=32, n_positions=CONTEXT, n_embd=D, n_layer=2, n_head=2)
    ).eval()
    bridge = SAETransformerBridge.boot_transformers("gpt2", hf_model=gpt2, tokenizer=tiny_tokenizer())
    sae = sae_for(HOOK)
    with torch.no_grad():
        plain = bridge(tokens)
        replaced = bridge.run_with_saes(tokens, saes=[sae])
        torch.testing.assert_close(
            bridge.run_with_saes(tokens, saes=[sae], use_error_term=True), plain, rtol=1e-4, atol=1e-4
        )
        _, cache = bridge.run_with_cache_with_saes(tokens, saes=[sae])
        torch.testing.assert_close(bridge(tokens), plain, **exactly)
    assert not torch.allclose(replaced, plain)
    acts = cache[bridge.get_sae_hook_name(sae)]
    assert acts.shape == (3, CONTEXT, F)
    assert cache[bridge.get_sae_hook_name(sae, "hook_sae_router_probs")].shape == (3, CONTEXT, E)
