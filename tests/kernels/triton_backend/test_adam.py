"""Adam over a matrix on Triton: against reference.py in float64 and torch's own fused step."""

import pytest
import torch
from helpers.pretended_gpu import on_device
from helpers.triton_checks import DEVICE, assert_as_good_as_torch, random
from sae_lens_switch_kernels import backend, reference, torch_backend
from torch import Tensor
from torch.nn import functional

from sae_lens_switch.training.optim.constrained_adam import ConstrainedAdam

pytest.importorskip("triton")

from sae_lens_switch_kernels import triton_backend  # noqa: E402
from sae_lens_switch_kernels.triton_backend.adam import adam_rows  # noqa: E402
from sae_lens_switch_kernels.triton_backend.adam_tensors import adam_tensors  # noqa: E402
from sae_lens_switch_kernels.triton_backend.blocks import Arch  # noqa: E402
from sae_lens_switch_kernels.triton_backend.launch import recording  # noqa: E402

OPTIONS = (0.9, 0.999, 1e-8)
SHAPES = [(1, 1), (13, 1), (13, 7), (13, 768), (3, 5000), (1, 5000), (2, 16384)]


def number(x: float) -> Tensor:
    return torch.tensor(x, device=DEVICE)


def rows(F: int, D: int) -> list[Tensor]:
    """W of unit rows, its gradient, and moments."""
    W = functional.normalize(random(F, D), dim=1)
    return [W, random(F, D, seed=1), random(F, D, seed=2), random(F, D, seed=3).square()]


def stepped(form, given: list[Tensor], *arguments, **options) -> list[Tensor]:
    given = [t.clone() for t in given]
    form(*given, *arguments, *OPTIONS, **options)
    return [given[0], given[2], given[3]]


@pytest.mark.parametrize(("F", "D"), SHAPES, ids=str)
@pytest.mark.parametrize("constraint", ["none", "unit", "unit, project", "unit, project, radial given"])
@pytest.mark.parametrize("lr_on_device", [False, True])
def test_a_step_equals_the_reference(F, D, constraint, lr_on_device):
    given = rows(F, D)
    unit, project = "unit" in constraint, "project" in constraint
    radial = (given[0] * given[1]).sum(1) if "radial" in constraint else None
    lr = number(0.01) if lr_on_device else 0.01
    options = {"grad_scale": number(2.0), "radial_F": radial, "unit_rows": unit, "project": project}
    for t in (1.0, 2.0, 700.0, 100_000.0):
        arguments = number(t), lr
        ours, plain = (
            stepped(form, given, *arguments, found_inf=number(0.0), **options)
            for form in (adam_rows, torch_backend.adam_rows)
        )
        exact = reference.adam_rows(
            *(t.double() for t in given), t, 0.01, *OPTIONS, grad_scale=2.0, unit_rows=unit, project=project
        )
        if project and D == 1:  # the projected gradient is nothing but rounding, and its sign the step's
            ours, plain, exact = ours[1:], plain[1:], exact[1:]
        for name, a, e, p in zip("Wmv"[-len(ours) :], ours, exact, plain, strict=True):
            assert_as_good_as_torch(f"{name}, step {t}", a, e, p)
        copy = torch.full_like(given[0], torch.nan, dtype=torch.bfloat16)
        again = stepped(adam_rows, given, *arguments, found_inf=number(0.0), copy_FD=copy, **options)
        assert all(torch.equal(a, b) for a, b in zip(ours, again[-len(ours) :], strict=True))
        assert torch.equal(copy, again[0].to(torch.bfloat16))


@pytest.mark.parametrize(("F", "D"), SHAPES, ids=str)
@pytest.mark.parametrize("constrained", [False, True])
def test_moments_in_bfloat16_are_rounded_as_in_plain_torch(F, D, constrained):
    """Moments and gradients whose sums are exact in float32, so that both round the same numbers."""
    W, grad, m, v = rows(F, D)
    grad, m = (t.mul(64).round().clamp(-255, 255) / 64 for t in (grad, m))
    given = [W, grad, m.to(torch.bfloat16), (grad * 3).square().round().to(torch.bfloat16)]
    options = {"unit_rows": constrained, "grad_scale": number(1.0)}
    decays = (0.75, 0.875, 1e-8)
    for t in (1.0, 100_000.0):
        results = []
        for form in (adam_rows, torch_backend.adam_rows):
            W, _, m, v = results.append([t.clone() for t in given]) or results[-1]
            form(W, grad, m, v, number(t), 0.01, *decays, **options)
        for a, b in zip(*(r[2:] for r in results), strict=True):
            assert a.dtype == torch.bfloat16
            assert torch.equal(a, b)
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    low = [t.float() for t in (given[2], results[0][2])]
    exact = 0.75 * low[0] + 0.25 * grad
    assert ((low[1] - exact).abs() <= 2.0**-7 * exact.abs()).all()
    if F * D > 50:
        assert not torch.equal(low[1], exact.to(torch.bfloat16).float())


@pytest.mark.parametrize(("F", "D"), [(13, 7), (3, 5000)], ids=str)
@pytest.mark.parametrize("constrained", [False, True])
def test_nothing_is_written_where_something_was_not_finite(F, D, constrained):
    given = rows(F, D)
    given[1].fill_(float("nan"))
    copy = given[0].to(torch.bfloat16)
    options = {"unit_rows": constrained, "project": constrained, "grad_scale": number(float("nan")), "copy_FD": copy}
    ours = stepped(adam_rows, given, number(1.0), 0.1, found_inf=number(1.0), **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, (given[0], given[2], given[3]), strict=True))
    assert torch.equal(copy, given[0].to(torch.bfloat16))


