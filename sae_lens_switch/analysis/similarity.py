"""How alike SAEs represent the same activations: representational similarity analysis (RSA) and linear CKA."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from sae_lens import SAE
from torch import Tensor

from sae_lens_switch.analysis.activity import encoded_pieces


@dataclass(frozen=True)
class Similarity:
    """Similarity of R representations of the same N tokens, whatever their widths.

    Attributes:
        names: What is compared.
        n_tokens: Number of tokens that the estimates are from.
        rsa_RR: Spearman correlation over pairs of tokens of their distances in the two representations.
        cka_RR: Linear CKA with the debiased HSIC of Song et al. 2012, float64: 1 if the representations are equal up to
            rotation, scale and shift, 0 in the mean if they are independent; NaN if a representation is constant.
    """

    names: tuple[str, ...]
    n_tokens: int
    rsa_RR: Tensor
    cka_RR: Tensor


@torch.no_grad()
def compare_saes(saes: Mapping[str, SAE], x: Tensor, *, n_tokens: int = 2048, seed: int = 0) -> Similarity:
    """Compare activations, codes and reconstructions of any SAEs on a random sample of the same tokens.

    Takes 8 n_tokens^2 bytes per representation, 1 + 2 per SAE; codes stay sparse.

    Args:
        saes: SAEs of the same activations by name.
        x: Activations [..., D].
        n_tokens: Number of tokens to draw, without replacement; all if there are fewer.
        seed: Seed of the draw.

    Returns:
        The similarity of ``activations``, and for each SAE of ``NAME codes`` and ``NAME reconstruction``.

    Raises:
        ValueError: For activations of another width, or fewer than four tokens.
    """
    x_ND = x.reshape(-1, x.shape[-1])
    for name, sae in saes.items():
        if sae.cfg.d_in != x.shape[-1]:
            raise ValueError(f"activations must have d_in={sae.cfg.d_in} of {name}; got shape {tuple(x.shape)}")
    chosen = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(seed))[:n_tokens]
    x_ND = x_ND[chosen.to(x_ND.device)]
    found = {"activations": x_ND.cpu()}
    for name, sae in saes.items():
        found[f"{name} codes"], found[f"{name} reconstruction"] = _represented(sae, x_ND)
    return similarity(found)


def _represented(sae: SAE, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as a sparse [N, F] tensor, and reconstructions [N, D], on the CPU."""
    places, values, x_hats = [], [], []
    for piece in encoded_pieces(sae, x_ND.to(sae.device, sae.dtype)):
        places.append(torch.stack([piece.start + piece.token, piece.latent]))
        values.append(piece.value)
        x_hats.append(piece.x_hat_BD.cpu())
    shape = (len(x_ND), sae.cfg.d_sae)
    codes_NF = torch.sparse_coo_tensor(torch.cat(places, dim=1), torch.cat(values), shape, check_invariants=False)
    return codes_NF, torch.cat(x_hats)


@torch.no_grad()
def similarity(
    representations: Mapping[str, Tensor], *, distance: Literal["euclidean", "cosine"] = "euclidean"
) -> Similarity:
    """Compare any representations of the same tokens, in float64.

    Args:
        representations: Tensors [N, anything] by name, dense or sparse COO; sparse ones are not made dense.
        distance: Distance of two tokens in RSA. The Euclidean one is invariant to shifts, as CKA is; tokens of zero
            norm have a cosine of 0 with every other.

    Raises:
        ValueError: For no or fewer than four tokens, or different numbers of them.
    """
    sizes = {name: len(value) for name, value in representations.items()}
    if len(set(sizes.values())) != 1 or min(sizes.values()) < 4:
        raise ValueError(f"representations must be of the same four or more tokens; got {sizes}")
    if distance not in ("euclidean", "cosine"):
        raise ValueError(f"distance must be 'euclidean' or 'cosine'; got {distance!r}")
    grams = [_gram(value) for value in representations.values()]
    ranks = torch.stack([_ranks(_distances(gram_NN, distance)) for gram_NN in grams])
    R, cka_RR = len(grams), torch.empty(len(grams), len(grams), dtype=torch.float64)
    rows = [_off_diagonal(gram_NN) for gram_NN in grams]
    for a in range(R):
        for b in range(a, R):
            cka_RR[a, b] = cka_RR[b, a] = _hsic(rows[a], rows[b])
    scale_R = torch.where(cka_RR.diag() > 0, cka_RR.diag(), torch.nan).sqrt()
    return Similarity(tuple(sizes), len(grams[0]), _correlation(ranks), cka_RR / scale_R / scale_R[:, None])


def _gram(value_NX: Tensor) -> Tensor:
    """Inner products of all pairs of rows, [N, N]."""
    value_NX = value_NX.double()
    if value_NX.is_sparse:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse.mm(value_NX, value_NX.T).to_dense()
    return value_NX @ value_NX.T


def _off_diagonal(gram_NN: Tensor) -> Tensor:
    return gram_NN.clone().fill_diagonal_(0)


def _hsic(K_NN: Tensor, L_NN: Tensor) -> Tensor:
    """The unbiased estimator of HSIC, Song et al. 2012, equation 5, of Gram matrices with a zero diagonal."""
    n = len(K_NN)
    K_N, L_N = K_NN.sum(1), L_NN.sum(1)
    pairs = (K_NN * L_NN).sum() + K_N.sum() * L_N.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (K_N @ L_N)
    return pairs / (n * (n - 3))


def _distances(gram_NN: Tensor, kind: str) -> Tensor:
    """A monotone function of the distance of each pair i < j, [N (N - 1) / 2]; ranks do not see the difference."""
    i, j = torch.triu_indices(len(gram_NN), len(gram_NN), offset=1)
    square_N = gram_NN.diag()
    if kind == "cosine":
        length_N = square_N.sqrt()
        return -torch.where(gram_NN[i, j] == 0, 0, gram_NN[i, j] / (length_N[i] * length_N[j]))
    return square_N[i] + square_N[j] - 2 * gram_NN[i, j]


def _ranks(values_P: Tensor) -> Tensor:
    """Ranks of the values; equal ones share the mean of theirs."""
    _, where, counts = values_P.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[where]


def _correlation(rows_RP: Tensor) -> Tensor:
    """Pearson correlation of the rows; NaN for constant ones."""
    rows_RP = rows_RP - rows_RP.mean(1, keepdim=True)
    length_R = rows_RP.norm(dim=1)
    return rows_RP @ rows_RP.T / length_R / length_R[:, None]
