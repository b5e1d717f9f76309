"""Steps skipped because loss or gradients were non-finite: counted on the device, reported, and given up on."""

import torch
from torch import Tensor, nn

from sae_lens_switch.common.printable import logger
from sae_lens_switch.common.types import AnyTrainingSAE


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient.

    Args:
        what: What happened.
        saved: Where the last good weights are.
    """

    def __init__(self, what: str, saved: str = "") -> None:
        super().__init__(f"{what}. {saved}" if saved else what)
        self.what = what


class SkippedSteps:
    """How many steps were skipped, in a row and in all: ``counts``, which the optimiser keeps."""

    def __init__(self, most_in_a_row: int, device: str) -> None:
        self.most_in_a_row = most_in_a_row
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # in a row, and in all
        self.n_reported = 0
        self.before_window = torch.zeros_like(self.counts[1])  # in all, before SAELens's window of firings began

    def begin_window(self) -> None:
        """Waits for nothing."""
        self.before_window = self.counts[1].clone()

    @property
    def in_window(self) -> Tensor:
        return self.counts[1] - self.before_window

    @property
    def total(self) -> int:
        """Waits for the device."""
        return int(self.counts[1])

    def report(self, sae: AnyTrainingSAE, x_BD: Tensor | None, step: int) -> int | None:
        """Log what was skipped since the last report, given a batch also why; return how many in a row if too many."""
        in_a_row, total = self.counts.tolist()
        if total > self.n_reported:
            self.n_reported = total
            reason = f" ({_why_not_finite(sae, x_BD)})" if in_a_row and x_BD is not None else ""
            logger.warning(
                f"step {step}: {total} steps skipped so far, {in_a_row} in a row, because loss or gradient were not "
                f"finite{reason}"
            )
        return in_a_row if in_a_row >= self.most_in_a_row else None

    def restore(self, counts: Tensor, n_reported: int, before_window: Tensor | None) -> None:
        """Of a checkpoint; earlier versions kept no ``before_window``."""
        self.counts.copy_(counts)
        self.n_reported = n_reported
        self.begin_window()
        if before_window is not None:
            self.before_window.copy_(before_window)
        if self.counts[0] >= self.most_in_a_row:  # of a run that stopped because of them
            self.counts[0] = 0


def non_finite_parameters(sae: nn.Module) -> list[str]:
    """Names; by the parameters' sums first, which take no memory."""
    return [
        name
        for name, p in sae.named_parameters()
        if not torch.isfinite(p.detach().sum(dtype=torch.promote_types(p.dtype, torch.float32)))
        and not torch.isfinite(p).all()
    ]


def _why_not_finite(sae: AnyTrainingSAE, x_BD: Tensor) -> str:
    if bad := int((~torch.isfinite(x_BD)).sum()):
        return f"{bad} activations are not finite"
    normalized = sae.run_time_activation_norm_fn_in(x_BD)
    if bad := int((~torch.isfinite(normalized)).any(dim=-1).sum()):
        return f"{bad} activations are not finite once normalised: {sae.cfg.normalize_activations!r}"
    largest = float(x_BD.abs().max())
    return f"the activations are finite, the largest {largest:.3g}: is that their size, or lr too high?"
