"""The k largest of every row on a CPU, by C that is compiled at first use, as Triton compiles its launcher.

torch.topk compares floats one by one and looks for NaN at each: four times the time (benchmarks/primitives.py). And a
row can be searched part by part, each while it is in cache. Where there is no C compiler, torch_topk.py does the same
with torch.topk.
"""

import ctypes
import os
from functools import cache

import torch
from torch import Tensor

from sae_lens_switch_kernels.cpu_search.compile import compiled

_FUNCTIONS = {torch.bfloat16: "update_bfloat16", torch.float32: "update_float32"}
_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
_LANES = 64  # a multiple of those of either dtype
# Stripes, whose maxima bound the k largest: so many that few rows have two of these in one, few to be searched.
_STRIPES_PER_K, _STRIPES, _FEWEST_PER_K = 16, 512, 4


def can_search(dtype: torch.dtype, device: torch.device, k: int, width: int) -> bool:
    """Whether ``TopK`` takes rows whose first part has this width. SAE_LENS_SWITCH_CPU_SEARCH=torch: never.

    Raises:
        ValueError: If the variable is set to anything else.
    """
    choice = os.environ.get("SAE_LENS_SWITCH_CPU_SEARCH", "")
    if choice not in ("", "torch"):
        raise ValueError(f"SAE_LENS_SWITCH_CPU_SEARCH must be 'torch' if set; got {choice!r}")
    is_wide = max(_STRIPES, _FEWEST_PER_K * k) <= width < 2**31
    fits = device.type == "cpu" and dtype in _FUNCTIONS and k > 0 and is_wide
    return fits and choice == "" and _library() is not None


class TopK:
    """The k largest of each of R rows, NaN being the largest; only where ``can_search``.

    Attributes:
        values_RK: What they are.
        indices_RK: Their columns, ascending.
    """

    def __init__(self, n_rows: int, k: int, dtype: torch.dtype, library: ctypes.CDLL | None = None) -> None:
        found = _library() if library is None else library
        assert found is not None
        self._update = found[_FUNCTIONS[dtype]]
        self._best_RK = torch.empty(n_rows, k, dtype=_BITS[dtype])
        self.values_RK = torch.empty(n_rows, k, dtype=dtype)
        self.indices_RK = torch.empty(n_rows, k, dtype=torch.long)

    def add(self, pre_RP: Tensor, rows: slice, first_column: int, ranked_RP: Tensor | None = None) -> None:
        """Search the next columns of some rows; those from column 0 on come first.

        Args:
            pre_RP: The columns.
            rows: Which rows they are of.
            first_column: Where they begin.
            ranked_RP: What is compared in their place.
        """
        (R, P), k = pre_RP.shape, self.values_RK.shape[1]
        ranked_RP = pre_RP if ranked_RP is None else ranked_RP
        found = (t[rows] for t in (self._best_RK, self.values_RK, self.indices_RK))
        n_stripes = min(max(_STRIPES, _STRIPES_PER_K * k), P) // _LANES * _LANES
        # The memory is kept alive by this frame; the call lets go of the interpreter's lock.
        arguments = (
            *(n for t in (ranked_RP, pre_RP) for n in (ctypes.c_void_p(t.data_ptr()), t.stride(0))),
            *(R, P, k, n_stripes, first_column, first_column == 0),
            *(ctypes.c_void_p(t.data_ptr()) for t in found),
        )
        arguments = (ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments)
        if self._update(*arguments):
            raise MemoryError(f"no memory for the top {k} of {P} numbers")


@cache
def _library() -> ctypes.CDLL | None:
    library = compiled()
    return library if library is not None and all(_agrees(library, dtype) for dtype in _FUNCTIONS) else None


def _agrees(library: ctypes.CDLL, dtype: torch.dtype) -> bool:
    """Whether it finds what torch finds, among them ties, infinities and NaN."""
    k, F, width = 7, 3 * _STRIPES + 65, _STRIPES + 1
    pre_RF = torch.arange(5 * F, dtype=torch.float32).mul_(0.37).sin_().view(5, F).to(dtype)
    pre_RF[1], pre_RF[2] = 0, -pre_RF[2].abs() - 1
    pre_RF[3, 11:14], pre_RF[4, -17:-15] = torch.inf, torch.nan
    found = TopK(5, k, dtype, library)
    for start in range(0, F, width):
        found.add(pre_RF[:, start : start + width], slice(0, 5), start)
    indices_RK = found.indices_RK
    if not bool(((indices_RK >= 0) & (indices_RK < F)).all() and (indices_RK.diff() > 0).all()):
        return False
    values = (found.values_RK, pre_RF.gather(1, indices_RK), pre_RF.topk(k).values)
    ours, chosen, theirs = (t.nan_to_num(9).sort().values for t in values)
    return torch.equal(ours, theirs) and torch.equal(chosen, theirs)
