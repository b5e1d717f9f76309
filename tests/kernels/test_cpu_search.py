"""The compiled top-k of a CPU: exact on every kind of number; plain torch wherever it cannot be compiled or run."""

import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.kernel_cases import assert_close, autoencoder_inputs
from sae_lens_switch_kernels import cpu_search, reference, sparse_autoencode, torch_tiles, torch_topk
from sae_lens_switch_kernels.cpu_search import compile as compiling
from torch import Tensor

needs_compiler = pytest.mark.skipif(
    compiling.compiled() is None, reason="no C compiler, or torch has no OpenMP to share"
)


def numbers(kind: str, R: int, F: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(F)
    pre = torch.randn(R, F, generator=generator)
    places = torch.randint(0, F, (R, 5), generator=generator)
    if kind == "ties":
        pre = pre.mul(2).round()
    elif kind == "negative":
        pre = -pre.abs() - 1
    elif kind == "few above zero":
        pre = -pre.abs().scatter_(1, places, -1.0)
    elif kind == "zeros of both signs":
        pre = pre.sign() * 0
    elif kind == "infinities":
        pre.scatter_(1, places, torch.tensor([[torch.inf, -torch.inf, torch.inf, -torch.inf, torch.inf]]).expand(R, 5))
    elif kind == "NaN":
        pre.scatter_(1, places, torch.nan)
    elif kind == "NaN with a sign":
        pre.scatter_(1, places, torch.tensor(torch.nan).copysign(torch.tensor(-1.0)).item())
        assert pre.gather(1, places).signbit().all()
    elif kind == "tiny":
        pre *= 1e-39  # subnormal
    return pre.to(dtype)


def without_nan(t: Tensor) -> Tensor:
    return t.nan_to_num(torch.inf, torch.inf, -torch.inf)


KINDS = (
    "random",
    "ties",
    "negative",
    "few above zero",
    "zeros of both signs",
    "infinities",
    "NaN",
    "NaN with a sign",
    "tiny",
)


def searched(pre: Tensor, k: int, width: int = 0, ranked: Tensor | None = None) -> cpu_search.TopK:
    """A part of this width after the other."""
    found = cpu_search.TopK(len(pre), k, pre.dtype)
    for start in range(0, pre.shape[1], width or pre.shape[1]):
        part = slice(start, start + (width or pre.shape[1]))
        found.add(pre[:, part], slice(0, len(pre)), start, None if ranked is None else ranked[:, part])
    return found


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("F", "k"), [(512, 1), (513, 32), (601, 5), (4099, 7), (24576, 36), (40001, 2000), (1088, 68)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_the_k_largest(kind, F, k, dtype):
    pre = numbers(kind, 5, F, dtype)
    expected = pre.topk(k, dim=1).values
    for width in (F, 512, 1203):
        if not cpu_search.can_search(dtype, pre.device, k, min(width, F)):
            assert width < 4 * k  # the first part must hold several times k
            continue
        found = searched(pre, k, width)
        values, indices = found.values_RK, found.indices_RK
        assert values.dtype == dtype
        assert torch.equal(without_nan(values), without_nan(pre.gather(1, indices)))
        assert (indices.diff(dim=1) > 0).all()  # distinct, and ascending
        assert torch.equal(values.isnan().sum(1), expected.isnan().sum(1))
        assert torch.equal(without_nan(values).sort(1, descending=True).values, without_nan(expected))


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_of_equal_numbers_the_first_are_kept_however_rows_are_divided(kind):
    pre = numbers(kind, 3, 3000, torch.bfloat16)
    whole = searched(pre, 9).indices_RK
    assert all(torch.equal(searched(pre, 9, width).indices_RK, whole) for width in (512, 777, 2999))
    if kind == "ties":
        assert torch.equal(whole, pre.float().sort(dim=1, descending=True, stable=True).indices[:, :9].sort(1).values)


@needs_compiler
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_rows_of_a_wider_buffer_on_any_number_of_threads(n_threads):
    before = torch.get_num_threads()
    buffer = numbers("random", 37, 3000, torch.bfloat16)
    expected = searched(buffer[:, :2001].contiguous(), 11)
    torch.set_num_threads(n_threads)
    try:
        found = searched(buffer[:, :2001], 11, 700)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.values_RK, expected.values_RK)
    assert torch.equal(found.indices_RK, expected.indices_RK)
    assert searched(buffer[:0], 11).indices_RK.shape == (0, 11)


@needs_compiler
def test_what_is_compared_may_be_something_else_than_what_is_returned():
    pre, scale = numbers("random", 5, 3001, torch.float32), numbers("random", 1, 3001, torch.float32)
    found = searched(pre, 9, 701, (pre * scale).abs())
    assert torch.equal(found.indices_RK, (pre * scale).abs().topk(9, dim=1).indices.sort(1).values)
    assert torch.equal(found.values_RK, pre.gather(1, found.indices_RK))


@needs_compiler
@pytest.mark.parametrize("by_magnitude", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tile_is_searched_as_torch_searches_it(by_magnitude, scaled, dtype, monkeypatch):
    pre, scale = numbers("random", 130, 20011, dtype), numbers("random", 1, 20011, dtype)[0].abs()
    options = {"scale_F": scale if scaled else None, "by_magnitude": by_magnitude}
    ours = torch_topk.select_topk(pre, 9, **options)
    monkeypatch.setenv("SAE_LENS_SWITCH_CPU_SEARCH", "torch")
    theirs = torch_topk.select_topk(pre, 9, **options)
    ranked = [(values * scale[i] if scaled else values) for values, i in (ours, theirs)]
    ranked = [t.abs() if by_magnitude else t for t in ranked]
    assert torch.equal(*(t.sort(1).values for t in ranked))
    assert torch.equal(ours[0], pre.gather(1, ours[1]))


@needs_compiler
@pytest.mark.parametrize("precision", ["full", "bfloat16", "float8"])
@pytest.mark.parametrize(
    ("E", "M", "names"),
    [
        (1, 1300, set()),
        (1, 1300, {"pre_bias_D", "bias_F", "scale_F"}),
        (1, 1300, {"bias_F", "scale_F", "by_magnitude"}),
        (2, 1300, {"pre_bias_D", "expert_B", "gates_B"}),
        (7, 520, {"pre_bias_D", "expert_B", "gates_B"}),
    ],
)
def test_an_autoencoder_with_it_is_the_reference(E, M, names, precision, monkeypatch):
    """Tiles of all kinds: parts of an expert, an expert, several experts."""
    monkeypatch.setattr(torch_tiles, "_NARROW_TILES", {"cpu": {2: (11, 640), 4: (7, 600)}})
    starts, add = set(), cpu_search.TopK.add
    monkeypatch.setattr(cpu_search.TopK, "add", lambda self, *args: starts.add(args[2]) or add(self, *args))
    leaves, constants = autoencoder_inputs(33, 6, E, M, 9, names)
    leaves = {name: t.float().requires_grad_() for name, t in leaves.items()}
    constants = {n: t.float() if n == "scale_F" else t for n, t in constants.items()}
    ours = sparse_autoencode(**leaves, **constants, encoder_precision=precision)
    truth = reference.sparse_autoencode(**leaves, **constants)
    assert starts >= {0} if E == 7 else {0, 600, 1200} if precision == "full" else {0, 640, 1280}
    # Low precision may choose others at the border; the values of all that are chosen are exact.
    chosen, true = (reference.dense_codes(values, i, E * M) for values, i in (ours[1:3], truth[1:3]))
    both = (chosen != 0) & (true != 0)
    assert both.sum() >= (1 if precision == "full" else 0.97) * (true != 0).sum()
    assert_close("values", chosen[both].double(), true[both].double(), 1e-5)
    if precision == "full":
        assert_close("out", ours.out_BD.double(), truth[0].double(), 1e-5)
    grads = [torch.autograd.grad(out.square().sum(), list(leaves.values())) for out in (ours.out_BD, truth[0])]
    for name, found, true in zip(leaves, *grads, strict=True):
        assert_close(name, found.double(), true.double(), 1e-4 if precision == "full" else 0.2)


def test_what_it_is_not_for_is_left_to_torch():
    cpu, fp32 = torch.device("cpu"), torch.float32
    assert not cpu_search.can_search(fp32, cpu, 0, 700)
    assert not cpu_search.can_search(fp32, cpu, 4, 511)
    assert not cpu_search.can_search(fp32, cpu, 176, 703)
    assert not cpu_search.can_search(torch.float64, cpu, 4, 700)
    assert not cpu_search.can_search(fp32, torch.device("meta"), 4, 700)


def test_a_mistaken_variable_is_refused(monkeypatch):
    monkeypatch.setenv("SAE_LENS_SWITCH_CPU_SEARCH", "c")
    with pytest.raises(ValueError, match="SAE_LENS_SWITCH_CPU_SEARCH must be 'torch' if set; got 'c'"):
        cpu_search.can_search(torch.float32, torch.device("cpu"), 4, 700)


# Compiling


@pytest.fixture
def anew(monkeypatch, tmp_path) -> Path:
    """An empty cache, and nothing compiled yet; returns the cache's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_search._library.cache_clear()
    yield tmp_path / "sae_lens_switch"
    cpu_search._library.cache_clear()


@needs_compiler
def test_where_it_compiles_it_agrees_with_torch():
    assert cpu_search._library() is not None


@needs_compiler
def test_it_is_compiled_once_and_found_again(anew, monkeypatch):
    assert compiling.compiled() is not None
    (file,) = anew.iterdir()
    assert file.name.startswith("search-")
    assert file.suffix == ".so"
    assert anew.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(compiling, "_compile", lambda *_: pytest.fail("compiled again"))
    assert compiling.compiled() is not None


@needs_compiler
@pytest.mark.usefixtures("anew")
def test_another_processor_compiler_or_source_has_a_library_of_its_own(monkeypatch):
    names = {compiling._fingerprint(["cc"])}
    read = Path.read_bytes
    for part, text in (("cpuinfo", b"flags : sse2\n"), ("search.c", b"int x;")):
        monkeypatch.setattr(Path, "read_bytes", lambda p, part=part, text=text: text if p.name == part else read(p))
        names.add(compiling._fingerprint(["cc"]))
    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(compiling, "_run", lambda *_: b"cc 99")
    names.add(compiling._fingerprint(["cc"]))
    assert len(names) == 4


@needs_compiler
def test_a_file_that_is_no_library_is_replaced(anew):
    script = "from sae_lens_switch_kernels.cpu_search.compile import compiled; assert compiled()"
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ)  # this process has not loaded it
    (file,) = anew.iterdir()
    file.write_bytes(b"not a library")
    assert compiling.compiled() is not None
    assert file.stat().st_size > 1000
    assert list(anew.iterdir()) == [file]


@needs_compiler
def test_without_a_cache_each_process_compiles_for_itself(anew, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError("read-only")))
    assert compiling._cache() is None
    monkeypatch.setattr(compiling, "_cache", lambda: None)
    assert cpu_search._library() is not None
    assert not anew.exists()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "true"])
def test_without_a_working_compiler_plain_torch_runs_and_the_log_says_so(compiler, anew, monkeypatch, caplog):
    monkeypatch.setenv("CC", compiler)
    caplog.set_level(logging.INFO, logger="sae_lens_switch_kernels")
    assert cpu_search._library() is None
    assert not list(anew.glob("*"))
    assert "plain torch runs" in caplog.text
    torch.manual_seed(0)
    x, W = torch.randn(9, 16), torch.randn(3000, 16)
    without = sparse_autoencode(x, W, W, 4, encoder_precision="bfloat16")
    monkeypatch.delenv("CC")
    cpu_search._library.cache_clear()
    with_it = sparse_autoencode(x, W, W, 4, encoder_precision="bfloat16")
    assert_close("out", without.out_BD.double(), with_it.out_BD.double(), 1e-6)


@pytest.mark.usefixtures("anew")
def test_a_library_that_finds_something_else_is_not_used(monkeypatch):
    class Wrong:
        def __getitem__(self, name: str):
            return lambda *_: 0  # finds nothing

    monkeypatch.setattr(cpu_search, "compiled", Wrong)
    assert cpu_search._library() is None


@needs_compiler
def test_its_failure_is_an_error_and_no_result(monkeypatch):
    monkeypatch.setattr(cpu_search, "_library", lambda: {"update_float32": lambda *_: 1})
    with pytest.raises(MemoryError, match="no memory for the top 4 of 700 numbers"):
        searched(torch.randn(3, 700), 4)


@needs_compiler
@pytest.mark.usefixtures("anew")
def test_it_runs_in_the_threads_of_torch():
    """One OpenMP per process: its workers and another's would wait for each other's cores."""
    script = (
        "import torch, sae_lens_switch_kernels.cpu_search as c; before = open('/proc/self/maps').read();"
        "assert c.can_search(torch.float32, torch.device('cpu'), 4, 700); after = open('/proc/self/maps').read();"
        "omp = lambda t: {l.split()[-1] for l in t.splitlines() if 'omp' in l.rsplit('/', 1)[-1]};"
        "assert omp(before) and omp(after) == omp(before), omp(after)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ)


@needs_compiler
def test_processes_that_compile_at_once_all_get_it(anew):
    script = "import sae_lens_switch_kernels.cpu_search as c; assert c._library() is not None"
    processes = [subprocess.Popen([sys.executable, "-c", script], env=os.environ) for _ in range(3)]
    assert [p.wait(timeout=120) for p in processes] == [0, 0, 0]
    assert len(list(anew.iterdir())) == 1
    assert isinstance(ctypes.CDLL(str(next(anew.iterdir()))), ctypes.CDLL)
