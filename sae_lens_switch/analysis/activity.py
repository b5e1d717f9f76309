"""What an SAE has learned: how its experts are used, where its router looks, and what it has learned twice.

Activations are streamed, and no tensor of all tokens x d_sae is made. N is the number of tokens in all.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_lens_switch.saes.router import Assignment
from sae_lens_switch.saes.sparse_codes import SparseCodes
from sae_lens_switch.saes.switch_sae import SwitchBase

GATE_BINS = 50
# Entries of a dense [tokens, F] piece, of SAEs that know no sparse codes.
_DENSE_AT_ONCE = 2**24
# expert * this + token id is one number for both.
_TOKEN_IDS = 2**32


@dataclass(frozen=True)
class Routing:
    """Where a router sent the tokens.

    tokens_E:       how many tokens each expert received, int64
    probability_E:  the router's mean probability of each expert
    entropy:        mean entropy of the router's probabilities of one token, in nats
    gate_mean:      mean probability of the chosen expert
    gate_counts:    how many gates fall in each of 50 equal bins of [0, 1]
    """

    tokens_E: Tensor
    probability_E: Tensor
    entropy: float
    gate_mean: float
    gate_counts: Tensor

    @property
    def load_E(self) -> Tensor:
        """Share of the tokens that each expert received; sums to 1."""
        return self.tokens_E / self.tokens_E.sum().clamp(min=1)


@dataclass(frozen=True)
class Examples:
    """Of each latent, the contexts in which it fires most strongly, strongest first; the earlier one at a tie.

    values, contexts, positions: [F, n]. The value, the number of the context in the stream, and the place in it where
    the latent is strongest; 0, -1, -1 where a latent fired in fewer contexts.
    """

    values: Tensor
    contexts: Tensor
    positions: Tensor


@dataclass(frozen=True)
class TypicalTokens:
    """Of each expert, the tokens that tell most about its being chosen, most telling first.

    Score: n_te log(n_te N / (n_t n_e)), a token's part of the mutual information of token and expert, times N. It asks
    for both: often in this expert, seldom in others. Only tokens more frequent here than by chance are listed.
    ids, counts, totals: [E, n]. The token; how often it came to this expert; how often it came at all. id -1: no more.
    """

    ids: Tensor
    counts: Tensor
    totals: Tensor


@dataclass(frozen=True)
class Activity:
    """What an SAE did on n_tokens tokens. Tensors are on the CPU.

    fired_F:   on how many tokens each latent was active, int64
    sum_F:     the sum of its activations, float64
    mse:       mean over tokens of ||x - x_hat||^2
    variance:  mean over tokens of ||x - mean x||^2
    outlier:   share of the variance that is the longest activation's alone
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
        """How many latents of each expert never fired."""
        return (self.fired_F == 0).view(self.n_experts, -1).sum(1)

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
    sae: Any,
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    *,
    n_examples: int = 8,
    n_typical_tokens: int = 20,
    ignore_tokens: Iterable[int] = (),
) -> Activity:
    """One pass over activations: load, density, dead latents, error, strongest examples, typical tokens.

    sae:            any SAE of SAELens; routing and typical tokens are of those with a router
    batches:        activations [contexts, positions, D] or [tokens, D], each token then being a context of its own;
                    or pairs of these and token ids [contexts, positions] or [tokens]
    ignore_tokens:  ids whose activations are left out
    Raises ValueError for activations of another width, ids of another shape, or no activations at all.
    """
    for name, n in (("n_examples", n_examples), ("n_typical_tokens", n_typical_tokens)):
        if n < 0:
            raise ValueError(f"{name} must be at least 0; got {n}")
    F, E = sae.cfg.d_sae, getattr(sae.cfg, "n_experts", 1)
    ignored = torch.tensor(sorted(ignore_tokens), dtype=torch.int64)
    fired_F, sum_F = torch.zeros(F, dtype=torch.int64), torch.zeros(F, dtype=torch.float64)
    moments = _Moments(sae.cfg.d_in)
    examples, routes, seen = _StrongestExamples(F, n_examples), _Routes(E), _TokensOfExperts()
    n_contexts = 0
    for batch in batches:
        x, ids = batch if isinstance(batch, tuple) else (batch, None)
        if x.ndim not in (2, 3) or x.shape[-1] != sae.cfg.d_in:
            raise ValueError(
                f"activations must be [tokens, d_in] or [contexts, positions, d_in], d_in={sae.cfg.d_in}; "
                f"got shape {tuple(x.shape)}"
            )
        if ids is not None and ids.shape != x.shape[:-1]:
            raise ValueError(f"token ids must have shape {tuple(x.shape[:-1])}; got {tuple(ids.shape)}")
        if len(ignored) and ids is None:
            raise ValueError("ignore_tokens needs token ids with every batch of activations")
        positions = x.shape[1] if x.ndim > 2 else 1
        x_BD = x.reshape(-1, x.shape[-1]).to(sae.device)
        place_B = torch.arange(len(x_BD))  # of each row of x_BD in the batch
        ids_B = None if ids is None else ids.flatten().cpu()
        if ids_B is not None and len(ignored):
            place_B = (~torch.isin(ids_B, ignored)).nonzero().flatten()
            ids_B, x_BD = ids_B[place_B], x_BD[place_B.to(x_BD.device)]
        for start, piece_BD, codes, assignment, x_hat_BD in _encoded(sae, x_BD):
            token, latent, value = codes
            moments.add(piece_BD, x_hat_BD)
            fired_F += torch.bincount(latent, minlength=F)
            sum_F.index_add_(0, latent, value.double())
            place = place_B[start + token]
            examples.add(latent, value, n_contexts + place // positions, place % positions)
            if assignment is not None:
                routes.add(assignment)
                if ids_B is not None:
                    experts_B = assignment.experts_BA.flatten().cpu()
                    seen.add(experts_B, ids_B[start : start + len(experts_B)])
        n_contexts += len(x)
    if moments.n == 0:
        raise ValueError("there must be activations to observe; got none")
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
        typical_tokens=seen.typical(E, n_typical_tokens) if seen.counts.numel() else None,
    )


