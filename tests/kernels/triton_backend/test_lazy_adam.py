"""Lazy Adam on Triton, some rows each by its own count of steps: against reference.py in float64, row by row."""

import pytest
import torch
from helpers import D, F, K
from helpers.pretended_gpu import on_device
from helpers.triton_checks import DEVICE, assert_as_good_as_torch, random
from sae_lens_switch_kernels import backend, reference, torch_backend
from torch import Tensor
from torch.nn import functional

from sae_lens_switch import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
from sae_lens_switch.training.optim.row_sparse_adam import RowSparseAdam

pytest.importorskip("triton")

from sae_lens_switch_kernels import triton_backend  # noqa: E402
from sae_lens_switch_kernels.triton_backend.adam import lazy_adam_rows  # noqa: E402
from sae_lens_switch_kernels.triton_backend.blocks import Arch  # noqa: E402
from sae_lens_switch_kernels.triton_backend.launch import recording  # noqa: E402

OPTIONS = (0.01, 0.9, 0.999, 1e-8)
# Rows in all, rows stepped, width
SHAPES = [(1, 1, 1), (13, 4, 1), (13, 13, 7), (13, 5, 768), (5, 2, 5000), (4, 3, 16384)]


def number(x: float) -> Tensor:
    return torch.tensor(x, device=DEVICE)


class Case:
    """Weights of unit rows, moments side by side as the optimiser keeps them, and rows in no order."""

    def __init__(self, n_rows: int, n_stepped: int, width: int) -> None:
        self.W = functional.normalize(random(n_rows, width), dim=1)
        self.moments = random(n_rows, 2, width, seed=1)
        self.moments[:, 1].square_()
        ages = torch.tensor([0, 1, 3, 700, 100_000], device=DEVICE)
        self.step = ages[torch.arange(n_rows, device=DEVICE) % len(ages)].float()
        generator = torch.Generator().manual_seed(2)
        self.rows = torch.randperm(n_rows, generator=generator)[:n_stepped].to(DEVICE)
        self.grad = random(n_stepped, width, seed=3)

    @property
    def state(self) -> list[Tensor]:
        return [self.W, self.moments[:, 0], self.moments[:, 1], self.step]

    def stepped(self, form, copy: Tensor | None = None, **options) -> list[Tensor]:
        W, moments, step = self.W.clone(), self.moments.clone(), self.step.clone()
        form(W, self.grad, moments[:, 0], moments[:, 1], step, self.rows, *OPTIONS, copy_FD=copy, **options)
        return [W, moments[:, 0], moments[:, 1], step]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_in_bfloat16_are_rounded_by_place_in_the_matrix_and_age_of_the_row(shape):
    """Of numbers whose sums are exact in float32, so that plain torch rounds the same."""
    case = Case(*shape)
    case.grad = case.grad.mul(64).round().clamp(-255, 255) / 64
    case.moments = (case.moments * 64).round().clamp(-255, 255).div(64).to(torch.bfloat16)
    results = []
    for form in (lazy_adam_rows, torch_backend.lazy_adam_rows):
        W, moments, step = case.W.clone(), case.moments.clone(), case.step.clone()
        form(W, case.grad, moments[:, 0], moments[:, 1], step, case.rows, 0.01, 0.75, 0.875, 1e-8)
        results.append((moments, step, W))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-5, atol=1e-6)
    rest = torch.ones(len(case.W), dtype=torch.bool).index_fill_(0, case.rows.cpu(), False)
    assert torch.equal(results[0][0][rest], case.moments[rest])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("constraint", ["none", "unit", "unit, project", "unit, project, radial given"])
