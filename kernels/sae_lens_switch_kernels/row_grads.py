"""Weight gradients of the active latents alone: where they are left for an optimiser, and their sums."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_lens_switch_kernels.backend import primitives


@dataclass
class RowGrads:
    """Where the backward pass of ``sparse_autoencode`` leaves gradients for an optimiser.

    Attributes:
        active_only: True: the weight gradients of the active latents are left here, and autograd gets none. False:
            autograd gets all gradients as usual, and only ``radial_R`` is left here, with all F rows.
        rows_R: The active latents, ascending and distinct; None until a backward pass has run.
        dW_enc_RD: Their rows of the encoder's gradient. Those of all other latents are zero.
        dW_dec_RD: Their rows of the decoder's gradient, likewise.
        d_bias_R: Their entries of the encoder bias's gradient, likewise.
        radial_R: <dW_dec[r], W_dec[r]>, the radial component that a unit-norm decoder's gradient must lose. It is a
            by-product of the gradient; None where products run in less than float32.
    """

    active_only: bool = True
    rows_R: Tensor | None = None
    dW_enc_RD: Tensor | None = None
    dW_dec_RD: Tensor | None = None
    d_bias_R: Tensor | None = None
    radial_R: Tensor | None = None

    def clear(self) -> None:
        self.rows_R = self.dW_enc_RD = self.dW_dec_RD = self.d_bias_R = self.radial_R = None

    def store(
        self, rows_R: Tensor | None, dW_enc_RD: Tensor, dW_dec_RD: Tensor, d_bias_R: Tensor, radial_R: Tensor | None
    ) -> None:
        """Keep what ``active_only`` asks for.

        Raises:
            RuntimeError: If an earlier backward pass is still held.
        """
        if self.rows_R is not None or self.radial_R is not None:
            raise RuntimeError("row_grads still holds an earlier backward pass: take a step, or clear() it")
        self.radial_R = radial_R
        if self.active_only:
            self.rows_R, self.dW_enc_RD, self.dW_dec_RD, self.d_bias_R = rows_R, dW_enc_RD, dW_dec_RD, d_bias_R

    def plus(self, other: "RowGrads") -> "RowGrads":
        """The sum of two backward passes, over the latents active in either."""
        if self.rows_R is None or other.rows_R is None:  # active_only=False: radial_R has F rows, or there is none
            mine, others = self.radial_R, other.radial_R
            return RowGrads(self.active_only, radial_R=None if mine is None or others is None else mine + others)
        rows_R = torch.cat([self.rows_R, other.rows_R]).unique()
        places = [torch.searchsorted(rows_R, rows) for rows in (self.rows_R, other.rows_R)]

        def total(mine: Tensor | None, others: Tensor | None) -> Tensor | None:
            if mine is None or others is None:
                return None
            total_R = mine.new_zeros(len(rows_R), *mine.shape[1:])
            for place, part in zip(places, (mine, others), strict=True):
                total_R[place] += part  # each row once: a sum of fixed order
            return total_R

        return RowGrads(self.active_only, rows_R, *map(total, self._per_row(), other._per_row()))

    def _per_row(self) -> tuple[Tensor | None, ...]:
        return self.dW_enc_RD, self.dW_dec_RD, self.d_bias_R, self.radial_R


def merge_rows(
    rows_R: Tensor | None, grads: tuple[Tensor, ...], more_R: Tensor | None, more: tuple[Tensor, ...]
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """The sum of two sets of rows, of which the second has all rows only if the first has; None: all rows."""
    if more_R is None:
        return None, tuple(g.add_(m) for g, m in zip(grads, more, strict=True))
    if rows_R is None:
        return None, tuple(g.index_add_(0, more_R, m) for g, m in zip(grads, more, strict=True))
    both_R, where = torch.cat([rows_R, more_R]).unique(return_inverse=True)
    # rows_R are distinct and most of the result, so they are copied; the others may repeat.
    merged = []
    for g, m in zip(grads, more, strict=True):
        sums = g.new_zeros(len(both_R), *g.shape[1:])
        sums[where[: len(rows_R)]] = g
        merged.append(sums.index_add_(0, where[len(rows_R) :], m))
    return both_R, tuple(merged)


def minus_weighted_sum(weights_R: Tensor, rows_R: Tensor | None, W_FD: Tensor) -> Tensor:
    """-sum_r weights[r] W[rows[r]], [D], without a copy of the rows; of some rows in parts, which run in parallel."""
    if rows_R is None:
        return torch.addmv(weights_R.new_empty(W_FD.shape[1]), W_FD.T, weights_R, beta=0, alpha=-1)
    parts = max(1, len(rows_R) // 256)
    # A GPU's kernel is compiled for whether parts are a multiple of 16: there they always are, however long.
    pad = -len(rows_R) % (parts if rows_R.device.type == "cpu" else 16 * parts)
    rows = torch.nn.functional.pad(rows_R, (0, pad)).view(parts, -1)
    weights = torch.nn.functional.pad(weights_R, (0, pad)).view(parts, -1)
    return -primitives(W_FD).sparse_decode(weights, rows, W_FD).sum(0)
