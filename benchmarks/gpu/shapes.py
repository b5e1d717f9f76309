"""Shapes, and the least that an operation at one must do: every byte moved once, every needed product multiplied."""

from __future__ import annotations

from typing import Any, NamedTuple


class Shape(NamedTuple):
    B: int
    D: int
    F: int
    K: int
    E: int = 1

    @property
    def M(self) -> int:
        return self.F // self.E

    def __str__(self) -> str:
        return f"B {self.B:,} D {self.D:,} F {self.F:,} k {self.K}" + (f" E {self.E}" if self.E > 1 else "")


class Work(NamedTuple):
    flops: int
    bytes: int

    def __add__(self, other: Any) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


class Ceilings(NamedTuple):
    """Bytes and FLOPs a second: measured by the stage `primitives`, else an H100's as they are commonly reached."""

    copy: float = 3.0e12
    fp32: float = 5.5e13
    tf32: float = 4.0e14
    bf16: float = 7.9e14

    def ms(self, work: Work, precision: str) -> float:
        return 1e3 * max(work.flops / getattr(self, precision), work.bytes / self.copy)


def ceilings_of(primitives: dict[str, dict[str, Any]]) -> Ceilings:
    """From the cases of the stage `primitives`, as far as they were measured."""
    cases = {name: primitives.get(f"ceiling, {name}", {}) for name in Ceilings._fields}
    return Ceilings(**{name: case["per_second"] for name, case in cases.items() if "per_second" in case})


def decode(s: Shape, size: int) -> Work:
    """sparse_decode; matmul_at_indices reads what this writes, and the other way round."""
    rows = min(s.F, s.B * s.K)
    return Work(2 * s.B * s.K * s.D, s.B * s.K * (size + 8) + (rows + s.B) * s.D * size)


def weight_grads(s: Shape, size: int) -> Work:
    """Both: index, codes and their gradients, g and x read, two matrices written."""
    index, codes = 8 * (s.B * s.K + s.F + 1), 2 * s.B * s.K * size
    return Work(4 * s.B * s.K * s.D, index + codes + 2 * (s.B + s.F) * s.D * size)


def grouped(s: Shape, size: int) -> Work:
    """Any of the three products of tokens with their own expert."""
    return Work(2 * s.B * s.D * s.M, (s.B * s.D + s.B * s.M + s.F * s.D) * size)


def select(s: Shape, size: int) -> Work:
    return Work(0, s.B * s.M * size + s.B * s.K * (size + 8))


def encode(s: Shape, size: int) -> Work:
    return Work(2 * s.B * s.D * s.M, (s.B * s.D + s.F * s.D) * size + s.B * s.K * (size + 8))


def index(s: Shape) -> Work:
    """A sort of int64 keys and positions in one pass, and where each latent begins."""
    return Work(0, 3 * 8 * s.B * s.K + 8 * (s.F + 1))


def adam(n_parameters: int, copy_size: int = 0) -> Work:
    """Weight and both moments read and written, the gradient read, all float32; a copy written, if it has a size."""
    return Work(0, (28 + copy_size) * n_parameters)


def step_ms(s: Shape, precision: str, c: Ceilings) -> float:
    """The floor of a whole training step: the parts one after the other, each at its own ceiling.

    Inside an expert the cheaper of sparse and dense products counts. Clipping reads the gradients once; sixteen passes
    over float32 tensors of the batch's size are loss, bias and routing.
    """
    size = 2 if precision == "bf16" else 4
    sparse = 2 * c.ms(decode(s, size), precision) + c.ms(index(s), precision) + c.ms(weight_grads(s, size), precision)
    dense = 4 * c.ms(grouped(s, size), precision)
    parameters = 2 * s.F * s.D
    rest = Work(2 * s.B * s.D * s.E if s.E > 1 else 0, 16 * 4 * s.B * s.D + 4 * parameters)
    parts = (encode(s, size), rest, adam(parameters))
    return sum(c.ms(work, precision) for work in parts) + min(sparse, dense)
