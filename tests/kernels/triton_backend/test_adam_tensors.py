"""Adam over several tensors at once on Triton, against float64."""

import pytest
import torch
from helpers.triton_checks import DEVICE, assert_as_good_as_torch, random
from sae_lens_switch_kernels import reference
from sae_lens_switch_kernels.triton_backend.adam_tensors import adam_tensors

OPTIONS = 0.9, 0.999, 1e-8


def tensors(shapes, seed):
    return [random(*shape, seed=10 * seed + i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("lr_on_device", [False, True], ids=["", "lr on device"])
@pytest.mark.parametrize(
    "shapes", [[(5,)], [(5, 3), (), (1030,)], [(2100,), (1,), (0,), (7,), (2, 2)], [(3,)] * 9], ids=str
)
def test_every_tensor_is_stepped_by_its_own_count(shapes, lr_on_device):
    W, grad, m, v = (tensors(shapes, seed) for seed in range(4))
    v = [t.square() for t in v]
    steps = [torch.full((), 1.0 + 3 * i, device=DEVICE) for i in range(len(shapes))]
    scale, found = (torch.full((), x, device=DEVICE) for x in (2.0, 0.0))
    lr = torch.full((), 0.01, device=DEVICE) if lr_on_device else 0.01
    before = [[t.clone() for t in part] for part in (W, m, v)]
    adam_tensors(W, grad, m, v, steps, lr, *OPTIONS, scale, 1 - found)
    for now, was in zip((W, m, v), before, strict=True):
        assert all(map(torch.equal, now, was))
    adam_tensors(W, grad, m, v, steps, lr, *OPTIONS, scale, found)
    for i in range(len(shapes)):
        given = [t[i].reshape(1, -1) for t in (before[0], grad, before[1], before[2])]

        def stepped(dtype, given=given, i=i):
            return reference.adam_rows(*(t.to(dtype) for t in given), 1.0 + 3 * i, 0.01, *OPTIONS, 2.0, False, False)

        found_now = (t[i].reshape(1, -1) for t in (W, m, v))
        for name, ours, exact, plain in zip(
            "Wmv", found_now, stepped(torch.float64), stepped(torch.float32), strict=True
        ):
            assert_as_good_as_torch(name, ours, exact, plain)
    assert [step.item() for step in steps] == [1.0 + 3 * i for i in range(len(shapes))]
