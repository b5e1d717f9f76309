"""When each latent last fired, counted without a pass over all latents in each step of a sparse SAE."""

import torch
from sae_lens.saes.sae import TrainStepOutput
from sae_lens_switch_kernels import count_codes
from torch import Tensor

from sae_lens_switch.saes.sparse_codes import SparseCodes
from sae_lens_switch.saes.step import SparseStepOutput

# A step's codes; of an SAE without any, how often each latent fired.
Firings = SparseCodes | Tensor


class FiringCounter:
    """Forward passes, how often each latent fired, and in which pass it last did, on the SAE's device."""

    def __init__(self, d_sae: int, device: str) -> None:
        self.n_passes = 0
        self.last_fired_F = torch.zeros(d_sae, dtype=torch.int32, device=device)
        self.counts_F = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._pass = torch.zeros((), dtype=torch.int32, device=device)  # n_passes, where a captured step sees it
        self._is_captured = False

    def begin_pass(self, is_captured: bool = False) -> None:
        self.n_passes += 1
        self._is_captured = is_captured
        if is_captured:
            self._pass.fill_(self.n_passes)

    @property
    def passes_since_fired_F(self) -> Tensor:
        """float32, as SAELens keeps it."""
        return (self.n_passes - self.last_fired_F).to(torch.float32)

    @passes_since_fired_F.setter
    def passes_since_fired_F(self, value: Tensor) -> None:
        self.last_fired_F.copy_(self.n_passes - value)

    def dead_F(self, window: int, is_captured: bool = False) -> Tensor:
        """Latents that have not fired for more than ``window`` passes; asked in a captured pass, as of before it."""
        return (self._pass - 1 if is_captured else self.n_passes) - self.last_fired_F > window

    @property
    def frequencies_F(self) -> Tensor:
        """How often each latent fired, float32, as SAELens keeps it."""
        return self.counts_F.to(torch.float32)

    @frequencies_F.setter
    def frequencies_F(self, value: Tensor) -> None:
        self.counts_F.copy_(value)

    def count(self, firings: list[Firings], is_finite: Tensor) -> None:
        """Add a step's firings; none of a non-finite step's. Waits for nothing."""
        number = self._pass if self._is_captured else self.n_passes
        for fired in firings:
            if isinstance(fired, SparseCodes):
                codes = fired.values, fired.indices
                count_codes(*codes, is_finite, number, self.last_fired_F, self.counts_F)
            else:
                number_now = torch.zeros_like(self.last_fired_F) + number
                self.last_fired_F.copy_(torch.where((fired > 0) & is_finite, number_now, self.last_fired_F))
                self.counts_F += (fired * is_finite).long()


def firings_of(output: TrainStepOutput) -> Firings:
    """Which latents fired, and how often."""
    if isinstance(output, SparseStepOutput):
        return output.codes
    acts = output.feature_acts
    counts_F = (acts.bool() if acts.is_sparse else acts.ne(0)).to(torch.float32).sum(0)
    return counts_F.to_dense() if counts_F.is_sparse else counts_F
