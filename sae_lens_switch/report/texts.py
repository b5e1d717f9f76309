"""One HTML page about a trained SAE: ``python -m sae_lens_switch.report RUN``.

RUN is what is on disk after training. The page holds all it needs, plotly's JavaScript too, and asks the network for
nothing. Weights and logs are enough for half of it; the other half needs the language model and some text.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.load_model import load_model
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_switch.analysis import (
    Activity,
    activations_of,
    duplicate_latents,
    observe,
    router_geometry,
)
from sae_lens_switch.common.printable import logger
from sae_lens_switch.common.progress import track
from sae_lens_switch.report.page import page_of
from sae_lens_switch.saes.serialization import fold_saved_scaler
from sae_lens_switch.training.checkpoints import TRAINING_FOLDER
from sae_lens_switch.training.history import FILENAME as HISTORY_FILENAME
from sae_lens_switch.training.history import numbers_of, read_history

METRICS_FILENAME = "metrics.json"
TEXT_FOLDER = "held_out"
_CONTEXTS_AT_ONCE = 8
# The language model's loss costs three whole passes of it.
_LOSS_CONTEXTS = 32
# A latent is shown where it fires in so many contexts, and on no more than this share of the tokens.
_FEW_CONTEXTS, _OFTEN = 4, 0.01
# An activation with more of the variance than this is worth a word.
_OUTLIER = 0.05
_TOKENS_BEFORE, _TOKENS_AFTER = 16, 8


# What is on disk


@dataclass
class Run:
    """What a run left: the SAE, and whatever else was found. ``notes`` say what was not, or not as it should be."""

    folder: Path
    sae: Any
    runner: dict[str, Any] = field(default_factory=dict)
    density_F: Tensor | None = None  # counted by the trainer, in its last window
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    text: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def n_experts(self) -> int:
        return getattr(self.sae.cfg, "n_experts", 1)


def find_sae(run: Path) -> Path:
    """The folder of the SAE below a run: itself, the only one, or the newest checkpoint of one run.

    Raises ValueError if there is none, or no telling which of several is meant.
    """
    if not run.is_dir():
        raise ValueError(f"RUN must be the folder of a run, a checkpoint or an SAE; {run} is no folder")
    if (run / SAE_CFG_FILENAME).exists():
        return run
    found = sorted(
        file.parent
        for level in (1, 2)
        for file in run.glob("/".join(["*"] * level + [SAE_CFG_FILENAME]))
        if not any(part.startswith(".") or part.endswith("~") for part in file.relative_to(run).parts)
    )
    if not found:
        raise ValueError(f"RUN must hold an SAE; there is no {SAE_CFG_FILENAME} in {run} or two levels below")
    if len(found) == 1:
        return found[0]
    samples = [folder.name.rpartition("_")[2] for folder in found]
    if len({folder.parent for folder in found}) == 1 and all(name.isdigit() for name in samples):
        return max(zip(map(int, samples), found, strict=True))[1]
    names = ", ".join(str(folder.relative_to(run)) for folder in found[:8])
    raise ValueError(f"RUN must hold one SAE; {run} has {len(found)}: {names}. Name one of them")


def load_run(run: str | Path, history: str | Path | None = None, device: str = "cpu") -> Run:
    """Everything but the language model. Raises ValueError if there is no SAE, or a file that is not what it says."""
    run = Path(run)
    folder = find_sae(run)
    in_training = (folder / TRAINER_STATE_FILENAME).exists() or (folder / TRAINING_FOLDER).is_dir()
    try:
        sae: Any = (TrainingSAE if in_training else SAE).load_from_disk(folder, device=device)
        fold_saved_scaler(sae, folder)
    except Exception as error:  # a damaged config or weights can go wrong in any way
        raise ValueError(f"RUN must hold an SAE that can be loaded; {folder}: {error!r}") from error
    if str(sae.cfg.metadata.hook_name).endswith("_z"):
        sae.turn_off_forward_pass_hook_z_reshaping()  # the activation store lays heads side by side
    loaded = Run(folder, sae.eval(), runner=_json(folder / RUNNER_CFG_FILENAME))
    loaded.density_F = _density(folder / SPARSITY_FILENAME, sae.cfg.d_sae)
    loaded.metrics = numbers_of(_json(run / METRICS_FILENAME))
    loaded.text = run / TEXT_FOLDER if (run / TEXT_FOLDER).is_dir() else None
    candidates = [Path(history)] if history else [folder / HISTORY_FILENAME, run / HISTORY_FILENAME]
    file = next((file for file in candidates if file.exists()), None)
    if file is not None:
        try:
            loaded.history = read_history(file)
        except (ValueError, OSError) as error:
            if history:
                raise
            loaded.notes.append(f"The history of the run cannot be read: {error}")
    elif history:
        raise ValueError(f"--history must be a {HISTORY_FILENAME} or a .wandb file; there is no {history}")
    if not loaded.history and not loaded.notes:
        loaded.notes.append(
            f"No curve was recorded: there is no {HISTORY_FILENAME} with the SAE. If the run was logged to W&B, online "
            "or offline, give its file: --history wandb/run-.../run-....wandb"
        )
    return loaded


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _density(file: Path, d_sae: int) -> Tensor | None:
    """Of SAELens's log10(density + 1e-10). None if the trainer's last window was empty when it was written."""
    if not file.exists():
        return None
    log_density_F = load_file(file)["sparsity"].double()
    if log_density_F.shape != (d_sae,) or not log_density_F.isfinite().all() or log_density_F.max() < -9.5:
        return None
    return torch.where(log_density_F < -9.5, 0.0, 10**log_density_F)


# What the language model shows


@dataclass
class Texts:
    """What the SAE does on text: ``windows`` of each chosen latent are its strongest examples, text and activations."""

    source: str
    activity: Activity
    loss: dict[str, float]
    windows: dict[int, list[tuple[list[str], list[float]]]]
    typical: list[list[tuple[str, int, int]]]  # of each expert: text, times there, times in all


def open_model(
    run: Run,
    model: str | None = None,
    model_class: str | None = None,
    dataset: str | None = None,
    device: str = "cpu",
) -> tuple[Any, ActivationsStore, str]:
    """The language model, text that streams through it as in training, and where the text is from.

    What is not given is the SAE's metadata's. Raises ValueError where these do not say, and what loading raises.
    """
    about, runner = run.sae.cfg.metadata, run.runner
    model = model or about.model_name
    source = dataset or (str(run.text) if run.text else about.dataset_path)
    for value, what in (
        (about.hook_name, "hook"),
        (model, "language model; give --model"),
        (source, "dataset; give --dataset"),
    ):
        if not value:
            raise ValueError(f"the SAE's metadata name no {what}")
    lm: Any = load_model(
        model_class or about.model_class_name or "HookedTransformer",
        cast(str, model),
        device=device,
        model_from_pretrained_kwargs=about.model_from_pretrained_kwargs,
        hook_names=[about.hook_name],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dataset is not tokenized")
        store = ActivationsStore(
            model=lm,
            dataset=_dataset(cast(str, source)),
            streaming=True,
            hook_name=about.hook_name,
            hook_head_index=about.hook_head_index,
            context_size=about.context_size or 128,
            d_in=run.sae.cfg.d_in,
            n_batches_in_buffer=1,
            total_training_tokens=1,
            store_batch_size_prompts=_CONTEXTS_AT_ONCE,
            train_batch_size_tokens=1,
            prepend_bos=about.get("prepend_bos", True),
            normalize_activations="none",
            device=torch.device(device),
            dtype="float32",
            model_kwargs=runner.get("model_kwargs"),
            autocast_lm=runner.get("autocast_lm", False),
            dataset_trust_remote_code=None,  # a page is no reason to run a dataset's code
            seqpos_slice=tuple(about.seqpos_slice or (None,)),
            disable_concat_sequences=bool(about.disable_concat_sequences),
            sequence_separator_token=about.get("sequence_separator_token", "bos"),
            use_chat_formatting=runner.get("use_chat_formatting", False),
        )
    return lm, store, cast(str, source)


def read_texts(
    run: Run,
    lm: Any,
    store: ActivationsStore,
    source: str,
    *,
    contexts: int,
    latents: Sequence[int] = (),
    n_latents: int = 64,
    n_examples: int = 6,
) -> Texts:
    """Text through the language model and the SAE. Raises ValueError for latents that the SAE has not, or no text."""
    sae = run.sae
    for name, value, least in (("contexts", contexts, 1), ("n_latents", n_latents, 0), ("n_examples", n_examples, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    for latent in latents:
        if not 0 <= latent < sae.cfg.d_sae:
            raise ValueError(f"latents must be between 0 and {sae.cfg.d_sae - 1}; got {latent}")
    tokens = _contexts(store, contexts)
    tokenizer = getattr(lm, "tokenizer", None)
    exclude = sae.cfg.metadata.exclude_special_tokens
    ignored = get_special_token_ids(tokenizer) if exclude is True else list(exclude or ())  # type: ignore[arg-type]
    activity = observe(sae, _activations(store, tokens), n_examples=n_examples, ignore_tokens=ignored)
    chosen = sorted({*choose_latents(activity, n_latents), *latents})
    found = activity.typical_tokens
    rows = zip(found.ids.tolist(), found.counts.tolist(), found.totals.tolist(), strict=True) if found else ()
    return Texts(
        source=f"{len(tokens):,} contexts of {tokens.shape[1]} tokens from {source}",
        activity=activity,
        loss=_losses(sae, lm, store, tokens[:_LOSS_CONTEXTS], ignored),
        windows=_windows(sae, store, tokens, activity, chosen, tokenizer, ignored),
        typical=[
            [(token_texts(tokenizer, [i, i])[1], n, total) for i, n, total in zip(*row, strict=True) if i >= 0]
            for row in rows
        ],
    )


def _dataset(source: str) -> Any:
    """What ActivationsStore takes: a name on the hub, or the dataset in a folder or file."""
    import datasets

    path = Path(source)
    if path.is_dir() and any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        found: Any = datasets.load_from_disk(source)
        return found[next(iter(found))] if isinstance(found, datasets.DatasetDict) else found
    if path.is_file():
        kinds = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
        if path.suffix not in kinds:
            raise ValueError(
                f"--dataset must be a folder, a name on the hub or a file {', '.join(kinds)}; got {source}"
            )
        return datasets.load_dataset(kinds[path.suffix], data_files=source, split="train")
    return source


def _contexts(store: ActivationsStore, n: int) -> Tensor:
    """The first n contexts of the text, or all there are: [contexts, tokens]."""
    rows: list[Tensor] = []
    while len(rows) < n:
        try:
            rows.append(store.get_batch_tokens(1, raise_at_epoch_end=True))
        except StopIteration:
            break
    if not rows:
        raise ValueError(f"the dataset must have at least one context of {store.context_size} tokens; it has none")
    return torch.cat(rows)


def _activations(store: ActivationsStore, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of activations [contexts, positions, D] and of their token ids."""
    for batch in track(tokens.split(_CONTEXTS_AT_ONCE), desc="Reading text"):
        yield store.get_activations(batch), batch[:, slice(*store.seqpos_slice)]