@torch.no_grad()
def activations_of(sae: Any, x: Tensor, latents: Sequence[int]) -> Tensor:
    """What some latents do on activations [..., D]: [..., number of latents], on the CPU."""
    x_BD = x.reshape(-1, x.shape[-1]).to(sae.device)
    column_F = torch.full((sae.cfg.d_sae,), -1)
    column_F[list(latents)] = torch.arange(len(latents))
    out = torch.zeros(len(x_BD), len(latents), dtype=sae.dtype)
    for start, _, (token, latent, value), _, _ in _encoded(sae, x_BD):
        wanted = column_F[latent] >= 0
        out[start + token[wanted], column_F[latent[wanted]]] = value[wanted]
    return out.view(*x.shape[:-1], len(latents))


_Triples = tuple[Tensor, Tensor, Tensor]


def _encoded(sae: Any, x_BD: Tensor) -> Iterator[tuple[int, Tensor, _Triples, Assignment | None, Tensor]]:
    """In pieces: the first row, activations, what fired there (token, latent, value, on the CPU), routing, x_hat."""
    rows = len(x_BD) if hasattr(sae, "encode_sparse") else max(1, _DENSE_AT_ONCE // sae.cfg.d_sae)
    for start in range(0, len(x_BD), max(1, rows)):
        x = x_BD[start : start + rows]
        assignment = None
        if isinstance(sae, SwitchBase):
            acts, assignment = sae.encode_routed(x)
        else:
            acts = sae.encode_sparse(x) if hasattr(sae, "encode_sparse") else sae.encode(x)
        if isinstance(acts, SparseCodes):
            token, slot = (acts.values > 0).nonzero(as_tuple=True)
            triples = token, acts.indices[token, slot], acts.values[token, slot]
        else:
            token, latent = (acts > 0).nonzero(as_tuple=True)
            triples = token, latent, acts[token, latent]
        yield start, x, tuple(t.cpu() for t in triples), assignment, sae.decode(acts)  # type: ignore[misc]


class _Moments:
    """Squared error and variance, in float64."""

    def __init__(self, d_in: int) -> None:
        self.n, self.error, self.square = 0, 0.0, 0.0
        self.sum_D = torch.zeros(d_in, dtype=torch.float64)
        self.longest_D = torch.zeros(d_in, dtype=torch.float64)

    def add(self, x_BD: Tensor, x_hat_BD: Tensor) -> None:
        x_BD = x_BD.cpu().double()
        self.n += len(x_BD)
        self.error += float((x_BD - x_hat_BD.cpu().double()).square().sum())
        self.sum_D += x_BD.sum(0)
        square_B = x_BD.square().sum(1)
        self.square += float(square_B.sum())
        if square_B.max() > self.longest_D.square().sum():
            self.longest_D = x_BD[square_B.argmax()].clone()

    @property
    def mse(self) -> float:
        return self.error / self.n

    @property
    def variance(self) -> float:
        return max(0.0, self.square / self.n - float((self.sum_D / self.n).square().sum()))

    @property
    def outlier(self) -> float:
        total = self.n * self.variance
        return float((self.longest_D - self.sum_D / self.n).square().sum()) / total if total else 0.0


class _StrongestExamples:
    """Of each latent the n strongest contexts so far, in flat lists: latent, value, context, position."""

    def __init__(self, d_sae: int, n: int) -> None:
        self.n = n
        self.floor_F = torch.zeros(d_sae, dtype=torch.float64)  # a new candidate must be above
        self.kept: tuple[Tensor, ...] = ()

    def add(self, latent: Tensor, value: Tensor, context: Tensor, position: Tensor) -> None:
        if self.n == 0:
            return
        value = value.double()
        new = (value > self.floor_F[latent]).nonzero().flatten()
        if not len(new):
            return
        candidates = tuple(t[new] for t in (latent, value, context, position))
        if self.kept:
            candidates = tuple(torch.cat(pair) for pair in zip(self.kept, candidates, strict=True))
        latent, value, context, _ = candidates
        order = _order(latent, context, -value)
        order = order[_rank(latent[order], context[order]) == 0]  # the strongest place of each context
        order = order[_order(latent[order], -value[order], context[order])]
        rank = _rank(latent[order])
        order, rank = order[rank < self.n], rank[rank < self.n]
        self.kept = latent, value, *_ = tuple(t[order] for t in candidates)
        full = rank == self.n - 1
        self.floor_F[latent[full]] = value[full]

    def result(self) -> Examples:
        shape = len(self.floor_F), self.n
        values = torch.zeros(shape, dtype=torch.float64)
        contexts, positions = torch.full(shape, -1), torch.full(shape, -1)
        if self.kept:
            latent, value, context, position = self.kept
            rank = _rank(latent)
            values[latent, rank], contexts[latent, rank], positions[latent, rank] = value, context, position
        return Examples(values, contexts, positions)


def _order(*keys: Tensor) -> Tensor:
    """Lexicographic, the first key foremost; equal rows stay as they are."""
    order = torch.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order


def _rank(*groups: Tensor) -> Tensor:
    """0, 1, 2, ... within each run of equal rows."""
    index = torch.arange(len(groups[0]))
    starts = torch.ones(len(index), dtype=torch.bool)
    starts[1:] = torch.stack([group[1:] != group[:-1] for group in groups]).any(0)
    return index - torch.where(starts, index, 0).cummax(0).values


class _Routes:
    def __init__(self, n_experts: int) -> None:
        self.n, self.entropy, self.gates = 0, 0.0, 0.0
        self.tokens_E = torch.zeros(n_experts, dtype=torch.int64)
        self.probability_E = torch.zeros(n_experts, dtype=torch.float64)
        self.gate_counts = torch.zeros(GATE_BINS, dtype=torch.int64)

    def add(self, assignment: Assignment) -> None:
        probs_BE, gates_B = assignment.probs_BE.cpu().double(), assignment.gates_BA.cpu().double().flatten()
        self.n += len(probs_BE)
        self.tokens_E += torch.bincount(assignment.experts_BA.flatten().cpu(), minlength=len(self.tokens_E))
        self.probability_E += probs_BE.sum(0)
        self.entropy += float(torch.special.entr(probs_BE).sum())
        self.gates += float(gates_B.sum())
        bins = (gates_B * GATE_BINS).long().clamp(0, GATE_BINS - 1)
        self.gate_counts += torch.bincount(bins, minlength=GATE_BINS)

    def result(self) -> Routing:
        return Routing(
            self.tokens_E, self.probability_E / self.n, self.entropy / self.n, self.gates / self.n, self.gate_counts
        )


class _TokensOfExperts:
    """How often each token came to each expert; only pairs that occur take memory."""

    def __init__(self) -> None:
        self.keys, self.counts = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)

    def add(self, experts_B: Tensor, ids_B: Tensor) -> None:
        keys = torch.cat([self.keys, experts_B * _TOKEN_IDS + ids_B])
        counts = torch.cat([self.counts, torch.ones_like(experts_B)])
        self.keys, where = keys.unique(return_inverse=True)
        self.counts = torch.zeros_like(self.keys).index_add_(0, where, counts)

    def typical(self, n_experts: int, n: int) -> TypicalTokens:
        expert, token = self.keys // _TOKEN_IDS, self.keys % _TOKEN_IDS
        total_E = torch.zeros(n_experts, dtype=torch.int64).index_add_(0, expert, self.counts)
        _, where = token.unique(return_inverse=True)
        total = torch.zeros(len(token), dtype=torch.int64).index_add_(0, where, self.counts)[where]
        chance = total.double() * total_E[expert] / self.counts.sum()
        score = self.counts * (self.counts / chance).log()
        ids, counts, totals = (torch.full((n_experts, n), fill) for fill in (-1, 0, 0))
        for e in range(n_experts):
            rows = ((expert == e) & (score > 0)).nonzero().flatten()
            rows = rows[score[rows].argsort(descending=True, stable=True)][:n]
            for listed, found in ((ids, token), (counts, self.counts), (totals, total)):
                listed[e, : len(rows)] = found[rows]
        return TypicalTokens(ids, counts, totals)


