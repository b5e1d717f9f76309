"""The loss of a step as one operator: against autograd through its parts, bit by bit where torch runs it."""

import pytest
import torch
from sae_lens_switch_kernels import reconstruction_loss, torch_loss
from sae_lens_switch_kernels.loss import lost, lost_backward
from torch import Tensor

B, D = 13, 7


def inputs(dtype: torch.dtype, x_dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    balance_dtype = torch.promote_types(dtype, torch.float32)
    tensors = normal(B, D).to(dtype), normal(D).to(dtype), (normal(B, D) + 3).to(x_dtype), normal(()).to(balance_dtype)
    return [t.requires_grad_() for t in tensors]


def by_parts(out, bias, x, balance, coefficient, scale):
    out = out + bias
    dtype = torch.promote_types(out.dtype, x.dtype)
    error = torch.nn.functional.mse_loss(out.to(dtype), x.to(dtype), reduction="none").sum(dim=-1).mean()
    if balance is None:
        return out, error, error, torch.zeros(())
    if scale is None:
        with torch.no_grad():
            promoted = x.to(torch.promote_types(x.dtype, torch.float32))
            scale = (promoted - promoted.mean(dim=0)).square_().sum(dim=-1).mean()
    weighted = coefficient * scale * balance
    return out, error + weighted, error, weighted


@pytest.mark.parametrize("scale", [7.0, None])
@pytest.mark.parametrize("coefficient", [0.3, "on the device"])
@pytest.mark.parametrize("used", [(1,), (0, 1), (2,), (3,), (0,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_it_is_bit_for_bit_what_autograd_makes_of_its_parts(dtypes, used, coefficient, scale):
    coefficient = torch.tensor(0.3) if isinstance(coefficient, str) else coefficient
    leaves = inputs(*dtypes)
    ours, theirs = reconstruction_loss(*leaves, coefficient, scale), by_parts(*leaves, coefficient, scale)
    for a, b in zip(ours[:4], theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    chosen = [leaf for i, leaf in enumerate(leaves) if not (used == (0,) and i > 1) and not (used == (3,) and i < 3)]
    grads = []
    for found in (ours, theirs):
        upstream = [torch.ones_like(found[i]) * (1 + i) for i in used]
        grads.append(torch.autograd.grad([found[i] for i in used], chosen, upstream, allow_unused=True))
    for a, b in zip(*grads, strict=True):
        b = torch.zeros_like(a) if b is None else b
        if len(used) == 1:
            assert torch.equal(a, b)
        else:  # autograd adds up what is upstream in an order of its own
            torch.testing.assert_close(a, b)


def test_without_experts_there_is_no_balance():
    leaves = inputs(torch.float32, torch.float32)
    found = reconstruction_loss(*leaves[:3])
    assert torch.equal(found.total, found.error)
    assert found.balance == 0
    grads = torch.autograd.grad(found.total, leaves[:3])
    expected = torch.autograd.grad(by_parts(*leaves[:3], None, 1.0, 1.0)[1], leaves[:3])
    assert all(map(torch.equal, grads, expected))


def test_the_spread_of_a_batch_is_the_same_in_one_pass_and_in_several(monkeypatch):
    x = torch.randn(50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100
    for in_passes in ({"cpu"}, set()):
        monkeypatch.setattr(torch_loss, "_IN_PASSES", in_passes)
        assert float(torch_loss.spread(x)) == pytest.approx(float(x.var(0, correction=0).sum()), rel=1e-12)


def test_it_is_an_operator_of_torch():
    out, bias, x, balance = inputs(torch.float32, torch.float32)
    for given in ((balance, None, 0.5, None), (None, None, 1.0, 1.0), (balance, torch.tensor(2.0), 1.0, 3.0)):
        torch.library.opcheck(lost, (out, bias, x, *given))
    out, x = (t.detach().T.contiguous().T.requires_grad_() for t in (out, x))  # of any strides
    torch.library.opcheck(lost, (out, bias, x, balance, None, 0.5, None))
    found = lost(out, bias, x, balance, None, 0.5, None)
    grads = torch.ones_like(out), *(torch.ones(()) for _ in range(3))
    given = (found[0].detach(), x.detach(), found[4].detach(), found[5], *grads)
    torch.library.opcheck(lost_backward, given, test_utils=("test_schema", "test_faketensor"))


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"x_BD must have shape \(3, 2\); got \(2, 2\)"):
        reconstruction_loss(torch.zeros(3, 2), torch.zeros(2), torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias_D": torch.zeros(3)}, r"bias_D must have shape \(2,\); got \(3,\)"),
        ({"bias_D": torch.zeros(1)}, r"bias_D must have shape \(2,\); got \(1,\)"),
        ({"bias_D": torch.zeros(2, device="meta")}, "bias_D and out_BD must share a device; got meta and cpu"),
        ({"x_BD": torch.zeros(3, 2, device="meta")}, "x_BD and out_BD must share a device; got meta and cpu"),
        ({"balance": torch.zeros(1)}, r"balance must have shape \(\); got \(1,\)"),
        ({"balance": torch.zeros((), device="meta")}, "balance and out_BD must share a device; got meta and cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"out_BD": torch.zeros(3, 2), "bias_D": torch.zeros(2), "x_BD": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match=message):
        reconstruction_loss(**given | change)
