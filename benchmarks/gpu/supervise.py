"""Stages as processes of their own: one that hangs or crashes costs its case, not the stage."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

from gpu.record import DEVICE_LOST, Record

# Stopped stages are asked once, then killed.
_GRACE_S = 5.0
# Stopped tests first say what has failed; with xdist, after the ten seconds that it gives its processes to end.
_SUMMARY_S = 30.0
_POLL_S = 0.1
_STARTS = 6
# What all stages say: few files are easier to bring home.
LOG = "gpu_check.log"
# What runs on the device: neither compiles ahead of time nor pretends that a device is there.
KERNEL_TESTS = (
    "tests/kernels",
    "--ignore=tests/kernels/test_compile.py",
    "--ignore=tests/kernels/test_pretended_gpu.py",
)


def environment(device: str, root: Path) -> dict[str, str]:
    """Of a stage: the checkout it lies in comes first; kernels are interpreted only where there is no GPU."""
    import torch

    env = dict(os.environ)
    own = [str(root), str(root / "kernels"), str(root / "benchmarks")]
    env["PYTHONPATH"] = os.pathsep.join([*own, *filter(None, [env.get("PYTHONPATH")])])
    env["PYTHONUNBUFFERED"] = "1"
    env.setdefault("HF_HUB_OFFLINE", "1")
    if torch.cuda.is_available():
        env.pop("TRITON_INTERPRET", None)
    elif device == "cpu":
        env["TRITON_INTERPRET"] = "1"
    return env


def supervise(
    command: Sequence[str], file: Path, seconds: float, case_seconds: float, env: dict[str, str], cwd: Path
) -> None:
    """Run a stage's process until it is through, for ``seconds`` at most.

    A case that takes longer than ``case_seconds``, or ends the process, is marked as such in ``file``; a new process
    goes on with the next. The process learns from ``--deadline`` when to stop by itself.
    """
    deadline, log = time.time() + seconds, file.with_name(LOG)
    for _ in range(_STARTS):
        if time.time() >= deadline:
            return
        with log.open("a") as output:
            output.write(f"== {file.stem}\n")
            output.flush()
            begin = log.stat().st_size
            process = subprocess.Popen(
                [*command, "--deadline", str(deadline)], stdout=output, stderr=subprocess.STDOUT, env=env, cwd=cwd
            )
            why = _wait(process, file, deadline, case_seconds)
        record = Record(file)
        case = record.running()
        if case is not None:
            fate = why or "crashed"
            tail = "" if fate == "unfinished" else _tail(log, begin)
            record.set(case, status=fate, error=f"exit status {process.returncode}", traceback=tail)
        elif process.returncode not in (0, DEVICE_LOST) and not why:
            record.data["error"] = f"exit status {process.returncode}\n{_tail(log, begin)}"
            record.write()
            return
        if process.returncode == 0 or why == "unfinished":
            return


def supervise_shares(
    command: Sequence[str], file: Path, jobs: int, seconds: float, case_seconds: float, env: dict[str, str], cwd: Path
) -> None:
    """``supervise``, with the cases dealt out to ``jobs`` processes: a first run compiles most of the time.

    What they find is gathered in ``file`` all the time.
    """
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder) / str(i) / file.name for i in range(jobs)]
        threads = []
        for i, part in enumerate(parts):
            part.parent.mkdir()
            shutil.copy(file, part)
            share = [*command, "--record", str(part), "--share", str(i), "--jobs", str(jobs)]
            threads.append(Thread(target=supervise, args=(share, part, seconds, case_seconds, env, cwd)))
            threads[-1].start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(5 * _POLL_S)
            _gather(file, parts)
        _gather(file, parts)
        logs = [part.with_name(LOG) for part in parts]
        with file.with_name(LOG).open("a") as log:
            log.writelines(part.read_text(errors="replace") for part in logs if part.exists())


def _gather(file: Path, parts: Sequence[Path]) -> None:
    record, found = Record(file), [Record(part) for part in parts]
    for part in found:
        record.data["cases"] |= {name: case for name, case in part.cases.items() if not record.is_done(name)}
        record.data |= {"error": part.data["error"]} if "error" in part.data else {}
    record.write()


def _wait(process: subprocess.Popen, file: Path, deadline: float, case_seconds: float) -> str:
    """Until it ends; or why it was ended: its case is ``hung``, or its time up and the case ``unfinished``."""
    seen, since = None, time.time()
    while process.poll() is None:
        case = Record(file).running() if file.exists() else None
        if case != seen:
            seen, since = case, time.time()
        now = time.time()
        late = now > deadline + case_seconds / 2
        if late or (case is not None and now - since > case_seconds):
            _stop(process)
            return "unfinished" if late else "hung"
        time.sleep(_POLL_S)
    return ""


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(log: Path, begin: int) -> str:
    return log.read_bytes()[begin:][-3000:].decode(errors="replace")


def kernel_tests(root: Path, output: Path, env: dict[str, str]) -> subprocess.Popen:
    """pytest on the kernels, in the background."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    command += [*_several_processes(), *KERNEL_TESTS]
    with (output / "kernel-tests.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=root)


def _several_processes() -> list[str]:
    """As many as pay, if xdist is there."""
    from importlib.util import find_spec

    return ["-n", str(min(10, os.cpu_count() or 1))] if find_spec("xdist") else []


def finish_tests(process: subprocess.Popen, output: Path, deadline: float) -> None:
    """Wait for the tests until ``deadline``; how they ended goes into kernel-tests.json, the log stays if not well."""
    while process.poll() is None and time.time() < deadline:
        time.sleep(_POLL_S)
    fate = "failed" if process.poll() else "ok"
    if process.poll() is None:
        _interrupt(process)
        fate = "unfinished"
    record, log = Record(output / "kernel-tests.json"), output / "kernel-tests.log"
    lines = log.read_text(errors="replace").strip().split("\n")
    record.set("kernel tests", status=fate, result=lines[-1][:300], traceback="\n".join(lines[-60:]))
    if fate == "ok":
        log.unlink()


def _interrupt(process: subprocess.Popen) -> None:
    """As Ctrl-C does, upon which pytest says which tests have failed so far; it says nothing if it is terminated."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_SUMMARY_S)
    except subprocess.TimeoutExpired:
        _stop(process)
