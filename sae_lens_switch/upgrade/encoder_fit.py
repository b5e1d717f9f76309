"""What the encoder of a split SAE makes up for: TopK's encoder bias, and gates where TopK had none."""

from dataclasses import replace
from typing import NamedTuple

import torch
from sae_lens_switch_kernels import sparse_decode, switch_encode
from torch import Tensor

from sae_lens_switch.saes.field_rules import Gate
from sae_lens_switch.upgrade.sources import ROWS_AT_ONCE, TopK

_RIDGE = 1e-3


def with_bias_folded(topk: TopK, x_ND: Tensor, expert_N: Tensor, E: int) -> TopK:
    """b_enc as a function of the input, linear on each expert's tokens."""
    W_enc_EMD, bias_EM = topk.W_enc_FD.clone().view(E, -1, x_ND.shape[1]), topk.b_enc_F.view(E, -1)
    for e in range(E):
        x_BD = x_ND[expert_N == e].double()
        if len(x_BD) == 0:
            continue
        x_BD = x_BD if topk.pre_bias_D is None else x_BD - topk.pre_bias_D
        gram_DD = x_BD.T @ x_BD
        gram_DD.diagonal().add_(_RIDGE * gram_DD.diagonal().mean() + 1e-30)
        v_D = torch.linalg.solve(gram_DD, x_BD.sum(dim=0)).to(x_ND.dtype)
        W_enc_EMD[e] += bias_EM[e].unsqueeze(1) * v_D
    return replace(topk, W_enc_FD=W_enc_EMD.flatten(0, 1))


class ExpertFit(NamedTuple):
    """The factor of each expert's encoder for the least squared error, and the FVU with it."""

    scale_E: Tensor
    fvu: float

    @classmethod
    def of(cls, topk: TopK, x_ND: Tensor, probs_NE: Tensor, gate: Gate) -> "ExpertFit":
        E = probs_NE.shape[1]
        gates_N, expert_N = probs_NE.max(dim=1)
        xy_E, yy_E = (torch.zeros(E, dtype=torch.float64, device=x_ND.device) for _ in range(2))
        xx = 0.0
        for rows in torch.arange(len(x_ND), device=x_ND.device).split(ROWS_AT_ONCE):
            x_BD, expert_B = x_ND[rows], expert_N[rows]
            values_BK, indices_BK = switch_encode(x_BD, expert_B, topk.W_enc_FD, topk.k, E, pre_bias_D=topk.pre_bias_D)
            if gate == "probability":
                values_BK = values_BK * gates_N[rows].to(values_BK).unsqueeze(1)
            y_BD = sparse_decode(values_BK, indices_BK, topk.W_dec_FD)
            onehot_EB = torch.nn.functional.one_hot(expert_B, E).T.double()
            residual_BD = x_BD - topk.b_dec_D
            xy_E += onehot_EB @ (residual_BD * y_BD).sum(dim=1).double()
            yy_E += onehot_EB @ y_BD.square().sum(dim=1).double()
            xx += float(residual_BD.square().sum(dim=1).double().sum())
        scale_E = torch.where((yy_E > 0) & (xy_E > 0), xy_E / yy_E.clamp_min(1e-300), 1.0)
        error = xx + float((scale_E.square() * yy_E - 2 * scale_E * xy_E).sum())
        return cls(scale_E, error / _variance(x_ND))


def fvu(topk: TopK, x_ND: Tensor, values_NK: Tensor, indices_NK: Tensor) -> float:
    error = 0.0
    for rows in torch.arange(len(x_ND), device=x_ND.device).split(ROWS_AT_ONCE):
        out_BD = sparse_decode(values_NK[rows], indices_NK[rows], topk.W_dec_FD) + topk.b_dec_D
        error += float((out_BD - x_ND[rows]).square().sum(dim=1).double().sum())
    return error / _variance(x_ND)


def _variance(x_ND: Tensor) -> float:
    """Summed over the tokens; never zero."""
    return max(float((x_ND - x_ND.mean(dim=0)).square().sum(dim=1).double().sum()), 1e-30)
