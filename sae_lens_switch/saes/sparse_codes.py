"""SparseCodes, which pass between encode and decode in place of a dense [..., F] tensor."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from sae_lens_switch_kernels import sparse_decode
from torch import Tensor


@dataclass(frozen=True)
class SparseCodes:
    """The active latents of each token: ``f[..., indices[..., j]] = values[..., j]``, zero elsewhere.

    Tokens with differing numbers of latents (BatchTopK) have theirs one after the other, as in a CSR matrix.

    Attributes:
        values: [..., K], gate included, zero where fewer than K latents are active; with offsets [S].
        indices: [..., K], int64, distinct within a token, in no particular order; with offsets [S].
        d_sae: F, the width of the dense form.
        offsets: [B + 1], int64: values and indices of token b are those from offsets[b] to offsets[b + 1]. None: every
            token has K.
        lead: With offsets, the shape that the tokens are laid out in, of B elements.
    """

    values: Tensor
    indices: Tensor
    d_sae: int
    offsets: Tensor | None = None
    lead: tuple[int, ...] = ()

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of the tokens."""
        return tuple(self.values.shape[:-1]) if self.offsets is None else self.lead

    @property
    def tokens(self) -> Tensor:
        """[S], which token each value belongs to, counted over all leading dimensions."""
        n = self.values.numel()
        if self.offsets is None:
            return torch.arange(n, device=self.indices.device) // self.values.shape[-1]
        rows = torch.arange(len(self.offsets) - 1, device=self.offsets.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=n)

    def to_dense(self) -> Tensor:
        """[..., F], a fresh tensor; differentiable in values."""
        if self.offsets is None:
            zeros = self.values.new_zeros(*self.batch_shape, self.d_sae)
            return zeros.scatter(-1, self.indices, self.values)
        zeros = self.values.new_zeros((len(self.offsets) - 1) * self.d_sae)
        places_S = self.tokens * self.d_sae + self.indices
        return zeros.scatter(0, places_S, self.values).view(*self.lead, self.d_sae)

    def to_coo(self) -> Tensor:
        """A coalesced sparse COO tensor of shape [..., F]; differentiable in values."""
        if self.offsets is None:
            latents, order = self.indices.sort(dim=-1)
            values = self.values.gather(-1, order)
        else:
            places_S, order_S = (self.tokens * self.d_sae + self.indices).sort()
            latents, values = places_S % self.d_sae, self.values[order_S]
        return torch.sparse_coo_tensor(
            torch.stack([*torch.unravel_index(self.tokens, self.batch_shape), latents.flatten()]),
            values.flatten(),
            (*self.batch_shape, self.d_sae),
            is_coalesced=True,
            check_invariants=False,
        )

    def active(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of all that is not 0: token, latent and value. Waits for the device."""
        is_active = self.values.flatten() != 0
        return self.tokens[is_active], self.indices.flatten()[is_active], self.values.flatten()[is_active]

    def matmul(self, W_FD: Tensor) -> Tensor:
        """[..., D], what ``to_dense() @ W`` is; differentiable in values and W."""
        values, indices = self.values, self.indices
        if self.offsets is None:
            values, indices = (t.reshape(-1, t.shape[-1]) for t in (values, indices))
        return sparse_decode(values, indices, W_FD, self.offsets).view(*self.batch_shape, W_FD.shape[-1])

    def view(self, *lead: int) -> "SparseCodes":
        """The same tokens, laid out as [*lead, K]."""
        if self.offsets is not None:
            return replace(self, lead=lead)
        K = self.values.shape[-1]
        return replace(self, values=self.values.view(*lead, K), indices=self.indices.view(*lead, K))

    def detach(self) -> "SparseCodes":
        return replace(self, values=self.values.detach())

    @staticmethod
    def cat(parts: "Sequence[SparseCodes]") -> "SparseCodes":
        """The tokens of several, one after the other; of one leading dimension."""
        first = parts[0]
        values, indices = (torch.cat(t) for t in ([p.values for p in parts], [p.indices for p in parts]))
        if first.offsets is None:
            return replace(first, values=values, indices=indices)
        offsets, n_codes = [first.offsets[:1]], 0
        for part in parts:
            assert part.offsets is not None
            offsets.append(part.offsets[1:] + n_codes)
            n_codes += len(part.values)
        lead = (sum(part.batch_shape[0] for part in parts),)
        return replace(first, values=values, indices=indices, offsets=torch.cat(offsets), lead=lead)
