"""Everything that a GPU machine without network needs, in one folder that travels in copies of at most 64 MiB.

    make wheelhouse                                   # wheelhouse/: packages, a packed language model, tokens
    make wheelhouse PYTHON_VERSION=3.12 TOKENS=30000000    # more tokens, which then travel by themselves

Packages are pure Python, those that SAELens imports and a machine with torch and transformers lacks. `wandb`, which
SAELens imports whether it is used or not, is replaced by one module that refuses to be used.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

LIMIT = 64 << 20
# Without their own requirements, which are there or not needed for what is run.
PACKAGES = (
    *("sae-lens>=6.54.3,<7", "transformer-lens>=3.9,<4", "datasets>=5,<6", "multiprocess", "dill", "simple-parsing"),
    *("docstring-parser", "better-abc", "eai-sparsify>=1.3.3,<2", "natsort", "schedulefree"),
)
WANDB = '''"""A stand-in for wandb, which is imported and not used."""

__version__ = "0.0.0"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*_args, **_kwargs):
        raise RuntimeError(f"wandb.{name}: this is a stand-in; set log_to_wandb=False or install wandb")

    return refuse
'''
_SIZE = 128  # tokens of a context


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    packages = args.output / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    if not args.no_packages:
        download(packages, args.python_version)
    stub_wheel(packages)
    if args.layers:
        from offline import gguf_file
        from packed_model import pack_model

        pack_model(gguf_file(), args.output / "model.safetensors", args.layers)
    if args.tokens:
        from packed_model import save_tokens

        save_tokens(contexts(args.tokens), args.output / "tokens.bin")
    return told(args.output)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--python-version", default="3.12", help="of the machine")
    parser.add_argument("--output", type=Path, default=ROOT / "wheelhouse")
    parser.add_argument("--layers", type=int, default=13, help="of the language model; 0: no model")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of documentation and source code; 0: none")
    parser.add_argument("--no-packages", action="store_true", help="download nothing")
    return parser.parse_args(argv)


def download(folder: Path, python_version: str) -> None:
    for old in folder.glob("*.whl"):
        old.unlink()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    only = ["--only-binary=:all:", "--python-version", python_version, "--dest", str(folder)]
    subprocess.run([*pip, *only, *PACKAGES], check=True)


def stub_wheel(folder: Path) -> Path:
    """A wheel that pip takes, with one module."""
    info = "wandb-0.0.0.dist-info"
    files = {
        "wandb.py": WANDB,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: wandb\nVersion: 0.0.0\nSummary: A stand-in.\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: sae-lens-switch\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [f"{name},sha256={_digest(text)},{len(text.encode())}" for name, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]) + "\n"
    wheel = folder / "wandb-0.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def contexts(n_tokens: int) -> Iterator[list[int]]:
    """Whole contexts of ``n_tokens`` in all: documentation first, then source code of what is installed."""
    from offline import language_model_folder, source_code, text_datasets, token_contexts

    model = language_model_folder(ROOT / "runs" / "models")
    left = n_tokens // _SIZE
    for text in (*text_datasets(), *source_code()):
        for row in token_contexts(text, model, _SIZE):
            if left == 0:
                return
            left -= 1
            yield row["input_ids"]  # type: ignore[index]
    if left:
        raise ValueError(f"tokens must be at most {n_tokens - left * _SIZE:,}, all the text there is; got {n_tokens:,}")


def told(folder: Path) -> int:
    """Sizes, and in how many copies it travels, each with the checkout; 1 if a part of it is too large for any."""
    tree = checkout_size()
    sizes = {p.name: sum(f.stat().st_size for f in [p, *p.rglob("*")] if f.is_file()) for p in folder.iterdir()}
    for name, size in [*sorted(sizes.items()), ("the checkout", tree)]:
        print(f"{name:24}{size / 1e6:8.2f} MB")
    copies = in_copies(sizes, LIMIT - tree)
    for i, names in enumerate(copies, start=1):
        size = tree + sum(sizes[name] for name in names)
        print(f"copy {i}: {size / 1e6:.2f} MB of {LIMIT / 1e6:.2f}, {', '.join(['the checkout', *names])}")
    too_large = [name for name, size in sizes.items() if tree + size > LIMIT]
    for name in too_large:
        print(f"{name} is too large for a copy beside the checkout: fewer --layers or --tokens make it smaller")
    return int(bool(too_large))


def checkout_size() -> int:
    """Bytes of all tracked files."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    return sum((ROOT / name).stat().st_size for name in listed.stdout.split("\0") if name and (ROOT / name).exists())


def in_copies(sizes: dict[str, int], room: int) -> list[list[str]]:
    """The parts, largest first, each in the first copy with room for it."""
    copies: list[list[str]] = []
    for name in sorted(sizes, key=lambda n: -sizes[n]):
        fits = (copy for copy in copies if sum(sizes[n] for n in copy) + sizes[name] <= room)
        copy = next(fits, None)
        if copy is None:
            copies.append([name])
        else:
            copy.append(name)
    return copies


if __name__ == "__main__":
    raise SystemExit(main())
