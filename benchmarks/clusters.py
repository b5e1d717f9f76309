"""The tables of docs/billion.md: formulas of sae_lens_switch.planning, and how far they are from what was measured."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING

from gpu import publish as gpu
from gpu.publish import ROOT, table

if TYPE_CHECKING:
    from sae_lens_switch.planning.hardware import Precision
    from sae_lens_switch.planning.plan import Plan

PROCESSES = ROOT / "docs" / "measured" / "processes.json"
# d_in, d_sae, k: a small model's dictionary, then GPT-2's, Gemma 2 2B's and Llama 3 8B's width.
TARGETS = [
    (768, 1_000_000, 32),
    (2304, 1_000_000, 64),
    (4096, 1_000_000, 64),
    (768, 1_000_000_000, 32),
    (2304, 1_000_000_000, 64),
    (4096, 1_000_000_000, 64),
    (4096, 10_000_000_000, 64),
]
TOPK_TARGETS = [
    *[(768, 1_000_000, 32), (2304, 1_000_000, 64), (4096, 1_000_000, 64)],
    (2304, 10_000_000, 64),
]
_PARTS = {
    "router": ("router",),
    "encoder, top-k": ("encoder", "top-k"),
    "sparse products": ("decoder", "latent gradient", "weight gradients", "pre-bias gradient"),
    "optimiser, constraint": ("optimiser", "clipping and constraint"),
    "network": ("all-to-all", "sums and statistics", "latency"),
}
_PRECISIONS: dict[str, Precision] = {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16"}


@cache
def plan_for(d_in: int, d_sae: int, k: int) -> Plan:
    from sae_lens_switch.planning.cluster_step import smallest
    from sae_lens_switch.planning.hardware import HARDWARE
    from sae_lens_switch.planning.plan import Plan

    return smallest(Plan(HARDWARE["h100"], d_in, d_sae, k, n_experts=1, load_spread=0.3))


def plans() -> str:
    rows = []
    for target in TARGETS:
        plan = plan_for(*target)
        seconds = plan.seconds()
        row = [f"{target[1]:,}", f"{plan.d_in:,}", f"{plan.n_ranks:,}", f"{plan.n_experts:,}"]
        row += [f"{1e3 * plan.step_seconds:.0f} ms"]
        row += [f"{1e3 * sum(seconds[name] for name in names):.1f}" for names in _PARTS.values()]
        rows.append([*row, f"{sum(plan.traffic.values()) / 1e6:,.0f} MB", f"{plan.gpu_hours(1e9):,.1f}"])
    head = ["latents", "d_in", "H100s", "experts", "a step", *(f"{name}, ms" for name in _PARTS)]
    return table([*head, "sent per GPU", "GPU-hours per 10^9 tokens"], rows)


def topk_plans() -> str:
    """A TopK SAE with divided latents beside a Switch SAE of the same shape, on as many GPUs."""
    from sae_lens_switch.planning.cluster_step import smallest
    from sae_lens_switch.planning.hardware import HARDWARE
    from sae_lens_switch.planning.latent_plan import LatentPlan

    rows = []
    for d_in, d_sae, k in TOPK_TARGETS:
        plan = smallest(LatentPlan(HARDWARE["h100"], d_in, d_sae, k))
        switch = plan_for(d_in, d_sae, k).on(plan.n_ranks)
        assert switch is not None
        row = [f"{d_sae:,}", f"{d_in:,}", f"{plan.n_ranks:,}", f"{1e3 * plan.step_seconds:,.0f} ms"]
        row += [f"{1e3 * switch.step_seconds:,.0f} ms"]
        row += [f"{sum(p.traffic.values()) / 1e6:,.0f} MB" for p in (plan, switch)]
        rows.append([*row, f"{plan.gpu_hours(1e9):,.1f}", f"{switch.gpu_hours(1e9):,.1f}"])
    head = ["latents", "d_in", "H100s", "TopK, a step", "Switch, a step", "TopK sends", "Switch sends"]
    return table([*head, "TopK, GPU-hours per 10^9 tokens", "Switch"], rows)


def against_measured() -> str:
    """Predicted steps of one H200 beside measured ones."""
    from sae_lens_switch.planning.hardware import HARDWARE
    from sae_lens_switch.planning.step_cost import Cost

    rows = []
    for shape, experts, precision, ms in gpu.measured_steps():
        B, D, F, K = shape
        cost = Cost("switch" if experts > 1 else "sparse_topk", D, F, K, experts, batch=B)
        predicted = 1e3 * cost.step_seconds(HARDWARE["h200"].at(_PRECISIONS[precision]))
        said = f"`switch`, {experts} experts" if experts > 1 else "`sparse_topk`"
        row = [
            f"{D:,}",
            f"{F:,}",
            said,
            gpu.PRECISIONS[precision],
            f"{predicted:.1f} ms",
            f"{ms:.1f} ms",
            f"{predicted / ms - 1:+.0%}",
        ]
        rows.append(row)
    return table(["d_in", "latents", "SAE", "precision", "predicted", "measured", "difference"], rows)


def against_processes() -> str:
    """Predicted steps of several processes of one machine beside measured ones, by `processes.py`."""
    head = ["SAE", "processes", "predicted", "measured", "difference", "memory of each", "sent by each"]
    rows = []
    for row in json.loads(PROCESSES.read_text())["results"]:
        predicted, ms = row["predicted_ms"], row["measured_ms"]
        cells = [
            f"`{row['architecture']}`",
            str(row["processes"]),
            f"{predicted:,.0f} ms",
            f"{ms:,.0f} ms",
            f"{predicted / ms - 1:+.0%}",
        ]
        rows.append([*cells, f"{row['memory_GB']:.2f} GB", f"{row['sent_MB']:,.1f} MB"])
    return table(head, rows)


BLOCKS = {
    "plans": plans,
    "plans-topk": topk_plans,
    "plan-against-measured": against_measured,
    "plan-against-processes": against_processes,
}
