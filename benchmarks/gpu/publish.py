"""Tables and a picture from the results in docs/gpu, which benchmarks/publish.py puts into the pages that show them."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "gpu"
FIRST, MENDED, GRAPH, LAST = (RESULTS / name for name in ("1-first", "2-mended", "3-graph", "4-kernels"))
PICTURE = RESULTS / "error-against-seconds.png"
_WIDTHS = {
    "B 8,192 D 768 F 24,576 k 32": "B 8,192, D 768, F 24,576, k 32",
    "B 8,192 D 2,304 F 65,536 k 64": "B 8,192, D 2,304, F 65,536, k 64",
    "B 8,192 D 4,096 F 262,144 k 64": "B 8,192, D 4,096, F 262,144, k 64",
}
PRECISIONS = {"bf16": "bf16 autocast", "tf32": "TF32", "fp32": "float32"}

Cases = dict[str, dict[str, Any]]


def cases(folder: Path, stage: str) -> Cases:
    return json.loads((folder / f"{stage}.json").read_text())["cases"]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def steps() -> str:
    """Whole steps, beside SAELens's of the same call, or of the one before where the last did not measure it."""
    before, graph, last = (cases(folder, "steps") for folder in (FIRST, GRAPH, LAST))
    parts = []
    for width, said in _WIDTHS.items():
        rows = []
        for precision in PRECISIONS:
            stock = f"SAELens topk, {width}, {precision}"
            if stock not in graph:
                continue
            rows.append([PRECISIONS[precision], "SAELens `topk`", "", *_both(graph, last, stock), "", "1"])
            for name, case in graph.items():
                found = re.fullmatch(rf"(sparse_topk|switch), {width}(?: E (\d+))?, {precision}, graph", name)
                if found is None:
                    continue
                eager = before.get(name.removesuffix(", graph"), before.get(name.replace(", graph", ", adam"), {}))
                experts = f", {found[2]} experts" if found[2] else ""
                first = f"{eager['ms']:.1f}" if eager else ""
                newest = last if name in last else graph
                ratio = newest.get(stock, graph[stock])["ms"] / newest[name]["ms"]
                rows.append(["", f"`{found[1]}`{experts}", first, *_both(graph, last, name), f"{case['floor_ms']:.2f}"])
                rows[-1] += [f"**{ratio:.1f}**"]
        head = ["precision", said, "first call, ms", "`cuda_graph=True`, ms", "new kernels too, ms", "floor, ms"]
        head += ["x SAELens"]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def measured_steps() -> list[tuple[tuple[int, ...], int, str, float]]:
    """Of our SAEs in a graph: (B, D, F, k), experts, precision, and milliseconds in the last call that measured it."""
    found = []
    for name, case in (cases(GRAPH, "steps") | cases(LAST, "steps")).items():
        if match := re.fullmatch(
            r"(?:sparse_topk|switch), (B [\d,]+ D [\d,]+ F [\d,]+ k \d+)(?: E (\d+))?, (\w+), graph", name
        ):
            shape = tuple(int(n.replace(",", "")) for n in match[1].split()[1::2])
            found.append((shape, int(match[2] or 1), match[3], case["ms"]))
    return found


def _both(graph: Cases, last: Cases, name: str) -> list[str]:
    return [f"{calls[name]['ms']:.2f}" if name in calls else "" for calls in (graph, last)]


def short_cells() -> dict[str, list[str]]:
    """By SAE, a cell per precision, at the width of GPT-2's SAEs."""
    now, width = cases(LAST, "steps"), "B 8,192 D 768 F 24,576 k 32"
    kinds = {
        "SAELens `topk`": f"SAELens topk, {width}, {{}}",
        "`sparse_topk`": f"sparse_topk, {width}, {{}}, graph",
        "`switch`, 32 experts": f"switch, {width} E 32, {{}}, graph",
        "`switch`, 128 experts": f"switch, {width} E 128, {{}}, graph",
    }
    rows: dict[str, list[str]] = {}
    for said, name in kinds.items():
        rows[said] = []
        for precision in PRECISIONS:
            ms = now[name.format(precision)]["ms"]
            ratio = now[f"SAELens topk, {width}, {precision}"]["ms"] / ms
            rows[said].append(f"{ms:.2f} ms" + (f", {ratio:.1f} x" if ratio != 1 else ""))
    return rows