@pytest.mark.parametrize("D", [7, 5000])
def test_rows_of_zeros_and_of_unit_norm_keep_their_bits(D):
    given = rows(4, D)
    for t in given:
        t[1] = 0
    given[0][2] = 0
    given[0][2, 3] = 1 + 4 * torch.finfo(torch.float32).eps
    given[1][2], given[2][2] = 0, 0
    W, *_ = stepped(adam_rows, given, number(1.0), 0.01, unit_rows=True, project=True)
    assert torch.equal(W[1:3], given[0][1:3])
    torch.testing.assert_close(W[[0, 3]].norm(dim=1), torch.ones(2, device=DEVICE), rtol=1e-6, atol=0)


def test_several_steps_follow_torchs_fused_adam():
    W = torch.nn.Parameter(random(13, 100))
    ours, m, v, step = W.detach().clone(), *(torch.zeros(13, 100, device=DEVICE) for _ in range(2)), number(0.0)
    optimizer = torch.optim.Adam([W], lr=1e-2, fused=True)
    for i in range(5):
        W.grad = random(13, 100, seed=i)
        optimizer.step()
        step += 1
        adam_rows(ours, W.grad, m, v, step, 1e-2, *OPTIONS)
        torch.testing.assert_close(ours, W.detach(), rtol=2e-6, atol=2e-7)
    for a, name in ((m, "exp_avg"), (v, "exp_avg_sq")):
        torch.testing.assert_close(a, optimizer.state[W][name], rtol=1e-5, atol=1e-7)


def test_a_decay_of_zero_and_an_empty_matrix():
    given = rows(3, 5)
    adam_rows(*(t[:0] for t in given), number(1.0), 0.1, *OPTIONS, unit_rows=True)
    W, m, _ = (t.clone() for t in (given[0], given[2], given[3]))
    adam_rows(W, given[1], m, given[3].clone(), number(1.0), 0.1, 0.0, 0.999, 1e-8)
    assert torch.equal(m, given[1])
    exact, *_ = reference.adam_rows(*(t.double() for t in given), 1.0, 0.1, 0.0, 0.999, 1e-8)
    torch.testing.assert_close(W.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("D", [768, 16384])
def test_a_step_is_one_launch_and_copies_nothing_from_the_host(copies, D):
    matrices = [on_device(24, D) for _ in range(4)]
    numbers = [on_device() for _ in range(4)]
    with recording(Arch(lanes=32, shared=232448)) as launches:
        adam_rows(*matrices, *numbers[:2], *OPTIONS, *numbers[2:], on_device(24), True, True)
    assert len(launches) == 1
    assert copies == []


@pytest.fixture
def nothing_proven():
    backend._proven.cache_clear()
    yield
    backend._proven.cache_clear()


def optimised(project: bool, lr_on_device: bool) -> list[Tensor]:
    """Decoder, transposed encoder, bias and moments after steps of which the third is skipped."""
    W_dec, W_enc, b = functional.normalize(random(13, 20), dim=1), random(13, 20, seed=1).T, random(13, seed=2)
    parameters = [torch.nn.Parameter(t) for t in (W_dec, W_enc, b)]
    optimizer = ConstrainedAdam(parameters, 0.01, unit_rows=parameters[0], project=project)
    for i in range(5):
        for j, p in enumerate(parameters):
            p.grad = random(*p.shape, seed=10 * i + j + 3)
        radial = (parameters[0] * parameters[0].grad).sum(1).detach() if i % 2 else None
        lr = number(0.02) if lr_on_device else None
        optimizer.step(grad_scale=number(2.0), found_inf=number(float(i == 2)), radial_F=radial, lr=lr)
    moments = [optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq", "step")]
    return [*(p.detach() for p in parameters), *moments]


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("lr_on_device", [True, False])
def test_the_optimiser_steps_matrices_with_it_and_in_plain_torch_alike(project, lr_on_device, monkeypatch):
    shapes = []

    def counted(W: Tensor, *arguments) -> None:
        shapes.append(tuple(W.shape))
        adam_rows(W, *arguments)

    def counted_together(parameters: list[Tensor], *arguments) -> None:
        shapes.extend(tuple(p.shape) for p in parameters)
        adam_tensors(parameters, *arguments)

    monkeypatch.setattr(triton_backend, "adam_rows", counted)
    monkeypatch.setattr(triton_backend, "adam_tensors", counted_together)
    monkeypatch.setenv("SAE_LENS_SWITCH_BACKEND", "torch")
    plain = optimised(project, lr_on_device)
    assert shapes == []
    monkeypatch.setenv("SAE_LENS_SWITCH_BACKEND", "triton")
    monkeypatch.setattr(backend, "_proven", lambda *_: True)
    ours = optimised(project, lr_on_device)
    assert shapes == 5 * [(13, 20), (13,), (13, 20)]
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("nothing_proven")
def test_an_optimiser_whose_kernel_is_wrong_warns_once_and_steps_in_plain_torch(monkeypatch):
    def wrong(W: Tensor, *_) -> None:
        W.add_(1)

    monkeypatch.setenv("SAE_LENS_SWITCH_BACKEND", "torch")
    plain = optimised(True, False)
    monkeypatch.setenv("SAE_LENS_SWITCH_BACKEND", "triton")
    monkeypatch.setattr(triton_backend, "adam_rows", wrong)
    with pytest.warns(RuntimeWarning, match="Triton kernel of adam_rows is off by") as caught:
        ours = optimised(True, False)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
