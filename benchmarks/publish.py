"""Every measured table in README.md and docs/, made from the JSON files of the runs that measured it.

python benchmarks/publish.py            # rewrites the marked parts of the pages
python benchmarks/publish.py --check    # exit code 1 if a page does not show what the results say

``docs/measured/`` holds what `make bench`, `make quickstart`, `recall.py`, `duplicates.py` and `processes.py` write to
``runs/``; to publish new numbers, copy ``bench.json``, ``row_sparse.json``, ``inference.json``,
``quickstart/metrics.json``, ``recall.json``, ``duplicates.json`` and ``processes.json`` there. ``docs/gpu/`` holds what
`make gpu-check` writes. ``docs/experiments/`` holds the CSVs of the experiments: examples/experiments/published.py
makes their tables.
A page marks the place of a table by ``<!-- measured: name -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import clusters
from gpu import publish as gpu
from gpu.publish import ROOT, table

sys.path.insert(0, str(ROOT / "examples" / "experiments"))
import published

RESULTS = ROOT / "docs" / "measured"
PAGES = [
    *(ROOT / name for name in ("README.md", "kernels/README.md")),
    *(ROOT / "docs" / f"{name}.md" for name in ("faq", "training", "ecosystem", "billion")),
    gpu.RESULTS / "README.md",
    published.SHORT / "README.md",
]
_NAMES = {
    "SAELens topk": "SAELens `topk`, rescaling (its default)",
    "SAELens topk, no rescaling": "SAELens `topk`, no rescaling",
    "SAELens topk, sparse mode": "SAELens `topk`, sparse mode, no rescaling",
    "sparsify": "sparsify 1.3.3, eager",
    "ours: sparse_topk": "**`sparse_topk`**",
    "ours: sparse_topk, bfloat16 encoder": "**`sparse_topk`, bfloat16 encoder**",
    "ours: sparse_batchtopk": "**`sparse_batchtopk`**",
    "ours: sparse_matryoshka_batchtopk": "**`sparse_matryoshka_batchtopk`, five widths**",
    "SAELens batchtopk": "SAELens `batchtopk`",
    "SAELens matryoshka_batchtopk": "SAELens `matryoshka_batchtopk`, five widths",
    "all experts, masked, 32 experts": "Switch formula, 32 experts, all computed and masked",
    "all experts, masked, 2 of 32 experts": "the same with 2 active experts",
    "all experts, masked, 32 experts and 1 shared": "the same with a shared expert",
}


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def bench_rows() -> dict[str, dict[str, Any]]:
    return read("bench.json")["results"]


def switch_rows() -> dict[str, dict[str, Any]]:
    """By the number of experts."""
    return {
        name.split()[2]: row for name, row in bench_rows().items() if re.fullmatch(r"ours: switch, \d+ experts", name)
    }


def times(row: dict[str, Any]) -> str:
    ratio = row["faster_than_SAELens"]
    return "1" if ratio == 1 else f"{ratio:.1f} x" if ratio < 20 else f"{ratio:.0f} x"


def bench() -> str:
    """Every contestant of `make bench`."""
    rows = []
    for name, row in bench_rows().items():
        said = _NAMES.get(name) or f"**`switch`{name.removeprefix('ours: switch')}**"
        both = row["forward_backward_ms"]
        rows.append([said, "" if both is None else f"{both:,.0f} ms", f"{row['step_ms']:,.0f} ms", times(row)])
        rows[-1] += [f"{row['times_the_bare_encoder']:.2f}", f"{row['peak_GB']:.2f} GB"]
    head = ["one training step", "forward, backward", "whole step", "against SAELens", "against `x @ W_enc`"]
    return table([*head, "peak memory"], rows)


def speed() -> str:
    """A step on a CPU and on a GPU, one row each of the baseline, the fastest other implementation, and ours."""
    here, there = bench_rows(), gpu.short_cells()
    rows = []
    for said, name in {
        "SAELens `topk`": "SAELens topk",
        "[sparsify](https://github.com/EleutherAI/sparsify) 1.3.3": "sparsify",
        "`sparse_topk`": "ours: sparse_topk",
        "Switch, 32 experts, all computed and masked": "all experts, masked, 32 experts",
        "`switch`, 32 experts": "ours: switch, 32 experts",
        "`switch`, 128 experts": "ours: switch, 128 experts",
    }.items():
        seconds, ratio = here[name]["step_ms"] / 1e3, times(here[name])
        cell = f"{seconds:.2f} s" + (f", {ratio}" if ratio != "1" else "")
        rows.append([said, cell, *there.get(said, [""] * len(gpu.PRECISIONS))])
    return table(["a training step", "CPU, float32", *(f"GPU, {said}" for said in gpu.PRECISIONS.values())], rows)


def speed_up() -> str:
    found, experts = bench_rows(), switch_rows()
    topk, sparsify = found["ours: sparse_topk"], found["sparsify"]
    slowest, fastest = (f(row["faster_than_SAELens"] for row in experts.values()) for f in (min, max))
    return (
        f"On two CPU cores, against SAELens's own dense TopK step in the same process: `sparse_topk` {times(topk)}, "
        f"`switch` with {', '.join(experts)} experts {slowest:.0f} x to {fastest:.0f} x (d_in 768, 24,576 latents, "
        "k 32, batch 4,096). A step of sparsify takes "
        f"{sparsify['step_ms'] / topk['step_ms']:.1f} times as long as one of `sparse_topk`."
    )


def row_sparse() -> str:
    results = read("row_sparse.json")["results"]
    head = ["latents", *(f"{row['d_sae']:,}" for row in results["adam"])]
    return table(head, [[f"`{name}`", *(f"{row['ms']:,.0f} ms" for row in rows)] for name, rows in results.items()])


def inference() -> str:
    """Encode and decode of loaded SAEs; memory beside weights and input."""
    rows = []
    for name, row in read("inference.json")["results"].items():
        ms = [f"{row[f'{form}_ms']:,.0f} ms" for form in ("SAELens", "sparse")]
        peaks = [f"{row[f'{form}_GB']:.2f} GB" for form in ("SAELens", "sparse")]
        rows.append([f"`{name}`", *ms, f"{row['time_ratio']:.2f}", *peaks, f"{row['memory_ratio']:.2f}"])
    head = ["encode and decode", "SAELens", "here", "ratio", "SAELens, memory", "here", "ratio"]
    return table(head, rows)


def quickstart() -> str:
    found = read("quickstart.json")
    ce = ", ".join(f"{found[f'ce_loss_{name}']:.3f}" for name in ("without_sae", "with_sae", "with_ablation"))
    load = found["expert_load"]
    row = [f"{found['explained_variance']:.3f}", ce, f"{found['ce_loss_recovered']:.3f}"]
    row += [f"{min(load):.1%} to {max(load):.1%}", f"{found['dead_latents']:,} of 4,608"]
    head = ["explained variance", "CE loss: model, with SAE, ablated", "CE loss recovered", "expert load"]
    return table([*head, "dead latents"], [row])


def recall() -> str:
    """Of the exactly selected latents, those among each precision's candidates, at the default margin."""
    rows = []
    for row in read("recall.json")["recall"]:
        if row["is_default"]:
            found = [f"{row[name]:.4%}" for name in ("by_count", "by_weight")]
            shares = [f"{row[name]:.2%}" for name in ("tokens_that_miss_one", "tokens_in_doubt")]
            rows.append([f"{row['d_sae']:,}", row["precision"], str(row["candidates"]), *found, *shares])
    head = ["latents", "precision", "candidates", "found, by count", "by weight", "tokens that miss one", "in doubt"]
    return table(head, rows)


