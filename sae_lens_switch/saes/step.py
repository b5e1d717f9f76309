"""What goes into a training step of a sparse SAE, and what comes out of it."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens_switch_kernels import RowGrads
from torch import Tensor, nn

from sae_lens_switch.saes.router import RoutingStatistics
from sae_lens_switch.saes.sparse_codes import SparseCodes


class LatentParameters(NamedTuple):
    """The parameters with a row per latent: W_enc [D, F], W_dec [F, D] and, where there is one, b_enc [F]."""

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter | None


class DeadLatents(NamedTuple):
    """Indices of the dead latents [N], or a mask [F], and how many of them reconstruct each token's residual (AuxK).

    ``counts`` says how many each level of a Matryoshka SAE has, where each reconstructs a residual of its own.
    """

    indices_N: Tensor | None
    aux_k: int
    counts: tuple[int, ...] = ()


@dataclass
class SparseStepInput(TrainStepInput):
    """SAELens's input of a step, with what SparseSAETrainer asks of it.

    Args:
        row_grads: Where the backward pass stores what the optimiser wants of it beside, or in place of, ``.grad``.
        refuse_non_finite: Whether the SAE raises for a non-finite loss, which waits for the device. Our trainer skips
            such steps itself.
        is_captured: Whether the step is to be captured in a CUDA graph, so that the host cannot know how many latents
            are dead.
    """

    row_grads: RowGrads | None = None
    refuse_non_finite: bool = True
    is_captured: bool = False


class SparseStepOutput(TrainStepOutput):
    """A step's output with its codes, detached. ``feature_acts``, COO as SAELens expects it, is made lazily."""

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


def differentiable(x: Tensor) -> Tensor:
    """x, or a copy of one made under inference_mode, which a backward pass may not keep."""
    return x.clone() if x.is_inference() and torch.is_grad_enabled() else x


def differentiable_codes(codes: SparseCodes) -> SparseCodes:
    """The codes, or copies of those of their tensors that were made under inference_mode."""
    offsets = None if codes.offsets is None else differentiable(codes.offsets)
    values, indices = differentiable(codes.values), differentiable(codes.indices)
    return replace(codes, values=values, indices=indices, offsets=offsets)


def activation_rows(x: Tensor, d_in: int, name: str = "d_in") -> Tensor:
    """Activations [..., d_in] as rows [B, d_in]. Raises ValueError for another width, or if there are none."""
    if x.ndim == 0 or x.shape[-1] != d_in:
        width = x.shape[-1] if x.ndim else "none"
        raise ValueError(
            f"{name} must be the width of the activations, {width}; got {name}={d_in}, shape {tuple(x.shape)}"
        )
    if x.numel() == 0:
        raise ValueError(f"activations must hold at least one token; got shape {tuple(x.shape)}")
    return differentiable(x).reshape(-1, d_in)


def why_not_finite(x_BD: Tensor, step: int) -> str:
    """What to say of a training step whose loss is non-finite."""
    bad = ~torch.isfinite(x_BD).all(dim=-1)
    if bad.any():
        nan, inf = int(x_BD.isnan().sum()), int(x_BD.isinf().sum())
        first = int(bad.nonzero()[0, 0])
        return (
            f"activations must be finite; training step {step} got {nan} NaN and {inf} infinite values in "
            f"{int(bad.sum())} of {len(x_BD)} tokens, the first in row {first}. "
            "The weights are those of the step before."
        )
    return (
        f"the loss of training step {step} is not finite, though the activations are: the learning rate may be too "
        "high. The weights are those of the step before."
    )
