"""The speed of a machine, described by six numbers or measured; only a measurement imports torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """The speed of a machine at the six things that a training step is made of.

    Args:
        flops: FLOPs per second of a matrix product, in the dtype of training.
        gather: Bytes per second of rows read at random from a matrix that does not fit into cache.
        regather: The same for a batch of activations, which may fit.
        stream: Bytes per second read or written sequentially.
        select: Pre-activations per second that top-k searches, at the width and k of the SAE.
        fresh: Bytes per second of memory that is written for the first time.

    Raises:
        ValueError: If a number is not positive.
    """

    flops: float
    gather: float
    regather: float
    stream: float
    select: float
    fresh: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive; got {value!r}")

    @classmethod
    def this_one(cls, d_in: int = 768, k: int = 32, expert_width: int = 24576, device: str = "cpu") -> "Machine":
        """Measure this machine, in a few seconds, at these sizes."""
        from sae_lens_switch_kernels.speed import measure_speed

        return cls(**measure_speed(d_in, k, expert_width, device))