def short_steps() -> str:
    return table(["a training step", *PRECISIONS.values()], [[said, *cells] for said, cells in short_cells().items()])


def primitives() -> str:
    """Each of the last call that measured it."""
    found = cases(FIRST, "primitives") | cases(GRAPH, "primitives") | cases(LAST, "primitives")
    ceilings = [
        f"{n.removeprefix('ceiling, ')} {c['per_second'] / 1e12:.1f}" for n, c in found.items() if "ceiling" in n
    ]
    rows = []
    for name, case in found.items():
        if "times_floor" not in case:
            continue
        theirs = ", ".join(f"{n} {ms:.3f}" for n, ms in case["theirs_ms"].items() if isinstance(ms, float))
        rows.append([name, f"{case['ms']:.3f}", f"{case['floor_ms']:.3f}", f"{case['times_floor']:.1f}", theirs])
    said = f"Ceilings measured first: {', '.join(ceilings)} (T bytes or FLOPs per second)."
    return said + "\n\n" + table(["operation", "ms", "floor, ms", "x floor", "torch's own, ms"], rows)


def correctness() -> str:
    counts = []
    calls = {FIRST: "first call", MENDED: "after the first mends", GRAPH: "with graphs", LAST: "with the new kernels"}
    for folder, said in calls.items():
        found = cases(folder, "correctness")
        good = sum(case["status"] == "ok" for case in found.values())
        counts.append(f"{good} of {len(found)} cases ({said})")
    worst: dict[str, float] = defaultdict(float)
    for folder in calls:
        for name, case in cases(folder, "correctness").items():
            if case["status"] == "ok" and "errors" in case:
                precision = name.rsplit(", ", 1)[-1]
                worst[precision] = max(worst[precision], *case["errors"].values())
    kernel_tests = cases(LAST, "kernel-tests")["kernel tests"]["result"]
    names = {"fp32": "float32", "tf32": "TF32", "bf16": "bf16", "autocast": "bf16 autocast"}
    errors = ", ".join(f"{said} {worst[precision]:.1g}" for precision, said in names.items())
    return (
        f"Against dense float64: {'; '.join(counts)}. Largest error of a result in units of its norm: {errors}. The "
        f"kernels' own tests there: {kernel_tests}."
    )


def curves() -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with (GRAPH / "training.csv").open() as file:
        for row in csv.DictReader(file):
            found[row["sae"]].append({name: float(value) for name, value in row.items() if name != "sae"})
    return found


def training() -> str:
    found = curves()
    bar = found[next(iter(found))][-1]["error"]  # SAELens's at its end
    rows = []
    for name, curve in found.items():
        last = curve[-1]
        there = next((point["seconds"] for point in curve if point["error"] <= bar), None)
        rows.append(
            [name, f"{last['tokens'] / 1e6:.1f}", f"{last['error']:.4f}", f"{last['dead']:.0%}"]
            + [f"{there:.1f}" if there else "not reached"]
        )
    head = ["SAE", "million tokens in 10 s", "unexplained variance", "dead latents", f"seconds to {bar:.3f}"]
    return table(head, rows)


def picture() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, curve in curves().items():
        axes.plot([p["seconds"] for p in curve[1:]], [p["error"] for p in curve[1:]], label=name)
    axes.set(xlabel="seconds of training on one H200", ylabel="unexplained variance, held-out tokens", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})


BLOCKS = {
    "steps": steps,
    "short-steps": short_steps,
    "primitives": primitives,
    "correctness": correctness,
    "training": training,
}
