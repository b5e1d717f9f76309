"""The choices behind the CPU path, timed: torch's routes to one result side by side, and what bounds a step's width.

python benchmarks/primitives.py    # about a minute on two cores; B 4096, D 768, F 24,576, K 32
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
from sae_lens_switch_kernels import products, sparse_autoencode, torch_backend
from torch.nn import functional

from sae_lens_switch.training.optim.row_sparse_adam import scatter_rows_

B, D, N_LATENTS, K, ROUNDS = 4096, 768, 24576, 32, 7


def compare(title: str, routes: dict[str, Callable[[], object]]) -> None:
    """Median milliseconds of each route, taken in turn; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in routes}
    for round_ in range(ROUNDS + 1):
        for name, route in routes.items():
            start = time.perf_counter()
            route()
            if round_:
                times[name].append(1e3 * (time.perf_counter() - start))
    print(f"{title:52}" + "   ".join(f"{name} {statistics.median(ms):.0f} ms" for name, ms in times.items()))


def main() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(B, D), torch.randn(B, D)
    W_enc, W_dec = (torch.randn(N_LATENTS, D).div_(D**0.5).requires_grad_() for _ in range(2))

    pre = torch.randn(B, N_LATENTS)

    def pruned(t: torch.Tensor) -> None:
        os.environ["SAE_LENS_SWITCH_CPU_SEARCH"] = "torch"
        torch_backend.select_topk(t, K)
        del os.environ["SAE_LENS_SWITCH_CPU_SEARCH"]

    for t in (pre.bfloat16(), pre):
        compare(
            f"top-k of {B} rows in {t.dtype}",
            {
                "torch.topk": lambda t=t: t.topk(K, sorted=False),
                "pruned": lambda t=t: pruned(t),
                "compiled": lambda t=t: torch_backend.select_topk(t, K),
            },
        )

    indices, starts = torch.randint(0, N_LATENTS, (B, K)), torch.arange(B + 1) * K
    pattern = torch.sparse_csr_tensor(
        starts, indices.flatten(), torch.zeros(B * K), (B, N_LATENTS), check_invariants=False
    )
    W = W_enc.detach()
    compare(
        "products of tokens and rows of weights at indices",
        {
            "CSR sampled_addmm": lambda: torch.sparse.sampled_addmm(pattern, x, W.T, beta=0),
            "embedding_bag's gradient": lambda: torch_backend.matmul_at_indices(x, W, indices),
        },
    )

    def step(n_experts: int, k: int, dense_up_to: int) -> None:
        products._DENSE_UP_TO["cpu"] = dense_up_to
        expert = torch.arange(B) % n_experts
        sparse_autoencode(x, W_enc, W_dec, k, expert_B=expert, n_experts=n_experts).out_BD.backward(g)
        W_enc.grad = W_dec.grad = None

    chosen_sums = torch_backend._segment_sums

    def bag_sums(values_S, tokens_S, starts_F1, y_BD):
        return functional.embedding_bag(tokens_S, y_BD, starts_F1[:-1], mode="sum", per_sample_weights=values_S)

    def step_summing_by(sums) -> None:
        torch_backend._segment_sums = sums
        step(32, K, 0)
        torch_backend._segment_sums = chosen_sums

    compare(
        "forward, backward; E 32, k 32; weight gradients by",
        {
            "embedding_bag": lambda: step_summing_by(bag_sums),
            "CSR product into used memory": lambda: step_summing_by(chosen_sums),
        },
    )
    before = products._DENSE_UP_TO["cpu"]
    for n_experts, k in ((32, 32), (128, 32), (256, 32), (128, 64), (128, 128)):
        compare(
            f"forward, backward; E {n_experts}, k {k}, M / k {N_LATENTS / n_experts / k:g}",
            {
                "sparse": lambda E=n_experts, k=k: step(E, k, 0),
                "dense within experts": lambda E=n_experts, k=k: step(E, k, 10**9),
            },
        )
    products._DENSE_UP_TO["cpu"] = before

    rows, moved = torch.randperm(100_000)[:30_000].sort().values, torch.randn(30_000, 512)
    table = torch.zeros(100_000, 512)
    compare(
        "30,000 rows of 2 KiB written back",
        {
            "index_copy_": lambda: table.index_copy_(0, rows, moved),
            "as 16-byte elements": lambda: scatter_rows_(table, rows, moved),
        },
    )

    wide = torch.randn(8 * N_LATENTS, D)
    both = [torch.zeros_like(wide) for _ in range(2)]
    compare("writing both gradients of 8 F latents", {"zero_": lambda: [t.zero_() for t in both]})

    def encode(n_experts: int) -> None:
        for rows, W in zip(x.chunk(n_experts), wide[: 768 * n_experts].chunk(n_experts), strict=True):
            torch.mm(rows, W.T)

    compare(
        "encoder products, 768 latents an expert",
        {f"E {n_experts}": lambda E=n_experts: encode(E) for n_experts in (32, 256)},
    )


if __name__ == "__main__":
    main()