@torch.no_grad()
def _losses(sae: Any, lm: Any, store: ActivationsStore, tokens: Tensor, ignored: Sequence[int]) -> dict[str, float]:
    """Cross entropy as it is, with the SAE, with zeros; over the tokens that the SAE was trained on alone."""
    hook_name, head = store.hook_name, store.hook_head_index
    sums: dict[str, float] = {"without_sae": 0.0, "with_sae": 0.0, "with_ablation": 0.0}
    n = 0

    def reconstruct(x: Tensor) -> Tensor:
        x_in = x.to(sae.device, sae.dtype)
        acts = sae.encode_sparse(x_in) if hasattr(sae, "encode_sparse") else sae.encode(x_in)
        return sae.decode(acts).to(x.device, x.dtype)

    def replace(acts: Tensor, hook: Any, by: Callable[[Tensor], Tensor], mask: Tensor) -> Tensor:  # noqa: ARG001
        x = acts.flatten(2) if head is None else acts[:, :, head]
        x = torch.where(mask.to(x.device)[..., None], by(x), x)
        if head is None:
            return x.view_as(acts)
        acts = acts.clone()
        acts[:, :, head] = x
        return acts

    for batch in track(tokens.split(_CONTEXTS_AT_ONCE), desc="Loss of the language model"):
        mask = torch.zeros_like(batch, dtype=torch.bool)
        mask[:, slice(*store.seqpos_slice)] = True
        mask &= ~torch.isin(batch, torch.tensor(ignored, dtype=batch.dtype, device=batch.device))
        n += int(mask[:, :-1].sum())
        for name, by in {"without_sae": None, "with_sae": reconstruct, "with_ablation": torch.zeros_like}.items():
            hooks = [] if by is None else [(hook_name, partial(replace, by=by, mask=mask))]
            _, loss = lm.run_with_hooks(
                batch, fwd_hooks=hooks, return_type="both", loss_per_token=True, **store.model_kwargs
            )
            sums[name] += float(loss[mask[:, :-1].to(loss.device)].double().cpu().sum())  # that of the next token
    losses = {name: total / max(1, n) for name, total in sums.items()}
    gap = losses["with_ablation"] - losses["without_sae"]
    recovered = (losses["with_ablation"] - losses["with_sae"]) / gap if n and gap else math.nan
    return {f"ce_loss_{name}": value for name, value in losses.items()} | {"ce_loss_recovered": recovered}


