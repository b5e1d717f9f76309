"""The stages of benchmarks/gpu_check.py, rehearsed without a GPU; what becomes of cases that fail, crash or hang; and
the files that a machine without network is given."""

import csv
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import packed_model
import pytest
import torch
from gpu import publish, shapes, supervise, wheelhouse
from gpu.record import Record, run_cases
from gpu.table import LINES, table
from gpu.timing import normal

ROOT = Path(__file__).parents[2]


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
    assert done.returncode == 0, done.stdout + done.stderr + (output / f"{stage}.log").read_text()
    assert "error" not in found
    assert {case["status"] for case in found["cases"].values()} == {"ok"}
    assert found["about"]["torch"] == torch.__version__
    assert f"== {stage}: {len(found['cases'])} ok" in done.stdout
    assert len(done.stdout.strip().split("\n")) <= LINES


def test_what_the_stages_measure(rehearsal):
    correctness, primitives, steps, training = (
        json.loads((rehearsal[0] / f"{stage}.json").read_text())["cases"] for stage in STAGES
    )
    for kind in ("sparse_decode", "latent_weight_grads", "grouped", "gradients of switch", "nondeterministic"):
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
    assert "illegal instruction" in file.with_suffix(".log").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.json", "found.log", "stage.py"]


def test_a_stage_that_does_not_start_is_reported(tmp_path):
    file = tmp_path / "stage.json"
    Record(file, {}).write()
    command = [sys.executable, "-c", "import no_such_package"]
    supervise.supervise(command, file, 30, 1.0, supervise.environment("cpu", ROOT), ROOT)
    assert "No module named 'no_such_package'" in Record(file).data["error"]
    assert "STOPPED: ModuleNotFoundError" in table(tmp_path, ["stage"])


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


# The folder for a machine without network


def test_the_stand_in_for_wandb_is_a_wheel_that_imports_and_refuses_to_be_used(tmp_path):
    wheel = wheelhouse.stub_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        recorded = [line.split(",")[0] for line in archive.read("wandb-0.0.0.dist-info/RECORD").decode().split()]
        assert sorted(recorded) == sorted(archive.namelist())
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    program = "import wandb; print(wandb.__file__); wandb.init(project='x')"
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == str(site / "wandb.py")
    assert "RuntimeError: wandb.init: this is a stand-in" in done.stderr


def test_the_folder_says_whether_it_travels_in_one_copy(tmp_path, monkeypatch, capsys):
    (tmp_path / "packages").mkdir()
    for name in ("packages/a.whl", "model.safetensors", "tokens.bin"):
        (tmp_path / name).write_bytes(bytes(10**6))
    for limit, code, said in ((64 << 20, 0, False), (2 << 20, 0, True), (10**6 - 1, 1, True)):
        monkeypatch.setattr(wheelhouse, "LIMIT", limit)
        monkeypatch.setattr(wheelhouse, "ROOT", tmp_path)  # no checkout
        assert wheelhouse.told(tmp_path) == code
        out = capsys.readouterr().out
        assert "together                    3.00 MB" in out
        assert ("too large for one copy" in out) == said


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_blocks_are_dequantised_as_a_loop_does(kind):
    rows, columns = 3, 64
    generator = torch.Generator().manual_seed(0)
    n_blocks, size = rows * columns // 32, packed_model._BLOCK_BYTES[kind]
    raw = torch.randint(0, 256, (n_blocks, size), generator=generator, dtype=torch.uint8)
    halves = torch.randn(n_blocks, 2, generator=generator).half()
    raw[:, :4] = halves.view(torch.uint8)
    if kind == "Q8_0":
        raw[:, 2:4] = torch.randint(0, 256, (n_blocks, 2), generator=generator, dtype=torch.uint8)
    expected = []
    for block, (scale, offset) in zip(raw.tolist(), halves.tolist(), strict=True):
        if kind == "Q8_0":
            expected += [scale * (byte - 256 if byte > 127 else byte) for byte in block[2:]]
        else:
            expected += [scale * (byte % 16) + offset for byte in block[4:]]
            expected += [scale * (byte // 16) + offset for byte in block[4:]]
    found = packed_model.dequantize(raw.view(rows, -1), kind, rows, columns)
    assert torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64).view(rows, columns), rtol=1e-6)


