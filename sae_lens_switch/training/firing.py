"""When each latent last fired, counted without a pass over all latents in each step of a sparse SAE."""

import torch
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from sae_lens_switch.saes.step import SparseStepOutput

# Which latents a step's counts are of; None: of all, in order.
Firings = tuple[Tensor | None, Tensor]


class FiringCounter:
    """Forward passes, and the pass in which each latent last fired, on the SAE's device."""

    def __init__(self, d_sae: int, device: str) -> None:
        self.n_passes = 0
        self.last_fired_F = torch.zeros(d_sae, dtype=torch.int32, device=device)
        self._pass = torch.zeros((), dtype=torch.int32, device=device)  # n_passes, where a captured step sees it
        self._never = torch.full((), torch.iinfo(torch.int32).min, dtype=torch.int32, device=device)

    def begin_pass(self) -> None:
        self.n_passes += 1
        self._pass.fill_(self.n_passes)

    @property
    def passes_since_fired_F(self) -> Tensor:
        """float32, as SAELens keeps it."""
        return (self.n_passes - self.last_fired_F).to(torch.float32)

    @passes_since_fired_F.setter
    def passes_since_fired_F(self, value: Tensor) -> None:
        self.last_fired_F.copy_(self.n_passes - value)

    def dead_F(self, window: int) -> Tensor:
        """Latents that have not fired for more than ``window`` passes."""
        return self.n_passes - self.last_fired_F > window

    def count(self, firings: list[Firings], is_finite: Tensor, total_F: Tensor) -> None:
        """Add a step's firings to ``total_F``; none of a non-finite step's. Waits for nothing."""
        for indices, counts in firings:
            counts = counts & is_finite if counts.dtype == torch.bool else counts * is_finite
            now = torch.where(counts if counts.dtype == torch.bool else counts > 0, self._pass, self._never)
            if indices is None:
                torch.maximum(self.last_fired_F, now, out=self.last_fired_F)
                total_F += counts
            else:
                self.last_fired_F.scatter_reduce_(0, indices, now, "amax")
                total_F.scatter_add_(0, indices, counts.to(total_F.dtype))


def firings_of(output: TrainStepOutput) -> Firings:
    """Which latents fired, and how often: one entry per code, or per latent of a dense SAE."""
    if isinstance(output, SparseStepOutput):
        return output.codes.indices.flatten(), output.codes.values.flatten() > 0
    acts = output.feature_acts
    counts_F = (acts.bool() if acts.is_sparse else acts.ne(0)).to(torch.float32).sum(0)
    return None, counts_F.to_dense() if counts_F.is_sparse else counts_F
