"""Text of several kinds as contexts of tokens: for training, held out by document, and of one kind kept out wholly."""

from __future__ import annotations

import hashlib
import json
import random
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from offline import python_documents, token_contexts, without_repeats

if TYPE_CHECKING:
    from numpy.typing import NDArray

Documents = Iterable[tuple[str, str]]
SPLITS = ("held_out", "other", "train")
# A part of every document list, at least this many characters per token: more is read than is needed.
_CHARS_PER_TOKEN = 5
_HELD_OUT_SHARE = 0.05


@dataclass
class Contexts:
    """Tokens [n, size] by split, and what they come from."""

    tokens: dict[str, NDArray[np.uint32]]
    facts: dict[str, dict[str, int]]  # by kind: documents and contexts of each split
    kept_out: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(b"".join(self.tokens[s].tobytes() for s in SPLITS)).hexdigest()


def default_kinds(folder: Path) -> dict[str, Callable[[], Documents]]:
    """Python's own documentation, that of installed packages, and Debian's packages where apt reaches them."""
    import debian

    return {"python": lambda: python_documents(()), "packages": package_documents} | debian.kinds(folder)


def package_documents() -> Iterator[tuple[str, str]]:
    """What installed Python packages bring besides code: descriptions, licences, READMEs, other documentation."""
    root = Path(sysconfig.get_path("purelib"))
    named = ["*.dist-info/METADATA", "*.dist-info/**/*LICENSE*", "**/*.md", "**/*.rst"]
    for path in sorted({p for pattern in named for p in root.glob(pattern) if p.is_file()}):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if path.name == "METADATA":
            text = text.partition("\n\n")[2]  # a description follows the fields
        yield str(path.relative_to(root)), text


def folder_kinds(folder: Path) -> dict[str, Callable[[], Documents]]:
    """A kind per subfolder, its files the documents; files in the folder itself are one more.

    Raises:
        ValueError: If there is no file.
    """
    parts = {p.name: p for p in sorted(folder.iterdir()) if p.is_dir()}
    found = {name: [p for p in sorted(part.rglob("*")) if p.is_file()] for name, part in parts.items()}
    found["files"] = [p for p in sorted(folder.iterdir()) if p.is_file()]
    found = {name: files for name, files in found.items() if files}
    if not found:
        raise ValueError(f"text must be a folder with text files; got {folder}, which has none")

    def documents(files: list[Path]) -> Iterator[tuple[str, str]]:
        return ((str(p), p.read_text(encoding="utf-8", errors="ignore")) for p in files)

    return {name: lambda files=files: documents(files) for name, files in found.items()}


def dataset_kind(name: str) -> dict[str, Callable[[], Documents]]:
    """A dataset of the hub, or a folder of one, with a column ``text``."""
    import datasets

    def documents() -> Iterator[tuple[str, str]]:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        return ((str(i), row["text"]) for i, row in enumerate(rows))

    return {"dataset": documents}


# Splits


@dataclass
class Split:
    """The documents of one kind, each its paragraphs, none of which occurs twice in all text."""

    train: list[tuple[str, list[str]]]
    held_out: list[tuple[str, list[str]]]
    n_chars: int  # of all documents there are


def split(kinds: dict[str, Callable[[], Documents]], most_chars: int, seed: int = 0) -> dict[str, Split]:
    """Documents in random order, a share of them held out; at most so many characters of a kind."""
    names = sorted(kinds)
    everything = ((f"{name}\0{source}", text) for name in names for source, text in kinds[name]())
    found: dict[str, list[tuple[str, list[str]]]] = {name: [] for name in names}
    for source, paragraphs in without_repeats(everything):
        name, _, source = source.partition("\0")
        found[name].append((source, paragraphs))
    return {name: _split(documents, most_chars, seed) for name, documents in found.items()}


def _split(documents: list[tuple[str, list[str]]], most_chars: int, seed: int) -> Split:
    random.Random(seed).shuffle(documents)
    sizes = [sum(map(len, paragraphs)) for _, paragraphs in documents]
    total = min(sum(sizes), most_chars)
    parts = Split([], [], sum(sizes))
    used = 0
    for document, size in zip(documents, sizes, strict=True):
        if used >= total and parts.train:
            break
        (parts.held_out if used < _HELD_OUT_SHARE * total else parts.train).append(document)
        used += size
    return parts


