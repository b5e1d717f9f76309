"""The loss of a step on Triton against plain torch in float64."""

import pytest
import torch
from helpers.triton_checks import DEVICE, assert_as_good_as_torch, random
from sae_lens_switch_kernels import torch_loss
from sae_lens_switch_kernels.triton_backend import step_loss

shapes = pytest.mark.parametrize(("B", "D"), [(1, 1), (7, 3), (33, 80), (700, 17), (70, 600), (2100, 5)], ids=str)


def double(*tensors):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]


@shapes
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("has_balance", "on_device", "scale"), [(False, False, 1.0), (True, False, 2.5), (True, True, None)]
)
def test_loss_and_gradients(B, D, x_dtype, has_balance, on_device, scale):
    out, bias, x = random(B, D), random(D, seed=1), (random(B, D, seed=2) + 50).to(x_dtype)
    balance = random(1, seed=3)[0] if has_balance else None
    coefficient = torch.tensor(0.7, device=DEVICE) if on_device else 0.7
    given = out, bias, x, balance, coefficient, scale
    ours, exact, plain = step_loss.loss(*given), torch_loss.loss(*double(*given)), torch_loss.loss(*given)
    names = ("out_BD", "total", "error", "balance", "factor")
    for name in names if B > 1 or scale is not None else names[:1]:  # one token has no spread
        # A spread is a sum of 10,500 squares beside a mean of 50.
        assert_as_good_as_torch(name, *(getattr(found, name) for found in (ours, exact, plain)), roundings=16)
    columns = ours.columns_PD.sum(0)
    assert_as_good_as_torch("columns", columns, (exact.out_BD - x).sum(0), (plain.out_BD - x.float()).sum(0))
    upstream = random(B, D, seed=4), *(random(1, seed=i)[0] for i in (5, 6, 7))
    for used in ((0, 1, 0, 0), (0, 0, 1, 1), (1, 1, 1, 1), (1, 0, 0, 0)):
        grads = [t if is_used else None for t, is_used in zip(upstream, used, strict=True)]
        saved = ours.out_BD, x, ours.factor, ours.columns_PD
        found = step_loss.loss_backward(*saved, *grads)
        plainly = torch_loss.loss_backward(*saved, *grads)
        exactly = torch_loss.loss_backward(*double(*saved, *grads))
        for name, a, b, c in zip(found._fields, found, exactly, plainly, strict=True):
            # Sums of errors that cancel are as exact as those errors are.
            assert_as_good_as_torch(name, a, b, c) if name != "bias_D" else torch.testing.assert_close(
                a.double(), b, rtol=1e-5, atol=1e-4
            )


def test_an_outlier_and_a_large_mean_do_not_cost_the_spread_its_digits():
    x = random(513, 6) + 3000
    x[0] = -1e5
    given = random(513, 6), random(6, seed=1), x, torch.ones((), device=DEVICE), 1.0, None
    exact = torch_loss.loss(*double(*given)).factor
    assert step_loss.loss(*given).factor.item() == pytest.approx(exact.item(), rel=1e-6)


def test_what_is_not_finite_stays_so_and_two_runs_have_the_same_bits():
    given = random(300, 40), random(40, seed=1), random(300, 40, seed=2), torch.ones((), device=DEVICE), 0.5, None
    for a, b in zip(step_loss.loss(*given), step_loss.loss(*given), strict=True):
        assert torch.equal(a, b)
    given[2][299, 39] = torch.nan
    found = step_loss.loss(*given)
    assert found.total.isnan()
    assert found.error.isnan()
    assert found.out_BD.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_left_to_torch(dtype):
    given = random(9, 4, dtype=dtype), random(4, dtype=dtype), random(9, 4, dtype=dtype), None, 1.0, 1.0
    ours, theirs = step_loss.loss(*given), torch_loss.loss(*given)
    assert all(map(torch.equal, ours, theirs))
    grads = None, torch.ones_like(ours.total), None, None
    saved = ours.out_BD, given[2], ours.factor, ours.columns_PD
    assert all(map(torch.equal, step_loss.loss_backward(*saved, *grads), torch_loss.loss_backward(*saved, *grads)))
