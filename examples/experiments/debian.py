"""Text from Debian's packages: downloaded as packages and unpacked, not installed.

A machine without apt, or whose apt reaches nothing, has these kinds of text not: nothing else depends on them.
"""

from __future__ import annotations

import gzip
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

# What makes a stream of the Bible's packages one that gzip reads: the head of a `compress` file with codes of 16 bits.
_COMPRESS_HEAD = b"\x1f\x9d\x90"
Documents = Iterator[tuple[str, str]]


def kinds(folder: Path) -> dict[str, Callable[[], Documents]]:
    """The kinds of text that can be had here, by name. Packages are kept in ``folder``."""
    found: dict[str, Callable[[], Documents]] = {}
    for name, (package, file, documents) in _KINDS.items():
        path = _unpacked(folder, package)
        files = sorted(path.glob(file)) if path else []
        if files:
            found[name] = lambda documents=documents, files=files: documents(files)
        else:
            print(f"no {name} text: apt brings no {package} here")
    return found


def _unpacked(folder: Path, package: str) -> Path | None:
    """The package's files; None where there is no apt, or it does not reach the package."""
    target = folder / package
    if target.is_dir():
        return target
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return None
    unfinished = folder / f".{package}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    if not _extract(package, unfinished):
        shutil.rmtree(unfinished)
        return None
    unfinished.rename(target)
    return target


def _extract(package: str, into: Path) -> bool:
    try:
        _run(["apt-get", "download", package], into)
        (deb,) = into.glob("*.deb")
        needed = re.findall(r"python3\.\d+-doc", _run(["dpkg-deb", "-f", deb.name, "Depends"], into))
        if package == "python3-doc" and needed:  # an empty package that needs that of one version
            _run(["apt-get", "download", needed[0]], into)
        for deb in into.glob("*.deb"):
            _run(["dpkg-deb", "-x", deb.name, "."], into)
            deb.unlink()
    except (subprocess.SubprocessError, ValueError, OSError):
        return False
    return True


def _run(command: list[str], folder: Path) -> str:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300).stdout


# Formats


def wordnet(files: list[Path]) -> Documents:
    """Words and glosses, 100 synonym sets a document: `offset file type n word id ... | gloss`."""
    for file in files:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("  ")]
        for i in range(0, len(lines), 100):
            yield f"{file.name}:{i}", "\n\n".join(map(_gloss, lines[i : i + 100]))


def _gloss(line: str) -> str:
    entry, gloss = line.split(" | ", 1)
    fields = entry.split(" ")
    words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
    return f"{', '.join(words)}: {gloss.strip()}"


def dictionary(files: list[Path]) -> Documents:
    """A dictionary for dictd, 20,000 characters a document; without the lines that name the source of every entry."""
    for file in files:
        text = gzip.decompress(file.read_bytes()).decode("utf-8", "replace")
        text = re.sub(r"\n *\[(1913 Webster|WordNet 1\.5|PJC)\]", "", text)
        for i, document in enumerate(_pieces(text.split("\n\n"), 20_000)):
            yield f"{file.name}:{i}", document


def _pieces(paragraphs: list[str], size: int) -> Iterator[str]:
    piece, length = [], 0
    for paragraph in paragraphs:
        piece.append(paragraph)
        length += len(paragraph)
        if length >= size:
            yield "\n\n".join(piece)
            piece, length = [], 0
    yield "\n\n".join(piece)


def info(files: list[Path]) -> Documents:
    """An Info manual: a node is a document. Lists of links, and the log of changes, are no prose."""
    for file in files:
        text = gzip.decompress(file.read_bytes()).decode("utf-8", "replace")
        for node in text.split("\x1f")[1:]:
            head, _, body = node.strip().partition("\n")
            title = re.search(r"Node: ([^,]*)", head)
            name = title[1] if title else head
            if not re.match(r"(Index|Python Module Index|Changelog|.*(alpha|beta|candidate|final))", name):
                yield name, re.sub(r"\n *\(\d+\) https?://\S+\n", "\n", body)


def bible(files: list[Path]) -> Documents:
    """A chapter is a document. The file: 64 KiB blocks, each a stream of `compress`, at offsets in a table."""
    for file in files:
        data = file.read_bytes()
        (n,) = struct.unpack_from(">I", data, 0x58)
        starts = struct.unpack_from(f">{n}I", data, 0x5C)
        blocks = [data[a:b] for a, b in zip(starts, (*starts[1:], len(data)), strict=True)]
        raw = b"".join(
            subprocess.run(["gzip", "-dc"], input=_COMPRESS_HEAD + block, capture_output=True).stdout
            for block in blocks
        )
        chapters: dict[str, list[str]] = {}
        for line in raw.decode("latin-1").splitlines():
            if verse := re.match(r"(\w+):\d+ (.*)", line):
                chapters.setdefault(verse[1], []).append(verse[2])
        for name, verses in chapters.items():
            yield name, "\n\n".join(verses)


_KINDS: dict[str, tuple[str, str, Callable[[list[Path]], Documents]]] = {
    "wordnet": ("wordnet-base", "usr/share/wordnet/data.*", wordnet),
    "gcide": ("dict-gcide", "usr/share/dictd/gcide.dict.dz", dictionary),
    "python manual": ("python3-doc", "usr/share/info/python3*.info.gz", info),
    "bible": ("bible-kjv-text", "usr/lib/bible.data", bible),
}
