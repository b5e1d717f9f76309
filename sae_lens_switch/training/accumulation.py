"""Gradient accumulation: a batch computed in parts, one after the other, in the memory of one part."""

from collections.abc import Sequence
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepOutput
from sae_lens_switch_kernels import RowGrads
from torch import Tensor

from sae_lens_switch.saes.router import RoutingStatistics
from sae_lens_switch.saes.sparse_codes import SparseCodes
from sae_lens_switch.saes.step import SparseStepOutput


def release(output: TrainStepOutput) -> None:
    """Drop the tensors of a part with dense latents, as wide as the dictionary, that ``merged`` does not read."""
    if not isinstance(output, SparseStepOutput):
        output.feature_acts = output.hidden_pre = output.sae_out = output.sae_in.new_empty(0)


def without_graph(output: TrainStepOutput) -> TrainStepOutput:
    """Detach from autograd's graph, no part of which may outlive a captured step."""
    output.loss, output.sae_out = output.loss.detach(), output.sae_out.detach()
    output.losses = {name: loss.detach() for name, loss in output.losses.items()}
    return output


def merged(outputs: Sequence[TrainStepOutput], shares: Sequence[float]) -> TrainStepOutput:
    """The output of the whole batch, from those of its parts.

    Losses are the batch's means. Of an SAE with dense latents the rest is the last part's: together they would be as
    large as if nothing had been split.

    Args:
        outputs: Of the parts.
        shares: What each part's means count for.
    """
    if len(outputs) == 1:
        return outputs[0]
    last = outputs[-1]

    def mean(values: Sequence[Any]) -> Tensor:
        return sum(
            (s * torch.as_tensor(v).detach() for s, v in zip(shares, values, strict=True)), start=torch.zeros(())
        )

    losses = {name: mean([output.losses[name] for output in outputs]) for name in last.losses}
    loss = mean([output.loss for output in outputs])
    sparse = [output for output in outputs if isinstance(output, SparseStepOutput)]
    if len(sparse) < len(outputs):
        last.loss, last.losses = loss, losses
        return last
    routings = [output.routing for output in sparse if output.routing is not None]
    routing, metrics = None, last.metrics
    if routings:
        routing = RoutingStatistics(
            mean([r.load_E for r in routings]),
            torch.cat([r.gates_B for r in routings]),
            routings[-1].layout,
            routings[-1].dead_latents_F,
        )
        balance = mean([output.metrics["load_balance"] for output in outputs])
        metrics = {**last.metrics, "load_balance": balance, **routing.metrics()}
    return SparseStepOutput(
        codes=SparseCodes.cat([output.codes for output in sparse]),
        routing=routing,
        sae_in=torch.cat([output.sae_in for output in outputs]),
        sae_out=torch.cat([output.sae_out.detach() for output in outputs]),
        hidden_pre=torch.cat([output.hidden_pre for output in outputs]),
        loss=loss,
        losses=losses,
        metrics=metrics,
    )


class Shares:
    """What the losses of parts are differentiated with: their shares of the batch, on their device, each made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

    def of(self, loss: Tensor, share: float) -> Tensor:
        key = share, loss.dtype, loss.device
        if key not in self._made:
            self._made[key] = torch.full_like(loss.detach(), share)
        return self._made[key]


class RowGradsSum:
    """The sum of what several backward passes leave in one RowGrads; autograd sums the other gradients itself."""

    def __init__(self, row_grads: RowGrads | None) -> None:
        self._row_grads = row_grads
        self._sum: RowGrads | None = None

    def take(self) -> None:
        """After a backward pass."""
        if self._row_grads is not None:
            taken = RowGrads(**vars(self._row_grads))
            self._row_grads.clear()
            self._sum = taken if self._sum is None else self._sum.plus(taken)

    def put_back(self) -> None:
        """Before the optimiser's step."""
        if self._row_grads is not None and self._sum is not None:
            vars(self._row_grads).update(vars(self._sum))