def choose_latents(activity: Activity, n: int) -> list[int]:
    """n latents worth a look, as many of each expert: the strongest where they fire, of those that fire in a few
    contexts and seldom; of others only where there are not enough of these."""
    E = activity.n_experts
    contexts_F = (activity.examples.contexts >= 0).sum(1)
    clear_F = (contexts_F >= min(_FEW_CONTEXTS, activity.examples.contexts.shape[1])) & (activity.density_F <= _OFTEN)
    order = sorted(
        (activity.fired_F > 0).nonzero().flatten().tolist(),
        key=lambda f: (not clear_F[f], -activity.mean_F[f].item(), f),
    )
    M = len(contexts_F) // E
    per_expert = -(-n // E)
    return sorted(f for e in range(E) for f in [f for f in order if f // M == e][:per_expert])


def _windows(
    sae: Any,
    store: ActivationsStore,
    tokens: Tensor,
    activity: Activity,
    chosen: Sequence[int],
    tokenizer: Any,
    ignored: Sequence[int],
) -> dict[int, list[tuple[list[str], list[float]]]]:
    """The text around each example of the chosen latents, token by token, and the latent's activations there."""
    examples = activity.examples
    rows = sorted({c for c in examples.contexts[list(chosen)].flatten().tolist() if c >= 0})
    acts: dict[int, Tensor] = {}  # of a context: [positions, chosen latents]
    for some in (rows[i : i + _CONTEXTS_AT_ONCE] for i in range(0, len(rows), _CONTEXTS_AT_ONCE)):
        acts |= zip(some, activations_of(sae, store.get_activations(tokens[some]), chosen), strict=True)
    T = tokens.shape[1]
    places = list(range(T))[slice(*store.seqpos_slice)]
    windows: dict[int, list[tuple[list[str], list[float]]]] = {}
    for column, latent in enumerate(chosen):
        windows[latent] = []
        for context, position in zip(
            examples.contexts[latent].tolist(), examples.positions[latent].tolist(), strict=True
        ):
            if context < 0:
                break
            values_T = torch.zeros(T)
            values_T[places] = acts[context][:, column].float()
            values_T[torch.isin(tokens[context].cpu(), torch.tensor(ignored, dtype=torch.long))] = 0
            at = places[position]
            start, stop = max(0, at - _TOKENS_BEFORE), at + _TOKENS_AFTER + 1
            before = min(1, start)  # some tokenizers take the space off the first token
            texts = token_texts(tokenizer, tokens[context, start - before : stop].tolist())[before:]
            windows[latent].append((texts, values_T[start:stop].tolist()))
    return windows


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token's part of the text. A character that several tokens make is the last one's."""
    if tokenizer is None:
        return [f"[{i}]" for i in ids]
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        texts.append(text[len(done) :] if whole else "")
        done = text if whole else done
    return texts


# The page


def write_report(
    run: str | Path,
    output: str | Path | None = None,
    *,
    history: str | Path | None = None,
    model: str | None = None,
    model_class: str | None = None,
    dataset: str | None = None,
    contexts: int = 256,
    latents: Sequence[int] = (),
    n_latents: int = 64,
    n_examples: int = 6,
    threshold: float = 0.9,
    device: str = "cpu",
) -> Path:
    """Write the page; returns its path, ``RUN/report.html`` unless ``output`` is given.

    run:        the output folder of a runner, of the quickstart, a checkpoint (or a folder of them), or an SAE
    history:    a ``history.jsonl`` or ``.wandb`` file with the curves, if there is none in the run
    model, model_class, dataset:  by default those in the SAE's metadata; the dataset a name on the hub, a folder or a
                file, and before any other the ``held_out`` text in the run
    contexts:   of text for the language model; 0: no language model
    latents:    to be shown for certain, beside n_latents that the page chooses; n_examples texts of each
    threshold:  cosine above which two latents are duplicates
    A model or dataset that cannot be had is a gap in the page, with the reason; if it was named here, it is an error.
    """
    loaded = load_run(run, history, device)
    duplicates = duplicate_latents(loaded.sae.W_dec.detach(), loaded.n_experts, threshold=threshold)
    geometry = router_geometry(loaded.sae, centered=True) if hasattr(loaded.sae, "W_router") else None
    opened, found, reason = None, None, "--contexts 0"
    if contexts != 0:
        try:
            opened = open_model(loaded, model, model_class, dataset, device)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            if model or model_class or dataset:
                names = {"model": model, "model_class": model_class, "dataset": dataset}
                named = ", ".join(f"{name} {value!r}" for name, value in names.items() if value)
                raise ValueError(f"no text can be read with {named}: {reason}") from error
            logger.warning(f"no text in the report: {reason}")
    if opened is None:
        loaded.notes.append(
            "No text was read, so there are no typical tokens, no texts of latents and no loss recovered on this page. "
            f"The reason: {reason}. With --model and --dataset there can be."
        )
    else:
        options = {"latents": latents, "n_latents": n_latents, "n_examples": n_examples}
        found = read_texts(loaded, *opened, contexts=contexts, **options)
        if found.activity.outlier > _OUTLIER:
            loaded.notes.append(
                f"One token of {found.activity.n_tokens:,} has {found.activity.outlier:.0%} of the variance of the "
                "activations. Where tokens have massive activations, the explained variance says little of the others; "
                "seqpos_slice and exclude_special_tokens leave them out, in training and here."
            )
    page = page_of(loaded, duplicates, geometry, found)
    file = Path(output) if output is not None else Path(run) / "report.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        unfinished.write_text(page, encoding="utf-8")
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
    return file
