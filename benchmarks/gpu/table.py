"""The short table at the end: what is wrong, and the numbers that decide, in at most 40 lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu.record import Record

Cases = dict[str, dict[str, Any]]

LINES = 40
WIDTH = 118


def table(output: Path, stages: Sequence[str]) -> str:
    names = [*stages, *(["kernel-tests"] if (output / "kernel-tests.json").exists() else [])]
    found = [of_stage(name, Record(output / f"{name}.json")) for name in names]
    lines: list[str] = []
    for i, of_one in enumerate(found):  # an equal share of what is left, so that short stages leave room to others
        lines += of_one[: (LINES - len(lines)) // (len(found) - i)]
    return "\n".join(line[:WIDTH] for line in lines)


def of_stage(name: str, record: Record) -> list[str]:
    """A head line, then what failed, then numbers."""
    counts = Counter(case["status"] for case in record.cases.values())
    head = f"== {name}: " + (", ".join(f"{n} {status}" for status, n in counts.items()) or "nothing was run")
    about = record.data["about"]
    if "device" in about:
        head += f"; {about['device']}, torch {about['torch']}, triton {about['triton']}"
    lines = [head]
    if record.data.get("error"):
        lines.append("STOPPED: " + record.data["error"].strip().split("\n")[-1])
    for case, found in record.cases.items():
        if found["status"] != "ok":
            lines.append(f"{found['status'].upper()}: {case}: {found.get('error') or found.get('result', '')}")
        lines += [f"WARNED: {case}: {message}" for message in found.get("warnings", [])]
    rows = (ROW.get(name, empty)(case, found, record.cases) for case, found in record.cases.items())
    return lines + [row for row in rows if row]


def empty(_case: str, _found: dict[str, Any], _cases: Cases) -> str:
    return ""


def correctness(case: str, found: dict[str, Any], _cases: Cases) -> str:
    operators = {name: len(messages) for name, messages in found.get("nondeterministic", {}).items()}
    return f"{case}: {operators}" if operators else ""


def primitive(case: str, found: dict[str, Any], _cases: Cases) -> str:
    if "per_second" in found:
        return f"{case:60}{found['per_second'] / 1e12:9.2f} T/s"
    if "M/K" in found:
        return f"{case:60}sparse {found['sparse_ms']:.3f} ms, dense {found['dense_ms']:.3f} ms"
    if "ms" not in found:
        return ""
    theirs = ", ".join(f"{n} {ms:.3f}" if isinstance(ms, float) else f"{n} -" for n, ms in found["theirs_ms"].items())
    return f"{case:60}{found['ms']:8.3f} ms {found['times_floor']:5.1f} x floor; {theirs}"


def step(case: str, found: dict[str, Any], cases: Cases) -> str:
    if "ms" not in found:
        return ""
    more = f"{found['launches']:5} launches{found['peak_GB']:6.1f} GB" if "launches" in found else ""
    ratios = [f"{ms / found['ms']:.1f} ({precision})" for precision, ms in stock_ms(found, cases).items()]
    stock = f", x stock {', '.join(ratios)}" if ratios and not found["kind"].startswith("SAELens ") else ""
    return (
        f"{case:52}{found['ms']:8.2f} ms, host {found['host_ms']:.2f}{more}{found['times_floor']:6.1f} x floor{stock}"
    )


def stock_ms(found: dict[str, Any], cases: Cases) -> dict[str, float]:
    """SAELens's SAE of the same kind, or its TopK, at the same shape, by precision."""
    kind = found["kind"]
    theirs = f"SAELens {kind.removeprefix('sparse_')}" if kind.startswith("sparse_") else "SAELens topk"
    width = {letter: n for letter, n in found["shape"].items() if letter != "E"}
    stock = [c for c in cases.values() if c.get("kind") == theirs and width.items() <= c["shape"].items()]
    return {c["precision"]: c["ms"] for c in stock if c["precision"] in ("fp32", "bf16")}


def training(case: str, found: dict[str, Any], _cases: Cases) -> str:
    if "curve" not in found:
        return ""
    last = found["curve"][-1]
    return f"{case:56}{last['seconds']:7.1f} s {last['tokens'] / 1e6:8.1f} M tokens, error {last['error']:.4f}"


ROW: dict[str, Callable[[str, dict[str, Any], Cases], str]] = {
    "correctness": correctness,
    "primitives": primitive,
    "steps": step,
    "training": training,
}
