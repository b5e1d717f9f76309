"""The language model of an SAE, text that streams through it as in training, and its loss with the SAE inside."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from sae_lens import SAE
from sae_lens.load_model import load_model
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from sae_lens_switch.analysis.activity import reconstruct
from sae_lens_switch.common.progress import track
from sae_lens_switch.report.run import Run

if TYPE_CHECKING:
    import datasets
    from transformer_lens import HookedRootModule

CONTEXTS_AT_ONCE = 8
# Arguments of from_pretrained that run no code, as trust_remote_code, attn_implementation and weights_only can: that of
# whoever published the SAE or the model.
_HARMLESS = {
    *("center_unembed", "center_writing_weights", "checkpoint_index", "checkpoint_value", "default_padding_side"),
    *("default_prepend_bos", "dtype", "first_n_layers", "fold_ln", "fold_value_biases", "n_ctx", "n_devices"),
    *("num_hidden_layers", "refactor_factored_attn_matrices", "revision", "torch_dtype"),
}


def open_model(
    run: Run,
    model: str | None = None,
    model_class: str | None = None,
    dataset: str | None = None,
    device: str = "cpu",
    trust_model_kwargs: bool = False,
) -> "tuple[HookedRootModule, ActivationsStore, str]":
    """Load the language model and open the text; defaults come from the SAE's metadata.

    Args:
        run: The run.
        model: Name or folder of the language model.
        model_class: SAELens's name for its class.
        dataset: A name on the Hub, a folder or a file.
        device: Of the language model.
        trust_model_kwargs: Load the model with all arguments that the SAE's metadata name, even if they can run code.

    Returns:
        The language model, the store through which text streams as in training, and the source of the text.

    Raises:
        ValueError: If neither arguments nor metadata name what is needed, or if the metadata name arguments that must
            be trusted. Loading raises errors of its own.
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
    model_kwargs = _mapping(about.model_from_pretrained_kwargs) or {}
    if not trust_model_kwargs and (others := sorted(model_kwargs.keys() - _HARMLESS)):
        raise ValueError(
            f"the SAE's metadata want its language model loaded with {', '.join(others)}, which could run code; if you "
            "trust who published it, give --trust-model-kwargs"
        )
    lm = load_model(
        model_class or about.model_class_name or "HookedTransformer",
        cast(str, model),
        device=device,
        model_from_pretrained_kwargs=model_kwargs,
        hook_names=[about["hook_name"]],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dataset is not tokenized")
        store = ActivationsStore(
            model=lm,
            dataset=_dataset(cast(str, source)),
            streaming=True,
            hook_name=about["hook_name"],
            hook_head_index=about.hook_head_index,
            context_size=about.context_size or 128,
            d_in=run.sae.cfg.d_in,
            n_batches_in_buffer=1,
            total_training_tokens=1,
            store_batch_size_prompts=CONTEXTS_AT_ONCE,
            train_batch_size_tokens=1,
            prepend_bos=about.get("prepend_bos", True),
            normalize_activations="none",
            device=torch.device(device),
            dtype="float32",
            model_kwargs=_mapping(runner.get("model_kwargs")),
            autocast_lm=bool(runner.get("autocast_lm", False)),
            dataset_trust_remote_code=None,  # a report must not run a dataset's code
            seqpos_slice=tuple(about.seqpos_slice or (None,)),
            disable_concat_sequences=bool(about.disable_concat_sequences),
            sequence_separator_token=about.get("sequence_separator_token", "bos"),
            use_chat_formatting=bool(runner.get("use_chat_formatting", False)),
        )
    return lm, store, cast(str, source)


def _mapping(value: object) -> dict[str, object] | None:
    return dict(value) if isinstance(value, Mapping) else None


def _dataset(source: str) -> "str | datasets.Dataset | datasets.IterableDataset":
    """What ActivationsStore takes: a name on the Hub, or the dataset in a folder or file."""
    import datasets

    path = Path(source)
    if path.is_dir() and any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        found = datasets.load_from_disk(source)
        return found[next(iter(found))] if isinstance(found, datasets.DatasetDict) else found
    if path.is_file():
        kinds = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
        if path.suffix not in kinds:
            raise ValueError(
                f"--dataset must be a folder, a name on the hub or a file {', '.join(kinds)}; got {source}"
            )
        return datasets.load_dataset(kinds[path.suffix], data_files=source, split="train")  # type: ignore[return-value]
    return source


def read_contexts(store: ActivationsStore, n: int) -> Tensor:
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


def activations(store: ActivationsStore, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of activations [contexts, positions, D] with their token ids."""
    for batch in track(tokens.split(CONTEXTS_AT_ONCE), desc="Reading text"):
        yield store.get_activations(batch), batch[:, slice(*store.seqpos_slice)]


@torch.no_grad()
def ce_losses(
    sae: SAE, lm: "HookedRootModule", store: ActivationsStore, tokens: Tensor, ignored: Sequence[int]
) -> dict[str, float]:
    """Cross entropy without the SAE, with it, and with zeros in its place, and the share of the loss recovered.

    Only tokens of the kind that the SAE was trained on are replaced, and only their losses are averaged.
    """
    sums: dict[str, float] = {"without_sae": 0.0, "with_sae": 0.0, "with_ablation": 0.0}
    n = 0

    def reconstructed(x: Tensor) -> Tensor:
        return reconstruct(sae, x.to(sae.device, sae.dtype)).to(x.device, x.dtype)

    for batch in track(tokens.split(CONTEXTS_AT_ONCE), desc="Loss of the language model"):
        mask = torch.zeros_like(batch, dtype=torch.bool)
        mask[:, slice(*store.seqpos_slice)] = True
        mask &= ~torch.isin(batch, torch.tensor(ignored, dtype=batch.dtype, device=batch.device))
        n += int(mask[:, :-1].sum())
        for name, by in {"without_sae": None, "with_sae": reconstructed, "with_ablation": torch.zeros_like}.items():
            head = store.hook_head_index
            hooks: list[tuple[str | Callable[..., bool], Callable[..., Tensor]]] = []
            if by is not None:
                hooks.append((store.hook_name, partial(_replace, by=by, mask=mask, head=head)))
            _, loss = lm.run_with_hooks(
                batch, fwd_hooks=hooks, return_type="both", loss_per_token=True, **store.model_kwargs
            )
            # The loss at a position is that of predicting the next token.
            sums[name] += float(loss[mask[:, :-1].to(loss.device)].double().cpu().sum())
    losses = {name: total / max(1, n) for name, total in sums.items()}
    gap = losses["with_ablation"] - losses["without_sae"]
    recovered = (losses["with_ablation"] - losses["with_sae"]) / gap if n and gap else math.nan
    return {f"ce_loss_{name}": value for name, value in losses.items()} | {"ce_loss_recovered": recovered}


def _replace(
    acts: Tensor,
    hook: HookPoint,  # noqa: ARG001
    *,
    by: Callable[[Tensor], Tensor],
    mask: Tensor,
    head: int | None,
) -> Tensor:
    """Replace the activations at a hook where the mask says so: all of the heads together, or one alone."""
    x = acts.flatten(2) if head is None else acts[:, :, head]
    x = torch.where(mask.to(x.device)[..., None], by(x), x)
    if head is None:
        return x.view_as(acts)
    acts = acts.clone()
    acts[:, :, head] = x
    return acts