def shares(available: dict[str, int], wanted: int) -> dict[str, int]:
    """Of every kind as much as of any other, or all there is. Less than ``wanted`` only if there is less.

    >>> shares({"a": 1, "b": 9, "c": 9}, 9)
    {'a': 1, 'b': 4, 'c': 4}
    """
    left, taken = wanted, {}
    for i, name in enumerate(sorted(available, key=available.__getitem__)):
        taken[name] = min(available[name], left // (len(available) - i))
        left -= taken[name]
    return {name: taken[name] for name in available}


def contexts(
    kinds: dict[str, Callable[[], Documents]],
    tokenizer: str | Path,
    size: int,
    wanted: dict[str, int],
    kept_out: str | None = None,
    seed: int = 0,
) -> Contexts:
    """So many contexts of each split, shuffled, the kinds in equal shares as far as they go.

    Args:
        kinds: Documents by the name of their kind.
        tokenizer: Name or folder of the model.
        size: Tokens per context.
        wanted: Contexts by split.
        kept_out: The kind that is only tested on. None: the Bible, or else the kind with the least text, if there are
            several.
        seed: Decides documents and order.

    Raises:
        ValueError: If there is too little text, or no such kind.
    """
    if kept_out is not None and kept_out not in kinds:
        raise ValueError(f"kept_out must be one of the kinds of text, {', '.join(kinds)}; got {kept_out!r}")
    n_kinds = max(1, len(kinds) - 1)
    parts = split(kinds, 2 * wanted["train"] * size * _CHARS_PER_TOKEN // n_kinds, seed)
    if kept_out is None and len(kinds) > 1:
        kept_out = "bible" if "bible" in kinds else min(parts, key=lambda name: parts[name].n_chars)
    by_split = {
        "held_out": {n: s.held_out for n, s in parts.items() if n != kept_out},
        "other": {n: s.held_out + s.train for n, s in parts.items() if n == kept_out},
        "train": {n: s.train for n, s in parts.items() if n != kept_out},
    }
    tokens, nothing = {}, {f"{what} {s}": 0 for s in SPLITS for what in ("documents", "contexts")}
    facts = {name: dict(nothing) for name in kinds}
    for name, documents in by_split.items():
        found = {kind: _tokenized(d, tokenizer, size, wanted[name]) for kind, d in documents.items()}
        taken = shares({kind: len(t) for kind, t in found.items()}, wanted[name])
        random_order = np.random.default_rng(seed)
        chosen = [random_order.permutation(found[kind])[:n] for kind, n in taken.items()]
        tokens[name] = random_order.permutation(np.concatenate([np.empty((0, size), np.uint32), *chosen]))
        for kind, n in taken.items():
            facts[kind] |= {f"documents {name}": len(documents[kind]), f"contexts {name}": n}
    for name in ("train", "held_out"):
        if len(tokens[name]) < (wanted[name] if name == "train" else 1):
            raise ValueError(f"there are {len(tokens[name])} contexts of {name} text; {wanted[name]} are wanted")
    return Contexts(tokens, facts, kept_out or "")


def _tokenized(
    documents: list[tuple[str, list[str]]], tokenizer: str | Path, size: int, most: int
) -> NDArray[np.uint32]:
    """At most so many contexts, from documents in turn."""
    from datasets import Dataset

    found: list[NDArray[np.uint32]] = [np.empty((0, size), np.uint32)]
    text = ["\n\n".join(paragraphs) for _, paragraphs in documents]
    while text and sum(map(len, found)) < most:
        n = max(1, int(np.searchsorted(np.cumsum([len(t) for t in text]), 1 << 21)))
        batch, text = text[:n], text[n:]
        rows = token_contexts(Dataset.from_dict({"text": batch}), tokenizer, size)
        if len(rows):
            found.append(np.array(rows["input_ids"], dtype=np.uint32))
    return np.concatenate(found)


# Kept, so that every process has the same


def save(found: Contexts, file: Path) -> None:
    unfinished = file.with_suffix(".unfinished.npz")
    facts = json.dumps({"facts": found.facts, "kept_out": found.kept_out})
    np.savez(unfinished, facts=np.array(facts), **found.tokens)
    unfinished.replace(file)


def load(file: Path) -> Contexts:
    with np.load(file, allow_pickle=False) as saved:
        facts = json.loads(str(saved["facts"]))
        return Contexts({name: saved[name] for name in SPLITS}, facts["facts"], facts["kept_out"])
