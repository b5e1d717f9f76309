"""Uneven routing, simulated: how many more tokens than the mean the busiest rank receives."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def uneven_loads(n_experts: int, spread: float, seed: int = 0) -> NDArray[np.float64]:
    """Shares of the tokens [E] that experts get: log-normal, ``spread`` being the standard deviation of the logarithm.

    Raises:
        ValueError: If ``spread`` is negative or infinite.
    """
    if not 0 <= spread < np.inf:
        raise ValueError(f"load_spread must be finite and not negative; got {spread!r}")
    load_E = np.exp(spread * np.random.default_rng(seed).standard_normal(n_experts))
    return load_E / load_E.sum()


def received(load_E: NDArray[np.float64], n_ranks: int, n_tokens: int, seed: int = 0) -> NDArray[np.int64]:
    """Tokens [N] that ranks receive in a step of ``n_tokens`` in all, rank r having the r-th block of experts.

    Raises:
        ValueError: If the experts cannot be divided among the ranks, or ``load_E`` is no distribution.
    """
    if n_ranks < 1 or len(load_E) % n_ranks:
        raise ValueError(f"n_ranks must divide the number of experts, {len(load_E)}; got {n_ranks}")
    if not ((load_E >= 0).all() and np.isclose(load_E.sum(), 1)):
        raise ValueError(f"load_E must be shares that add up to 1; their sum is {load_E.sum():.4g}")
    share_N = load_E.reshape(n_ranks, -1).sum(1)
    return np.random.default_rng(seed).multinomial(n_tokens, share_N / share_N.sum())


@lru_cache(1024)
def skew(n_experts: int, spread: float, n_ranks: int, n_tokens: int) -> float:
    """Tokens that the busiest rank receives, as a multiple of the mean."""
    tokens_N = received(uneven_loads(n_experts, spread), n_ranks, n_tokens)
    return float(tokens_N.max() / tokens_N.mean())
