"""What an SAE does on activations: density, error, strongest examples and routing, in one pass over a stream.

No tensor of all tokens x d_sae is ever made.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor

from sae_lens_switch.analysis.accumulators import (
    Examples,
    Moments,
    Routes,
    Routing,
    StrongestExamples,
    TypicalTokens,
    typical_tokens,
)
from sae_lens_switch.analysis.label_counts import CountingLabels, LabelCounts
from sae_lens_switch.saes.config import layout_of
from sae_lens_switch.saes.expert_layout import ExpertLayout
from sae_lens_switch.saes.router import Assignment
from sae_lens_switch.saes.sparse_codes import SparseCodes
from sae_lens_switch.saes.sparse_sae import SparseSAE
from sae_lens_switch.saes.switch_sae import SwitchBase
from sae_lens_switch.saes.transcoder_fields import refuse_transcoders

# Entries of a dense [tokens, F] piece, for SAEs without sparse codes.
_DENSE_AT_ONCE = 2**24


@dataclass(frozen=True)
class Activity:
    """What an SAE did on ``n_tokens`` tokens. Tensors are on the CPU.

    Attributes:
        n_tokens: Number of tokens observed.
        n_experts: Number of experts; 1 for an SAE without a router. Shared ones are not among them.
        fired_F: Number of tokens on which each latent was active, int64.
        sum_F: Sum of each latent's activations, float64.
        mse: Mean over tokens of ||x - x_hat||^2.
        variance: Mean over tokens of ||x - mean x||^2.
        outlier: Share of the variance due to the single longest activation.
        examples: The strongest contexts per latent.
        routing: Where the tokens went; None without a router.
        typical_tokens: The most informative tokens per expert; None without a router or token ids.
        token_counts: How often each token id was routed to each expert; None without a router or token ids.
        position_counts: The same of positions in the context; None without a router or contexts.
        n_shared: Number of shared latents, the first ones.
    """

    n_tokens: int
    n_experts: int
    fired_F: Tensor
    sum_F: Tensor
    mse: float
    variance: float
    outlier: float
    examples: Examples
    routing: Routing | None
    typical_tokens: TypicalTokens | None
    token_counts: LabelCounts | None = None
    position_counts: LabelCounts | None = None
    n_shared: int = 0

    @property
    def layout(self) -> ExpertLayout:
        return ExpertLayout(len(self.fired_F), self.n_experts, self.n_shared)

    @property
    def density_F(self) -> Tensor:
        """Share of the tokens on which each latent is active."""
        return self.fired_F / self.n_tokens

    @property
    def mean_F(self) -> Tensor:
        """Mean activation of each latent where it is active."""
        return self.sum_F / self.fired_F.clamp(min=1)

    @property
    def dead_E(self) -> Tensor:
        """Number of latents per expert that never fired; shared ones are not counted."""
        return self.layout.by_expert(self.fired_F == 0).sum(1)

    @property
    def l0(self) -> float:
        """Mean number of active latents per token."""
        return int(self.fired_F.sum()) / self.n_tokens

    @property
    def explained_variance(self) -> float:
        """1 - mse / variance."""
        return 1 - self.mse / self.variance if self.variance > 0 else float("nan")


@torch.no_grad()
def observe(
    sae: SAE,
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    *,
    n_examples: int = 8,
    n_typical_tokens: int = 20,
    ignore_tokens: Iterable[int] = (),
) -> Activity:
    """Measure load, density, dead latents, error, strongest examples and typical tokens in one pass.

    Args:
        sae: Any SAE of SAELens. Routing and typical tokens are measured if it has a router.
        batches: Activations [contexts, positions, D], or [tokens, D] where each token is its own context; or pairs of
            these and token ids [contexts, positions] or [tokens].
        n_examples: Number of contexts to keep per latent.
        n_typical_tokens: Number of tokens to list per expert.
        ignore_tokens: Token ids whose activations are skipped.

    Raises:
        ValueError: For activations of another width, ids of another shape, or no activations at all; for a transcoder,
            whose error is that of other activations.
    """
    refuse_transcoders("sae", sae.cfg)
    for name, n in (("n_examples", n_examples), ("n_typical_tokens", n_typical_tokens)):
        if n < 0:
            raise ValueError(f"{name} must be at least 0; got {n}")
    layout = layout_of(sae.cfg)
    F, E = layout.d_sae, layout.n_experts
    ignored = torch.tensor(sorted(ignore_tokens), dtype=torch.int64)
    fired_F, sum_F = torch.zeros(F, dtype=torch.int64), torch.zeros(F, dtype=torch.float64)
    moments = Moments(sae.cfg.d_in)
    examples, routes, seen = StrongestExamples(F, n_examples), Routes(E), CountingLabels()
    places = CountingLabels()
    n_contexts = 0
    for batch in batches:
        x, ids = batch if isinstance(batch, tuple) else (batch, None)
        _check_batch(sae, x, ids, needs_ids=len(ignored) > 0)
        positions = x.shape[1] if x.ndim > 2 else 1
        x_BD = x.reshape(-1, x.shape[-1]).to(sae.device)
        place_B = torch.arange(len(x_BD))  # position in the batch of each row of x_BD
        ids_B = None if ids is None else ids.flatten().cpu()
        if ids_B is not None and len(ignored):
            place_B = (~torch.isin(ids_B, ignored)).nonzero().flatten()
            ids_B, x_BD = ids_B[place_B], x_BD[place_B.to(x_BD.device)]
        for piece in encoded_pieces(sae, x_BD):
            moments.add(piece.x_BD, piece.x_hat_BD)
            fired_F += torch.bincount(piece.latent, minlength=F)
            sum_F.index_add_(0, piece.latent, piece.value.double())
            place = place_B[piece.start + piece.token]
            examples.add(piece.latent, piece.value, n_contexts + place // positions, place % positions)
            if piece.assignment is not None:
                routes.add(piece.assignment)
                rows, experts_BA = slice(piece.start, piece.start + len(piece.x_BD)), piece.assignment.experts_BA
                if ids_B is not None:
                    seen.add(experts_BA, ids_B[rows])
                if x.ndim > 2:
                    places.add(experts_BA, place_B[rows] % positions)
        n_contexts += len(x)
    if moments.n == 0:
        raise ValueError("there must be activations to observe; got none")
    of_tokens, of_places = (found.result(E) if found.counts.numel() else None for found in (seen, places))
    return Activity(
        n_tokens=moments.n,
        n_experts=E,
        fired_F=fired_F,
        sum_F=sum_F,
        mse=moments.mse,
        variance=moments.variance,
        outlier=moments.outlier,
        examples=examples.result(),
        routing=routes.result() if routes.n else None,
        typical_tokens=typical_tokens(of_tokens, n_typical_tokens) if of_tokens is not None else None,
        token_counts=of_tokens,
        position_counts=of_places,
        n_shared=layout.shared_width,
    )


@torch.no_grad()
def activations_of(sae: SAE, x: Tensor, latents: Sequence[int]) -> Tensor:
    """Activations of selected latents on activations [..., D]: [..., number of latents], on the CPU."""
    x_BD = x.reshape(-1, x.shape[-1]).to(sae.device)
    column_F = torch.full((sae.cfg.d_sae,), -1)
    column_F[list(latents)] = torch.arange(len(latents))
    out = torch.zeros(len(x_BD), len(latents), dtype=sae.dtype)
    for piece in encoded_pieces(sae, x_BD):
        wanted = column_F[piece.latent] >= 0
        out[piece.start + piece.token[wanted], column_F[piece.latent[wanted]]] = piece.value[wanted]
    return out.view(*x.shape[:-1], len(latents))


def encode(sae: SAE, x: Tensor) -> SparseCodes | Tensor:
    """Sparse codes if the SAE has them, dense latents otherwise; ``sae.decode`` takes either."""
    if isinstance(sae, SparseSAE):
        return sae.encode_sparse(x)
    return sae.encode(x)


def reconstruct(sae: SAE, x: Tensor) -> Tensor:
    """``sae.decode(sae.encode(x))`` of activations [..., D], without dense latents of all tokens at once."""
    x_BD = x.reshape(-1, x.shape[-1])
    parts = [sae.decode(encode(sae, part)) for part in x_BD.split(_rows_at_once(sae, len(x_BD)))]  # type: ignore[arg-type]
    return torch.cat(parts).view_as(x)


def _rows_at_once(sae: SAE, n: int) -> int:
    return max(1, n if isinstance(sae, SparseSAE) else _DENSE_AT_ONCE // sae.cfg.d_sae)


def _check_batch(sae: SAE, x: Tensor, ids: Tensor | None, *, needs_ids: bool) -> None:
    if x.ndim not in (2, 3) or x.shape[-1] != sae.cfg.d_in:
        raise ValueError(
            f"activations must be [tokens, d_in] or [contexts, positions, d_in], d_in={sae.cfg.d_in}; "
            f"got shape {tuple(x.shape)}"
        )
    if ids is not None and ids.shape != x.shape[:-1]:
        raise ValueError(f"token ids must have shape {tuple(x.shape[:-1])}; got {tuple(ids.shape)}")
    if needs_ids and ids is None:
        raise ValueError("ignore_tokens needs token ids with every batch of activations")


class Piece(NamedTuple):
    """Consecutive rows of a batch, encoded. What fired is listed as token, latent, value; these are on the CPU."""

    start: int
    x_BD: Tensor
    token: Tensor
    latent: Tensor
    value: Tensor
    assignment: Assignment | None
    x_hat_BD: Tensor


def encoded_pieces(sae: SAE, x_BD: Tensor) -> Iterator[Piece]:
    """Encode and decode a batch, in pieces if only dense latents are to be had."""
    rows = _rows_at_once(sae, len(x_BD))
    for start in range(0, len(x_BD), rows):
        x = x_BD[start : start + rows]
        assignment = None
        if isinstance(sae, SwitchBase):
            acts, assignment = sae.encode_routed(x)
        else:
            acts = encode(sae, x)
        if isinstance(acts, SparseCodes):
            token, latent, value = acts.active()
        else:
            token, latent = (acts != 0).nonzero(as_tuple=True)
            value = acts[token, latent]
        x_hat_BD = sae.decode(acts)  # type: ignore[arg-type]  # of codes too, where encode gives them
        yield Piece(start, x, token.cpu(), latent.cpu(), value.cpu(), assignment, x_hat_BD)
