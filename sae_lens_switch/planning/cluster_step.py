"""A training step on a cluster of GPUs: what every way to divide an SAE over them has in common.

Letters beside the package's: N ranks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Self, TypeVar

from sae_lens_switch.planning.hardware import Hardware, Precision
from sae_lens_switch.planning.step_cost import OptimizerName, check_sizes


@dataclass(frozen=True)
class ClusterStep(ABC):
    """Memory, traffic and time of a step, predicted by formula.

    Args:
        hardware: The cluster.
        d_in: Width of the activations.
        d_sae: Number of latents; rounded up to what can be divided.
        k: Active latents per token.
        n_ranks: GPUs.
        tokens_per_rank: Tokens per step and rank.
        optimizer: "adam" or "row_sparse_adam".
        precision: Of the matrix products. Weights are float32.
        reserved: Bytes per GPU that the language model and the activations take.
        bytes_per_moment: 4 for moments in float32, 2 for bfloat16.

    Raises:
        ValueError: For sizes below 1, and for ``reserved`` that is negative or not finite.
    """

    hardware: Hardware
    d_in: int
    d_sae: int
    k: int
    _: KW_ONLY
    n_ranks: int = 1
    tokens_per_rank: int = 4096
    optimizer: OptimizerName = "row_sparse_adam"
    precision: Precision = "bfloat16"
    reserved: float = 16e9
    bytes_per_moment: int = 4

    def __post_init__(self) -> None:
        sizes = "d_in", "d_sae", "k", "n_ranks", "tokens_per_rank", "bytes_per_moment"
        check_sizes({name: vars(self)[name] for name in sizes})
        if not 0 <= self.reserved < math.inf:
            raise ValueError(f"reserved must be a finite number of bytes, at least 0; got {self.reserved!r}")

    @property
    @abstractmethod
    def memory(self) -> dict[str, float]:
        """Peak bytes per GPU, by part."""

    @property
    @abstractmethod
    def traffic(self) -> dict[str, float]:
        """Bytes that a rank sends in a step, by message of ``parallel``; activations are float32."""

    @abstractmethod
    def seconds(self) -> dict[str, float]:
        """Predicted seconds of a step, by part: the busiest rank's. Nothing overlaps."""

    @abstractmethod
    def on(self, n_ranks: int, experts: Iterable[int] | None = None) -> Self | None:
        """The same on so many GPUs, with the fastest of these numbers of experts; None if the memory is too small."""

    @property
    @abstractmethod
    def heading(self) -> list[str]:
        """What it is a plan for, in lines."""

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= self.hardware.memory

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds().values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens that all ranks together train on; without the language model's time."""
        return self.n_ranks * self.tokens_per_rank / self.step_seconds

    def gpu_hours(self, tokens: float) -> float:
        """GPU-hours to train on so many tokens; without the language model's."""
        return tokens / self.tokens_per_second * self.n_ranks / 3600

    # The network

    def _is_wide(self) -> bool:
        return self.n_ranks > self.hardware.gpus_per_node

    def _share_beyond_node(self) -> float:
        return max(0.0, (self.n_ranks - self.hardware.gpus_per_node) / max(1, self.n_ranks - 1))

    def _wire_seconds(self, sent: float, beyond: float) -> float:
        return max((1 - beyond) * sent / self.hardware.link, beyond * sent / self.hardware.network)


T = TypeVar("T", bound=ClusterStep)


def smallest(plan: T, experts: Iterable[int] | None = None, most_ranks: int = 1 << 17) -> T:
    """The plan with the fewest GPUs whose memory suffices, and with the fastest number of experts on those.

    Up to a node, powers of two, or with given experts all that divide them; beyond it, whole nodes.

    Raises:
        ValueError: If not even ``most_ranks`` suffice.
    """
    experts = None if experts is None else list(experts)
    node = plan.hardware.gpus_per_node
    within_node = range(1, node) if experts else [2**i for i in range(node.bit_length()) if 2**i < node]
    room = plan.hardware.memory - plan.reserved
    # weights and moments alone
    at_least = math.inf if room <= 0 else (4 + 2 * plan.bytes_per_moment) * 2 * plan.d_in * plan.d_sae / room
    for n in [*within_node, *range(node, most_ranks + 1, node)]:
        if n >= at_least and (found := plan.on(n, experts)):
            return found
    raise ValueError(
        f"d_sae must be smaller, or the GPUs larger: d_in={plan.d_in}, d_sae={plan.d_sae} needs more than"
        f" {most_ranks:,} of {plan.hardware.name} with tokens_per_rank={plan.tokens_per_rank}"
    )
