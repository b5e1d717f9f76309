"""Equal-sized clusters of latents that fire together, from sparse codes."""

import torch
from sae_lens_switch_kernels import latent_weight_grad, sparse_decode
from torch import Tensor

from sae_lens_switch.upgrade.balanced import balanced_assignment

_POWER_STEPS = 8
_KMEANS_STEPS = 20
_REFINEMENTS = 10


@torch.no_grad()
def cluster_latents(strength_NK: Tensor, indices_NK: Tensor, n_latents: int, n_experts: int, seed: int = 0) -> Tensor:
    """Divide F latents among E experts, F / E each, so that most of a token's code lies in one expert.

    Letters here: N tokens, Q dimensions of the embedding.

    1. Spectral co-clustering (Dhillon 2001): latents are embedded by the leading singular vectors of the [N, F]
       matrix of strengths, scaled by the square roots of its row and column sums; products with it are the sparse
       kernels', so that nothing of size N x F is made.
    2. Balanced k-means on the embedding.
    3. Alternation, while it helps: tokens to the expert that holds most of their strength, evenly; latents to the
       expert whose tokens they are strongest on, evenly.

    Args:
        strength_NK: Of each active latent, its squared value times its squared decoder norm.
        indices_NK: The active latents, int64.
        n_latents: F.
        n_experts: E, which divides F.
        seed: Of the random vectors that the embedding starts from.

    Returns:
        The expert of each latent, [F], int64. Bit-identical in every run.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding_FQ = _embedding(strength_NK.sqrt(), indices_NK, n_latents, 2 * n_experts, generator)
    expert_F = _balanced_kmeans(embedding_FQ, n_experts)
    return _refined(expert_F, strength_NK, indices_NK, n_experts)


def _embedding(values_NK: Tensor, indices_NK: Tensor, F: int, Q: int, generator: torch.Generator) -> Tensor:
    """[F, Q], rows of unit length; of zeros for latents that never fire."""
    Q = min(Q, F - 1, len(values_NK) - 1) if F > 1 else 1
    ones_N1 = values_NK.new_ones(len(values_NK), 1)
    degree_F = latent_weight_grad(values_NK, indices_NK, ones_N1, F).flatten()
    scale_F = torch.where(degree_F > 0, degree_F, torch.inf).rsqrt()
    scaled_NK = values_NK * scale_F[indices_NK] * values_NK.sum(dim=1, keepdim=True).clamp_min(1e-30).rsqrt()
    trivial_F1 = degree_F.sqrt().unsqueeze(1) / degree_F.sum().sqrt().clamp_min(1e-30)
    basis_FQ = torch.randn(F, Q, generator=generator).to(values_NK)
    for _ in range(_POWER_STEPS):
        basis_FQ = basis_FQ - trivial_F1 @ (trivial_F1.T @ basis_FQ)
        basis_FQ = torch.linalg.qr(basis_FQ)[0]
        basis_FQ = latent_weight_grad(scaled_NK, indices_NK, sparse_decode(scaled_NK, indices_NK, basis_FQ), F)
    # Rayleigh-Ritz: directions within the subspace, each weighted by its singular value.
    basis_FQ = torch.linalg.qr(basis_FQ)[0]
    projected_NQ = sparse_decode(scaled_NK, indices_NK, basis_FQ)
    eigenvalues_Q, rotation_QQ = torch.linalg.eigh(projected_NQ.T @ projected_NQ)
    embedded_FQ = scale_F.unsqueeze(1) * (basis_FQ @ rotation_QQ) * eigenvalues_Q.clamp_min(0).sqrt()
    return torch.nn.functional.normalize(embedded_FQ, dim=1)


def _balanced_kmeans(points_FQ: Tensor, E: int) -> Tensor:
    """Spherical k-means with clusters of equal size, from centres that lie far apart."""
    centres_EQ = _far_apart(points_FQ, E)
    expert_F = balanced_assignment(points_FQ @ centres_EQ.T, len(points_FQ) // E)
    for _ in range(_KMEANS_STEPS):
        onehot_FE = torch.nn.functional.one_hot(expert_F, E).to(points_FQ)
        centres_EQ = torch.nn.functional.normalize(onehot_FE.T @ points_FQ, dim=1)
        before, expert_F = expert_F, balanced_assignment(points_FQ @ centres_EQ.T, len(points_FQ) // E)
        if torch.equal(before, expert_F):
            break
    return expert_F


def _far_apart(points_FQ: Tensor, E: int) -> Tensor:
    """E of the points, each the one that is least like those before it."""
    chosen = [int(points_FQ.square().sum(dim=1).argmax())]
    nearest_F = points_FQ @ points_FQ[chosen[0]]
    silent_F = points_FQ.square().sum(dim=1) == 0
    for _ in range(E - 1):
        chosen.append(int(nearest_F.masked_fill(silent_F, torch.inf).argmin()))
        nearest_F = torch.maximum(nearest_F, points_FQ @ points_FQ[chosen[-1]])
    return points_FQ[chosen]


def _refined(expert_F: Tensor, strength_NK: Tensor, indices_NK: Tensor, E: int) -> Tensor:
    """Alternate between tokens and latents while the strength within the tokens' own experts rises."""
    best, best_F = -1.0, expert_F
    N, F = len(strength_NK), len(expert_F)
    for _ in range(_REFINEMENTS):
        share_NE = strength_by_expert(strength_NK, indices_NK, expert_F, E)
        token_N = balanced_assignment(share_NE, -(-N // E))
        captured = float(share_NE.gather(1, token_N.unsqueeze(1)).double().sum())
        if captured <= best * (1 + 1e-6):
            break
        best, best_F = captured, expert_F
        onehot_NE = torch.nn.functional.one_hot(token_N, E).to(strength_NK)
        expert_F = balanced_assignment(latent_weight_grad(strength_NK, indices_NK, onehot_NE, F), F // E)
    return best_F


def strength_by_expert(strength_NK: Tensor, indices_NK: Tensor, expert_F: Tensor, E: int) -> Tensor:
    """[N, E], how much of each token's strength lies in each expert."""
    return sparse_decode(strength_NK, indices_NK, torch.nn.functional.one_hot(expert_F, E).to(strength_NK))
