"""SAEs of other projects, read through SAELens's loaders: equal to what their own formulas say, token by token."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from helpers import D, E, F, K, M, activations, trainer
from helpers.foreign_saes import (
    AUTHORS_CONFIG,
    X,
    authors_state,
    numbers,
    openai_state,
    sparsify_state,
    write_authors,
    write_openai,
    write_sparsify,
)
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopKSAE, TopKTrainingSAE
from torch import Tensor

from sae_lens_switch import SparseTopKTrainingSAE, SwitchSAE, SwitchTrainingSAE, converters, override_topk
from sae_lens_switch.interop import converters as converters_module
from sae_lens_switch.interop.converters import authors_switch, openai_topk, sparsify_topk


def test_the_public_module_has_what_the_documentation_imports_from_it():
    for name in ("Converter", "authors_switch", "openai_topk", "sparsify_topk"):
        assert vars(converters)[name] is vars(converters_module)[name]


def keep_largest(latents: list[float], k: int) -> Tensor:
    kept = sorted(range(len(latents)), key=lambda i: -latents[i])[:k]
    return torch.tensor([v if i in kept else 0.0 for i, v in enumerate(latents)], dtype=torch.float64)


def authors_reference(x_BD: Tensor, heaviside: bool) -> tuple[Tensor, Tensor]:
    s = authors_state()
    latents, outputs = [], []
    for x in x_BD:
        p = (s["router.weight"] @ (x - s["b_router"])).softmax(0)
        e = int(p.argmax())
        gate = 1.0 if heaviside else float(p[e])
        z = (s["encoder.weight"] @ (x - s["b_dec"])).relu() * gate
        f = keep_largest([float(v) if i // M == e else 0.0 for i, v in enumerate(z)], K)
        latents.append(f)
        outputs.append(sum((v * row for v, row in zip(f, s["decoder"], strict=True)), start=s["b_dec"]))
    return torch.stack(latents), torch.stack(outputs)


def topk_reference(x_BD: Tensor, W_enc_FD: Tensor, b_enc: Tensor, W_dec_FD: Tensor, b_dec: Tensor, normalize: bool):
    latents, outputs = [], []
    for x in x_BD:
        mean, spread = x.new_zeros(()), x.new_ones(())
        if normalize:
            mean = x.sum() / D
            spread = ((x - mean).square().sum() / (D - 1)).sqrt()
            x = (x - mean) / (spread + 1e-5)
        z = [max(0.0, float(w @ (x - b_dec) + b)) for w, b in zip(W_enc_FD, b_enc, strict=True)]
        f = keep_largest(z, K)
        out = sum((v * row for v, row in zip(f, W_dec_FD, strict=True)), start=b_dec)
        latents.append(f)
        outputs.append(out * spread + mean if normalize else out)
    return torch.stack(latents), torch.stack(outputs)


def assert_equal_outputs(sae: Any, x: Tensor, expected: tuple[Tensor, Tensor], tolerance: float = 1e-10) -> None:
    latents, outputs = expected
    encoded = sae.encode(x)
    torch.testing.assert_close(encoded, latents.to(encoded.dtype), rtol=0, atol=tolerance)
    torch.testing.assert_close(sae.decode(encoded), outputs.to(encoded.dtype), rtol=0, atol=tolerance)
    torch.testing.assert_close(sae(x), outputs.to(encoded.dtype), rtol=0, atol=tolerance)


@pytest.mark.parametrize("heaviside", [False, True])
def test_the_authors_switch_checkpoints(tmp_path, heaviside):
    folder = write_authors(tmp_path / "run", heaviside=heaviside)
    sae = SAE.load_from_disk(folder, converter=authors_switch)
    assert isinstance(sae, SwitchSAE)
    assert (sae.cfg.n_experts, sae.cfg.k, sae.cfg.dtype) == (E, K, "float64")
    expected = authors_reference(X, heaviside)
    assert (expected[0] != 0).any(0).sum() > F // 3  # several experts, many latents
    assert_equal_outputs(sae, X, expected)
    metadata = sae.cfg.metadata
    assert metadata.model_name == "openai-community/gpt2"
    assert metadata.hook_name == "blocks.8.hook_resid_post"
    assert metadata.context_size == 128
    sae.save_model(tmp_path / "ours")
    assert_equal_outputs(SAE.load_from_disk(tmp_path / "ours"), X, expected)


def test_biases_that_shared_a_storage_no_longer_do(tmp_path):
    state = authors_state()
    assert state["b_dec"].data_ptr() == state["b_router"].data_ptr()
    sae = SAE.load_from_disk(write_authors(tmp_path), converter=authors_switch)
    with torch.no_grad():
        sae.b_dec.zero_()
    torch.testing.assert_close(sae.b_router.data, state["b_router"])


def test_an_authors_checkpoint_of_a_run_under_way_has_its_config_one_folder_up(tmp_path):
    folder = write_authors(tmp_path)
    (folder / "checkpoints").mkdir()
    (folder / "ae.pt").rename(folder / "checkpoints" / "ae_1000.pt")
    sae = SAE.load_from_disk(folder / "checkpoints" / "ae_1000.pt", converter=authors_switch)
    assert_equal_outputs(sae, X, authors_reference(X, heaviside=False))


def test_settings_may_stand_in_the_authors_config_without_a_trainer_around_them(tmp_path):
    folder = write_authors(tmp_path)
    (folder / "config.json").write_text(json.dumps({"dict_size": F, "k": K, "experts": E}))
    sae = SAE.load_from_disk(folder, converter=authors_switch)
    assert_equal_outputs(sae, X, authors_reference(X, heaviside=False))


def test_training_goes_on_from_an_authors_checkpoint(tmp_path):
    sae = SwitchTrainingSAE.load_from_disk(write_authors(tmp_path), dtype="float32", converter=authors_switch)
    assert sae.cfg.tie_router_bias
    assert (sae.cfg.load_balance_scale, sae.cfg.load_balance_coefficient) == ("d_in", 3.0)
    assert_equal_outputs(sae, X.float(), authors_reference(X, heaviside=False), tolerance=1e-5)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    trainer(sae, activations(3), lr=1e-4).fit()
    for name, parameter in sae.named_parameters():
        if name == "W_dec":  # to unit norm, in the first step
            continue
        change = (parameter - before[name]).abs().max()
        assert 0 < change < 1e-3, name  # trained, and not started again from the batch's median
    torch.testing.assert_close(sae.b_router, sae.b_dec)


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("layers.10", "blocks.10.hook_resid_post"),
        ("h.3.mlp", "blocks.3.hook_mlp_out"),
        ("model.layers.0.self_attn", "blocks.0.hook_attn_out"),
        ("embed_tokens", "hook_embed"),
        ("something", None),
    ],
)
def test_sparsify_folders(tmp_path, name, hook):
    folder = write_sparsify(tmp_path / name)
    run = {"model": "EleutherAI/pythia-160m", "dataset": "some/data", "ctx_len": 2048}
    (tmp_path / "config.json").write_text(json.dumps(run))
    sae = SAE.load_from_disk(folder, converter=sparsify_topk)
    assert type(sae) is TopKSAE
    s = sparsify_state()
    assert_equal_outputs(
        sae, X, topk_reference(X, s["encoder.weight"], s["encoder.bias"], s["W_dec"], s["b_dec"], normalize=False)
    )
    assert sae.cfg.metadata.hook_name == hook
    assert sae.cfg.metadata.model_name == "EleutherAI/pythia-160m"
    sae.save_model(tmp_path / "ours")
    torch.testing.assert_close(SAE.load_from_disk(tmp_path / "ours")(X), sae(X))


def test_a_sparsify_width_may_be_an_expansion_factor(tmp_path):
    narrow = {name: t[: 2 * D] if len(t) == F else t for name, t in sparsify_state().items()}
    folder = write_sparsify(tmp_path, narrow, num_latents=0, expansion_factor=2)
    assert SAE.load_from_disk(folder, converter=sparsify_topk).cfg.d_sae == 2 * D
    with pytest.raises(ValueError, match=f"num_latents is {3 * D}, but sae.safetensors has {2 * D}"):
        SAE.load_from_disk(write_sparsify(tmp_path, narrow, num_latents=0, expansion_factor=3), converter=sparsify_topk)


def test_sparsify_itself_agrees(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    sparsify = pytest.importorskip("sparsify", reason="pip install eai-sparsify")
    theirs = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=K))
    with torch.no_grad():
        for seed, parameter in enumerate(theirs.parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=seed))
    theirs.save_to_disk(tmp_path / "layers.0")
    ours = SAE.load_from_disk(tmp_path / "layers.0", converter=sparsify_topk)
    encoded = theirs.encode(X.float())
    latents = torch.zeros(len(X), F).scatter_(1, encoded.top_indices, encoded.top_acts)
    output = theirs.decode(encoded.top_acts, encoded.top_indices)
    assert_equal_outputs(ours, X.float(), (latents.detach(), output.detach()), tolerance=1e-5)


def test_openai_topk_files(tmp_path):
    file = write_openai(tmp_path / "resid_post_mlp_v5_32k" / "autoencoders" / "8.pt")
    s = openai_state()
    expected = topk_reference(
        X, s["encoder.weight"], s["latent_bias"], s["decoder.weight"].T, s["pre_bias"], normalize=True
    )
    for path in (file, file.parent):
        sae = SAE.load_from_disk(path, converter=openai_topk)
        assert type(sae) is TopKSAE
        assert_equal_outputs(sae, X, expected)
    assert (sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name) == ("gpt2", "blocks.8.hook_resid_post")
    sae.save_model(tmp_path / "ours")
    assert_equal_outputs(SAE.load_from_disk(tmp_path / "ours"), X, expected)


def test_openai_files_of_an_unknown_place_have_no_hook(tmp_path):
    sae = SAE.load_from_disk(write_openai(tmp_path / "mine.pt"), converter=openai_topk)
    assert sae.cfg.metadata.hook_name is None


def test_training_goes_on_from_a_topk_file(tmp_path):
    folder = write_sparsify(tmp_path / "layers.0")
    stock = TopKTrainingSAE.load_from_disk(folder, dtype="float32", converter=sparsify_topk)
    with override_topk():
        ours = SparseTopKTrainingSAE.load_from_disk(folder, dtype="float32", converter=sparsify_topk)
    for sae in (stock, ours):
        trainer(sae, activations(3), lr=1e-4).fit()
    torch.testing.assert_close(ours(X.float()), stock(X.float()))


# Loading


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A repository in the Hub client's cache, which is all that it looks at when offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "cache" / "models--user--repo"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    return repo / "snapshots" / ("0" * 40)


def test_from_the_hub(hub):
    write_authors(hub / "dictionaries" / "trainer0")
    write_authors(hub)
    write_sparsify(hub / "layers.10")
    (hub / "config.json").write_text(json.dumps({"trainer": AUTHORS_CONFIG, "model": "some/model"}))
    write_openai(hub / "resid_delta_mlp_v5_128k" / "autoencoders" / "2.pt")
    for name in ("dictionaries/trainer0", "dictionaries/trainer0/ae.pt", "."):
        sae = SAE.from_pretrained("user/repo", name, dtype="float64", converter=authors_switch)
        assert_equal_outputs(sae, X, authors_reference(X, heaviside=False))
    sae, cfg, sparsity = SAE.from_pretrained_with_cfg_and_sparsity("user/repo", "layers.10", converter=sparsify_topk)
    assert sparsity is None
    assert sae.cfg.dtype == cfg["dtype"] == "float32"
    assert sae.cfg.metadata.model_name == "some/model"
    s = sparsify_state()
    expected = topk_reference(X, s["encoder.weight"], s["encoder.bias"], s["W_dec"], s["b_dec"], normalize=False)
    assert_equal_outputs(sae, X.float(), expected, tolerance=1e-5)
    name = "resid_delta_mlp_v5_128k/autoencoders/2.pt"
    sae = SAE.from_pretrained("user/repo", name, converter=openai_topk)
    assert sae.cfg.metadata.hook_name == "blocks.2.hook_mlp_out"


@pytest.mark.parametrize("name", ["../repo2", "/etc", "a/../../b", "a\\..\\b", "x/../ae.pt"])
def test_an_id_stays_inside_its_repository(name):
    with pytest.raises(ValueError, match="sae_id must be a folder or file inside user/repo"):
        SAE.from_pretrained("user/repo", name, converter=authors_switch)


def test_an_openai_id_names_a_file():
    with pytest.raises(ValueError, match=r"must name a \.pt file of user/repo; got 'autoencoders'"):
        SAE.from_pretrained("user/repo", "autoencoders", converter=openai_topk)


def test_dtypes(tmp_path):
    folder = write_authors(tmp_path)
    sae = SAE.load_from_disk(folder, dtype="bfloat16", converter=authors_switch)
    assert {name: p.dtype for name, p in sae.named_parameters()} == {
        "W_enc": torch.bfloat16,
        "W_dec": torch.bfloat16,
        "b_dec": torch.bfloat16,
        "W_router": torch.float32,
        "b_router": torch.float32,
    }
    torch.testing.assert_close(sae.W_router.data, authors_state()["router.weight"].T.float(), rtol=0, atol=0)
    bf16 = {name: t.bfloat16() for name, t in sparsify_state().items()}
    sae = SAE.load_from_disk(write_sparsify(tmp_path / "h.0", bf16), converter=sparsify_topk)
    assert (sae.W_enc.dtype, sae.cfg.dtype) == (torch.bfloat16, "bfloat16")


@pytest.mark.parametrize(
    "device", ["meta", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))]
)
def test_devices(tmp_path, device):
    cfg, weights = openai_topk(write_openai(tmp_path / "1.pt"), device)
    assert cfg["device"] == device
    assert {t.device.type for t in weights.values()} == {device}
