"""The reference for every primitive: dense, plain autograd, any dtype, no tricks.

Each function has the name and signature of the public one. Everything here makes [B, F] tensors on purpose.

Letters: in ``sparse_autoencode``, N counts the dead latents that a token may choose from.
"""

import torch
from torch import Tensor


def dense_codes(values_BK: Tensor, indices_BK: Tensor, n_latents: int) -> Tensor:
    """f[b, i[b, j]] += v[b, j]: the [B, F] matrix that (values, indices) stands for."""
    one_hot_BKF = torch.nn.functional.one_hot(indices_BK.long(), n_latents).to(values_BK.dtype)
    return torch.einsum("bk,bkf->bf", values_BK, one_hot_BKF)


def sparse_decode(values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """x[b] = sum_f f[b, f] W_dec[f]."""
    return torch.einsum("bf,fd->bd", dense_codes(values_BK, indices_BK, len(W_dec_FD)), W_dec_FD)


def matmul_at_indices(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor) -> Tensor:
    """(g W^T)[b, i[b, j]]."""
    return torch.einsum("bd,fd->bf", g_BD, W_FD).gather(1, indices_BK.long())


def latent_weight_grad(values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_latents: int) -> Tensor:
    """f^T g."""
    return torch.einsum("bf,bd->fd", dense_codes(values_BK, indices_BK, n_latents), g_BD)


def adam_rows(
    W_FD: Tensor,
    grad_FD: Tensor,
    m_FD: Tensor,
    v_FD: Tensor,
    step: float | Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: float = 1.0,
    unit_rows: bool = False,
    project: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """W, m and v after clip, project, step number ``step``, renormalise; unlike the primitive not in place.

    ``step`` may be [F, 1], each row's own.
    """
    g_FD = grad_FD / grad_scale
    if project:
        g_FD = g_FD - (g_FD * W_FD).sum(1, keepdim=True) * W_FD
    m_FD, v_FD = beta1 * m_FD + (1 - beta1) * g_FD, beta2 * v_FD + (1 - beta2) * g_FD.square()
    corrected_m_FD, corrected_v_FD = m_FD / (1 - beta1**step), v_FD / (1 - beta2**step)
    W_FD = W_FD - lr * corrected_m_FD / (corrected_v_FD.sqrt() + eps)
    return torch.nn.functional.normalize(W_FD, dim=1, eps=1e-30) if unit_rows else W_FD, m_FD, v_FD


def lazy_adam_rows(
    W_FD: Tensor,
    grad_RD: Tensor,
    m_FD: Tensor,
    v_FD: Tensor,
    step_F: Tensor,
    rows_R: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: float = 1.0,
    unit_rows: bool = False,
    project: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``adam_rows`` row by row, each by its own count of steps."""
    options = lr, beta1, beta2, eps, grad_scale, unit_rows, project
    W_FD, m_FD, v_FD, step_F = (t.clone() for t in (W_FD, m_FD, v_FD, step_F))
    for grad_D, f in zip(grad_RD, rows_R.tolist(), strict=True):
        row = slice(f, f + 1)
        step_F[f] += 1
        old = W_FD[row], grad_D.unsqueeze(0), m_FD[row], v_FD[row]
        W_FD[row], m_FD[row], v_FD[row] = adam_rows(*old, float(step_F[f]), *options)
    return W_FD, m_FD, v_FD, step_F


def switch_encode(
    x_BD: Tensor,
    expert_B: Tensor,
    W_enc_FD: Tensor,
    k: int,
    n_experts: int,
    *,
    n_shared: int = 0,
    gates_B: Tensor | None = None,
    pre_bias_D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per token, relu of the k of (x - b) W_enc^T, shared or within its own experts, that are largest when gated."""
    M = (len(W_enc_FD) - n_shared) // n_experts
    values, indices = [], []
    for b, x_D in enumerate(x_BD):
        experts = expert_B[b].flatten()
        routed = [torch.arange(n_shared + e * M, n_shared + (e + 1) * M) for e in experts.tolist()]
        mine = torch.cat([torch.arange(n_shared), *routed])
        pre = W_enc_FD[mine] @ (x_D if pre_bias_D is None else x_D - pre_bias_D)
        gates = torch.ones_like(experts) if gates_B is None else gates_B[b].flatten()
        gates = torch.cat([gates.new_ones(n_shared), gates.repeat_interleave(M)])
        chosen = (pre.relu() * gates).topk(k).indices
        values.append(pre[chosen].relu())
        indices.append(mine[chosen])
    if not values:
        return x_BD.new_zeros(0, k), expert_B.new_zeros(0, k)
    return torch.stack(values), torch.stack(indices)


def topk_encode(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    k: int,
    *,
    pre_bias_D: Tensor | None = None,
    bias_F: Tensor | None = None,
    scale_F: Tensor | None = None,
    by_magnitude: bool = False,
) -> tuple[Tensor, Tensor]:
    """relu of the k of (x - b) W_enc^T + bias that are largest when scaled; or without ReLU the k farthest from 0."""
    pre_BF = (x_BD if pre_bias_D is None else x_BD - pre_bias_D) @ W_enc_FD.T
    pre_BF = pre_BF if bias_F is None else pre_BF + bias_F
    ranked_BF = pre_BF if scale_F is None else pre_BF * scale_F
    indices_BK = (ranked_BF.abs() if by_magnitude else ranked_BF).topk(k, dim=1).indices
    values_BK = pre_BF.gather(1, indices_BK)
    return values_BK if by_magnitude else values_BK.relu(), indices_BK


def threshold_encode(
    x_BD: Tensor, W_enc_FD: Tensor, threshold_F: Tensor, *, bias_F: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """All of x W_enc^T + bias that is not at most its threshold."""
    pre_BF = x_BD @ W_enc_FD.T + (0 if bias_F is None else bias_F)
    is_active = ~(pre_BF <= threshold_F)
    offsets_B1 = torch.tensor([0, *is_active.sum(1).cumsum(0).tolist()])
    return pre_BF[is_active], is_active.nonzero()[:, 1], offsets_B1


def sparse_autoencode(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    W_dec_FD: Tensor,
    k: int,
    *,
    expert_B: Tensor | None = None,
    n_experts: int = 1,
    n_shared: int = 0,
    gates_B: Tensor | None = None,
    pre_bias_D: Tensor | None = None,
    bias_F: Tensor | None = None,
    scale_F: Tensor | None = None,
    dead_N: Tensor | None = None,
    aux_k: int = 0,
    by_magnitude: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Encode, gate, decode; and decode the top aux_k, without ReLU, of the dead latents that the token may use."""
    if n_shared and expert_B is not None and expert_B.ndim == 1:
        expert_B, gates_B = expert_B.unsqueeze(1), None if gates_B is None else gates_B.unsqueeze(1)
    if expert_B is None:
        values_BK, indices_BK = topk_encode(
            x_BD, W_enc_FD, k, pre_bias_D=pre_bias_D, bias_F=bias_F, scale_F=scale_F, by_magnitude=by_magnitude
        )
    else:
        options = {"n_shared": n_shared, "pre_bias_D": pre_bias_D, "gates_B": gates_B}
        values_BK, indices_BK = switch_encode(x_BD, expert_B, W_enc_FD, k, n_experts, **options)
    M = (len(W_enc_FD) - n_shared) // n_experts
    gates_BK = 1 if gates_B is None else _gates_at(gates_B, expert_B, (indices_BK - n_shared) // M)
    gated_BK = values_BK * gates_BK
    out_BD = sparse_decode(gated_BK, indices_BK, W_dec_FD)
    if dead_N is None:
        return out_BD, values_BK, indices_BK, None
    dead_N = dead_N.nonzero().flatten() if dead_N.dtype == torch.bool else dead_N
    rows = []
    for b, x_D in enumerate(x_BD):
        expert_N = (dead_N - n_shared) // M  # negative: shared
        mine = dead_N if expert_B is None else dead_N[torch.isin(expert_N, expert_B[b]) | (expert_N < 0)]
        pre_N = W_enc_FD[mine] @ (x_D if pre_bias_D is None else x_D - pre_bias_D)
        pre_N = pre_N if bias_F is None else pre_N + bias_F[mine]
        gates_N = torch.ones_like(pre_N)
        if gates_B is not None:
            of_token = None if expert_B is None else expert_B[b : b + 1]
            experts_1N = ((mine - n_shared) // M).unsqueeze(0)
            gates_N = _gates_at(gates_B[b : b + 1], of_token, experts_1N).detach().expand(1, len(mine))[0]
        ranked_N = gates_N * (pre_N if scale_F is None else pre_N * scale_F[mine])
        ranked_N = ranked_N.abs() if by_magnitude else ranked_N
        chosen_A = ranked_N.topk(min(aux_k, len(mine))).indices
        rows.append((gates_N * pre_N)[chosen_A] @ W_dec_FD[mine[chosen_A]])
    return out_BD, values_BK, indices_BK, torch.stack(rows) if rows else torch.zeros_like(out_BD)


def _gates_at(gates_B: Tensor, expert_B: Tensor | None, expert_BK: Tensor) -> Tensor:
    """[B, 1], or with several experts per token [B, K]: the gate of each latent's expert; 1 of shared latents."""
    if expert_B is None or expert_B.ndim == 1:
        return gates_B.unsqueeze(1)
    return torch.stack(
        [
            torch.stack([gates[experts == e].sum() + (e < 0) for e in wanted]) if len(wanted) else gates[:0]
            for gates, experts, wanted in zip(gates_B, expert_B, expert_BK, strict=True)
        ]
    )