def test_a_step_equals_the_reference_and_touches_no_other_row(shape, constraint):
    case = Case(*shape)
    unit, project = "unit" in constraint, "project" in constraint
    radial = (case.W[case.rows] * case.grad).sum(1) if "radial" in constraint else None
    options = {"grad_scale": number(2.0), "radial_R": radial, "unit_rows": unit, "project": project}
    copy = case.W.to(torch.bfloat16)
    ours, plain = case.stepped(lazy_adam_rows, copy, **options), case.stepped(torch_backend.lazy_adam_rows, **options)
    W, m, v, step = (t.double() for t in case.state)
    exact = reference.lazy_adam_rows(
        *(W, case.grad.double(), m, v, step, case.rows, *OPTIONS, 2.0), unit_rows=unit, project=project
    )
    compared = list(zip(("W", "m", "v", "step"), ours, exact, plain, strict=True))
    if project and shape[2] == 1:  # the projected gradient is nothing but rounding, and its sign the step's
        compared = compared[1:]
    for name, a, e, p in compared:
        assert_as_good_as_torch(name, a, e, p)
    others = [f for f in range(shape[0]) if f not in case.rows.tolist()]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(ours, case.state, strict=True))
    assert torch.equal(ours[3][case.rows], case.step[case.rows] + 1)
    assert torch.equal(copy, ours[0].to(torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(ours, case.stepped(lazy_adam_rows, **options), strict=True))


def test_gradients_in_low_precision_and_a_rate_on_the_device_are_read_as_float32():
    case = Case(13, 5, 24)
    case.grad = case.grad.to(torch.bfloat16)
    W, moments, step = case.W.clone(), case.moments.clone(), case.step.clone()
    rate = number(0.01)
    lazy_adam_rows(W, case.grad, moments[:, 0], moments[:, 1], step, case.rows, rate, *OPTIONS[1:])
    case.grad = case.grad.float()
    for a, b in zip((W, moments[:, 0], moments[:, 1], step), case.stepped(torch_backend.lazy_adam_rows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_rows_are_no_step():
    case = Case(5, 0, 7)
    assert all(torch.equal(a, b) for a, b in zip(case.stepped(lazy_adam_rows), case.state, strict=True))


@pytest.mark.parametrize("width", [768, 16384])
def test_a_step_is_one_launch_and_copies_nothing_from_the_host(copies, width):
    W, grad, moments, step = on_device(24, width), on_device(8, width), on_device(24, 2, width), on_device(24)
    rows, scale = torch.empty(8, dtype=torch.int64, device=W.device), on_device()
    with recording(Arch(lanes=32, shared=232448)) as launches:
        lazy_adam_rows(W, grad, moments[:, 0], moments[:, 1], step, rows, *OPTIONS, scale, on_device(8), True, True)
    assert len(launches) == 1
    assert copies == []


def trained(monkeypatch, form: str, dtype: str, frozen: bool) -> list[Tensor]:
    """Weights and the optimiser's state after a few row-sparse steps."""
    monkeypatch.setenv("SAE_LENS_SWITCH_BACKEND", form)
    torch.manual_seed(0)
    options = {"d_in": D, "d_sae": F, "k": K, "dtype": dtype, "device": DEVICE, "aux_loss_coefficient": 0.0}
    sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**options))
    sae.W_dec.requires_grad_(not frozen)
    optimizer = RowSparseAdam(sae, 1e-2)
    for i in range(3):
        x = random(9, D, seed=i, dtype=sae.dtype)
        generator = torch.Generator().manual_seed(i)
        rows = torch.randperm(F, generator=generator)[:20].sort().values.to(DEVICE)
        grads = [random(20, D, seed=10 * i + j, dtype=sae.dtype) for j in range(2)]
        d_bias = random(20, seed=10 * i + 2, dtype=sae.dtype)
        radial = None if frozen else (grads[1] * sae.W_dec[rows]).sum(1).detach()
        optimizer.row_grads.store(rows, *grads, d_bias, radial if i else None)
        sae.b_dec.grad = x.mean(0)
        optimizer.clipped_step(torch.zeros((), device=DEVICE), 1.0)
    state = [t for p in sae.parameters() for t in optimizer.state.get(p, {}).values()]
    return [*(p.detach().clone() for p in sae.parameters()), *state]


@pytest.mark.parametrize(("dtype", "frozen"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_the_optimiser_steps_rows_with_it_and_in_plain_torch_alike(dtype, frozen, monkeypatch):
    calls = []
    for name in ("adam_rows", "lazy_adam_rows"):
        real = getattr(triton_backend, name)

        def counted(W: Tensor, *arguments, real=real, name=name) -> None:
            calls.append((name, tuple(W.shape)))
            real(W, *arguments)

        monkeypatch.setattr(triton_backend, name, counted)
    plain = trained(monkeypatch, "torch", dtype, frozen)
    assert calls == []
    monkeypatch.setattr(backend, "_proven", lambda *_: True)
    ours = trained(monkeypatch, "triton", dtype, frozen)
    matrices = [("lazy_adam_rows", (F, D))] * (1 if frozen else 2)
    assert sorted(calls[-len(matrices) - 2 :]) == [("adam_rows", (1, D)), ("lazy_adam_rows", (F, 1)), *matrices]
    assert {t.dtype for t in ours} == {torch.float32, getattr(torch, dtype)}
    for a, b in zip(ours, plain, strict=True):
        # In bf16 the radial component comes from a decoder that may be a rounding away.
        rtol, atol = (1e-5, 1e-6) if dtype == "float32" else (1e-2, 1e-3)
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
