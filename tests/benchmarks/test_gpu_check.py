"""The stages of benchmarks/gpu_check.py, rehearsed without a GPU; what becomes of cases that fail, crash or hang."""

import csv
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from gpu import gradients, shapes, supervise
from gpu.record import Record, run_cases
from gpu.table import LINES, table
from helpers import ROOT, kills


def check(output: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--tiny", "--output", str(output)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, env=env)


STAGES = ("correctness", "primitives", "steps", "training")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """All stages, in one call."""
    output = tmp_path_factory.mktemp("rehearsal")
    return output, check(output, "--train-seconds", "0.05")


@pytest.mark.parametrize("stage", STAGES)
def test_every_case_of_a_rehearsed_stage_ends_well(stage, rehearsal):
    output, done = rehearsal
    found = json.loads((output / f"{stage}.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr + (output / supervise.LOG).read_text()
    assert "error" not in found
    assert {case["status"] for case in found["cases"].values()} == {"ok"}
    assert found["about"]["torch"] == version("torch")
    assert f"== {stage}: {len(found['cases'])} ok" in done.stdout
    assert len(done.stdout.strip().split("\n")) <= LINES


def test_a_call_leaves_few_files(rehearsal):
    """With the two of the kernels' tests, eight."""
    found = {p.name for p in rehearsal[0].iterdir()}
    assert found == {*(f"{stage}.json" for stage in STAGES), "training.csv", supervise.LOG}
    assert all(f"== {stage}\n" in (rehearsal[0] / supervise.LOG).read_text() for stage in STAGES)


def test_what_the_stages_measure(rehearsal):
    correctness, primitives, steps, training = (
        json.loads((rehearsal[0] / f"{stage}.json").read_text())["cases"] for stage in STAGES
    )
    kinds = ["sparse_decode", "latent_weight_grads", "grouped", "adam_rows", "route", "nondeterministic"]
    kinds += [f"gradients of {kind}," for kind in gradients.KINDS]
    for kind in (*kinds, "training of switch", "training of sparse_batchtopk twice"):
        assert any(name.startswith(kind) for name in correctness), kind
    timed = [case for case in primitives.values() if "floor_ms" in case]
    assert timed
    assert all(case["times_floor"] == pytest.approx(case["ms"] / case["floor_ms"]) for case in timed)
    assert {case["kind"] for case in steps.values() if "kind" in case} >= {"SAELens topk", "sparse_topk", "switch"}
    rows = list(csv.DictReader((rehearsal[0] / "training.csv").open()))
    assert {row["sae"] for row in rows} == set(training)
    assert all(0 < float(row["error"]) < 10 for row in rows)


def test_a_second_call_makes_only_what_is_missing(rehearsal, tmp_path):
    found = json.loads((rehearsal[0] / "correctness.json").read_text())
    name, *_ = found["cases"]
    kept = {n: case for n, case in found["cases"].items() if n != name}
    (tmp_path / "correctness.json").write_text(json.dumps({**found, "cases": kept}))
    assert check(tmp_path, "--stage", "correctness").returncode == 0
    again = json.loads((tmp_path / "correctness.json").read_text())["cases"]
    assert {n: case for n, case in again.items() if n != name} == kept
    assert again[name]["status"] == "ok"


def test_without_a_gpu_the_check_says_so_and_writes_nothing(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "benchmarks/gpu_check.py", "--output", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "torch.cuda.is_available() says there is none" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_case_that_raises_is_recorded_with_its_place_and_the_others_run(tmp_path):
    record = Record(tmp_path / "stage.json")

    def read():
        return json.loads(record.file.read_text())["cases"]

    def wrong():
        raise AssertionError("errors {'out': 0.3}")

    def later():
        assert read()["first"]["status"] == "ok"  # whole after every case
        assert read()["wrong"]["status"] == "failed"
        assert read()["later"]["status"] == "running"
        return {"ms": 1.0}

    run_cases(record, [("first", dict), ("wrong", wrong), ("later", later)], time.time() + 60)
    assert [case["status"] for case in read().values()] == ["ok", "failed", "ok"]
    assert read()["wrong"]["error"] == "AssertionError: errors {'out': 0.3}"
    assert "in wrong" in read()["wrong"]["traceback"]
    assert read()["later"]["ms"] == 1.0
    run_cases(record, [("first", wrong), ("wrong", later)], time.time() + 60)  # neither runs again
    assert read()["first"]["status"] == "ok"
    record.forget_failures()
    run_cases(record, [("wrong", dict), ("too late", dict)], time.time() + 60)
    assert read()["wrong"]["status"] == "ok"
    run_cases(record, [("after the deadline", dict)], time.time() - 1)
    assert "after the deadline" not in read()


def test_a_record_whose_writing_was_killed_leaves_nothing_once_it_is_written(tmp_path):
    record, n_killed = Record(tmp_path / "stage.json"), 0
    for at in range(6):
        n_killed += kills.killed(lambda at=at: record.set("case", status="ok", n=at), at=at)
    assert n_killed > 1
    record.set("case", status="ok", n=6)
    assert Record(record.file).cases["case"]["n"] == 6
    assert [p.name for p in tmp_path.iterdir()] == ["stage.json"]


STAGE = """
import argparse, os, sys, time
from pathlib import Path
from gpu.record import Record, run_cases
parser = argparse.ArgumentParser()
parser.add_argument("file", type=Path)
parser.add_argument("--deadline", type=float)
args = parser.parse_args()
def crash():
    print("illegal instruction", flush=True)
    os.abort()
def hang():
    time.sleep(600)
cases = [("good", dict), ("crash", crash), ("hang", hang), ("last", dict)]
run_cases(Record(args.file), cases, args.deadline)
"""


def test_a_case_that_crashes_or_hangs_costs_itself_alone(tmp_path):
    script, file = tmp_path / "stage.py", tmp_path / "found.json"
    script.write_text(STAGE)
    env = supervise.environment("cpu", ROOT)
    start = time.time()
    supervise.supervise([sys.executable, str(script), str(file)], file, 300, 1.0, env, ROOT)
    assert time.time() - start < 200
    cases = Record(file).cases
    assert {name: case["status"] for name, case in cases.items()} == {
        "good": "ok",
        "crash": "crashed",
        "hang": "hung",
        "last": "ok",
    }
    assert "illegal instruction" in cases["crash"]["traceback"]


def test_cases_dealt_out_to_several_processes_end_up_in_one_file(tmp_path):
    script, file = tmp_path / "stage.py", tmp_path / "found.json"
    script.write_text(
        STAGE.replace("(args.file)", "(args.record)")
        .replace(", cases,", ", cases[args.share :: args.jobs],")
        .replace('"file"', '"--record"')
        .replace(
            "args = ", 'parser.add_argument("--share", type=int)\nparser.add_argument("--jobs", type=int)\nargs = '
        )
    )
    Record(file, {"device": "none"}).set("good", status="ok", kept=True)
    supervise.supervise_shares(
        [sys.executable, str(script)], file, 2, 300, 1.0, supervise.environment("cpu", ROOT), ROOT
    )
    record = Record(file)
    fates = {name: case["status"] for name, case in record.cases.items()}
    assert fates == {"good": "ok", "crash": "crashed", "hang": "hung", "last": "ok"}
    assert record.cases["good"]["kept"]
    assert record.data["about"] == {"device": "none"}
    assert "illegal instruction" in file.with_name(supervise.LOG).read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.json", supervise.LOG, "stage.py"]


def test_a_stage_that_does_not_start_is_reported(tmp_path):
    file = tmp_path / "stage.json"
    Record(file, {}).write()
    command = [sys.executable, "-c", "import no_such_package"]
    supervise.supervise(command, file, 30, 1.0, supervise.environment("cpu", ROOT), ROOT)
    assert "No module named 'no_such_package'" in Record(file).data["error"]
    assert "STOPPED: ModuleNotFoundError" in table(tmp_path, ["stage"])


KERNEL_TESTS = """
import time
def test_passes():
    pass
def test_fails():
    assert 1 + 1 == 3
def test_hangs():
    time.sleep(600)
"""


@pytest.fixture(params=[pytest.param([], marks=pytest.mark.slow), ["-n", "2"]], ids=["one process", "xdist"])
def start_tests(request, tmp_path, monkeypatch):
    """Starts some of these tests, by name, as the kernels' tests are."""
    if request.param:
        pytest.importorskip("xdist")
    (tmp_path / "output").mkdir()
    (tmp_path / "test_kernels.py").write_text(KERNEL_TESTS)
    monkeypatch.setattr(supervise, "_several_processes", lambda: request.param)

    def start(*names: str) -> tuple[subprocess.Popen, Path]:
        monkeypatch.setattr(supervise, "KERNEL_TESTS", [f"test_kernels.py::{name}" for name in names])
        process = supervise.kernel_tests(tmp_path, tmp_path / "output", supervise.environment("cpu", ROOT))
        return process, tmp_path / "output"

    return start


def test_tests_that_run_out_of_time_say_which_have_failed(start_tests):
    process, output = start_tests("test_fails", "test_hangs")
    log, deadline = output / "kernel-tests.log", time.time() + 120
    while "F" not in log.read_text() and time.time() < deadline:
        time.sleep(0.1)
    supervise.finish_tests(process, output, time.time())
    (found,) = Record(output / "kernel-tests.json").cases.values()
    assert found["status"] == "unfinished"
    assert "FAILED test_kernels.py::test_fails - assert (1 + 1) == 3" in found["traceback"]
    assert found["result"].startswith("1 failed")
    assert log.exists()
    assert "UNFINISHED: kernel tests: 1 failed" in table(output, [])


@pytest.mark.parametrize(("names", "status"), [(["test_passes"], "ok"), (["test_passes", "test_fails"], "failed")])
def test_a_log_is_kept_of_tests_that_did_not_all_pass(names, status, start_tests):
    process, output = start_tests(*names)
    supervise.finish_tests(process, output, time.time() + 120)
    (found,) = Record(output / "kernel-tests.json").cases.values()
    assert found["status"] == status
    assert "1 passed" in found["result"]  # which benchmarks/gpu/publish.py prints
    assert (output / "kernel-tests.log").exists() == (status == "failed")


def test_the_kernels_tests_that_a_gpu_runs_are_there():
    paths = [ROOT / argument.removeprefix("--ignore=") for argument in supervise.KERNEL_TESTS]
    assert [path for path in paths if not path.exists()] == []


def test_kernels_are_never_interpreted_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for device in ("cuda", "cpu"):
        assert "TRITON_INTERPRET" not in supervise.environment(device, ROOT)


def test_the_table_has_at_most_forty_lines_and_begins_with_what_is_wrong(tmp_path):
    for stage in ("correctness", "primitives"):
        record = Record(tmp_path / f"{stage}.json", {"device": "a GPU", "torch": "2", "triton": "3"})
        for i in range(60):
            record.set(f"case {i}", status="failed" if i % 2 else "ok", error="AssertionError: off", per_second=1e12)
    lines = table(tmp_path, ["correctness", "primitives"]).split("\n")
    assert len(lines) <= 40
    assert lines[0].startswith("== correctness: 30 ok, 30 failed; a GPU")
    assert lines[1] == "FAILED: case 1: AssertionError: off"


def test_floors_are_those_counted_by_hand():
    s = shapes.Shape(B=8192, D=768, F=24576, K=32, E=32)
    assert shapes.grouped(s, 2) == (2 * 8192 * 768 * 768, 2 * (8192 * 768 + 8192 * 768 + 24576 * 768))
    assert shapes.adam(10) == (0, 280)
    c = shapes.Ceilings(copy=3e12, bf16=8e14)
    assert c.ms(shapes.Work(8 * 10**11, 3 * 10**9), "bf16") == pytest.approx(1.0)
    assert c.ms(shapes.Work(8 * 10**11, 6 * 10**9), "bf16") == pytest.approx(2.0)
    measured = {"ceiling, copy": {"status": "ok", "per_second": 1e12}, "ceiling, bf16": {"status": "failed"}}
    assert shapes.ceilings_of(measured) == shapes.Ceilings(copy=1e12)
    floors = [shapes.step_ms(s._replace(E=E), "bf16", c) for E in (1, 32)]
    assert floors == sorted(floors, reverse=True)


def test_the_results_of_a_real_run_say_where_they_are_from():
    for file in (ROOT / "docs" / "gpu").rglob("*.json"):
        about = json.loads(file.read_text())["about"]
        assert about["device"].startswith("NVIDIA"), file
        assert about["commit"], file
        assert "gpu_check.py" in about["command"], file
