"""The compiled search: a shared library in the user's cache, one per source, compiler and kind of processor.

It runs in the threads of torch: it takes OpenMP's functions from the runtime that torch has loaded. Linked to a runtime
of its own, the two would fight for the cores.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("search.c", "search_rows.h"))
_FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp")
_SECONDS = 120


def compiled() -> ctypes.CDLL | None:
    """The library, compiled unless this machine has done so before; None, with a line in the log, if it cannot be."""
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or ""]
    if sys.platform != "linux" or not shutil.which(compiler[0]):
        logger.info("no C compiler for top-k on the CPU: plain torch runs, more slowly")
        return None
    try:
        return _from_cache(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        logger.info("top-k on the CPU could not be compiled, plain torch runs, more slowly: %s", reason)
        return None


def _from_cache(compiler: list[str]) -> ctypes.CDLL:
    folder = _cache()
    file = None if folder is None else folder / f"search-{_fingerprint(compiler)}.so"
    if file is not None and file.exists():
        try:
            return ctypes.CDLL(str(file))
        except OSError:
            logger.info("%s is no library: compiled anew", file)
    # In a folder beside it, so that it is there as a whole or not at all, if several processes compile at once.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        library = _compile(compiler, Path(temporary))
        return ctypes.CDLL(str(library if file is None else library.replace(file)))


def _cache() -> Path | None:
    """None where nothing can be kept: each process then compiles for itself."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sae_lens_switch"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that cannot be written to
        return None
    stat = folder.stat()
    is_ours_alone = stat.st_uid == os.getuid() and not stat.st_mode & 0o022  # what lies there is run
    return folder if is_ours_alone and os.access(folder, os.W_OK) else None


def _compile(compiler: list[str], folder: Path) -> Path:
    unlinked, library = folder / "search.o", folder / "search.so"
    _run(*compiler, *_FLAGS, "-c", str(_SOURCES[0]), "-o", str(unlinked))
    # Without -fopenmp, which would link another OpenMP.
    _run(*compiler, "-shared", str(unlinked), "-o", str(library))
    return library


def _fingerprint(compiler: list[str]) -> str:
    """Of all that the library depends on: homes are shared by machines with other processors."""
    parts = [source.read_bytes() for source in _SOURCES]
    parts += [" ".join(_FLAGS).encode(), _run(*compiler, "--version"), platform.machine().encode()]
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    parts += sorted({line for line in lines if line.lower().startswith((b"model name", b"flags", b"features"))})
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS).stdout
