"""Switch SAEs in SAEDashboard and in its files for Neuronpedia: what is shown is what ``encode`` and W_dec say."""

import importlib.util
import json
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from helpers import CONTEXT, HOOK, HOOK_Z, WORDS, D, F, K, M, random_input, randomize, switch_sae, training_sae
from helpers.local_model import MODEL_NAME, write_model_and_text
from sae_lens import SAE, HookedSAETransformer, TopKSAE, TopKSAEConfig
from sae_lens.analysis import neuronpedia_integration
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopK
from torch import Tensor

from sae_lens_switch import SwitchSAE
from sae_lens_switch.interop import saedashboard as dashboard
from sae_lens_switch.interop.saedashboard import as_dashboard_sae

MLP_OUT = "blocks.1.hook_mlp_out"
HOOKS = [HOOK, MLP_OUT, HOOK_Z]
exactly = {"rtol": 0, "atol": 0}
needs_sae_dashboard = pytest.mark.skipif(
    importlib.util.find_spec("sae_dashboard") is None,
    reason="SAEDashboard is not installed: see sae_lens_switch/interop/saedashboard.py",
)


def sae_at(hook_name: str, **options) -> SwitchSAE:
    metadata = SAEMetadata(hook_name=hook_name, context_size=CONTEXT, prepend_bos=True, model_name=MODEL_NAME)
    if hook_name == HOOK_Z:
        options["reshape_activations"] = "hook_z"
    return switch_sae(metadata=metadata, dtype="float32", **options)


# --- The adapter


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": "one"},
        {"normalize_activations": "layer_norm"},
        {"apply_b_dec_to_input": False},
        {"reshape_activations": "hook_z"},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [switch_sae, training_sae], ids=["inference", "training"])
def test_it_encodes_and_decodes_as_the_sae_does_with_the_same_weights(make, options):
    sae = randomize(make(**options)).eval()
    shown = as_dashboard_sae(sae)
    assert isinstance(shown, SwitchSAE)
    assert isinstance(shown.activation_fn, TopK)  # by which SAEDashboard knows how to treat it
    sae.turn_off_forward_pass_hook_z_reshaping()
    shown.turn_off_forward_pass_hook_z_reshaping()
    x = random_input(5, 7, D)
    torch.testing.assert_close(shown.encode(x), sae.encode(x), **exactly)
    torch.testing.assert_close(shown(x), sae(x), **exactly)
    pointers = [{name: p.data_ptr() for name, p in s.named_parameters()} for s in (sae, shown)]
    assert pointers[0] == pointers[1]
    assert {name: p.dtype for name, p in shown.named_parameters()} == {n: p.dtype for n, p in sae.named_parameters()}
    assert (shown.cfg.dtype, shown.cfg.device, shown.dtype) == (sae.cfg.dtype, sae.cfg.device, sae.dtype)


def test_the_router_bias_of_a_tied_sae_comes_with_it():
    sae = training_sae(tie_router_bias=True)
    with torch.no_grad():
        sae.b_dec.copy_(random_input(D))
    sae.after_own_step()
    x = random_input(50, D)
    torch.testing.assert_close(as_dashboard_sae(sae).encode(x), sae.encode(x), **exactly)


def test_what_saedashboard_changes_does_not_reach_the_sae():
    sae = sae_at(HOOK_Z)
    weights = {name: p.clone() for name, p in sae.named_parameters()}
    cfg = sae.cfg.to_dict()
    shown = as_dashboard_sae(sae)
    shown.fold_W_dec_norm()
    shown.turn_off_forward_pass_hook_z_reshaping()
    shown.cfg.dataset_path = "text"
    shown.cfg.metadata.context_size = 3
    shown.cfg.metadata["prepend_bos"] = False
    shown.to(dtype=torch.float16)
    assert sae.hook_z_reshaping_mode
    assert sae.cfg.to_dict() == cfg
    assert not hasattr(sae.cfg, "dataset_path")
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.data, weights[name].data, **exactly)


