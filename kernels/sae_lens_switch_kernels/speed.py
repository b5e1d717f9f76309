"""How fast this machine does what a training step is made of, measured with the primitives of the CPU path."""

import time
from collections.abc import Callable

import torch

from sae_lens_switch_kernels import torch_backend
from sae_lens_switch_kernels.functions import matmul_at_indices, sparse_decode

_BATCH, _TILE_ROWS, _TILE_LATENTS = 4096, 512, 1024
_LARGE = 1 << 24  # numbers: more than a cache holds
_FRESH = 1 << 26
_MAX_WIDTH = 1 << 15


def measure_speed(d_in: int, k: int, expert_width: int, device: str = "cpu") -> dict[str, float]:
    """Rates per second, measured in a few seconds.

    Args:
        d_in: Width of the activations.
        k: Active latents per token.
        expert_width: Latents per expert.
        device: Where to measure.

    Returns:
        ``flops`` of a float32 matrix product; bytes of rows read at random from a large matrix (``gather``) and from
        a batch of activations (``regather``); bytes read or written sequentially (``stream``) and to memory written
        for the first time (``fresh``); pre-activations that top-k searches (``select``).
    """
    generator = torch.Generator().manual_seed(0)
    B, F, block = _BATCH, max(_BATCH, _LARGE // d_in), _TILE_LATENTS
    x = torch.randn(B, d_in, generator=generator).to(device)
    W = torch.randn(F, d_in, generator=generator).to(device)
    out = torch.empty(_TILE_ROWS, block, device=device)
    indices = torch.randint(0, F, (B, k), generator=generator).to(device)
    tokens = torch.randint(0, B, (B, k), generator=generator).to(device)
    values = torch.randn(B, k, generator=generator).to(device)
    pre = torch.randn(_TILE_ROWS, max(k, min(expert_width, _MAX_WIDTH)), generator=generator).to(device)
    weights = torch.nn.Parameter(W.clone())
    weights.grad = torch.ones_like(W)
    adam = torch.optim.Adam([weights], lr=1e-9, fused=True)
    product = _seconds(lambda: [torch.mm(r, W[:block].T, out=out) for r in x.split(_TILE_ROWS)], device)
    gather = _seconds(lambda: (sparse_decode(values, indices, W), matmul_at_indices(x, W, indices)), device)
    regather = _seconds(lambda: sparse_decode(values, tokens, x), device)
    stream = _seconds(adam.step, device)
    fresh = _seconds(lambda: torch.empty(_FRESH, device=device).fill_(1), device)
    select = _seconds(lambda: torch_backend.select_topk(pre, k), device)
    bytes_gathered = 4 * B * k * d_in
    return {
        "flops": 2 * B * d_in * block / product,
        "gather": 2 * bytes_gathered / gather,
        "regather": bytes_gathered / regather,
        "stream": 7 * 4 * W.numel() / stream,
        "select": pre.numel() / select,
        "fresh": 4 * _FRESH / fresh,
    }


def _seconds(call: Callable[[], object], device: str) -> float:
    """The median of five calls, after one that warms up."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[2]