def test_tokens_survive_their_file_and_those_too_large_are_refused(tmp_path):
    file = tmp_path / "tokens.bin"
    assert packed_model.save_tokens([[1, 65535, 3], [4, 5, 6, 7]], file) == 7
    assert file.stat().st_size == 14
    assert packed_model.load_tokens(file, 3).tolist() == [[1, 65535, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 65536\); got values from 5 to 65536"):
        packed_model.save_tokens([[5, 65536]], file)
    assert packed_model.load_tokens(file, 7).tolist() == [[1, 65535, 3, 4, 5, 6, 7]]
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory) -> Path:
    """A Llama of two layers with random weights, as llama.cpp would store it: Q8_0 matrices, float32 norms."""
    gguf = pytest.importorskip("gguf")
    D, heads, F, V, layers = 64, 2, 96, 50, 2
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(F)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(V)
    sizes = {"token_embd": (V, D), "output_norm": (D,)}
    for i in range(layers):
        square = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (D, D))
        rest = {"ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F), "attn_norm": (D,), "ffn_norm": (D,)}
        sizes |= {f"blk.{i}.{name}": shape for name, shape in (square | rest).items()}
    for seed, (name, shape) in enumerate(sizes.items()):
        t = normal(*shape, seed=seed, device="cpu").numpy()
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", 1 + 0.1 * t)
        else:
            blocks = gguf.quants.quantize(0.1 * t, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("n_layers", [1, 2])
def test_packed_layers_give_what_the_whole_model_gives(small_gguf, n_layers, tmp_path):
    packed = packed_model.load_model(packed_model.pack_model(small_gguf, tmp_path / "packed", n_layers))
    assert_same_as_whole(packed, small_gguf, n_layers)
    with pytest.raises(ValueError, match="n_layers must be between 1 and 2; got 3"):
        packed_model.pack_model(small_gguf, tmp_path / "other", 3)
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]


def test_packed_layers_in_half_precision_keep_their_rotary_frequencies(small_gguf, tmp_path):
    file = packed_model.pack_model(small_gguf, tmp_path / "packed", 1)
    whole, half = (packed_model.load_model(file, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.rotary_emb.inv_freq, whole.rotary_emb.inv_freq)
    with torch.no_grad():
        out = half(torch.tensor([[3, 1, 4]]), use_cache=False).last_hidden_state
    assert out.dtype == torch.bfloat16


@pytest.mark.slow
def test_packed_layers_of_the_real_model_give_what_it_gives(tmp_path):
    offline = pytest.importorskip("offline")
    file = packed_model.pack_model(offline.gguf_file(), tmp_path / "packed", 13)
    assert file.stat().st_size < 60e6
    assert_same_as_whole(packed_model.load_model(file), offline.gguf_file(), 13)


def assert_same_as_whole(packed, gguf_file: Path, n_layers: int) -> None:
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name, dtype="float32")
    whole.model.layers = whole.model.layers[:n_layers]
    whole.model.norm = torch.nn.Identity()
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (m(tokens, use_cache=False).last_hidden_state for m in (packed, whole.model))
    assert torch.equal(ours, theirs)
    assert ours.std() > 0


def test_pages_show_what_the_results_of_a_real_run_say():
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "publish.py"), "--check"]
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    page = ROOT / "docs" / "gpu" / "README.md"
    for file in page.parent.rglob("*.json"):
        about = json.loads(file.read_text())["about"]
        assert about["device"].startswith("NVIDIA"), file
        assert about["commit"], file
        assert "gpu_check.py" in about["command"], file
    assert publish.filled(page.read_text().replace("**", "")) == page.read_text(), (
        "a number that is changed is put back"
    )
