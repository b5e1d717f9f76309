"""What the compiler makes of the kernels, on a machine without a GPU; and the arithmetic behind the predictions."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from sae_lens_switch_kernels.triton_backend.adam import adam_rows_traffic, lazy_adam_rows_traffic  # noqa: E402
from sae_lens_switch_kernels.triton_backend.blocks import (  # noqa: E402
    Arch,
    candidate_block,
    gemm_blocks,
    registers_warps,
    row_block,
)
from sae_lens_switch_kernels.triton_backend.code_rows import (  # noqa: E402
    codes_traffic,
    dense_rows_traffic,
    sorted_rows_traffic,
)
from sae_lens_switch_kernels.triton_backend.counting_sort import sorted_places_traffic  # noqa: E402
from sae_lens_switch_kernels.triton_backend.gather import matmul_at_indices_traffic, sparse_decode_traffic  # noqa: E402
from sae_lens_switch_kernels.triton_backend.grouped_matmul import grouped_traffic  # noqa: E402
from sae_lens_switch_kernels.triton_backend.latent_weight_grads import latent_weight_grads_traffic  # noqa: E402
from sae_lens_switch_kernels.triton_backend.launch import Traffic  # noqa: E402
from sae_lens_switch_kernels.triton_backend.select_topk import select_topk_traffic  # noqa: E402
from sae_lens_switch_kernels.triton_backend.topk_rows import topk_rows_traffic  # noqa: E402

KERNELS = {
    "sparse_decode",
    "matmul_at_indices",
    "latent_weight_grads",
    "latent_weight_grads_pieces",
    "select_topk_maxima",
    "topk_rows",
    "count_above",
    "write_above",
    "grouped_matmul",
    "grouped_weight_grad",
    "sorted_rows",
    *(
        # These read and write codes, not rows of a matrix.
        CODES := {
            "code_grads",
            "count_codes",
            "count_digits",
            "dense_rows",
            "find_starts",
            "gated_row_grads",
            "gated_rows",
            "gated_codes",
            "place_by_digit",
            "take_in_rows",
        }
    ),
}
# The router is float32 whatever the SAE's dtype, and knows nothing of D; nor do the few numbers of a step.
ROUTER = {"route", "shares", "place_tokens", "route_backward", "update_loads", "update_expert_bias", "clip", "loss"}
# The loss, and all weights and their gradients, are float32.
FLOAT32 = {"adam_rows", "adam_tensors", "loss_backward", "loss_parts", "squares"}


def compile_all(file, *arguments: str) -> list[dict]:
    # An interpreted kernel cannot be compiled: the report runs in a process of its own.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sae_lens_switch_kernels.report", "--json", str(file), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())["kernels"]


def assert_good_code(rows: list[dict], archs: set[str], widths: set[int]) -> None:
    for name in KERNELS:
        mine = [row for row in rows if row["kernel"] == name]
        assert {row["arch"] for row in mine} == archs, name
        assert {D for row in mine for D in row["widths"]} == widths, name
        assert {dtype for row in mine for dtype in row["dtypes"]} >= {"fp32", "bf16"}, name
    for name in ROUTER:
        assert {row["arch"] for row in rows if row["kernel"] == name} == archs, name
    for name in FLOAT32:
        mine = [row for row in rows if row["kernel"] == name]
        assert {row["arch"] for row in mine} == archs, name
        assert {D for row in mine for D in row["widths"]} == widths, name
    for row in rows:
        assert row["spill_bytes"] == row["local_bytes"] == 0, f"spills: {row}"
        assert row["atomics"] == 0, f"atomics, so the order of a sum would be open: {row}"
        assert row["row_loads_narrow"] == 0, f"rows read in pieces of less than 128 bits: {row}"
        assert row["row_loads_128"] > 0 or row["kernel"] in CODES | ROUTER, f"no row read was found: {row}"


def test_no_spills_no_atomics_wide_loads(tmp_path):
    rows = compile_all(tmp_path / "report.json", "--quick", "--arch", "sm_90")
    assert_good_code(rows, {"sm_90"}, {768, 4096})
    # In 16 bits every product on Hopper is made of its wide instruction, however few tokens an expert has.
    products = [row for row in rows if row["kernel"].startswith("grouped_") and row["arch"] == "sm_90"]
    assert all(row["wide_products"] for row in products if row["dtypes"] == ["bf16"])
    assert sum(row["kernel"] == "grouped_matmul" and row["dtypes"] == ["bf16"] for row in products) >= 5


@pytest.mark.slow
def test_no_spills_no_atomics_wide_loads_everywhere(tmp_path):
    rows = compile_all(tmp_path / "report.json")
    assert_good_code(rows, {"sm_80", "sm_90", "sm_100", "gfx942"}, {576, 768, 2304, 4096, 8192, 16384})


def test_traffic_is_what_the_formulas_say():
    B, K, F, D, E, M = 4096, 32, 32768, 768, 32, 1024
    slices = 3  # of D, 256 columns each; each reads the indices again

    assert sparse_decode_traffic(B, K, F, D, itemsize=2, index_itemsize=4) == Traffic(
        flops=2 * B * K * D,
        streamed=slices * B * K * (2 + 4) + B * D * 2,
        gathered=B * K * D * 2,
        pool=F * D * 2,
        passes=slices,
    )
    assert matmul_at_indices_traffic(B, K, F, D, itemsize=2, index_itemsize=4) == Traffic(
        flops=2 * B * K * D,
        streamed=B * K * (2 + 4) + B * D * 2,
        gathered=B * K * D * 2,
        pool=F * D * 2,
    )
    assert latent_weight_grads_traffic(B, K, F, D, itemsize=4) == Traffic(
        flops=2 * 2 * B * K * D,
        streamed=slices * (8 * B * K + 8 * (F + 1) + 2 * 4 * B * K) + 2 * 4 * F * D + 4 * F,
        gathered=2 * 4 * B * K * D,
        pool=2 * 4 * B * D,
        passes=slices,
    )
    assert latent_weight_grads_traffic(B, K, F, D, itemsize=4, encoder=False) == Traffic(
        flops=2 * B * K * D,
        streamed=slices * (8 * B * K + 8 * (F + 1) + 4 * B * K) + 4 * F * D,
        gathered=4 * B * K * D,
        pool=4 * B * D,
        passes=slices,
    )
    # b = sqrt(F / k) = 32: 1024 maxima, written and read, and 1024 candidates a row; the k blocks too come with values
    assert select_topk_traffic(B, F, K, itemsize=2, vectors=2) == Traffic(
        flops=2 * B * (F + 1024),
        streamed=2 * B * F + 2 * 4 * B * 1024 + B * K * (4 + 8 + 8) + 2 * B * 1024 + B * K * (2 + 8),
        gathered=2 * 4 * (B // 4 * F + B * 1024),
        pool=2 * 4 * F,
    )
    assert topk_rows_traffic(B, M, K, itemsize=2, vectors=2) == Traffic(
        flops=2 * B * M, streamed=2 * B * M + B * K * (2 + 8), gathered=2 * 4 * B * M, pool=2 * 4 * M
    )
    # three digits of five bits: int64 keys read twice, then int32 ones, with their places, and both written
    assert sorted_places_traffic(B * K, F) == Traffic(flops=0, streamed=64 * B * K + 4 * (F + 1))
    assert sorted_places_traffic(B, E, itemsize=8) == Traffic(flops=0, streamed=(16 + 8) * B + 8 * (E + 1))
    assert sorted_rows_traffic(B, D, 4, 2).streamed == B * D * (4 + 2) + 8 * B + 4 * D
    assert codes_traffic(B, K, 4).streamed == B * K * (3 * 4 + 2 * 8) + B * (8 + 4)
    assert dense_rows_traffic(B, K, M, 4, 2, outputs=2).streamed == B * K * (2 * (4 + 2) + 8) + 2 * B * M * 2
    assert adam_rows_traffic(F, D, constrained=True, copy_itemsize=2) == Traffic(
        flops=22 * F * D, streamed=(7 * 4 + 2) * F * D + 4 * F
    )
    assert lazy_adam_rows_traffic(K, D, constrained=False) == Traffic(
        flops=16 * K * D, streamed=7 * 4 * K * D + (8 + 4 + 4) * K
    )
    assert grouped_traffic(B, D, M, E, itemsize=2) == Traffic(
        flops=2 * B * D * M, streamed=2 * (B * D + B * M + E * M * D) + 8 * (E + 1)
    )


def test_blocks_follow_from_shape_and_architecture():
    import torch

    assert row_block(48, lanes=32) == (64, 1)
    assert row_block(768, lanes=32) == (256, 1)
    assert row_block(768, lanes=64) == (512, 1)
    assert row_block(16384, lanes=32, max_warps=4) == (1024, 4)
    assert [candidate_block(F, 32) for F in (32, 96, 512, 32768, 65536)] == [1, 2, 4, 32, 64]
    assert [registers_warps(n, 32) for n in (1, 256, 1024, 2048, 4096, 16384)] == [1, 1, 1, 2, 4, 16]
    assert [registers_warps(n, 64) for n in (1, 1024, 4096, 16384)] == [1, 1, 2, 8]
    hopper, consumer, amd = Arch(32, 232448), Arch(32, 101376), Arch(64, 65536)
    for arch in (hopper, consumer, amd):
        for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
            for inner_contiguous in (False, True):
                blocks = gemm_blocks(4096, 4096, dtype, arch, tf32=tf32, inner_contiguous=inner_contiguous)
                used = (blocks.rows + blocks.columns) * blocks.inner * dtype.itemsize * blocks.num_stages
                assert used <= arch.shared
    assert gemm_blocks(5, 3, torch.bfloat16, hopper).rows == 16


def test_the_command_knows_the_architectures_and_widths_that_can_be_compiled():
    from sae_lens_switch_kernels import report
    from sae_lens_switch_kernels.triton_backend.compiled_code import TARGETS

    assert tuple(TARGETS) == report.ARCHITECTURES
    assert set(report.QUICK_ARCHITECTURES) < set(report.ARCHITECTURES)
    assert set(report.QUICK_WIDTHS) < set(report.WIDTHS)
