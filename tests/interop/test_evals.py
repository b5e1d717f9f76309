"""SAELens's evaluations of our SAEs."""

import pytest
import torch
from helpers import (
    CONTEXT,
    D,
    K,
)
from helpers.hooked_models import HOOKS, KINDS, sae_at, with_activations
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hook_name", HOOKS)
def test_run_evals_gives_what_is_written_out_here(hook_name, kind, model, dataset, tmp_path):
    sae = sae_at(hook_name, kind, tmp_path)
    sae.turn_off_forward_pass_hook_z_reshaping()
    store = ActivationsStore.from_sae(
        model, sae, dataset, streaming=False, store_batch_size_prompts=4, n_batches_in_buffer=4, total_tokens=1024
    )
    drawn, draw = [], store.get_batch_tokens

    def drawing(*args, **kwargs):
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    store.get_batch_tokens = drawing
    metrics, featurewise = run_evals(sae, store, model, ActivationScaler(), get_eval_everything_config(4, 1, 2))
    reconstructed, measured = drawn[0], torch.cat(drawn[1:])
    assert measured.shape == (8, CONTEXT)

    def kept(tokens: Tensor) -> Tensor:
        """SAELens leaves special tokens out: here the first of every context."""
        return tokens != 0

    with torch.no_grad():
        x_ND = model.run_with_cache(measured)[1][hook_name].reshape(*measured.shape, D)[kept(measured)]
        latents_NF = sae.encode(x_ND)
        x_hat_ND = sae(x_ND)
        error = (x_ND - x_hat_ND).square().sum()
        explained = 1 - error / (x_ND - x_ND.mean(0)).square().sum()

        def loss(change):
            logits = with_activations(model, hook_name, reconstructed, change)
            logprobs = logits[:, :-1].log_softmax(-1).gather(-1, reconstructed[:, 1:, None])[..., 0]
            return -logprobs[kept(reconstructed)[:, :-1]].mean().item()

        def through_sae(x):
            keep = kept(reconstructed).view(4, CONTEXT, *[1] * (x.ndim - 2))
            return torch.where(keep, sae(x.reshape(4, CONTEXT, D)).view(x.shape), x)

        plain, zero, with_sae = loss(lambda x: x), loss(torch.zeros_like), loss(through_sae)
    approx = {"rel": 1e-3, "abs": 1e-5}
    quality, performance = metrics["reconstruction_quality"], metrics["model_performance_preservation"]
    assert quality["mse"] == pytest.approx(error.item() / len(x_ND), **approx)
    assert quality["explained_variance"] == pytest.approx(explained.item(), **approx)
    assert quality["cossim"] == pytest.approx(torch.cosine_similarity(x_ND, x_hat_ND).mean().item(), **approx)
    assert metrics["sparsity"]["l0"] == pytest.approx((latents_NF != 0).sum(-1).float().mean().item())
    assert metrics["sparsity"]["l1"] == pytest.approx(latents_NF.sum(-1).mean().item(), **approx)
    assert featurewise["feature_density"] == pytest.approx((latents_NF != 0).float().mean(0).tolist())
    assert performance["ce_loss_without_sae"] == pytest.approx(plain, **approx)
    assert performance["ce_loss_with_ablation"] == pytest.approx(zero, **approx)
    assert performance["ce_loss_with_sae"] == pytest.approx(with_sae, **approx)
    fewest = K if kind == "topk" else K / 2  # few latents of a small expert are positive for some tokens
    assert fewest <= metrics["sparsity"]["l0"] <= K
