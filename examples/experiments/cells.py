"""A cell: one SAE to train, with the budgets of tokens after which it is measured, and what that costs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

L1_ARCHITECTURES = ("standard", "gated")
# Sweeps have a seed of their own, so that the SAEs that chose a setting are not those compared afterwards.
TUNING_SEED = 100
# Of a step on one core of a 2.6 GHz Xeon with AVX-512, at d_in 576, batch 512, k 32: what depends on the active
# latents, what a dense product with 2,048 latents adds, and Adam's pass over a parameter.
_SPARSE, _DENSE, _PER_PARAMETER = 0.018, 0.015, 4.4e-9
_DENSE_PRODUCTS = {"standard": 6, "gated": 9, "topk": 6}
# Fields that earlier results lack: at their defaults they change no cell's name.
_LATER = (
    *("n_active_experts", "n_shared_experts", "gate", "load_balancing"),
    *("router_z_loss_coefficient", "expert_overlap_coefficient"),
)
_CE_SECONDS = 0.45  # per context of 128 tokens, with and without the SAE


@dataclass(frozen=True)
class Cell:
    """One SAE to train. What is None is chosen by a sweep that is not over.

    Every budget is a training run of its own, with the learning rate constant and in the last fifth falling to 0. Runs
    that differ in budget alone are the same until the shorter one's learning rate falls: that part is trained once.
    """

    experiment: str
    architecture: str  # sparse_topk, switch, standard (ReLU, L1), gated
    d_sae: int
    k: int = 32  # with an L1 coefficient: the L0 that it is chosen for
    n_experts: int = 1
    layer: int = 6
    budgets: tuple[int, ...] = (3_000_000,)  # tokens
    seed: int = 0
    lr: float | None = None
    l1_coefficient: float | None = 0.0
    batch: int = 512
    load_balance_coefficient: float = 0.3
    load_balance_warm_up: float = 0.0  # share of the steps
    router_start_std: float = 1.0
    router_lr: float = 1.0  # times lr
    lr_warm_up: float = 0.0  # share of the steps
    aux_loss_coefficient: float = 0.0
    # Of the experts. "copies": all the same; "shared": copies of one trained on a tenth of the tokens; "split": parts
    # of a TopK SAE trained on half of them.
    start: str = "apart"
    n_active_experts: int = 1
    n_shared_experts: int = 0  # each as wide as the others
    gate: str = "probability"
    load_balancing: str = "loss"
    router_z_loss_coefficient: float = 0.0
    expert_overlap_coefficient: float = 0.0

    @property
    def tokens(self) -> int:
        return self.budgets[-1]

    @property
    def is_ready(self) -> bool:
        return self.lr is not None and self.l1_coefficient is not None

    def key(self, of_run: dict[str, Any]) -> str:
        """A name for the settings that decide results: those of the cell and of the whole run."""
        settings = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("experiment", "budgets") and (name not in _LATER or value != getattr(Cell, name))
        }
        # Warm-ups are shares of the steps: only runs without can be parts of longer ones.
        of_budgets = [] if not (self.lr_warm_up or self.load_balance_warm_up) else list(self.budgets)
        text = json.dumps([settings, of_budgets, of_run], sort_keys=True)
        return f"{self.architecture}-{self.n_experts}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def settings(self) -> dict[str, Any]:
        return {n: v for n, v in asdict(self).items() if n != "budgets"}

    @property
    def label(self) -> str:
        name = f"switch {self.n_experts}" if self.architecture == "switch" else self.architecture
        name += f", {self.n_active_experts} active" if self.n_active_experts > 1 else ""
        name += ", one shared" if self.n_shared_experts else ""
        return f"{name}, F {self.d_sae}, k {self.k}, layer {self.layer}, lr {self.lr or 0:.2g}, seed {self.seed}"

    @property
    def active_width(self) -> int:
        """Latents that a token is encoded with."""
        n_used = self.n_active_experts + self.n_shared_experts
        return n_used * self.d_sae // (self.n_experts + self.n_shared_experts)

    # Cost

    def steps(self, budget: int) -> int:
        return budget // self.batch

    @property
    def steps_trained(self) -> int:
        """Of all budgets: the constant part of the longest, and the falling part of each."""
        return self.steps(self.tokens) + sum(self.steps(b) // 5 for b in self.budgets[:-1])

    def step_seconds(self, d_in: int = 576) -> float:
        """Predicted, on one core."""
        size = self.batch / 512 * d_in / 576
        dense = _DENSE_PRODUCTS.get(self.architecture, 1) * _DENSE * self.active_width / 2048
        return size * (_SPARSE * self.k / 32 + dense) + _PER_PARAMETER * 2 * self.d_sae * d_in

    def seconds(self, d_in: int = 576, ce_contexts: int = 0) -> float:
        """Predicted: training, and the language model's loss at the end."""
        return self.steps_trained * self.step_seconds(d_in) + ce_contexts * _CE_SECONDS


def with_experts(cell: Cell, n_experts: int, matched: bool) -> Cell:
    """The Switch SAE to set beside a TopK SAE: of experts as wide as it, or of the same width."""
    width = cell.d_sae * n_experts if matched else cell.d_sae
    return replace(cell, architecture="switch", n_experts=n_experts, d_sae=width)
