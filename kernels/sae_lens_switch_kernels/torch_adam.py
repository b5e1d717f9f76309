"""Adam over the rows of a matrix in plain torch: what its kernels are checked against.

An optimiser that has no kernel steps in blocks that stay in cache instead.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_lens_switch_kernels.stochastic_rounding import rounded_moments


def adam_rows(
    W_FD: Tensor,
    grad_FD: Tensor,
    m_FD: Tensor,
    v_FD: Tensor,
    step: Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    radial_F: Tensor | None = None,
    unit_rows: bool = False,
    project: bool = False,
    copy_FD: Tensor | None = None,
) -> None:
    """Project, step by Adam and renormalise the rows of a matrix in place.

    Args:
        W_FD: Weights.
        grad_FD: Their gradient, divided by ``grad_scale`` first.
        m_FD: First moments; float32, or bfloat16, into which they are rounded stochastically.
        v_FD: Second moments, of the same dtype.
        step: Which step this is, from 1.
        lr: Learning rate.
        beta1: Decay of the first moments.
        beta2: Decay of the second moments.
        eps: Added to the root of the second moments.
        grad_scale: None: 1.
        found_inf: Nothing changes where it is 1.
        radial_F: <grad, W> per row; None: it is computed.
        unit_rows: Whether rows are scaled to unit norm at the end.
        project: Whether the gradient loses its component along each row.
        copy_FD: W in lower precision, written with it.
    """
    new = _stepped(
        (W_FD, grad_FD, m_FD, v_FD), step.double(), lr, beta1, beta2, eps, grad_scale, radial_F, unit_rows, project
    )
    if m_FD.dtype == torch.bfloat16:
        new = new[0], *rounded_moments(*new[1:], torch.arange(len(W_FD), device=W_FD.device), step)
    for old, t in zip((W_FD, m_FD, v_FD), new, strict=True):
        old.copy_(t if found_inf is None else torch.where(found_inf == 0, t, old))
    if copy_FD is not None:
        copy_FD.copy_(W_FD)


def lazy_adam_rows(
    W_FD: Tensor,
    grad_RD: Tensor,
    m_FD: Tensor,
    v_FD: Tensor,
    step_F: Tensor,
    rows_R: Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: Tensor | None = None,
    radial_R: Tensor | None = None,
    unit_rows: bool = False,
    project: bool = False,
    copy_FD: Tensor | None = None,
) -> None:
    """``adam_rows`` for the rows ``rows_R`` alone, each of which counts its own steps (lazy Adam).

    Args:
        W_FD: Weights.
        grad_RD: The gradient of the rows to step.
        m_FD: First moments; float32 or bfloat16, as in ``adam_rows``.
        v_FD: Second moments, of the same dtype.
        step_F: How many steps each row has taken; that of the rows to step is increased by one.
        rows_R: The rows to step, distinct.
        lr: Learning rate.
        beta1: Decay of the first moments.
        beta2: Decay of the second moments.
        eps: Added to the root of the second moments.
        grad_scale: The gradient is divided by it; None: by 1.
        radial_R: <grad, W> of the rows to step; None: it is computed.
        unit_rows: Whether rows are scaled to unit norm at the end.
        project: Whether the gradient loses its component along each row.
        copy_FD: W in lower precision, written with it.
    """
    step_R = step_F[rows_R] + 1
    old = W_FD[rows_R], grad_RD, m_FD[rows_R], v_FD[rows_R]
    number_R1 = step_R.double().unsqueeze(1)
    new = _stepped(old, number_R1, lr, beta1, beta2, eps, grad_scale, radial_R, unit_rows, project)
    if m_FD.dtype == torch.bfloat16:
        new = new[0], *rounded_moments(*new[1:], rows_R, step_R)
    for t_FD, t_RD in zip((W_FD, m_FD, v_FD), new, strict=True):
        t_FD[rows_R] = t_RD
    step_F[rows_R] = step_R
    if copy_FD is not None:
        copy_FD[rows_R] = new[0].to(copy_FD.dtype)


def adam_tensors(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Step several tensors of any shape by Adam, in place; each by its own count of steps, otherwise as ``adam_rows``.

    Args:
        parameters: Weights.
        grads: Their gradients.
        exp_avgs: First moments.
        exp_avg_sqs: Second moments.
        steps: Which step this is for each, from 1.
        lr: Learning rate.
        beta1: Decay of the first moments.
        beta2: Decay of the second moments.
        eps: Added to the root of the second moments.
        grad_scale: Gradients are divided by it; None: by 1.
        found_inf: Nothing changes where it is 1.
    """
    for W, grad, m, v, step in zip(parameters, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        rows = W.view(1, -1), grad.view(1, -1), m.view(1, -1), v.view(1, -1)
        adam_rows(*rows, step, lr, beta1, beta2, eps, grad_scale, found_inf)


def _stepped(
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    step: Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: Tensor | None,
    radial_R: Tensor | None,
    unit_rows: bool,
    project: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and both moments after a step, of a matrix or of some of its rows."""
    W_RD, g_RD, m_RD, v_RD = (t.to(given[0].dtype) for t in given)
    if project:
        radial_R = (g_RD * W_RD).sum(1) if radial_R is None else radial_R
        g_RD = torch.addcmul(g_RD, W_RD, radial_R.unsqueeze(1), value=-1)
    g_RD = g_RD if grad_scale is None else g_RD / grad_scale
    m_RD, v_RD = beta1 * m_RD + (1 - beta1) * g_RD, beta2 * v_RD + (1 - beta2) * g_RD.square()
    root = (1 - beta2**step).sqrt().to(v_RD.dtype)
    W_RD = W_RD - (lr / (1 - beta1**step)).to(m_RD.dtype) * m_RD / (v_RD.sqrt() / root + eps)
    if unit_rows:
        info, norms = torch.finfo(W_RD.dtype), torch.linalg.vector_norm(W_RD, dim=1, keepdim=True)
        W_RD = W_RD / norms.masked_fill((norms - 1).abs() <= 8 * info.eps, 1).clamp_min(info.tiny)
    return W_RD, m_RD, v_RD