def test_decoder_rows_of_any_norm_leave_the_latents_as_they_are():
    sae, x = sae_at(HOOK), random_input(9, D, dtype=torch.float32)
    with pytest.raises(NotImplementedError):
        sae.fold_W_dec_norm()
    shown = as_dashboard_sae(sae)
    shown.fold_W_dec_norm()
    torch.testing.assert_close(shown.encode(x), sae.encode(x), **exactly)


def test_an_adapted_sae_is_saved_as_what_it_is(tmp_path):
    sae = sae_at(HOOK)
    as_dashboard_sae(sae).save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is SwitchSAE
    x = random_input(9, D, dtype=torch.float32)
    torch.testing.assert_close(loaded(x), sae(x), **exactly)


def test_saes_of_other_architectures_are_left_alone():
    sae = TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=K))
    assert as_dashboard_sae(sae) is sae


# --- SAEDashboard itself


def activations_at(model, hook_name: str, tokens: Tensor) -> Tensor:
    return model.run_with_cache(tokens)[1][hook_name].reshape(*tokens.shape, D)


@needs_sae_dashboard
@pytest.mark.parametrize("hook_name", HOOKS)
def test_saedashboard_shows_the_latents_of_encode(hook_name, model, dataset, tmp_path):
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import FeatureDataGeneratorFactory, SaeVisRunner

    sae, tokens = sae_at(hook_name), torch.tensor(dataset[:60]["tokens"])
    x = activations_at(model, hook_name, tokens)
    with torch.no_grad():  # tokens go to many experts, small as some activations are
        sae.b_router.copy_(x.mean((0, 1)))
        sae.W_router.div_(x.std())
    flat = as_dashboard_sae(sae)
    flat.turn_off_forward_pass_hook_z_reshaping()
    latents = flat.encode(x).detach()
    features = (latents != 0).sum((0, 1)).topk(6).indices.tolist()
    assert len({f // M for f in features}) > 1

    cfg = SaeVisConfig(hook_point=hook_name, features=features, minibatch_size_features=4, minibatch_size_tokens=7)
    shown = as_dashboard_sae(sae)
    data = SaeVisRunner(cfg).run(shown, model, tokens)
    generated = FeatureDataGeneratorFactory.create(cfg, model, shown, tokens).get_feature_data(features)[0]
    torch.testing.assert_close(generated, latents[..., features], rtol=1e-5, atol=1e-6)

    direction_FD = sae.W_dec if hook_name != HOOK_Z else sae.W_dec @ model.W_O[0].flatten(0, 1)
    for f in features:
        found = data.feature_data_dict[f]
        assert f"{(latents[..., f] != 0).float().mean():.3%}" in found.acts_histogram_data.title
        top = (direction_FD[f] @ model.W_U).topk(10)
        assert found.logits_table_data.top_token_ids == top.indices.tolist()
        assert found.logits_table_data.top_logits == pytest.approx(top.values.tolist(), rel=1e-3, abs=1e-5)
        shown_sequences = [s for group in found.sequence_data.seq_group_data for s in group.seq_data]
        assert shown_sequences
        for sequence in shown_sequences:
            row = tokens[sequence.original_index].unfold(0, len(sequence.token_ids), 1)
            (place,) = (row == torch.tensor(sequence.token_ids)).all(1).nonzero().flatten().tolist()[:1]
            there = latents[sequence.original_index, place : place + len(sequence.token_ids), f]
            assert sequence.feat_acts == pytest.approx(there.tolist(), abs=1e-3)
    save_feature_centric_vis(data, tmp_path / "latents.html")
    page = (tmp_path / "latents.html").read_text()
    assert all(f'"{f}"' in page for f in features)
    assert any(word in page for word in WORDS)


@needs_sae_dashboard
def test_without_the_adapter_saedashboard_refuses(model, dataset):
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import FeatureDataGeneratorFactory

    tokens = torch.tensor(dataset[:4]["tokens"])
    generator = FeatureDataGeneratorFactory.create(
        SaeVisConfig(hook_point=HOOK, features=[1]), model, sae_at(HOOK), tokens
    )
    with pytest.raises(ValueError, match="Invalid architecture"):
        generator.get_feature_data([1])


# --- Neuronpedia


@needs_sae_dashboard
def test_the_command_writes_neuronpedias_batches_of_a_saved_sae(tmp_path, monkeypatch):
    from sae_dashboard.neuronpedia import neuronpedia_runner

    stock = neuronpedia_runner.NeuronpediaRunner
    write_model_and_text(tmp_path)
    sae = sae_at(HOOK)
    sae.save_model(tmp_path / "sae")
    monkeypatch.chdir(tmp_path)
    flags = {
        "--sae-path": "sae",
        "--sae-set": "res-switch",
        "--np-set-name": "res-switch",
        "--dataset-path": "text",
        "--output-dir": "out",
        "--n-prompts": "16",
        "--n-tokens-in-prompt": str(CONTEXT),
        "--n-prompts-in-forward-pass": "5",
        "--n-features-per-batch": "20",
    }
    monkeypatch.setattr(sys, "argv", ["dashboard", "--from-local-sae", *(x for pair in flags.items() for x in pair)])
    dashboard.main()
    assert neuronpedia_runner.NeuronpediaRunner is stock

    (folder,) = Path("out").iterdir()
    batches = [json.loads((folder / f"batch-{i}.json").read_text()) for i in range(2)]
    assert not (folder / "batch-2.json").exists()
    assert all((b["model_id"], b["layer"], b["sae_set"]) == (MODEL_NAME, 1, "res-switch") for b in batches)
    features = [feature for batch in batches for feature in batch["features"]]
    assert [feature["feature_index"] for feature in features] == list(range(F))

    model = HookedSAETransformer.from_pretrained(MODEL_NAME)
    (file,) = folder.glob("tokens_*.pt")
    tokens = torch.load(file)
    latents = sae.encode(activations_at(model, HOOK, tokens)).detach() * (tokens > 2)[..., None]
    density = (latents != 0).float().mean((0, 1))
    assert [f["frac_nonzero"] for f in features] == pytest.approx(density.tolist(), abs=1e-5)
    assert (density > 0).sum() > K
    contexts = [model.to_str_tokens(row) for row in tokens]
    for f in density.topk(3).indices.tolist():
        top = (sae.W_dec[f] @ model.W_U).topk(3).indices
        assert features[f]["pos_str"][:3] == [model.to_string(token) for token in top]
        strongest = max(features[f]["activations"], key=lambda a: max(a["values"]))
        n = len(strongest["tokens"])
        cut = [
            latents[row, start : start + n, f]
            for row, context in enumerate(contexts)
            for start in range(CONTEXT - n + 1)
            if context[start : start + n] == strongest["tokens"]
        ]
        assert any(values.tolist() == pytest.approx(strongest["values"], abs=1e-3) for values in cut)


def test_the_command_says_how_to_install_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_dashboard.neuronpedia", None)
    with pytest.raises(SystemExit, match="pip install --no-deps sae-dashboard"):
        dashboard.main()


@pytest.mark.parametrize("make", [switch_sae, training_sae], ids=["inference", "training"])
def test_a_neuronpedia_id_is_kept_and_understood_by_saelens(make, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(neuronpedia_integration.webbrowser, "open", opened.append)
    sae = make(metadata=SAEMetadata(model_name="gpt2-small"))
    sae.cfg.metadata.neuronpedia_id = "gpt2-small/8-res-switch"
    save = sae.save_model if make is switch_sae else sae.save_inference_model
    save(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    neuronpedia_integration.open_neuronpedia_feature_dashboard(loaded, 7)
    assert opened == ["https://neuronpedia.org/gpt2-small/8-res-switch/7"]
    url = neuronpedia_integration.get_neuronpedia_quick_list(loaded, [7, 31])
    wanted = [{"modelId": "gpt2-small", "layer": "8-res-switch", "index": str(f)} for f in (7, 31)]
    assert json.loads(unquote(url.split("&features=")[1])) == wanted
    assert as_dashboard_sae(loaded).cfg.metadata.neuronpedia_id == "gpt2-small/8-res-switch"
