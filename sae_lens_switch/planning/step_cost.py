"""What an SAE costs to train, by formula: parameters, FLOPs, memory, bytes moved, and the time of a training step.

A multiply-add counts as two FLOPs. ``paper_flops`` is the count of arXiv 2410.08201: the encoder of one expert, 2MD,
and the router, 2ED.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sae_lens_switch.common.speed import Machine
from sae_lens_switch.saes.expert_layout import ExpertLayout

Architecture = Literal["switch", "sparse_topk", "topk"]
OptimizerName = Literal["adam", "row_sparse_adam"]

# Passes over a [B, D] tensor in a step: centring, sorting, bias, error, its square, their gradients, and torch's copies
# in between. Measured.
_TOKEN_PASSES = 80
# Passes over both weight matrices: norms; for `switch` also projection and renormalisation. Measured.
_CONSTRAINT_PASSES = {"switch": 7.5, "sparse_topk": 1.2, "topk": 3.0}
# Tensors of B x F that SAELens allocates in a step, and how often each is read.
_DENSE_TENSORS, _DENSE_READS = 14, 2


def check_sizes(given: Mapping[str, object], at_least: int = 1) -> None:
    """Raises ValueError for what is no whole number, or too small. Needs no SAELens, whose import takes seconds."""
    for name, value in given.items():
        if not isinstance(value, int) or value < at_least:
            raise ValueError(f"{name} must be a whole number, at least {at_least}; got {value!r}")


@dataclass(frozen=True)
class Cost:
    """The cost of an SAE of a given shape, and of one of its training steps, by formula.

    Args:
        architecture: "switch" or "sparse_topk" of this package, or SAELens's dense "topk".
        d_in: Width of the activations.
        d_sae: Number of latents, over all experts.
        k: Active latents per token.
        n_experts: Number of experts; 1 unless the architecture is "switch".
        n_active_experts: Experts per token.
        n_shared_experts: Experts that every token uses beside them.
        shared_width: Latents of these together; None: each is as wide as the others.
        batch: Activations per training step.
        optimizer: "adam" or "row_sparse_adam".
        bytes_per_weight: 4 for float32, 2 for bfloat16.
        bytes_per_moment: Likewise, of Adam's moments of both weight matrices.

    Raises:
        ValueError: If there is no SAE of this shape.
    """

    architecture: Architecture
    d_in: int
    d_sae: int
    k: int
    n_experts: int = 1
    batch: int = 4096
    optimizer: OptimizerName = "adam"
    bytes_per_weight: int = 4
    n_active_experts: int = 1
    n_shared_experts: int = 0
    shared_width: int | None = None
    bytes_per_moment: int = 4

    def __post_init__(self) -> None:
        if self.architecture not in ("switch", "sparse_topk", "topk"):
            raise ValueError(f"architecture must be switch, sparse_topk or topk; got {self.architecture!r}")
        sizes = "d_in", "d_sae", "k", "n_experts", "n_active_experts", "batch", "bytes_per_weight", "bytes_per_moment"
        check_sizes({name: vars(self)[name] for name in sizes})
        check_sizes({"n_shared_experts": self.n_shared_experts}, at_least=0)
        check_sizes({} if self.shared_width is None else {"shared_width": self.shared_width})
        if self.architecture != "switch" and self.n_experts != 1:
            raise ValueError(f"n_experts must be 1 unless architecture is 'switch'; got {self.n_experts}")
        if self.n_shared_experts and self.architecture != "switch":
            raise ValueError(f"n_shared_experts must be 0 unless architecture is 'switch'; got {self.n_shared_experts}")
        if self.shared_width is not None and not self.n_shared_experts:
            raise ValueError(f"shared_width must be None without shared experts; got {self.shared_width}")
        if not self.layout.is_possible:
            rest = f" less the {self.layout.shared_width} latents of shared experts" if self.n_shared_experts else ""
            raise ValueError(f"n_experts must divide d_sae={self.d_sae}{rest}; got {self.n_experts}")
        if self.n_active_experts > self.n_experts:
            raise ValueError(
                f"n_active_experts must be at most n_experts={self.n_experts}; got {self.n_active_experts}"
            )
        if self.k > self.active_width:
            several = "" if self.n_active_experts == 1 else "n_active_experts * "
            what = "the latents of a token's experts and the shared ones," if self.n_shared_experts else ""
            what = what or f"{several}d_sae / n_experts ="
            raise ValueError(f"k must be at most {what} {self.active_width}; got {self.k}")

    @property
    def layout(self) -> ExpertLayout:
        """Which latents belong to which expert."""
        return ExpertLayout.of(self.d_sae, self.n_experts, self.n_shared_experts, self.shared_width)

    @property
    def expert_width(self) -> int:
        """Latents per expert."""
        return self.layout.expert_width

    @property
    def active_width(self) -> int:
        """Latents of a token's experts together, shared ones included."""
        return self.layout.shared_width + self.n_active_experts * self.expert_width

    @property
    def rows(self) -> int:
        """Latents whose weights an optimiser step updates: all, or at most those that can be active in a batch."""
        return self.d_sae if self.optimizer == "adam" else min(self.d_sae, self.batch * self.k)

    @property
    def parameters(self) -> dict[str, int]:
        """Number of parameters, by tensor."""
        D, F = self.d_in, self.d_sae
        counts = {"W_enc": D * F, "W_dec": F * D, "b_dec": D}
        if self.architecture == "switch":
            return counts | {"W_router": D * self.n_experts, "b_router": D}
        return counts | {"b_enc": F}

    @property
    def paper_flops(self) -> int:
        """FLOPs per activation as arXiv 2410.08201 counts them: 2MD, and the router's 2ED."""
        router = 2 * self.n_experts * self.d_in if self.architecture == "switch" else 0
        return 2 * self.active_width * self.d_in + router

    @property
    def flops(self) -> dict[str, float]:
        """FLOPs per activation, by part."""
        D, F, K, M, B = self.d_in, self.d_sae, self.k, self.active_width, self.batch
        router = 2 * D * self.n_experts if self.architecture == "switch" else 0
        dense = self.architecture == "topk"
        weights = 2 * self.rows * D
        return {
            "router": 3 * router,  # forward, and the gradients of W_router and b_router
            "encoder": 2 * D * M,
            "decoder": 2 * D * (F if dense else K),
            "latent gradient": 2 * D * (F if dense else K),
            "decoder gradient": 2 * D * (F if dense else K),
            "encoder gradient": 2 * D * (F if dense else K),
            "pre-bias gradient": 2 * D * (F if dense else self.rows / B),
            "clipping and constraint": (2 + (4 if self.architecture == "switch" else 0)) * weights / B,
            "optimiser": 12 * weights / B,
        }

    @property
    def memory(self) -> dict[str, int]:
        """Peak memory of a training step in bytes, by part."""
        B, D, K, n = self.batch, self.d_in, self.k, sum(self.parameters.values())
        masters = 4 * n if self.bytes_per_weight < 4 else 0
        matrices = 2 * D * self.d_sae
        if self.architecture == "topk":  # from the second step on, SAELens holds seven tensors of B x F
            latents = 7 * 4 * B * self.d_sae
        else:  # codes, their gradients and index, and the tile of pre-activations that top-k searches
            widest = max(self.expert_width, self.layout.shared_width)
            latents = B * K * (4 * 4 + 4 * 8) + 4 * 512 * min(widest, 1 << 15)
        return {
            "weights": self.bytes_per_weight * n,
            "gradients": self.bytes_per_weight * 2 * self.rows * D,
            "optimiser": 2 * (self.bytes_per_moment * matrices + 4 * (n - matrices)) + masters,
            "activations": (5 + self.n_active_experts + (self.n_shared_experts > 0)) * 4 * B * D,
            "latents": latents,
        }

    @property
    def bytes_moved(self) -> dict[str, float]:
        """Bytes moved between memory and processor in a step, by part."""
        w, B, D, F, K = self.bytes_per_weight, self.batch, self.d_in, self.d_sae, self.k
        # Latents that are shared, or of experts with at least one token.
        reached = self.layout.shared_width + min(self.n_experts, B * self.n_active_experts) * self.expert_width
        touched = 2 * w * self.rows * D
        moments = 4 * 2 * self.bytes_per_moment * self.rows * D  # two of both matrices, read and written
        if self.architecture == "topk":
            return {
                "dense latents, written": _DENSE_TENSORS * 4 * B * F,
                "dense latents, read": _DENSE_READS * _DENSE_TENSORS * 4 * B * F,
                "clipping": _CONSTRAINT_PASSES["topk"] * touched,
                "optimiser": 3 * touched + moments,
            }
        return {
            "router": w * D * self.n_experts,
            "encoder": w * D * reached,
            "decoder": w * B * K * D,
            "latent gradient": w * B * K * D,
            "weight gradients": 2 * w * B * K * D + touched,
            "pre-bias gradient": w * self.rows * D,
            "clipping and constraint": _CONSTRAINT_PASSES[self.architecture] * touched,
            "optimiser": 3 * touched + moments,
            "tokens": _TOKEN_PASSES * 4 * B * D,
        }

    def seconds(self, machine: Machine) -> dict[str, float]:
        """Predicted seconds of a training step, by part."""
        B, D, M, K = self.batch, self.d_in, self.active_width, self.k
        moved, flops = self.bytes_moved, self.flops
        if self.architecture == "topk":
            work = sum(flops[n] for n in flops if n in _MATRIX_PRODUCTS)
            return {
                "matrix products": B * work / machine.flops,
                "top-k": B * M / machine.select,
                "dense latents, written": moved["dense latents, written"] / machine.fresh,
                **{n: moved[n] / machine.stream for n in ("dense latents, read", "clipping", "optimiser")},
            }
        return {
            "router": B * flops["router"] / machine.flops,
            "encoder": B * flops["encoder"] / machine.flops + moved["encoder"] / machine.stream,
            "top-k": B * M / machine.select,
            "decoder": moved["decoder"] / machine.gather,
            "latent gradient": moved["latent gradient"] / machine.gather,
            "weight gradients": 8 * B * K * D / machine.regather + 2 * 4 * self.rows * D / machine.stream,
            **{
                name: moved[name] / machine.stream
                for name in ("pre-bias gradient", "clipping and constraint", "optimiser", "tokens")
            },
        }

    def step_seconds(self, machine: Machine) -> float:
        """Predicted seconds of a training step."""
        return sum(self.seconds(machine).values())


_MATRIX_PRODUCTS = (
    *("encoder", "decoder", "latent gradient"),
    *("decoder gradient", "encoder gradient", "pre-bias gradient"),
)