@dataclass(frozen=True)
class RouterGeometry:
    """Cosines between the router's directions, and with the mean encoder and decoder directions of the experts.

    router_EE:   of W_router[:, i] and W_router[:, j]
    encoder_EE:  of W_router[:, i] and the mean of expert j's columns of W_enc
    decoder_EE:  of W_router[:, i] and the mean of expert j's rows of W_dec
    norms_E:     ||W_router[:, i]||
    """

    router_EE: Tensor
    encoder_EE: Tensor
    decoder_EE: Tensor
    norms_E: Tensor


@torch.no_grad()
def router_geometry(sae: Any, *, centered: bool = False) -> RouterGeometry:
    """Where a Switch SAE's router looks; in float64.

    centered: from every direction the mean over the experts is taken off first, as a softmax is blind to what its
              logits share: that part of the router decides nothing.
    Raises ValueError for an SAE without a router.
    """
    if not hasattr(sae, "W_router"):
        raise ValueError(f"sae must have a router; a {sae.cfg.architecture()} SAE has none")
    E = sae.cfg.n_experts
    router_ED = sae.W_router.cpu().double().T
    encoder_ED = torch.stack([block.cpu().double().mean(0) for block in sae.W_enc.T.chunk(E)])
    decoder_ED = torch.stack([block.cpu().double().mean(0) for block in sae.W_dec.chunk(E)])
    norms_E = router_ED.norm(dim=1)
    if centered:
        router_ED, encoder_ED, decoder_ED = (t - t.mean(0) for t in (router_ED, encoder_ED, decoder_ED))
    router, encoder, decoder = (torch.nn.functional.normalize(t, dim=1) for t in (router_ED, encoder_ED, decoder_ED))
    return RouterGeometry(router @ router.T, router @ encoder.T, router @ decoder.T, norms_E)


