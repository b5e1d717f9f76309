"""The benchmark of several processes runs, and its table can be published."""

import json
import subprocess
import sys

import publish
import pytest
from helpers import ROOT

SMALL = ["--processes", "1", "2", "--tokens", "64", "--d-in", "16", "--d-sae", "64", "--n-experts", "4", "--k", "4"]


@pytest.mark.parametrize(
    "more", [[], pytest.param(["--n-active-experts", "2"], marks=pytest.mark.slow)], ids=["one expert", "two"]
)
def test_it_compares_the_plan_with_every_number_of_processes(more, tmp_path, monkeypatch):
    output = tmp_path / "processes.json"
    command = [sys.executable, "benchmarks/processes.py", *SMALL, *more, "--rounds", "2", "--output", str(output)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    rows = json.loads(output.read_text())["results"]
    assert [(row["architecture"], row["processes"]) for row in rows] == [
        *[("switch", 1), ("switch", 2)],
        *[("sparse_topk", 1), ("sparse_topk", 2)],
    ]
    for row in rows:
        assert row["predicted_ms"] == pytest.approx(sum(row["parts_ms"].values()))
        assert row["measured_ms"] > 0
        assert row["memory_GB"] > 0
    assert rows[0]["sent_MB"] == rows[2]["sent_MB"] == 0
    assert min(rows[1]["sent_MB"], rows[3]["sent_MB"]) > 0
    if not more:
        monkeypatch.setattr(publish.clusters, "PROCESSES", output)
        table = publish.BLOCKS["plan-against-processes"]()
        assert f"| `switch` | 2 | {rows[1]['predicted_ms']:,.0f} ms | {rows[1]['measured_ms']:,.0f} ms |" in table
