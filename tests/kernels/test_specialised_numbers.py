"""Numbers of tokens, codes or active latents differ from step to step, and no kernel is compiled anew for them."""

import pkgutil
from collections import defaultdict
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

import pytest
import torch
from helpers.pretended_gpu import on_device

pytest.importorskip("triton")

from sae_lens_switch_kernels import backend, triton_backend  # noqa: E402
from sae_lens_switch_kernels.indexing import CodeRows, ExpertGroups, LatentIndex  # noqa: E402
from sae_lens_switch_kernels.row_grads import minus_weighted_sum  # noqa: E402
from sae_lens_switch_kernels.triton_backend import predict  # noqa: E402
from sae_lens_switch_kernels.triton_backend.blocks import Arch  # noqa: E402
from sae_lens_switch_kernels.triton_backend.codes_above import write_above  # noqa: E402
from sae_lens_switch_kernels.triton_backend.launch import Launch, recording  # noqa: E402
from sae_lens_switch_kernels.triton_backend.select_topk import select_topk  # noqa: E402

HOPPER = Arch(lanes=32, shared=232448)
# What Triton compiles for: widths, strides and numbers of experts, which a run keeps.
FIXED = {
    "_adam_rows_kernel": {"D", "last", "moments_stride"},
    "_adam_tensors_kernel": {*(f"n{i}" for i in range(4)), *(f"end{i}" for i in range(3))},
    "_code_grads_kernel": {"K"},
    "_count_codes_kernel": {"K"},
    "_count_above_kernel": {"stride", "P"},
    "_dense_rows_kernel": {"E", "K", "M"},
    "_gated_codes_kernel": {"K"},
    "_gated_row_grads_kernel": {"E", "K", "M"},
    "_gated_rows_kernel": {"E", "K", "M"},
    "_grouped_matmul_kernel": {"E", "C", "N"},
    "_grouped_weight_grad_kernel": {"M", "D"},
    "_latent_weight_grads_kernel": {"D"},
    "_latent_weight_grads_pieces_kernel": {"D"},
    "_loss_backward_kernel": {"D"},
    "_loss_kernel": {"D"},
    "_loss_parts_kernel": {"D"},
    "_matmul_at_indices_kernel": {"D"},
    "_place_tokens_kernel": {"E"},
    "_route_backward_kernel": {"E"},
    "_route_kernel": {"E"},
    "_select_topk_maxima_kernel": {"F", "n_blocks"},
    "_shares_kernel": {"E"},
    "_sorted_rows_kernel": {"D"},
    "_sparse_decode_kernel": {"K", "D"},
    "_take_in_rows_kernel": {"E", "K", "M"},
    "_topk_rows_kernel": {"F", "n_blocks", "E"},
    "_update_expert_bias_kernel": {"E"},
    "_update_loads_kernel": {"E"},
    "_write_above_kernel": {"stride", "P"},
}


def constants(kernel: Any) -> set[str]:
    return {p.name for p in signature(kernel.fn).parameters.values() if "constexpr" in str(p.annotation)}


def unspecialised(kernel: Any) -> set[str]:
    """Of a kernel for the interpreter, or for a GPU."""
    names = kernel.kwargs["do_not_specialize"] if hasattr(kernel, "kwargs") else kernel.do_not_specialize
    return set(names or ())


def test_numbers_that_kernels_are_compiled_for_are_those_that_a_run_keeps():
    """A new kernel, or a new number, is to be entered above or into ``do_not_specialize``."""
    names = [f"{triton_backend.__name__}.{m.name}" for m in pkgutil.iter_modules(triton_backend.__path__)]
    kernels = {name for module in map(import_module, names) for name in vars(module) if name.endswith("_kernel")}
    with recording(HOPPER) as launches:
        for operation in predict.operations(768, "fp32"):
            operation.run()
    assert {launch.kernel.__name__ for launch in launches} == kernels
    found = defaultdict(set)
    for launch in launches:
        numbers = {name for name, value in launch.arguments.items() if isinstance(value, int)}
        if compiled_for := numbers - constants(launch.kernel) - unspecialised(launch.kernel):
            found[launch.kernel.__name__] |= compiled_for
    assert dict(found) == FIXED


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return on_device(*shape, dtype=dtype)


def places(*shape: int) -> torch.Tensor:
    return on_device(*shape, dtype=torch.int64)


B, D, F, K, E = 512, 768, 24576, 32, 32
W, x = empty(F, D), empty(B, D)


def groups(B: int) -> ExpertGroups:
    return ExpertGroups(places(B), places(E + 1))


def index(S: int, F: int) -> LatentIndex:
    return LatentIndex(places(S), places(F + 1))


