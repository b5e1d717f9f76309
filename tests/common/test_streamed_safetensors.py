"""Files written a block at a time are those the library writes of whole tensors."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_lens_switch.common import streamed_safetensors
from sae_lens_switch.common.streamed_safetensors import blocks, write_streamed

TENSORS = {
    "W_dec": torch.randn(7, 5, generator=torch.Generator().manual_seed(1)),
    "bfloat16": torch.randn(3, generator=torch.Generator().manual_seed(2)).bfloat16(),
    "experts": torch.arange(2 * 3 * 5.0).view(2, 3, 5).transpose(1, 2),
    "integers": torch.arange(4),
    "number": torch.tensor(3.5),
    "none": torch.empty(0, 4),
    "switch": torch.tensor([True, False, True]),
}


@pytest.mark.parametrize("block_bytes", [1, 24, 64, 1000])
def test_every_byte_is_the_librarys(block_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed_safetensors, "BLOCK_BYTES", block_bytes)
    shapes = {name: (t.shape, t.dtype) for name, t in TENSORS.items()}
    asked = []

    def read(name, box):
        block = TENSORS[name][box]
        asked.append(block.nbytes)
        return block

    write_streamed(tmp_path / "streamed", shapes, read)
    save_file({name: t.contiguous() for name, t in TENSORS.items()}, tmp_path / "whole")
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert all(torch.equal(t, TENSORS[name]) for name, t in load_file(tmp_path / "streamed").items())
    assert max(asked) <= max(block_bytes, 8)  # a number of 64 bits is read whole


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 4), (2, 3, 5), (2, 0, 3)])
@pytest.mark.parametrize("most", [1, 4, 6, 100])
def test_blocks_are_a_tensor_in_order(shape, most, monkeypatch):
    monkeypatch.setattr(streamed_safetensors, "BLOCK_BYTES", 8 * most)
    whole = torch.arange(math.prod(shape)).view(shape)
    parts = [whole[box] for box in blocks(whole.shape, 8)]
    assert all(part.numel() <= most for part in parts)
    assert torch.cat([part.reshape(-1) for part in parts] or [whole.view(-1)]).equal(whole.view(-1))
    assert len(parts) <= max(whole.numel(), 2)
