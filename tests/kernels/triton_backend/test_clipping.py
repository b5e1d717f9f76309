"""Whether a step is finite and how it is clipped: on Triton, in torch, and as numbers say."""

import math

import pytest
import torch
from helpers.triton_checks import DEVICE, random
from sae_lens_switch_kernels import torch_clipping
from sae_lens_switch_kernels.triton_backend import clipping

NAN, INF = float("nan"), float("inf")
both = pytest.mark.parametrize("clip", [clipping.clip, torch_clipping.clip], ids=["triton", "torch"])


@both
@pytest.mark.parametrize("max_norm", [1.0, 0.25, None], ids=str)
@pytest.mark.parametrize("norm", [0.0, 0.5, 3.0, 5e18, INF, NAN])
@pytest.mark.parametrize("loss", [2.0, -3e38, INF, -INF, NAN])
def test_a_step_is_judged_and_clipped(norm, loss, max_norm, clip):
    grads = [torch.zeros(3, 2, device=DEVICE), torch.tensor(norm, device=DEVICE)]
    is_finite, found_inf, scale = clip(grads, torch.tensor(loss, device=DEVICE), max_norm)
    good = math.isfinite(norm) and math.isfinite(loss)
    assert is_finite.dtype == torch.bool
    assert (is_finite.item(), found_inf.item()) == (good, float(not good))
    if good:
        assert scale.item() == pytest.approx(1 if max_norm is None else max(1, norm / max_norm), rel=1e-5)
    assert found_inf.shape == scale.shape == ()


@both
def test_skipped_steps_and_the_steps_of_each_parameter_are_counted(clip):
    grads, skipped = [torch.ones(5, device=DEVICE)], torch.tensor([0, 4], device=DEVICE)
    steps = [torch.full((), float(i), device=DEVICE) for i in range(11)]
    seen = []
    for loss in (1.0, NAN, INF, 1.0, -INF):
        clip(grads, torch.tensor(loss, device=DEVICE), 1.0, skipped, steps)
        seen.append(skipped.tolist())
    assert seen == [[0, 4], [1, 5], [2, 6], [0, 6], [1, 7]]
    assert [step.item() for step in steps] == [i + 2 for i in range(11)]


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 19])
def test_the_norm_is_that_of_all_gradients_in_any_layout(n):
    shapes = [(), (1,), (5, 3), (2500,), (0,), (70, 40), (3, 2, 5)]
    grads = [3 * random(*shapes[i % len(shapes)], seed=i) for i in range(n)]
    grads = [g.T if g.ndim == 2 and i % 2 else g for i, g in enumerate(grads)]
    grads[-1] = grads[-1].expand(4, *grads[-1].shape)[::2]
    loss, limit = torch.ones((), device=DEVICE), 1e-3
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    scale = clipping.clip(grads, loss, limit).scale
    torch.testing.assert_close(scale.double() * limit, exact + 1e-6, rtol=1e-6, atol=0)
    assert torch.equal(scale, clipping.clip(grads, loss, limit).scale)
    for bad in (NAN, INF):
        spoiled = [g.clone() for g in grads]
        next(g for g in spoiled if g.numel()).view(-1)[-1] = bad
        assert not clipping.clip(spoiled, loss, limit).is_finite


def test_gradients_in_low_precision_are_left_to_torch():
    grads = [random(40, dtype=torch.bfloat16), random(3, 5)]
    loss = torch.ones((), device=DEVICE)
    for ours, theirs in zip(clipping.clip(grads, loss, 0.1), torch_clipping.clip(grads, loss, 0.1), strict=True):
        assert torch.equal(ours, theirs)
