"""A Switch SAE sharded by experts over a cluster: memory, traffic and time per step, and how many GPUs it needs.

Every rank has its own tokens, all of the router, and E / N of the experts. A token travels once to the rank of its
expert, which computes reconstruction, loss and all gradients of that expert; with several active experts, it travels
to each, their best latents and reconstructions come back, and the gradient goes out again. What all ranks share,
router and biases, is summed over them. So traffic depends on the number of experts, not on that of latents.

Letters beside the package's: N ranks.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, replace

from typing_extensions import override

from sae_lens_switch.planning.cluster_step import ClusterStep
from sae_lens_switch.planning.step_cost import Cost
from sae_lens_switch.planning.traffic import skew

_COLLECTIVES = 6  # per step: facts of the batch, counts, tokens, the router's gradient and losses, the norm
_OF_SEVERAL = 5  # more, with several active experts
# What does not go to single experts.
_OF_ALL = ("statistics of the batch", "gradients of the router and losses", "the norm of the gradients")


@dataclass(frozen=True)
class Plan(ClusterStep):
    """A Switch SAE on ``n_ranks`` GPUs; its arguments beside those of every ClusterStep:

    Args:
        n_experts: Experts in all.
        n_active_experts: Experts per token.
        load_spread: Standard deviation of the logarithm of the experts' loads.

    Raises:
        ValueError: If the experts cannot be divided among the ranks, or there is no SAE of this shape.
    """

    n_experts: int
    _: KW_ONLY
    n_active_experts: int = 1
    load_spread: float = 0.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_experts < 1:
            raise ValueError(f"n_experts must be at least 1; got {self.n_experts}")
        if self.n_experts % self.n_ranks:
            raise ValueError(f"n_ranks must divide n_experts={self.n_experts}; got {self.n_ranks}")
        if self.n_active_experts > self.n_experts:
            raise ValueError(
                f"n_active_experts must be at most n_experts={self.n_experts}; got {self.n_active_experts}"
            )
        if self.k > self.n_active_experts * self.expert_width:
            raise ValueError(
                f"k must be at most n_active_experts * d_sae / n_experts = {self.n_active_experts * self.expert_width};"
                f" got {self.k}"
            )
        _ = self.local  # checks the rest

    @property
    def skew(self) -> float:
        """Tokens that the busiest rank receives, as a multiple of the mean; simulated."""
        tokens = self.n_ranks * self.tokens_per_rank * self.n_active_experts
        return skew(self.n_experts, self.load_spread, self.n_ranks, tokens)

    @property
    def expert_width(self) -> int:
        """Latents per expert."""
        return -(-self.d_sae // self.n_experts)

    @property
    def local(self) -> Cost:
        """What the busiest rank computes with its own experts."""
        local_experts = self.n_experts // self.n_ranks
        return Cost(
            "switch",
            self.d_in,
            self.expert_width * local_experts,
            min(-(-self.k // self.n_active_experts), self.expert_width),
            local_experts,
            round(self.tokens_per_rank * self.n_active_experts * self.skew),
            self.optimizer,
            bytes_per_moment=self.bytes_per_moment,
        )

    @property
    def _routes_twice(self) -> bool:
        """Whether the owner of a token's expert routes it again, for the gradients, after the rank it came from."""
        return self.n_ranks > 1 and self.n_active_experts == 1

    @property
    @override
    def memory(self) -> dict[str, float]:
        """Peak bytes per GPU, by part."""
        E, D, b = self.n_experts, self.d_in, self.tokens_per_rank
        copies = 2 * 2 * D * self.local.d_sae if self.precision == "bfloat16" else 0
        return {
            **self.local.memory,
            "working copies": copies,
            # Weights, gradients and moments; logits and probabilities.
            "router": 4 * 4 * D * E + 3 * 4 * b * E * (self.skew if self._routes_twice else 1),
            "statistics of the batch": 8 * (E + D + 1 + 2 * self.n_ranks),
            "language model": self.reserved,
        }

    @property
    @override
    def traffic(self) -> dict[str, float]:
        """Bytes that a rank sends in a step, by message of ``parallel``; activations are float32."""
        N, D, E, A = self.n_ranks, self.d_in, self.n_experts, self.n_active_experts
        pairs, candidates = A * self.tokens_per_rank * (N - 1) / N, min(self.k, self.expert_width)
        numbers = {"tokens": 4 * D}  # per pair of a token and one of its experts
        if A > 1:
            numbers |= {"experts": 8, "candidates": 4 * candidates, "choices": candidates}
            numbers |= {"parts of the reconstruction": 4 * D, "the gradient of the reconstruction": 4 * D}
        return {
            **{name: n_bytes * pairs for name, n_bytes in numbers.items()},
            # A ring: every byte is sent once to be summed and once to be known. In float64; and a count to each.
            "statistics of the batch": 2 * (N - 1) / N * 8 * (E + D + 1) + 8 * (N - 1),
            "gradients of the router and losses": 2 * (N - 1) / N * 4 * (2 * D + D * E + 3),
            "the norm of the gradients": 4.0 * (N - 1),
        }

    @override
    def seconds(self) -> dict[str, float]:
        """Predicted seconds of a step, by part: the busiest rank's. Nothing overlaps."""
        machine, router_flops = self.hardware.at(self.precision), self.hardware.flops["float32"]
        if self.precision == "tf32":
            router_flops = self.hardware.flops["tf32"]
        own = self.local.seconds(machine)
        passes = 1 + 3 * self.skew if self._routes_twice else 3
        router = passes * 2 * self.tokens_per_rank * self.d_in * self.n_experts / router_flops
        sent = self.traffic
        collectives = _COLLECTIVES + (_OF_SEVERAL if self.n_active_experts > 1 else 0)
        of_all = sum(sent.pop(name) for name in _OF_ALL)
        return own | {
            "router": router,
            "all-to-all": self._wire_seconds(sum(sent.values()) * self.skew, self._share_beyond_node()),
            "sums and statistics": self._wire_seconds(of_all, float(self._is_wide())),
            "latency": collectives * self.hardware.latency if self.n_ranks > 1 else 0.0,
        }

    @override
    def on(self, n_ranks: int, experts: Iterable[int] | None = None) -> "Plan | None":
        return fastest(self, experts, n_ranks)

    @property
    @override
    def heading(self) -> list[str]:
        E, N = self.n_experts, self.n_ranks
        return [
            f"{E * self.expert_width:,} latents of {self.d_in:,} numbers in {E:,} experts of {self.expert_width:,},"
            f" {self.n_active_experts} active, k {self.k}",
            f"{N:,} x {self.hardware.name}, {E // N:,} experts and {self.tokens_per_rank:,} tokens per step on each;"
            f" {self.precision}, {self.optimizer}",
            f"the busiest GPU receives {self.skew:.2f} times the mean number of tokens",
        ]


