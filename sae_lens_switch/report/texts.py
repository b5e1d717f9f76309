"""What the SAE does on text: activity, language-model loss, and the texts around each latent's strongest examples."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import TYPE_CHECKING

import torch
from sae_lens import SAE
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sae_lens_switch.analysis import Activity, Similarity, activations_of, compare_saes, observe, over_represented
from sae_lens_switch.report.language_model import CONTEXTS_AT_ONCE, activations, ce_losses, read_contexts
from sae_lens_switch.report.run import Run

if TYPE_CHECKING:
    from transformer_lens import HookedRootModule

# The language model's loss costs three full passes.
_LOSS_CONTEXTS = 32
# Latents are shown by preference that fire in at least this many contexts, and on at most this share of the tokens.
_FEW_CONTEXTS, _OFTEN = 4, 0.01
_TOKENS_BEFORE, _TOKENS_AFTER = 16, 8
# Of the first this many tokens, so many are compared; so many over-represented tokens are shown.
_SAMPLED, _COMPARED, _DISTINCT = 4096, 1024, 32

Window = tuple[list[str], list[float]]  # the text of each token, and the latent's activation there


@dataclass(frozen=True)
class DistinctToken:
    """A token over-represented in an expert, and the share of its occurrences that went to each."""

    text: str
    share_E: list[float]


@dataclass
class Texts:
    """What the SAE does on text.

    Attributes:
        source: How much text, and where it is from.
        activity: Statistics over all of it.
        loss: Cross-entropy losses of the language model by name.
        windows: The strongest examples of each chosen latent.
        typical: The typical tokens per expert: text, count in this expert, count overall.
        distinct: The most over-represented tokens of each expert, expert by expert.
        similarity: Of activations, codes and reconstructions; None for fewer than four tokens.
    """

    source: str
    activity: Activity
    loss: dict[str, float]
    windows: dict[int, list[Window]]
    typical: list[list[tuple[str, int, int]]]
    distinct: list[DistinctToken]
    similarity: Similarity | None


def read_texts(
    run: Run,
    lm: "HookedRootModule",
    store: ActivationsStore,
    source: str,
    *,
    contexts: int,
    latents: Sequence[int] = (),
    n_latents: int = 64,
    n_examples: int = 6,
    others: Mapping[str, SAE] | None = None,
) -> Texts:
    """Run text through the language model and the SAE.

    Args:
        run: The run, as ``load_run`` returns it.
        lm: The language model; it, ``store`` and ``source`` as ``open_model`` returns them.
        store: The store through which the text streams.
        source: Where the text is from.
        contexts: Number of contexts to read.
        latents: Latents to include in any case.
        n_latents: Number of latents to choose beside these.
        n_examples: Number of texts per latent.
        others: SAEs of the same activations to compare this one with, by name.

    Raises:
        ValueError: For latents that the SAE does not have, or if there is no text.
    """
    sae = run.sae
    for name, value, least in (("contexts", contexts, 1), ("n_latents", n_latents, 0), ("n_examples", n_examples, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    for latent in latents:
        if not 0 <= latent < sae.cfg.d_sae:
            raise ValueError(f"latents must be between 0 and {sae.cfg.d_sae - 1}; got {latent}")
    tokens = read_contexts(store, contexts)
    tokenizer = getattr(lm, "tokenizer", None)  # a HookedRootModule need not have one
    exclude = sae.cfg.metadata["exclude_special_tokens"]
    ignored = get_special_token_ids(tokenizer) if exclude is True else list(exclude or ())  # type: ignore[arg-type]
    sample: list[Tensor] = []
    batches = _sampled(activations(store, tokens), sample, ignored)
    activity = observe(sae, batches, n_examples=n_examples, ignore_tokens=ignored)
    chosen = sorted({*choose_latents(activity, n_latents), *latents})
    return Texts(
        source=f"{len(tokens):,} contexts of {tokens.shape[1]} tokens from {source}",
        activity=activity,
        loss=ce_losses(sae, lm, store, tokens[:_LOSS_CONTEXTS], ignored),
        windows=_windows(sae, store, tokens, activity, chosen, tokenizer, ignored),
        typical=_typical(activity, tokenizer),
        distinct=_distinct(activity, tokenizer),
        similarity=_similarity({"this SAE's": sae, **(others or {})}, torch.cat(sample)),
    )


def _sampled(
    batches: Iterable[tuple[Tensor, Tensor]], sample: list[Tensor], ignored: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hand the batches on, and put the first activations into the sample, but for ignored tokens."""
    for x, ids in batches:
        if sum(map(len, sample)) < _SAMPLED:
            kept = ~torch.isin(ids.cpu(), torch.tensor(ignored, dtype=torch.long))
            sample.append(x[kept.to(x.device)])
        yield x, ids