@dataclass(frozen=True)
class Duplicates:
    """Pairs of latents whose decoder rows have a cosine above the threshold.

    pairs_P2, cosines_P:  latents i < j and their cosine, most similar first; at most ``max_pairs`` of them
    n_pairs_EE:           how many pairs there are between two experts, or, on the diagonal, within one; all of them
    within_F, across_F:   whether a latent has a duplicate in its own expert, or in another
    """

    threshold: float
    pairs_P2: Tensor
    cosines_P: Tensor
    n_pairs_EE: Tensor
    within_F: Tensor
    across_F: Tensor

    @property
    def n_pairs(self) -> int:
        return int(self.n_pairs_EE.triu().sum())

    @property
    def share_within(self) -> float:
        """Share of the latents with a duplicate in their own expert."""
        return self.within_F.double().mean().item()

    @property
    def share_across(self) -> float:
        """Share of the latents with a duplicate in another expert."""
        return self.across_F.double().mean().item()


@torch.no_grad()
def duplicate_latents(
    W_dec_FD: Tensor, n_experts: int = 1, *, threshold: float = 0.9, max_pairs: int = 100_000, block: int = 2048
) -> Duplicates:
    """What was learned twice (arXiv 2410.08201: decoder rows at a cosine above 0.9, across experts).

    2 F^2 D operations / 2, in blocks of block x block cosines. Rows of zeros are like nothing. On the device of W_dec.
    Raises ValueError unless n_experts divides F and 0 < threshold < 1.
    """
    if W_dec_FD.ndim != 2:
        raise ValueError(f"W_dec must be [d_sae, d_in]; got shape {tuple(W_dec_FD.shape)}")
    F, E = len(W_dec_FD), n_experts
    if E < 1 or F % E:
        raise ValueError(f"n_experts must divide d_sae={F}; got {E}")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be between 0 and 1; got {threshold}")
    if max_pairs < 0 or block < 1:
        raise ValueError(f"max_pairs must be at least 0 and block at least 1; got {max_pairs} and {block}")
    dtype, device = torch.promote_types(W_dec_FD.dtype, torch.float32), W_dec_FD.device
    expert_F = torch.arange(F, device=device) // (F // E)
    within_F, across_F = (torch.zeros(F, dtype=torch.bool, device=device) for _ in range(2))
    n_pairs_EE = torch.zeros(E, E, dtype=torch.int64, device=device)
    pairs, cosines = torch.empty(0, 2, dtype=torch.int64, device=device), torch.empty(0, dtype=dtype, device=device)

    def unit_rows(start: int) -> Tensor:
        return torch.nn.functional.normalize(W_dec_FD[start : start + block].to(dtype), dim=1)

    for i in range(0, F, block):
        rows_D = unit_rows(i)
        for j in range(i, F, block):
            cosine = rows_D @ (unit_rows(j) if j > i else rows_D).T
            alike = cosine > threshold
            found = (alike.triu(1) if j == i else alike).nonzero()
            if not len(found):
                continue
            new = found + torch.tensor([i, j], device=device)
            experts = expert_F[new]
            same = experts[:, 0] == experts[:, 1]
            within_F[new[same].flatten()] = True
            across_F[new[~same].flatten()] = True
            n_pairs_EE += torch.bincount(experts[:, 0] * E + experts[:, 1], minlength=E * E).view(E, E)
            pairs, cosines = torch.cat([pairs, new]), torch.cat([cosines, cosine[found[:, 0], found[:, 1]]])
            if len(pairs) > 2 * max_pairs:
                pairs, cosines = _most_similar(pairs, cosines, max_pairs)
    pairs, cosines = _most_similar(pairs, cosines, max_pairs)
    n_pairs_EE = n_pairs_EE + n_pairs_EE.T.triu(1) + n_pairs_EE.T.tril(-1)
    return Duplicates(threshold, pairs.cpu(), cosines.cpu(), n_pairs_EE.cpu(), within_F.cpu(), across_F.cpu())


def _most_similar(pairs_P2: Tensor, cosines_P: Tensor, n: int) -> tuple[Tensor, Tensor]:
    order = cosines_P.sort(descending=True, stable=True).indices[:n]
    return pairs_P2[order], cosines_P[order]
