"""SAEs of other projects, read through SAELens's loaders: equal to what their own formulas say, token by token; and
files that are not what they claim."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from helpers import D, E, F, K, M, activations, random_input, trainer
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopKSAE, TopKTrainingSAE
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_switch import SparseTopKTrainingSAE, SwitchSAE, SwitchTrainingSAE, converters, override_topk
from sae_lens_switch.interop import converters as converters_module
from sae_lens_switch.interop.converters import Converter, authors_switch, openai_topk, sparsify_topk


def test_the_public_module_has_what_the_documentation_imports_from_it():
    for name in ("Converter", "authors_switch", "openai_topk", "sparsify_topk"):
        assert vars(converters)[name] is vars(converters_module)[name]


def numbers(*shape: int, seed: int) -> Tensor:
    return random_input(*shape, seed=seed) * 0.4


# The formats, as the projects write them


def authors_state() -> dict[str, Tensor]:
    bias = numbers(D, seed=4)  # one storage for both, as in their runs
    matrices = {"encoder.weight": numbers(F, D, seed=1), "router.weight": numbers(E, D, seed=2)}
    return {"decoder": numbers(F, D, seed=3), "b_dec": bias, "b_router": bias, **matrices}


AUTHORS_CONFIG = {
    "trainer_class": "SwitchTrainer",
    "dict_class": "SwitchAutoEncoder",
    "activation_dim": D,
    "dict_size": F,
    "k": K,
    "experts": E,
    "heaviside": False,
    "lb_alpha": 3.0,
    "layer": 8,
    "lm_name": "openai-community/gpt2",
    "submodule_name": None,
}


def write_authors(folder: Path, state: Any = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(authors_state() if state is None else state, folder / "ae.pt")
    settings = {"trainer": AUTHORS_CONFIG | config, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def sparsify_state() -> dict[str, Tensor]:
    state = {"encoder.weight": numbers(F, D, seed=1), "encoder.bias": numbers(F, seed=2)}
    return state | {"W_dec": numbers(F, D, seed=3), "b_dec": numbers(D, seed=4)}


SPARSIFY_CONFIG = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": F,
    "k": K,
    "multi_topk": True,  # a loss of theirs; the SAE is the same
    "skip_connection": False,
    "transcode": False,
    "d_in": D,
}


def write_sparsify(folder: Path, state: dict[str, Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(sparsify_state() if state is None else state, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(SPARSIFY_CONFIG | config))
    return folder


def openai_state(k: int = K) -> dict[str, Any]:
    return {
        "pre_bias": numbers(D, seed=4),
        "latent_bias": numbers(F, seed=2),
        "stats_last_nonzero": torch.zeros(F, dtype=torch.long),
        "latents_activation_frequency": torch.ones(F),
        "latents_mean_square": torch.zeros(F),
        "encoder.weight": numbers(F, D, seed=1),
        "decoder.weight": numbers(F, D, seed=3).T,  # [D, F], stored column by column
        "activation": "TopK",
        "activation_state_dict": {"k": k, "postact_fn": "ReLU"},
    }


def write_openai(file: Path, state: Any = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(openai_state() if state is None else state, file)
    return file


# Their formulas, one token at a time


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


X = random_input(23, D) * 3 + 1


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


# Files that are not what they claim

WRITERS: dict[str, tuple[Converter, Any]] = {
    "authors": (authors_switch, lambda folder, state: write_authors(folder, state) / "ae.pt"),
    "sparsify": (sparsify_topk, lambda folder, state: write_sparsify(folder, state) / "sae.safetensors"),
    "openai": (openai_topk, lambda folder, state: write_openai(folder / "8.pt", state)),
}
STATES = {"authors": authors_state, "sparsify": sparsify_state, "openai": openai_state}
KEYS = [
    (name, key) for name, state in STATES.items() for key, t in state().items() if getattr(t, "dtype", 0) == X.dtype
]


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_every_key_must_be_there_in_its_shape_and_finite(tmp_path, name, key):
    converter, write = WRITERS[name]
    state = STATES[name]()
    spoilt = state[key].clone()
    spoilt[-1:] = float("nan") if key != "b_dec" else float("inf")
    # The shapes of all others follow from that of the encoder.
    leading = key == "encoder.weight"
    for bad, message in (
        (None, f"{key} must be a matrix; got nothing" if leading else rf"missing: \['{key}'\]"),
        (state[key][:-2], "shape|dict_size is|num_latents is" if leading else f"{key} must have shape"),
        (state[key].long(), f"{key} must be a dense tensor .* got torch.strided, torch.int64"),
        (spoilt, f"{key} holds NaN or infinite values"),
    ):
        damaged = {k: v for k, v in state.items() if k != key} | ({} if bad is None else {key: bad})
        file = write(tmp_path, {k: v.clone() if isinstance(v, Tensor) else v for k, v in damaged.items()})
        with pytest.raises(ValueError, match=message) as error:
            SAE.load_from_disk(tmp_path, converter=converter)
        assert file.name in str(error.value)


@pytest.mark.parametrize("name", WRITERS)
def test_an_unknown_key_is_refused(tmp_path, name):
    converter, write = WRITERS[name]
    file = write(tmp_path, STATES[name]() | {"W_skip": torch.zeros(D, D)})
    with pytest.raises(ValueError, match=rf"{file.name} must hold .* unknown: \['W_skip'\]"):
        SAE.load_from_disk(tmp_path, converter=converter)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, name, share):
    converter, write = WRITERS[name]
    file = write(tmp_path, None)
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        SAE.load_from_disk(tmp_path, converter=converter)


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", ["authors", "openai"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_objects_are_refused_and_not_run(tmp_path, name, legacy):
    converter, write = WRITERS[name]
    file, trace = write(tmp_path / "sae", None), tmp_path / "trace"
    torch.save(STATES[name]() | {"extra": Bomb(trace)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="which are never loaded"):
        SAE.load_from_disk(tmp_path / "sae", converter=converter)
    assert not trace.exists()
    torch.load(file, weights_only=False)  # it would have
    assert trace.exists()


@pytest.mark.parametrize("name", ["authors", "openai"])
def test_a_tensor_larger_than_its_file_is_refused(tmp_path, name):
    converter, write = WRITERS[name]
    huge = torch.zeros(1, 1, dtype=torch.float64).expand(1 << 30, D)
    file = write(tmp_path, STATES[name]() | {"encoder.weight": huge})
    (tmp_path / "config.json").unlink(missing_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"experts": 1, "k": 1}))
    with pytest.raises(ValueError, match=f"{file.name}.*(shape|claims)"):
        SAE.load_from_disk(tmp_path, converter=converter)
    consistent = {"decoder": huge, "b_dec": torch.zeros(D), "b_router": torch.zeros(D), "router.weight": huge[:1]}
    if name == "authors":
        write(tmp_path, consistent | {"encoder.weight": huge})
        (tmp_path / "config.json").write_text(json.dumps({"experts": 1, "k": 1}))
        with pytest.raises(ValueError, match="encoder.weight claims 12884901888 numbers"):
            SAE.load_from_disk(tmp_path, converter=converter)


def test_other_things_than_state_dicts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold a state dict; got list"):
        SAE.load_from_disk(write_openai(tmp_path / "1.pt", [1, 2]), converter=openai_topk)
    with pytest.raises(ValueError, match="encoder.weight must be a matrix; got nothing"):
        SAE.load_from_disk(write_authors(tmp_path / "a", {"weights": X, 3: X}), converter=authors_switch)
    sparse = authors_state() | {"decoder": numbers(F, D, seed=3).to_sparse()}
    with pytest.raises(ValueError, match="decoder must be a dense tensor .* got torch.sparse_coo"):
        SAE.load_from_disk(write_authors(tmp_path / "b", sparse), converter=authors_switch)


def test_the_authors_variant_with_an_expert_that_is_always_on_is_refused(tmp_path):
    state = authors_state() | {"router.weight": numbers(E - 1, D, seed=2)}
    with pytest.raises(ValueError, match="one row fewer than experts=4.*always on"):
        SAE.load_from_disk(write_authors(tmp_path, state), converter=authors_switch)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"k": "3"}, "k must be a whole number, at least 1; got '3'"),
        ({"k": True}, "k must be a whole number"),
        ({"k": M + 1}, f"k must be at most d_sae / n_experts = {F} / {E} = {M}"),
        ({"experts": 10**9}, r"router.weight must have shape \(1000000000, 12\)"),
        ({"experts": None}, "experts must be a whole number, at least 1; got None"),
        ({"dict_size": 10**12}, f"dict_size is {10**12}, but ae.pt has {F}"),
        ({"activation_dim": D + 1}, f"activation_dim is {D + 1}, but ae.pt has {D}"),
        ({"heaviside": "yes"}, "heaviside must be true or false; got 'yes'"),
    ],
)
def test_settings_of_the_authors_that_are_wrong(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        SAE.load_from_disk(write_authors(tmp_path, **config), converter=authors_switch)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"transcode": True}, "transcode is true: it predicts another module's output"),
        ({"skip_connection": True}, "skip_connection is true"),
        ({"signed": True}, "signed is true"),
        ({"activation": "groupmax"}, "activation must be 'topk'; got 'groupmax'"),
        ({"k": F + 1}, f"k must be at most the number of latents, {F}; got {F + 1}"),
        ({"k": 0}, "k must be a whole number, at least 1; got 0"),
        ({"num_latents": 0, "expansion_factor": "32"}, "expansion_factor must be a whole number"),
        ({"num_latents": 10**12}, f"num_latents is {10**12}, but sae.safetensors has {F}"),
        ({"d_in": D + 1}, f"d_in is {D + 1}, but sae.safetensors has {D}"),
    ],
)
def test_settings_of_sparsify_that_are_wrong(tmp_path, config, message):
    with pytest.raises(ValueError, match=f"cfg.json: {message}"):
        SAE.load_from_disk(write_sparsify(tmp_path, **config), converter=sparsify_topk)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "ReLU"}, "activation must be 'TopK'; got 'ReLU'"),
        ({"activation_state_dict": 3}, "activation_state_dict must hold k and postact_fn; got int"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "postact_fn must be 'ReLU'.*'Identity'"),
        ({"activation_state_dict": {"k": F + 1, "postact_fn": "ReLU"}}, "k must be at most the number of latents"),
        ({"activation_state_dict": {"postact_fn": "ReLU"}}, "k must be a whole number, at least 1; got None"),
    ],
)
def test_settings_of_openai_that_are_wrong(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"8.pt: {message}"):
        SAE.load_from_disk(write_openai(tmp_path / "8.pt", openai_state() | change), converter=openai_topk)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, '{"trainer": 3}'])
def test_configs_that_are_no_tables_are_refused(tmp_path, text):
    folder = write_authors(tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        SAE.load_from_disk(folder, converter=authors_switch)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="ae.pt"):
        SAE.load_from_disk(tmp_path, converter=authors_switch)
    folder = write_authors(tmp_path / "run")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        SAE.load_from_disk(folder, converter=authors_switch)
    file = write_openai(tmp_path / "two" / "1.pt")
    shutil.copy(file, file.with_name("2.pt"))
    with pytest.raises(ValueError, match=r"holds 2 files, name one of them: \['1.pt', '2.pt'\]"):
        SAE.load_from_disk(file.parent, converter=openai_topk)
