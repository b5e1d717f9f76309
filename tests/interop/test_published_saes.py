"""SAEs in the files of Gemma Scope 2 and Qwen-Scope, through SAELens's own loaders, as SparseCodes."""

import json

import pytest
import torch
from helpers import D, random_input
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.topk_sae import TopKSAE
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder
from safetensors.torch import load_file, save_file

from sae_lens_switch import decode_sparse, encode_sparse

F, D_OUT = 1024, D + 2
close = {"rtol": 1e-4, "atol": 1e-4}


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return random_input(*shape, seed=seed, dtype=torch.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the loaders take for the Hub."""

    def download(repo_id, filename, subfolder=None, **_):  # noqa: ARG001
        return str(tmp_path / (subfolder or "") / filename)

    def shapes(repo_id, filename):  # noqa: ARG001
        return {name: list(t.shape) for name, t in load_file(tmp_path / filename).items()}

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    return tmp_path


def assert_same_as_saelens(sae) -> None:
    x = numbers(3, 20, D, seed=9)
    codes = encode_sparse(sae, x)
    torch.testing.assert_close(codes.to_dense(), sae.encode(x), **close)
    torch.testing.assert_close(decode_sparse(sae, codes, x), sae(x), **close)
    assert 60 < (codes.values > 0).sum() < 0.3 * 60 * F


@pytest.mark.parametrize(
    ("kind", "affine", "sae_class"),
    [
        ("resid_post", False, JumpReLUSAE),
        ("transcoder", False, JumpReLUTranscoder),
        ("transcoder", True, JumpReLUSkipTranscoder),
    ],
)
def test_gemma_scope_2(kind, affine, sae_class, folder):
    where = folder / kind / "layer_5_width_1k_l0_medium"
    where.mkdir(parents=True)
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "affine_connection": affine}
    (where / "config.json").write_text(json.dumps(config))
    width = D if kind == "resid_post" else D_OUT
    tensors = {"w_enc": numbers(D, F, seed=1), "w_dec": numbers(F, width, seed=2), "b_enc": numbers(F, seed=3)}
    tensors |= {"b_dec": numbers(width, seed=4), "threshold": 3 + numbers(F, seed=5).abs()}
    if affine:
        tensors["affine_skip_connection"] = numbers(D, width, seed=6)
    save_file(tensors, where / "params.safetensors")
    sae = SAE.from_pretrained("someone/scope", f"{kind}/{where.name}", converter=loaders.gemma_3_sae_huggingface_loader)
    assert type(sae) is sae_class
    assert_same_as_saelens(sae)


def test_qwen_scope(folder, monkeypatch):
    monkeypatch.setitem(loaders.QWEN_SCOPE_MODEL_INFO, "Qwen3-1.7B-Base", ("Qwen/Qwen3-1.7B-Base", D))
    tensors = {"W_enc": numbers(F, D, seed=1), "W_dec": numbers(D, F, seed=2)}
    tensors |= {"b_enc": numbers(F, seed=3), "b_dec": numbers(D, seed=4)}
    torch.save(tensors, folder / "layer3.sae.pt")
    release = "Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_50"
    sae = SAE.from_pretrained(release, "layer3.sae.pt", converter=loaders.qwen_scope_sae_huggingface_loader)
    assert type(sae) is TopKSAE
    assert encode_sparse(sae, numbers(2, D, seed=9)).values.shape == (2, 50)
    assert_same_as_saelens(sae)
