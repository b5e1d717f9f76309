"""The files that a machine without network is given for benchmarks/gpu_check.py."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import packed_model
import pytest
import torch
from gpu import wheelhouse
from gpu.timing import normal


def test_the_stand_in_for_wandb_is_a_wheel_that_imports_and_refuses_to_be_used(tmp_path):
    wheel = wheelhouse.stub_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        recorded = [line.split(",")[0] for line in archive.read("wandb-0.0.0.dist-info/RECORD").decode().split()]
        assert sorted(recorded) == sorted(archive.namelist())
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    program = "import wandb; print(wandb.__file__); wandb.init(project='x')"
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == str(site / "wandb.py")
    assert "RuntimeError: wandb.init: this is a stand-in" in done.stderr


@pytest.mark.parametrize(
    ("sizes", "copies"),
    [
        ({}, []),
        ({"tokens": 2, "model": 59, "packages": 3}, [["model"], ["packages", "tokens"]]),
        ({"tokens": 1, "model": 59, "packages": 3}, [["model", "tokens"], ["packages"]]),
        ({"model": 50, "packages": 3, "tokens": 2}, [["model", "packages", "tokens"]]),
        ({"model": 70, "packages": 3}, [["model"], ["packages"]]),
    ],
    ids=str,
)
def test_every_part_goes_into_a_copy_with_room_for_it(sizes, copies):
    assert wheelhouse.in_copies(sizes, 60) == copies


@pytest.mark.parametrize(("limit", "n_copies", "is_too_large"), [(2000, 1, False), (1600, 2, False), (1000, 2, True)])
def test_it_says_what_goes_into_which_copy_and_what_fits_into_none(
    limit, n_copies, is_too_large, tmp_path, monkeypatch, capsys
):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "some.whl").write_bytes(bytes(300))
    (tmp_path / "model.safetensors").write_bytes(bytes(1500))
    monkeypatch.setattr(wheelhouse, "ROOT", tmp_path)  # no repository: an empty checkout
    monkeypatch.setattr(wheelhouse, "LIMIT", limit)
    assert wheelhouse.told(tmp_path) == is_too_large
    said = capsys.readouterr().out
    assert said.count("\ncopy ") == n_copies
    assert ("model.safetensors is too large for a copy" in said) == is_too_large


def test_the_packed_language_model_fits_into_a_copy_beside_this_checkout():
    assert 0 < wheelhouse.checkout_size() < wheelhouse.LIMIT - 58_950_000


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_blocks_are_dequantised_as_a_loop_does(kind):
    rows, columns = 3, 64
    generator = torch.Generator().manual_seed(0)
    n_blocks, size = rows * columns // 32, packed_model._BLOCK_BYTES[kind]
    raw = torch.randint(0, 256, (n_blocks, size), generator=generator, dtype=torch.uint8)
    halves = torch.randn(n_blocks, 2, generator=generator).half()
    raw[:, :4] = halves.view(torch.uint8)
    if kind == "Q8_0":
        raw[:, 2:4] = torch.randint(0, 256, (n_blocks, 2), generator=generator, dtype=torch.uint8)
    expected = []
    for block, (scale, offset) in zip(raw.tolist(), halves.tolist(), strict=True):
        if kind == "Q8_0":
            expected += [scale * (byte - 256 if byte > 127 else byte) for byte in block[2:]]
        else:
            expected += [scale * (byte % 16) + offset for byte in block[4:]]
            expected += [scale * (byte // 16) + offset for byte in block[4:]]
    found = packed_model.dequantize(raw.view(rows, -1), kind, rows, columns)
    assert torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64).view(rows, columns), rtol=1e-6)


def test_tokens_survive_their_file_and_those_too_large_are_refused(tmp_path):
    file = tmp_path / "tokens.bin"
    assert packed_model.save_tokens([[1, 65535, 3], [4, 5, 6, 7]], file) == 7
    assert file.stat().st_size == 14
    assert packed_model.load_tokens(file, 3).tolist() == [[1, 65535, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 65536\); got values from 5 to 65536"):
        packed_model.save_tokens([[5, 65536]], file)
    assert packed_model.load_tokens(file, 7).tolist() == [[1, 65535, 3, 4, 5, 6, 7]]
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory) -> Path:
    """A Llama of two layers with random weights, as llama.cpp would store it: Q8_0 matrices, float32 norms."""
    gguf = pytest.importorskip("gguf")
    D, heads, F, V, layers = 64, 2, 96, 50, 2
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(F)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(V)
    sizes = {"token_embd": (V, D), "output_norm": (D,)}
    for i in range(layers):
        square = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (D, D))
        rest = {"ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F), "attn_norm": (D,), "ffn_norm": (D,)}
        sizes |= {f"blk.{i}.{name}": shape for name, shape in (square | rest).items()}
    for seed, (name, shape) in enumerate(sizes.items()):
        t = normal(*shape, seed=seed, device="cpu").numpy()
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", 1 + 0.1 * t)
        else:
            blocks = gguf.quants.quantize(0.1 * t, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("n_layers", [1, 2])
def test_packed_layers_give_what_the_whole_model_gives(small_gguf, n_layers, tmp_path):
    packed = packed_model.load_model(packed_model.pack_model(small_gguf, tmp_path / "packed", n_layers))
    assert_same_as_whole(packed, small_gguf, n_layers)
    with pytest.raises(ValueError, match="n_layers must be between 1 and 2; got 3"):
        packed_model.pack_model(small_gguf, tmp_path / "other", 3)
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]


def test_packed_layers_in_half_precision_keep_their_rotary_frequencies(small_gguf, tmp_path):
    file = packed_model.pack_model(small_gguf, tmp_path / "packed", 1)
    whole, half = (packed_model.load_model(file, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.rotary_emb.inv_freq, whole.rotary_emb.inv_freq)
    with torch.no_grad():
        out = half(torch.tensor([[3, 1, 4]]), use_cache=False).last_hidden_state
    assert out.dtype == torch.bfloat16


@pytest.mark.slow
def test_packed_layers_of_the_real_model_give_what_it_gives(tmp_path):
    offline = pytest.importorskip("offline")
    file = packed_model.pack_model(offline.gguf_file(), tmp_path / "packed", 13)
    assert file.stat().st_size < 60e6
    assert_same_as_whole(packed_model.load_model(file), offline.gguf_file(), 13)


def assert_same_as_whole(packed, gguf_file: Path, n_layers: int) -> None:
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name, dtype="float32")
    whole.model.layers = whole.model.layers[:n_layers]
    whole.model.norm = torch.nn.Identity()
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (m(tokens, use_cache=False).last_hidden_state for m in (packed, whole.model))
    assert torch.equal(ours, theirs)
    assert ours.std() > 0