def recall_curves() -> str:
    """How far the errors of training in low precision are from those in full, step by step."""
    found = read("recall.json")
    full = found["curves"]["full"]
    sentences = []
    for precision, errors in found["curves"].items():
        if precision != "full":
            off = [abs(e / f - 1) for e, f in zip(errors, full, strict=True)]
            last = sum(errors[-20:]) / sum(full[-20:]) - 1
            sentences.append(f"at most {max(off):.1%} in {precision} (over the last 20 steps {last:+.2%})")
    return (
        f"In training {found['curves_at']:,} latents on the same batches, a step's error differs from that in full "
        f"precision by {' and '.join(sentences)}."
    )


def duplicates() -> str:
    """Means over the seeds, and the range of the errors."""
    by_coefficient: dict[float, list[dict[str, float]]] = {}
    for row in read("duplicates.json")["results"]:
        by_coefficient.setdefault(row["coefficient"], []).append(row)
    names = [f"decoder_{c}" for c in (0.7, 0.8, 0.9)] + ["encoder_0.7", "dead"]
    rows = []
    for coefficient, found in by_coefficient.items():
        errors = [row["fvu"] for row in found]
        counts = [f"{sum(row[name] for row in found) / len(found):.0f}" for name in names]
        rows.append([f"{coefficient:g}", f"{sum(errors) / len(errors):.4f}", f"{min(errors):.4f} to {max(errors):.4f}"])
        rows[-1] += counts
    head = [
        "`expert_overlap_coefficient`",
        "FVU",
        "range",
        "decoder rows > 0.7",
        "> 0.8",
        "> 0.9",
        "encoder rows > 0.7",
    ]
    return table([*head, "dead"], rows)


BLOCKS = {
    "duplicates": duplicates,
    "recall": recall,
    "recall-curves": recall_curves,
    "bench": bench,
    "speed": speed,
    "speed-up": speed_up,
    "row-sparse": row_sparse,
    "inference": inference,
    "quickstart": quickstart,
    **{f"gpu-{name}": block for name, block in gpu.BLOCKS.items()},
    **published.BLOCKS,
    **clusters.BLOCKS,
}


@cache
def _made(name: str) -> str:
    return BLOCKS[name]()


def filled(page: str) -> str:
    """The page with everything between a mark and its end made anew."""

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}\n{_made(found[2])}\n{found[3]}"

    return re.sub(r"(<!-- measured: ([\w-]+) -->)\n.*?(<!-- end -->)", block, page, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    stale = [page for page in PAGES if filled(page.read_text()) != page.read_text()]
    for page in stale:
        print(f"{'stale' if check else 'written'}: {page.relative_to(ROOT)}")
        if not check:
            page.write_text(filled(page.read_text()))
    if not check:
        gpu.picture()
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
