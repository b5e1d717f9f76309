"""Small things that our SAEs have in common as guests of SAELens."""

from typing import Any

import torch
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor, nn

from sae_lens_switch.saes.router import RoutingStatistics
from sae_lens_switch.saes.sparse_codes import SparseCodes


class SparseStepOutput(TrainStepOutput):
    """A step's output with its codes, detached. ``feature_acts``, COO as SAELens knows it, is made when asked for."""

    def __init__(self, *, codes: SparseCodes, routing: RoutingStatistics | None = None, **fields: Any) -> None:
        self.codes, self.routing = codes, routing
        self._feature_acts: Tensor | None = None
        super().__init__(feature_acts=None, **fields)  # type: ignore[arg-type]

    @property
    def feature_acts(self) -> Tensor:
        if self._feature_acts is None:
            self._feature_acts = self.codes.to_coo()
        return self._feature_acts

    @feature_acts.setter
    def feature_acts(self, value: Tensor | None) -> None:  # type: ignore[override]
        self._feature_acts = value


def dead_latents(sae: Any, mask_F: Tensor | None, n_experts: int = 1) -> tuple[Tensor | None, int]:
    """Indices of the dead latents, and how many reconstruct a token's residual (Gao et al. 2024, A.2); None: none do.

    ``aux_k``, or all there are of the expert that has most.
    """
    if mask_F is None or sae.cfg.aux_loss_coefficient == 0:
        return None, 0
    dead_N = mask_F.nonzero().flatten()
    most = len(dead_N) if n_experts == 1 else int(mask_F.view(n_experts, -1).sum(1).max())
    k_aux = min(aux_k(sae), most)
    if k_aux == 0:
        return None, 0
    if sae.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
        raise ValueError(
            "aux_loss_coefficient must be 0 with normalize_activations="
            f"{sae.cfg.normalize_activations!r}: dead latents would reconstruct a normalised residual"
        )
    return dead_N, k_aux


def aux_k(sae: Any) -> int:
    """Half of d_in, as in SAELens, for an SAE whose config has no ``aux_k``."""
    return getattr(sae.cfg, "aux_k", sae.cfg.d_in // 2)


def aux_loss(sae: Any, x_BD: Tensor, sae_out_BD: Tensor, aux_out_BD: Tensor, n_dead: Tensor | int) -> Tensor:
    """coefficient * min(1, n_dead / aux_k) * mean_B ||aux_out - (x - sae_out)||^2; n_dead of all, or a token."""
    residual = (x_BD - sae_out_BD).detach()
    error_B = (sae.reshape_fn_out(aux_out_BD, sae.d_head) - residual).pow(2).sum(dim=-1)
    # A number is filled in on the device: a copy from the host would wait for it.
    few = n_dead.to(error_B.dtype) if isinstance(n_dead, Tensor) else error_B.new_full((), n_dead)
    few = (few / aux_k(sae)).clamp(max=1)
    return sae.cfg.aux_loss_coefficient * (few * error_B).mean()


def normalized_input(sae: Any, x: Tensor) -> Tensor:
    """x in the SAE's dtype, hook_z flattened, normalised; b_dec not yet taken off.

    Once per encode: the hook fires and run-time normalisation remembers its statistics for decode.
    """
    return sae.run_time_activation_norm_fn_in(sae.hook_sae_input(sae.reshape_fn_in(differentiable(x).to(sae.dtype))))


def differentiable(x: Tensor) -> Tensor:
    """x, or a copy of one made under inference_mode, which a backward pass may not keep."""
    return x.clone() if x.is_inference() and torch.is_grad_enabled() else x


def activation_rows(x: Tensor, d_in: int) -> Tensor:
    """Activations [..., d_in] as rows [B, d_in]. Raises ValueError for another width, or if there are none."""
    if x.ndim == 0 or x.shape[-1] != d_in:
        width = x.shape[-1] if x.ndim else "none"
        raise ValueError(f"d_in must be the width of the activations, {width}; got d_in={d_in}, shape {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"activations must hold at least one token; got shape {tuple(x.shape)}")
    return differentiable(x).reshape(-1, d_in)


def pre_bias(sae: Any) -> Tensor | None:
    """What the encoder takes off its input."""
    return sae.b_dec if sae.cfg.apply_b_dec_to_input else None


def has_hooks(hook: nn.Module) -> bool:
    return bool(hook._forward_hooks or hook._backward_hooks or hook._backward_pre_hooks or hook._forward_pre_hooks)


def reconstruction_error(sae: Any, sae_out: Tensor, x: Tensor) -> Tensor:
    """mean_B ||x - sae_out||^2 by SAELens's loss function, in the wider of the two dtypes.

    Which is what torch does with two dtypes; but not all its versions can differentiate that.
    """
    dtype = torch.promote_types(sae_out.dtype, x.dtype)
    return sae.mse_loss_fn(sae_out.to(dtype), x.to(dtype)).sum(dim=-1).mean()


def finish_decoding(sae: Any, out: Tensor) -> Tensor:
    """What follows ``f @ W_dec + b_dec`` in every SAE of SAELens."""
    return sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(sae.hook_sae_recons(out)), sae.d_head)
