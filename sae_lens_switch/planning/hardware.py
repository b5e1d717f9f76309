"""What a cluster is made of, as far as the time and the memory of a training step depend on it."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from sae_lens_switch.common.speed import Machine
from sae_lens_switch.planning.step_cost import check_sizes

Precision = Literal["float32", "tf32", "bfloat16"]
_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Hardware:
    """Equal GPUs in equal nodes.

    Args:
        name: What they are called.
        memory: Bytes per GPU.
        flops: FLOPs per second of large matrix products, by precision.
        machine: The other speeds of a GPU; its ``flops`` are those in float32.
        gpus_per_node: GPUs that ``link`` connects.
        link: Bytes per second that a GPU sends to others of its node.
        network: Bytes per second that a GPU sends to other nodes.
        latency: Seconds that a collective operation takes at least.

    Raises:
        ValueError: For a memory or a speed of the network that is not positive and finite, or nodes without a GPU.
    """

    name: str
    memory: float
    flops: dict[Precision, float]
    machine: Machine
    gpus_per_node: int = 8
    link: float = 450 * _GIGA
    network: float = 50 * _GIGA
    latency: float = 30e-6

    def __post_init__(self) -> None:
        check_sizes({"gpus_per_node": self.gpus_per_node})
        for name in ("memory", "link", "network"):
            value = vars(self)[name]
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive finite number; got {value!r}")

    def at(self, precision: Precision) -> Machine:
        """The speeds of a GPU, with matrix products in ``precision``."""
        return replace(self.machine, flops=self.flops[precision])


def _scaled(name: str, memory: float, bandwidth: float, flops: dict[Precision, float], link: float) -> Hardware:
    """A GPU that was not measured: what memory limits scales with its bandwidth, products are given."""
    ratio = bandwidth / _H200_BANDWIDTH
    speeds = {n: ratio * v for n, v in vars(_H200.machine).items() if n != "flops"}
    return Hardware(name, memory, flops, Machine(flops=flops["float32"], **speeds), link=link)


# Measured (docs/gpu): copy, products, decode, weight gradients and top-k at B 8,192, D 768, F 24,576, k 32, in float32.
# The links are those of the data sheet (NVLink) and of one 400 Gb/s network card per GPU.
_H200 = Hardware(
    "h200",
    memory=141 * _GIGA,
    flops={"float32": 51.2 * _TERA, "tf32": 408 * _TERA, "bfloat16": 706 * _TERA},
    machine=Machine(
        flops=51.2 * _TERA,
        gather=8.4 * _TERA,
        regather=5.8 * _TERA,
        stream=4.3 * _TERA,
        select=0.146 * _TERA,
        fresh=4.3 * _TERA,
    ),
)
_H200_BANDWIDTH = 4.8 * _TERA
# Predicted from the H200's numbers: the H100 computes alike, the A100 at the same fraction of its data sheet.
HARDWARE = {
    "h200": _H200,
    "h100": _scaled("h100", 80 * _GIGA, 3.35 * _TERA, _H200.flops, 450 * _GIGA),
    "a100": _scaled(
        *("a100", 80 * _GIGA, 2.04 * _TERA),
        {"float32": 15 * _TERA, "tf32": 130 * _TERA, "bfloat16": 223 * _TERA},
        300 * _GIGA,
    ),
}
