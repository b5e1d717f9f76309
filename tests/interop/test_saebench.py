"""Our SAEs in SAEBench."""

import json
from pathlib import Path

import pytest
import torch
from helpers import (
    CONTEXT,
    HOOK,
    HOOK_Z,
    D,
    F,
)
from helpers.hooked_models import FIRST, LAST, closely, sae_at
from helpers.local_model import MODEL_NAME, write_model_and_text
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]


@pytest.fixture
def working_directory(tmp_path, monkeypatch):
    """With a model that SAEBench finds by name, and text."""
    write_model_and_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hook_name", [HOOK, HOOK_Z])
def test_saebenchs_core_evaluation_of_a_saved_sae(hook_name, dtype, working_directory, monkeypatch, capsys):
    pytest.importorskip("sae_bench", reason="SAEBench is not installed: see examples/saebench.py")
    import saebench

    sae = sae_at(hook_name, "switch", working_directory)
    sae.save_model("sae")
    drawn, draw = [], ActivationsStore.get_batch_tokens
    monkeypatch.setattr(
        ActivationsStore, "get_batch_tokens", lambda *args, **kwargs: drawn.append(draw(*args, **kwargs)) or drawn[-1]
    )
    arguments = f"sae --dataset text --output out --batches 2 --batch-size 4 --context-size {CONTEXT} --dtype {dtype}"
    metrics = saebench.main(arguments.split())
    (written,) = Path("out").glob("*.json")
    assert str(written) in capsys.readouterr().out
    saved = json.loads(written.read_text())
    assert saved["sae_cfg_dict"]["architecture"] == "switch"
    assert saved["eval_result_metrics"]["sparsity"]["l0"] == pytest.approx(metrics["l0"])
    assert len(saved["eval_result_details"]) == F

    reference = HookedTransformer.from_pretrained_no_processing(MODEL_NAME, dtype=dtype)
    sae = sae.to(dtype=getattr(torch, dtype))
    sae.turn_off_forward_pass_hook_z_reshaping()
    tokens = torch.cat(drawn[-2:])
    x_ND = reference.run_with_cache(tokens)[1][hook_name].reshape(*tokens.shape, D)[tokens > 2]
    with torch.no_grad():
        latents_NF, x_hat_ND = sae.encode(x_ND), sae(x_ND)
    close = {"rel": 1e-4 if dtype == "float32" else 2e-2, "abs": 1e-2}
    assert metrics["l0"] == pytest.approx((latents_NF != 0).sum(-1).float().mean().item(), **close)
    assert metrics["l2_ratio"] == pytest.approx((x_hat_ND.norm(dim=-1) / x_ND.norm(dim=-1)).mean().item(), **close)
    cosines = torch.cosine_similarity(x_ND.float(), x_hat_ND.float())
    assert metrics["cossim"] == pytest.approx(cosines.mean().item(), **close)
    if dtype == "float32":
        density = (latents_NF != 0).float().mean(0) * len(x_ND) / (tokens > 2).sum()
        assert [f["feature_density"] for f in saved["eval_result_details"]] == pytest.approx(density.tolist())


def test_an_sae_that_saebench_cannot_evaluate_ends_in_an_error(working_directory):
    pytest.importorskip("sae_bench", reason="SAEBench is not installed: see examples/saebench.py")
    import saebench

    sae_at(HOOK, "switch", working_directory).save_model("sae")
    with pytest.raises(SystemExit, match="could not evaluate sae"):
        saebench.main(["sae", "--dataset", "text", "--output", "out", "--dtype", "float32", "--context-size", "64"])


def test_what_saebenchs_other_evaluations_do_with_an_sae(model, tokens, tmp_path):
    """Latents by token, their means and densities, from which probing, absorption, SCR and RAVEL start."""
    pytest.importorskip("sae_bench", reason="SAEBench is not installed: see examples/saebench.py")
    from sae_bench.sae_bench_utils import activation_collection

    sae = sae_at(HOOK, "switch", tmp_path)
    where = {"batch_size": 2, "layer": 1, "hook_name": HOOK, "mask_bos_pad_eos_tokens": True}
    x = model.run_with_cache(tokens)[1][HOOK] * (tokens > 2)[..., None]
    expected = sae.encode(x).detach() * (tokens > 2)[..., None]
    latents = activation_collection.collect_sae_activations(tokens, model, sae, selected_latents=[3, LAST], **where)
    torch.testing.assert_close(latents, expected[..., [3, LAST]], **closely)
    means = activation_collection.get_sae_meaned_activations({"a": x}, sae, 2)["a"]
    torch.testing.assert_close(means, expected.sum(1) / (tokens > 2).sum(1)[:, None], **closely)
    density = activation_collection.get_feature_activation_sparsity(tokens, model, sae, **where)
    torch.testing.assert_close(density, (expected != 0).float().sum((0, 1)) / (tokens > 2).sum(), **closely)


def test_saebenchs_ablation_of_latents_of_two_experts(model, tokens, tmp_path):
    pytest.importorskip("sklearn", reason="of SAEBench's own environment: see examples/saebench.py")
    from sae_bench.evals.scr_and_tpp.main import ablated_precomputed_activations

    sae = sae_at(HOOK, "switch", tmp_path)
    x = model.run_with_cache(tokens)[1][HOOK]
    gone = torch.zeros(F, dtype=torch.bool)
    gone[[FIRST, LAST]] = True
    ablated = ablated_precomputed_activations(x, sae, gone, 2)
    expected = (x - (sae.encode(x) * gone) @ sae.W_dec).mean(1)
    torch.testing.assert_close(ablated, expected, **closely)
    assert not torch.allclose(ablated, x.mean(1), **closely)
