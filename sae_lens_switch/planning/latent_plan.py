"""A TopK SAE whose latents are divided over a cluster: memory, traffic and time per step, and how many GPUs it needs.

Every rank encodes the tokens of all with its own F / N latents, and decodes those that are among the k best of all
latents, a share of 1 / N of them on average. So traffic does not depend on the width, but encoders together cost what
one does.

Letters beside the package's: N ranks, b tokens of each.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from typing_extensions import override

from sae_lens_switch.planning.cluster_step import ClusterStep
from sae_lens_switch.planning.step_cost import Cost

_COLLECTIVES = 7  # per step: sizes, tokens, candidates, borders, parts, their gradient, sums and the norm
# Passes over the [N b, D] tensors that are exchanged: gathered, decoded into, summed, and their gradient.
_EXCHANGE_PASSES = 10


@dataclass(frozen=True)
class LatentPlan(ClusterStep):
    """A TopK SAE, ``sparse_topk``, on ``n_ranks`` GPUs.

    Raises:
        ValueError: If there is no SAE of this shape.
    """

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k > self.d_sae:
            raise ValueError(f"k must be at most d_sae={self.d_sae}; got {self.k}")
        _ = self.own, self.encoding  # which check the rest

    @property
    def width(self) -> int:
        """Latents per GPU."""
        return -(-self.d_sae // self.n_ranks)

    @property
    def own(self) -> Cost:
        """What a rank does with as many codes as its own tokens have: all but the encoder."""
        return self._cost(self.tokens_per_rank)

    @property
    def encoding(self) -> Cost:
        """Of which the encoder's part is a rank's."""
        return self._cost(self.n_ranks * self.tokens_per_rank)

    def _cost(self, batch: int) -> Cost:
        k = min(self.k, self.width)
        return Cost(
            *("sparse_topk", self.d_in, self.width, k),
            batch=batch,
            optimizer=self.optimizer,
            bytes_per_moment=self.bytes_per_moment,
        )

    @property
    @override
    def memory(self) -> dict[str, float]:
        N, D, b, C = self.n_ranks, self.d_in, self.tokens_per_rank, min(self.k, self.width)
        copies = 2 * 2 * D * self.width if self.precision == "bfloat16" else 0
        return {
            **self.own.memory,
            "working copies": copies,
            # Tokens, parts here and at home, gradients; of candidates values, places, and what they are ranked by.
            "exchanged": 0 if N == 1 else 4 * 4 * N * b * D + (4 + 8 + 2 * 4) * N * b * C,
            "language model": self.reserved,
        }

    @property
    @override
    def traffic(self) -> dict[str, float]:
        N, D = self.n_ranks, self.d_in
        to_others = self.tokens_per_rank * (N - 1)
        return {
            "tokens": 4.0 * D * to_others,
            "candidates": 4.0 * min(self.k, self.width) * to_others,
            "borders": 8.0 * to_others,
            "parts of the reconstruction": 4.0 * D * to_others,
            "the gradient of the reconstruction": 4.0 * D * to_others,
            "gradients of b_dec and losses": 2 * (N - 1) / N * 4 * (D + 2),
            "the norm of the gradients": 4.0 * (N - 1),
        }

    @override
    def seconds(self) -> dict[str, float]:
        machine, N = self.hardware.at(self.precision), self.n_ranks
        own, encoding = self.own.seconds(machine), self.encoding.seconds(machine)
        del own["router"]
        exchanged = _EXCHANGE_PASSES * 4 * N * self.tokens_per_rank * self.d_in if N > 1 else 0
        return own | {
            "encoder": encoding["encoder"],
            "top-k": encoding["top-k"],
            "exchanged tokens": exchanged / machine.stream,
            "all-to-all": self._wire_seconds(sum(self.traffic.values()), self._share_beyond_node()),
            "latency": _COLLECTIVES * self.hardware.latency if N > 1 else 0.0,
        }

    @override
    def on(self, n_ranks: int, experts: Iterable[int] | None = None) -> "LatentPlan | None":
        found = replace(self, n_ranks=n_ranks)
        return found if found.fits else None

    @property
    @override
    def heading(self) -> list[str]:
        N = self.n_ranks
        return [
            f"{N * self.width:,} latents of {self.d_in:,} numbers, k {self.k}",
            f"{N:,} x {self.hardware.name}, {self.width:,} latents and {self.tokens_per_rank:,} tokens per step on"
            f" each; {self.precision}, {self.optimizer}",
        ]
