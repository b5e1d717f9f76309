"""torch's grouped product in place of ours: when it is called, with what, and that it computes the same."""

import pytest
import torch
from helpers.triton_checks import DEVICE, random
from sae_lens_switch_kernels.triton_backend import grouped_library, grouped_matmul
from sae_lens_switch_kernels.triton_backend.blocks import Arch, gemm_blocks, swaps

E, M, D = 4, 24, 16
bf16 = torch.bfloat16


def operands(B: int, dtype: torch.dtype = bf16, D: int = D, M: int = M):
    experts = torch.randint(0, E - 1, (B,), generator=torch.Generator().manual_seed(0))  # the last has no token
    offsets = torch.cat([torch.zeros(1).long(), experts.bincount(minlength=E).cumsum(0)]).to(DEVICE)
    return random(B, D, dtype=dtype), random(E * M, D, dtype=dtype, seed=1), offsets


@pytest.fixture
def on_hopper(monkeypatch):
    """Every device passes for one; calls of torch's product are recorded, and computed one expert at a time."""
    calls = []

    def fake(x, W_EDM, *, offs):
        calls.append((x, W_EDM, offs))
        starts = [0, *offs.tolist()]
        return torch.cat([x[a:b] @ W for a, b, W in zip(starts, starts[1:], W_EDM, strict=False)])

    monkeypatch.setattr(grouped_library, "_is_hopper", lambda _: True)
    monkeypatch.setattr(grouped_library, "grouped_mm", fake)
    return calls


def test_it_is_called_from_128_tokens_per_expert_on_and_gets_what_it_demands(on_hopper, monkeypatch):
    monkeypatch.delenv("SAE_LENS_SWITCH_GROUPED", raising=False)
    assert grouped_library.library_encode(*operands(128 * E - 1)) is None
    assert on_hopper == []
    x, W, offsets = operands(128 * E)
    found = grouped_matmul.grouped_encode(x, W, offsets)
    ((given, W_EDM, offs),) = on_hopper
    assert given is x
    assert W_EDM.shape == (E, D, M)
    assert W_EDM.data_ptr() == W.data_ptr()
    assert W_EDM.stride() == (M * D, 1, D)
    assert offs.dtype == torch.int32
    assert offs.tolist() == offsets[1:].tolist()
    exact = torch.cat(
        [x[a:b].double() @ W_EDM[e].double() for e, (a, b) in enumerate(offsets.unfold(0, 2, 1).tolist())]
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "given",
    [
        operands(600, torch.float32),
        operands(600, D=12),  # rows of 24 bytes
        operands(600, M=20),
        (operands(600)[0], random(D, E * M, dtype=bf16).T, operands(600)[2]),  # not contiguous
        (random(600 * D + 1, dtype=bf16)[1:].view(600, D), *operands(600)[1:]),  # starts between 16 bytes
        operands(0),
    ],
    ids=["float32", "D", "M", "transposed", "address", "no token"],
)
def test_what_its_fast_path_does_not_take_is_ours(given, on_hopper, monkeypatch):
    for choice in ("", "library"):
        monkeypatch.setenv("SAE_LENS_SWITCH_GROUPED", choice)
        assert grouped_library.library_encode(*given) is None
    assert on_hopper == []


def test_either_can_be_forced(on_hopper, monkeypatch):
    few, many = operands(8), operands(600)
    monkeypatch.setenv("SAE_LENS_SWITCH_GROUPED", "triton")
    assert grouped_library.library_encode(*many) is None
    monkeypatch.setenv("SAE_LENS_SWITCH_GROUPED", "library")
    assert grouped_library.library_encode(*few) is not None
    assert len(on_hopper) == 1
    monkeypatch.setenv("SAE_LENS_SWITCH_GROUPED", "fastest")
    with pytest.raises(ValueError, match="must be 'triton' or 'library' if set; got 'fastest'"):
        grouped_library.library_encode(*few)


def test_elsewhere_and_without_it_in_torch_ours_runs(monkeypatch):
    monkeypatch.setenv("SAE_LENS_SWITCH_GROUPED", "library")
    if DEVICE == "cpu":
        assert grouped_library.library_encode(*operands(600)) is None
    monkeypatch.setattr(grouped_library, "_is_hopper", lambda _: True)
    monkeypatch.setattr(grouped_library, "grouped_mm", None)
    assert grouped_library.library_encode(*operands(600)) is None


@pytest.mark.skipif(grouped_library.grouped_mm is None, reason="not in this torch")
@pytest.mark.parametrize("B", [1, 37, 600])
def test_torchs_own_product_is_that_of_each_expert(B):
    x, W, offsets = operands(B)
    found, again = grouped_library.product(x, W, offsets), grouped_library.product(x, W, offsets)
    exact = torch.cat(
        [x[a:b].double() @ W.view(E, M, D)[e].double().T for e, (a, b) in enumerate(offsets.unfold(0, 2, 1).tolist())]
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-2)
    assert found.shape == (B, M)
    assert torch.equal(found, again)


@pytest.mark.parametrize("dtype", [torch.float32, bf16], ids=str)
def test_with_few_tokens_per_expert_operands_are_swapped(dtype, monkeypatch):
    monkeypatch.setenv("SAE_LENS_SWITCH_GROUPED", "triton")
    x, W, offsets = operands(37, dtype)
    a, order = random(37, M, dtype=dtype, seed=2), torch.randperm(37).to(DEVICE)
    results = []
    for swapped in (True, False):
        monkeypatch.setattr(grouped_matmul, "swaps", lambda *_, swapped=swapped: swapped)
        matmul = grouped_matmul._grouped_matmul
        with monkeypatch.context() as patch:
            if dtype == torch.float32:  # which swaps where it is multiplied as TF32
                patch.setattr(grouped_matmul, "_dot_precision", lambda *_, **__: "tf32")
            results.append((matmul(x, W, offsets, True), matmul(a, W, offsets, False, order)))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-2 if dtype == bf16 else 1e-5, atol=1e-5)


def test_only_the_tiles_of_few_rows_are_swapped_and_only_on_hopper_or_later():
    hopper, ampere, amd = Arch(32, 232448), Arch(32, 166912), Arch(64, 65536)
    for rows, expected in ((8, True), (32, True), (33, False), (128, False)):
        blocks = gemm_blocks(rows, 768, bf16, hopper, inner_contiguous=True)
        assert swaps(blocks, hopper) is expected
        assert not swaps(blocks, ampere)
        assert not swaps(blocks, amd)
    assert not swaps(gemm_blocks(8, 32, bf16, hopper), hopper)  # nor where there are as few columns
