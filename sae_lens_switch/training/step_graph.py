"""A training step as one CUDA graph: one call of the host replays hundreds of launches."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sae_lens_switch.common.types import AnyTrainingSAE
from sae_lens_switch.saes.sparse_sae import SparseTrainingSAE
from sae_lens_switch.training.field_rules import OptimizerName

T = TypeVar("T")
# Kernels are compiled, and moments made, by the first steps; none of that can be captured.
_STEPS_BEFORE = 3


class StepGraph(Generic[T]):
    """Calls ``step(x_BD)``: the first few times as it is, then captured, then replayed.

    Captured, a step reads and writes the memory that it did then: ``step`` must take all that changes from tensors, and
    must not wait for the device. What it returns is overwritten by the next replay. On a CPU nothing is captured, but
    batches go through the same memory.
    """

    def __init__(self, step: Callable[[Tensor], T]) -> None:
        self.step = step
        self.forget()

    def forget(self) -> None:
        """Capture anew: what was captured works on tensors that have been replaced."""
        self.x_BD: Tensor | None = None
        self.n_calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: T | None = None

    def __call__(self, x_BD: Tensor) -> T:
        if self.x_BD is None:
            self.x_BD = x_BD.clone()
        if (x_BD.shape, x_BD.dtype) != (self.x_BD.shape, self.x_BD.dtype):  # the last batch of an epoch, say
            return self.step(x_BD)
        self.x_BD.copy_(x_BD)
        self.n_calls += 1
        if x_BD.device.type != "cuda":
            return self.step(self.x_BD)
        with torch.cuda.device(x_BD.device):  # streams and graphs are the current device's
            return self._on_gpu(self.x_BD)

    def _on_gpu(self, x_BD: Tensor) -> T:
        if self.n_calls <= _STEPS_BEFORE:
            return self._aside(x_BD)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # torch's own stream for captures is that of the device where it first captured.
            with torch.cuda.graph(self.graph, stream=torch.cuda.Stream()):
                self.output = self.step(x_BD)
        self.graph.replay()
        assert self.output is not None
        return self.output

    def _aside(self, x_BD: Tensor) -> T:
        """On another stream than the default one, as torch asks of the steps before a capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = self.step(x_BD)
        torch.cuda.current_stream().wait_stream(stream)
        return output


def check_capturable(sae: AnyTrainingSAE, optimizer: OptimizerName) -> None:
    """Raises ValueError for an SAE or an optimiser whose step waits for the device."""
    sparse = sae if isinstance(sae, SparseTrainingSAE) else None
    for name, fits in {
        f"an SAE with sparse codes, not {sae.cfg.architecture()!r}": sparse is not None,
        "optimizer='adam'": optimizer == "adam",
        "aux_loss_coefficient=0, or an aux_k up to the latents of an expert for all levels together": sparse is None
        or not sparse.needs_dead_mask
        or sparse.can_mask_dead,
    }.items():
        if not fits:
            raise ValueError(f"cuda_graph must be False without {name}; got True")
