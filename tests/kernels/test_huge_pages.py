"""Large CPU tensors: memory is reused, never while in use, and layouts survive."""

import pytest
import torch
from sae_lens_switch_kernels import huge_pages


def test_large_tensors_use_memory_again_and_never_while_it_is_in_use(monkeypatch):
    monkeypatch.setattr(huge_pages, "_free", {})
    shape, options = (1000, 1200), {"dtype": torch.float32, "device": torch.device("cpu")}
    first = huge_pages.empty_huge(*shape, **options).fill_(1)
    second = huge_pages.empty_huge(*shape, **options).fill_(2)
    assert first.data_ptr() != second.data_ptr()
    view, place = first.T[3:], first.data_ptr()
    del first
    assert huge_pages.empty_huge(*shape, **options).fill_(3).data_ptr() != place  # the view still needs it
    assert (view == 1).all()
    assert (second == 2).all()
    del view
    assert huge_pages.empty_huge(*shape, **options).data_ptr() == place
    for n in range(20):  # other sizes, come and gone: few are kept
        huge_pages.empty_huge(1200 + n, 1000, **options)
    assert len(huge_pages._free) <= huge_pages._SIZES_KEPT
    assert huge_pages.empty_huge(3, 5, **options).shape == (3, 5)


@pytest.mark.parametrize("shape", [(1000, 1200), (1200, 1000, 2), (3, 5), (0, 3), ()], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_a_tensor_moved_to_large_memory_is_what_it_was(shape, layout):
    t = torch.randn(shape)
    if layout == "transposed" and t.ndim == 2:
        t = t.T
    elif layout == "strided" and t.ndim > 1:
        t = t[:, ::2]
    moved = huge_pages.to_huge_pages(t)
    assert (moved.shape, moved.stride(), moved.dtype) == (t.shape, t.stride(), t.dtype)
    assert torch.equal(moved, t)
    large = t.nbytes >= huge_pages._SMALLEST and layout != "strided"
    assert (moved.data_ptr() != t.data_ptr()) == large