CALLS: dict[str, Callable[[int], Any]] = {
    "Adam, active latents": lambda n: triton_backend.lazy_adam_rows(
        *(W, empty(n, D), empty(F, 2, D)[:, 0], empty(F, 2, D)[:, 1], empty(F), places(n), 1e-3, 0.9, 0.999, 1e-8)
    ),
    "clip, active latents": lambda n: triton_backend.clip([empty(n, D), empty(n), x], empty(), 1.0),
    "weight gradients, active latents": lambda n: triton_backend.latent_weight_grads(
        *(index(B * K, n), empty(B, K), x, empty(B, K), x)
    ),
    "weight gradients, few dead latents": lambda n: triton_backend.latent_weight_grads(
        *(index(B * n, F), empty(B, n), x, empty(B, n), x)
    ),
    "weight gradients, codes over the batch": lambda n: triton_backend.latent_weight_grads(
        *(index(n, F), empty(n), x, empty(n), x, CodeRows(places(B + 1), places(n), 1))
    ),
    "sum over active latents": lambda n: minus_weighted_sum(empty(n), places(n), W),
    "decoder, codes over the batch": lambda n: triton_backend.sparse_decode(empty(n), places(n), W, places(B + 1)),
    "dots, few dead latents": lambda n: triton_backend.matmul_at_indices(x, W, places(B, n)),
    "dots, codes over the batch": lambda n: triton_backend.matmul_at_indices(x, W, places(n), places(B + 1)),
    "counts, codes over the batch": lambda n: triton_backend.count_codes(
        *(empty(n), places(n), empty(dtype=torch.bool), n, empty(F, dtype=torch.int32), places(F))
    ),
    "codes above their thresholds": lambda n: write_above(empty(B, F), empty(F), None, None, places(B + 1), n),
    "index, codes": lambda n: triton_backend.latent_index(places(n), F),
    "index, latents": lambda n: triton_backend.latent_index(places(B, K), n),
    "groups, tokens": lambda n: triton_backend.expert_groups(places(n), E),
    "rows, tokens": lambda n: triton_backend.sorted_rows(empty(n, D), empty(D), groups(n), torch.float32),
    "codes, tokens": lambda n: triton_backend.sorted_codes(empty(n, K), places(n, K), empty(n), groups(n)),
    "gradients of codes, tokens": lambda n: triton_backend.code_grads(
        *(empty(n, K), empty(n, K), empty(n), None, groups(n))
    ),
    "encoder, tokens": lambda n: triton_backend.grouped_encode(empty(n, D), W, groups(n), torch.float32),
    "decoder within experts, tokens": lambda n: triton_backend.gated_decode(
        *(empty(n, K), places(n, K), empty(n), W, groups(n), torch.float32)
    ),
    "selection, tokens": lambda n: select_topk(empty(n, F), K),
    "selection, few dead latents": lambda n: select_topk(empty(B, 8192), n),
    "router, tokens": lambda n: triton_backend.route(empty(n, E)),
    "router, tokens, many experts": lambda n: triton_backend.route(empty(n, 512)),
    "router's gradient, tokens": lambda n: triton_backend.route_backward(
        *(empty(n, E), places(n), empty(n, E), empty(n), empty(E), empty(), empty(E))
    ),
    "loss, tokens": lambda n: triton_backend.loss(empty(n, D), empty(D), empty(n, D), empty(), 1.0, None),
    "loss's gradient, tokens": lambda n: triton_backend.loss_backward(
        *(empty(n, D), empty(n, D), empty(), empty(n - 4000, D), None, empty(), None, None)
    ),
}


def compiled_for(launch: Launch) -> list[Any]:
    """All that decides whether Triton has to compile a launch."""
    facts: list[Any] = [launch.kernel.__name__, launch.num_warps, launch.num_stages]
    fixed, free = constants(launch.kernel), unspecialised(launch.kernel)
    for name, value in launch.arguments.items():
        if isinstance(value, torch.Tensor):
            facts.append((name, value.dtype, value.storage_offset() * value.itemsize % 16 == 0))
        elif name in fixed or not isinstance(value, int):
            facts.append((name, value))
        else:
            facts.append((name, value >= 2**31, name in free or (value == 1, value % 16 == 0)))
    return facts


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_compiled_anew_where_there_are_more_or_fewer(name, monkeypatch):
    monkeypatch.setenv("SAE_LENS_SWITCH_BACKEND", "triton")
    monkeypatch.setattr(backend, "_proven", lambda *_: True)
    found = []
    for n in (4080, 4087):  # of which one is a multiple of 16
        with recording(HOPPER) as launches:
            CALLS[name](n)
        assert launches
        found.append([compiled_for(launch) for launch in launches])
    assert found[0] == found[1]
