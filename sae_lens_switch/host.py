"""Small things that our SAEs have in common as guests of SAELens."""

from typing import Any

from torch import Tensor, nn


def normalized_input(sae: Any, x: Tensor) -> Tensor:
    """x in the SAE's dtype, hook_z flattened, normalised; b_dec not yet taken off.

    Once per encode: the hook fires and run-time normalisation remembers its statistics for decode.
    """
    return sae.run_time_activation_norm_fn_in(sae.hook_sae_input(sae.reshape_fn_in(x.to(sae.dtype))))


def pre_bias(sae: Any) -> Tensor | None:
    """What the encoder takes off its input."""
    return sae.b_dec if sae.cfg.apply_b_dec_to_input else None


def has_hooks(hook: nn.Module) -> bool:
    return bool(hook._forward_hooks or hook._backward_hooks or hook._backward_pre_hooks or hook._forward_pre_hooks)


def finish_decoding(sae: Any, out: Tensor) -> Tensor:
    """What follows ``f @ W_dec + b_dec`` in every SAE of SAELens."""
    return sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(sae.hook_sae_recons(out)), sae.d_head)
