"""The first layers of a language model in one small file, for machines without network access.

    python examples/packed_model.py --layers 13 --output wheelhouse/smollm2-13-layers.safetensors

The weights stay the quantised blocks of the GGUF file that they come from (Q4_1 and Q8_0, of 32 numbers each), so the
file is as small; loading needs neither the GGUF file nor the package that reads it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaModel

# The names of a layer's weights in llama.cpp and in transformers.
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = 32  # numbers
_BLOCK_BYTES = {"Q4_1": 20, "Q8_0": 34}
_PLAIN = {"F32": torch.float32, "F16": torch.float16}


def pack_model(gguf_file: str | Path, output: str | Path, n_layers: int) -> Path:
    """Write the embedding and the first ``n_layers`` layers of a Llama in a GGUF file to one safetensors file."""
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoConfig

    gguf_file, output = Path(gguf_file), Path(output)
    config = AutoConfig.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    if not 1 <= n_layers <= config.num_hidden_layers:
        raise ValueError(f"n_layers must be between 1 and {config.num_hidden_layers}; got {n_layers}")
    config.num_hidden_layers = n_layers
    config.layer_types = None  # as long as the whole model's
    tensors, kinds = {}, {}
    for found in GGUFReader(str(gguf_file)).tensors:
        if not _is_wanted(found.name, n_layers):
            continue
        kind = found.tensor_type.name
        if kind not in _BLOCK_BYTES and kind not in _PLAIN:
            raise ValueError(f"{found.name} must be one of {', '.join([*_BLOCK_BYTES, *_PLAIN])}; got {kind}")
        tensors[found.name] = torch.from_numpy(found.data.copy())
        kinds[found.name] = [kind, *(int(n) for n in reversed(found.shape))]
    kept = {k: v for k, v in config.to_dict().items() if k != "quantization_config"}
    metadata = {"kinds": json.dumps(kinds), "config": json.dumps(kept, default=str)}
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.unfinished")
    save_file(tensors, unfinished, metadata=metadata)
    unfinished.replace(output)
    return output


def _is_wanted(name: str, n_layers: int) -> bool:
    if name.startswith("blk."):
        return int(name.split(".")[1]) < n_layers
    return name == "token_embd.weight"


def load_model(file: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LlamaModel:
    """Load the packed layers as a transformers model; its ``last_hidden_state`` is the residual stream after them."""
    from safetensors import safe_open
    from transformers import LlamaConfig, LlamaModel

    with safe_open(str(file), "pt") as packed:
        metadata = packed.metadata()
        raw = {name: packed.get_tensor(name).to(device) for name in packed.keys()}  # noqa: SIM118, no mapping
    config = LlamaConfig(**json.loads(metadata["config"]))
    kinds = json.loads(metadata["kinds"])
    weights = dict(_renamed(name, dequantize(t, *kinds[name]), config) for name, t in raw.items())
    with torch.device(device):
        model = LlamaModel(config)
    model.norm = torch.nn.Identity()
    model.load_state_dict(weights, strict=True)
    for parameter in model.parameters():  # not buffers: rotary frequencies have to stay float32
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def _renamed(name: str, weight: Tensor, config: Any) -> tuple[str, Tensor]:
    if name == "token_embd.weight":
        return "embed_tokens.weight", weight
    _, layer, part, _ = name.split(".")
    if part in ("attn_q", "attn_k"):  # llama.cpp interleaves the two halves that a rotary embedding rotates
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        weight = weight.view(heads, len(weight) // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
    return f"layers.{layer}.{_NAMES[part]}.weight", weight


def dequantize(raw: Tensor, kind: str, *shape: int) -> Tensor:
    """Dequantise ggml's blocks of 32. Q8_0: scale, int8. Q4_1: scale, offset, low and high nibbles."""
    if kind in _PLAIN:
        return raw.contiguous().view(_PLAIN[kind]).float().view(shape)
    blocks = raw.contiguous().view(-1, _BLOCK_BYTES[kind])
    scale = _half(blocks[:, :2])
    if kind == "Q8_0":
        return (scale * blocks[:, 2:].contiguous().view(torch.int8).float()).view(shape)
    quantised = blocks[:, 4:]
    return (scale * torch.cat([quantised & 15, quantised >> 4], dim=1).float() + _half(blocks[:, 2:4])).view(shape)


def _half(two_bytes: Tensor) -> Tensor:
    return two_bytes.contiguous().view(torch.float16).float()


def save_tokens(contexts: Iterable[Sequence[int]], file: str | Path) -> int:
    """Write token ids as little-endian uint16; returns their number."""
    import numpy as np

    tokens = np.fromiter((token for context in contexts for token in context), dtype=np.int64)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < 1 << 16:
        raise ValueError(f"token ids must lie in [0, 65536); got values from {tokens.min()} to {tokens.max()}")
    unfinished = Path(file).with_name(f".{Path(file).name}.unfinished")
    tokens.astype("<u2").tofile(unfinished)
    unfinished.replace(file)
    return len(tokens)


def load_tokens(file: str | Path, context: int) -> Tensor:
    """Read tokens as [n, context] int64, without an incomplete last context."""
    import numpy as np

    tokens = np.fromfile(file, dtype="<u2")
    return torch.from_numpy(tokens[: len(tokens) // context * context].astype(np.int64)).view(-1, context)


def main() -> None:
    from offline import gguf_file

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    file = pack_model(gguf_file(), args.output, args.layers)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