def _similarity(saes: Mapping[str, SAE], x_ND: Tensor) -> Similarity | None:
    return compare_saes(saes, x_ND, n_tokens=_COMPARED) if len(x_ND) >= 4 else None


def _distinct(activity: Activity, tokenizer: PreTrainedTokenizerBase | None) -> list[DistinctToken]:
    counts, E = activity.token_counts, activity.n_experts
    if counts is None:
        return []
    ids = over_represented(counts, n=max(1, _DISTINCT // E)).ids.flatten()
    found = []
    for token in ids[ids >= 0][:_DISTINCT].tolist():
        of_token = counts.labels_P == token
        share_E = torch.zeros(E, dtype=torch.float64)
        share_E[counts.experts_P[of_token]] = counts.counts_P[of_token].double() / counts.counts_P[of_token].sum()
        found.append(DistinctToken(token_texts(tokenizer, [token, token])[1], share_E.tolist()))
    return found


def choose_latents(activity: Activity, n: int) -> list[int]:
    """Choose n latents worth showing, in turn from each expert and the shared ones: highest mean activation first.

    Latents that fire in a few contexts and rarely come first; others fill up where there are not enough of these.
    """
    expert_of, owners = activity.layout.expert_of, range(-1 if activity.n_shared else 0, activity.n_experts)
    contexts_F = (activity.examples.contexts >= 0).sum(1)
    clear_F = (contexts_F >= min(_FEW_CONTEXTS, activity.examples.contexts.shape[1])) & (activity.density_F <= _OFTEN)
    is_clear, means = clear_F.tolist(), activity.mean_F.tolist()
    fired = (activity.fired_F > 0).nonzero().flatten().tolist()
    order = sorted(fired, key=lambda f: (not is_clear[f], -means[f], f))
    of_owner: dict[int, list[int]] = {e: [] for e in owners}
    for f in order:
        of_owner[expert_of(f)].append(f)
    rank = {f: i for i, f in enumerate(order)}
    turns = (
        sorted((f for f in turn if f is not None), key=rank.__getitem__) for turn in zip_longest(*of_owner.values())
    )
    return sorted(islice((f for turn in turns for f in turn), n))


def _windows(
    sae: SAE,
    store: ActivationsStore,
    tokens: Tensor,
    activity: Activity,
    chosen: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None,
    ignored: Sequence[int],
) -> dict[int, list[Window]]:
    """The text around each example of the chosen latents, token by token, with the latent's activations."""
    examples = activity.examples
    rows = sorted({c for c in examples.contexts[list(chosen)].flatten().tolist() if c >= 0})
    acts: dict[int, Tensor] = {}  # by context: [positions, chosen latents]
    for some in (rows[i : i + CONTEXTS_AT_ONCE] for i in range(0, len(rows), CONTEXTS_AT_ONCE)):
        acts |= zip(some, activations_of(sae, store.get_activations(tokens[some]), chosen), strict=True)
    T = tokens.shape[1]
    places = list(range(T))[slice(*store.seqpos_slice)]
    windows: dict[int, list[Window]] = {}
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
            before = min(1, start)  # some tokenizers strip the space off the first token
            texts = token_texts(tokenizer, tokens[context, start - before : stop].tolist())[before:]
            windows[latent].append((texts, values_T[start:stop].tolist()))
    return windows


def _typical(activity: Activity, tokenizer: PreTrainedTokenizerBase | None) -> list[list[tuple[str, int, int]]]:
    found = activity.typical_tokens
    if found is None:
        return []
    rows = zip(found.ids.tolist(), found.counts.tolist(), found.totals.tolist(), strict=True)
    # Decoded after another token, for some tokenizers strip the space off the first.
    return [
        [(token_texts(tokenizer, [i, i])[1], n, total) for i, n, total in zip(*row, strict=True) if i >= 0]
        for row in rows
    ]


def token_texts(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int]) -> list[str]:
    """Each token's part of the text. A character spread over several tokens belongs to the last of them."""
    if tokenizer is None:
        return [f"[{i}]" for i in ids]
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        texts.append(text[len(done) :] if whole else "")
        done = text if whole else done
    return texts