def fastest(plan: Plan, experts: Iterable[int] | None = None, n_ranks: int | None = None) -> Plan | None:
    """The plan with the number of experts whose step is shortest among those that fit into memory; None if none fits.

    Args:
        plan: Everything else.
        experts: The numbers to choose from; by default n_ranks times each power of two, up to twice the root of d_sae,
            beyond which the router, 2DE FLOPs forward, costs more than an expert, 2DM.
        n_ranks: GPUs; None: the plan's.
    """
    fitting = [p for p in _with_experts(plan, experts, plan.n_ranks if n_ranks is None else n_ranks) if p.fits]
    return min(fitting, key=lambda p: p.step_seconds, default=None)


def _with_experts(plan: Plan, experts: Iterable[int] | None, n_ranks: int) -> Iterator[Plan]:
    if n_ranks < 1:
        raise ValueError(f"n_ranks must be at least 1; got {n_ranks}")
    if experts is None:
        most = max(1, 2 * math.isqrt(plan.d_sae) // n_ranks)
        experts = [n_ranks * 2**i for i in range(most.bit_length())]
    for n in experts:
        if n < 1:
            raise ValueError(f"n_experts must be at least 1; got {n}")
        has_experts, has_latents = n >= plan.n_active_experts, -(-plan.d_sae // n) * plan.n_active_experts >= plan.k
        if n % n_ranks == 0 and has_experts and has_latents:
            yield replace(plan, n_experts=n, n_ranks=n_ranks)
