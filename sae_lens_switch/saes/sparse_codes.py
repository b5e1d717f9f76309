"""SparseCodes, which pass between encode and decode in place of a dense [..., F] tensor."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseCodes:
    """The active latents of each token: ``f[..., indices[..., j]] = values[..., j]``, zero elsewhere.

    Attributes:
        values: [..., K], gate included, zero where fewer than K latents are active.
        indices: [..., K], int64, distinct within a token, in no particular order.
        d_sae: F, the width of the dense form.
    """

    values: Tensor
    indices: Tensor
    d_sae: int

    def to_dense(self) -> Tensor:
        """[..., F], a fresh tensor; differentiable in values."""
        zeros = self.values.new_zeros(*self.values.shape[:-1], self.d_sae)
        return zeros.scatter(-1, self.indices, self.values)

    def to_coo(self) -> Tensor:
        """A coalesced sparse COO tensor of shape [..., F]; differentiable in values."""
        indices, order = self.indices.sort(dim=-1)
        lead = self.values.shape[:-1]
        tokens = torch.arange(lead.numel(), device=indices.device).repeat_interleave(indices.shape[-1])
        return torch.sparse_coo_tensor(
            torch.stack([*torch.unravel_index(tokens, lead), indices.flatten()]),
            self.values.gather(-1, order).flatten(),
            (*lead, self.d_sae),
            is_coalesced=True,
            check_invariants=False,
        )

    def view(self, *lead: int) -> "SparseCodes":
        """The same tokens, laid out as [*lead, K]."""
        K = self.values.shape[-1]
        return SparseCodes(self.values.view(*lead, K), self.indices.view(*lead, K), self.d_sae)

    def detach(self) -> "SparseCodes":
        return SparseCodes(self.values.detach(), self.indices, self.d_sae)
