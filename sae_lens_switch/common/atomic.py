"""Atomic replacement of several files: written to a scratch folder, synced to disk, then moved into place together.

Scratch folders are named ``.saving-...`` and ``.deleting-...`` after the process that owns them, so that a later
process removes those of a dead owner and leaves those of a live one alone.
"""

import errno
import hashlib
import itertools
import os
import re
import shutil
import socket
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from sae_lens_switch.common.printable import logger

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

INDEX_FILENAME = f"{SAE_WEIGHTS_FILENAME}.index.json"  # in place of that file, of weights in several
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_NOT_SUPPORTED_FOR_FOLDERS = _NOT_SUPPORTED | {errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF}
_NAME = re.compile(
    r"\.(?:saving|deleting)-\w+-(?P<place>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-\d+(?:-.*)?", re.ASCII | re.DOTALL
)
_NAME_BEFORE = re.compile(r"\.(?:saving|deleting)-(?P<pid>\d+)-.*", re.ASCII | re.DOTALL)
_ABANDONED_AFTER = 24 * 60 * 60  # seconds without a change, if the owner is on another machine
_numbers = itertools.count()
_warned_of: set[bool] = set()


def replace_files(path: str | Path, save: Callable[[Path], tuple[Path, Path]]) -> tuple[Path, Path]:
    """Let ``save`` write files to a scratch folder, then move all of them into ``path`` atomically.

    Other files in ``path`` stay. A process killed at any moment leaves all of the old files or all of the new ones, for
    every reader. Where symbolic links are not supported there is a moment without ``cfg.json``, in which the SAE does
    not load; the next save repairs it.

    Args:
        path: The folder of the files, created if necessary.
        save: Writes the files into the folder it is given and returns two of them.

    Returns:
        The paths of the same two files in ``path``.

    Raises:
        OSError: If writing fails; the files are then unchanged.
        ValueError: As ``refuse_other_weights``, likewise.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    remove_left_overs(path)
    aside = scratch(path, "saving")
    new = aside / "new"
    try:
        new.mkdir(parents=True)
        written = save(new)
        names = [file.name for file in new.iterdir()]
        refuse_other_weights("path", path, names)
        for entry in [*new.iterdir(), new, aside]:
            sync(entry)
        with locked(path):
            _exchange(aside, path, sorted(names, key=lambda name: (name == SAE_CFG_FILENAME, name)))
    finally:
        _settle(aside, path)
        shutil.rmtree(aside, ignore_errors=True)
    return path / written[0].name, path / written[1].name


def refuse_other_weights(name: str, folder: Path, files: Collection[str]) -> None:
    """Check that ``folder`` has no weights that would stay beside those in ``files``, and could be loaded for them.

    Raises:
        ValueError: If it has.
    """
    for mine, other in ((SAE_WEIGHTS_FILENAME, INDEX_FILENAME), (INDEX_FILENAME, SAE_WEIGHTS_FILENAME)):
        if mine in files and other not in files and (folder / other).exists():
            raise ValueError(f"{name} must be a folder without {other}, of an SAE in other files; got {folder}")


def _exchange(aside: Path, path: Path, names: list[str]) -> None:
    """Move ``names`` from ``aside/new`` to ``path``, ``cfg.json`` last: nothing loads without it."""
    (aside / "old").mkdir()
    if not os.path.lexists(path / SAE_CFG_FILENAME) or SAE_CFG_FILENAME not in names:
        _move(aside / "new", path, names)
    elif _symlink(aside / "now", "old"):
        for name in names:
            if (path / name).exists():
                _copy((path / name).resolve(), aside / "old" / name)
            os.symlink(f"{aside.name}/now/{name}", aside / f"link-{name}")
        for folder in (aside / "old", aside):
            sync(folder)
        _move_links(aside, path, names)
        os.symlink("new", aside / "next")
        os.replace(aside / "next", aside / "now")  # from here on all files are the new ones
        sync(aside)
    else:
        os.replace(path / SAE_CFG_FILENAME, aside / "old" / SAE_CFG_FILENAME)
        _move(aside / "new", path, names)
    sync(path)


def _move_links(aside: Path, path: Path, names: list[str]) -> None:
    """Replace each file by a link to the same content."""
    for name in names:
        os.replace(aside / f"link-{name}", path / name)
    sync(path)


def _move(folder: Path, path: Path, names: list[str]) -> None:
    for name in names:
        os.replace(folder / name, path / name)


def _settle(aside: Path, path: Path) -> None:
    """Make ``path`` independent of ``aside``, wherever an exchange was interrupted."""
    links = [file for file in path.iterdir() if file.is_symlink() and os.readlink(file).startswith(f"{aside.name}/")]
    for link in links:
        if link.exists():
            os.replace(link.resolve(), link)
        else:
            link.unlink()
    without_links = (aside / "old" / SAE_CFG_FILENAME).exists() and not (aside / "now").is_symlink()
    if without_links and not os.path.lexists(path / SAE_CFG_FILENAME):
        names = [file.name for file in (aside / "new").iterdir()]
        _move(aside / "new", path, sorted(names, key=lambda name: (name == SAE_CFG_FILENAME, name)))
        links = [path / SAE_CFG_FILENAME]
    if links:
        sync(path)


def _symlink(link: Path, target: str) -> bool:
    if os.name == "nt":  # where a link to a folder cannot be replaced
        return False
    try:
        os.symlink(target, link)
    except (OSError, NotImplementedError):
        return False
    return True


def _copy(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(file, to)
        sync(to)


# On disk, and one at a time


def sync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to disk; warns once if the file system does not support it."""
    is_folder = path.is_dir()
    try:
        # Windows syncs only files opened for writing, and opens no folders.
        handle = os.open(path, os.O_RDWR if os.name == "nt" and not is_folder else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in (_NOT_SUPPORTED_FOR_FOLDERS if is_folder else _NOT_SUPPORTED):
            raise
        if is_folder not in _warned_of:
            _warned_of.add(is_folder)
            logger.warning(
                f"{path.parent}: the file system cannot sync {'folders' if is_folder else 'files'} to disk ({error}). "
                "What is saved there is intact if this process is killed, but may be lost if the machine fails"
            )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Admit one process at a time, where the file system can lock a folder; the lock ends with the process."""
    handle = None
    with suppress(OSError):
        if fcntl is not None:
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


# Scratch folders and their owners


def scratch(base: Path, kind: str, name: str = "") -> Path:
    """A path in ``base`` that no other process uses, for a folder to write ("saving") or to delete ("deleting")."""
    host = re.sub(r"\W", "_", socket.gethostname(), flags=re.ASCII)[:32] or "_"
    pid = os.getpid()
    owner = f"{host}-{_place()}-{pid}-{_started(pid) or 0}-{next(_numbers)}"
    return base / (f".{kind}-{owner}-{name}" if name else f".{kind}-{owner}")


def discard(folder: Path) -> None:
    """Remove a folder atomically: other processes see it whole or not at all.

    Raises:
        OSError: If it cannot be moved out of the way.
    """
    doomed = scratch(folder.parent, "deleting", folder.name)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_left_overs(base: Path) -> None:
    """Remove the scratch folders of dead processes, after finishing what they had begun to move into place."""
    for folder in [*base.glob(".saving-*"), *base.glob(".deleting-*")]:
        with locked(base), suppress(FileNotFoundError):  # another process may remove it too
            if _is_abandoned(folder):
                _settle(folder, base)
                shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    name = _NAME.fullmatch(folder.name)
    if name is None:
        before = _NAME_BEFORE.fullmatch(folder.name)  # named by an earlier version
        return before is None or int(before["pid"]) == os.getpid() or not _runs(int(before["pid"]))
    if name["place"] != _place():
        return _seconds_without_change(folder) > _ABANDONED_AFTER
    pid, start = int(name["pid"]), int(name["start"])
    return not _runs(pid) or start not in (0, _started(pid) or start)


@cache
def _place() -> str:
    """Identifies where a process id is valid: this boot of this machine, this container."""
    facts = [socket.gethostname()]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        facts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def _seconds_without_change(folder: Path) -> float:
    """By the file system's own clock, since that of another machine may differ."""
    probe = scratch(folder.parent, "saving", "clock")
    try:
        probe.mkdir()
        now = probe.stat().st_mtime
    finally:
        with suppress(OSError):
            probe.rmdir()
    return now - max(entry.lstat().st_mtime for entry in [folder, *folder.rglob("*")])


def _started(pid: int) -> int | None:
    """When a process started, in ticks since boot; None if unknown."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    fields = _stat(pid)
    return not fields or fields[0] not in "ZX"  # a zombie no longer writes


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on; empty if there is no such file."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
