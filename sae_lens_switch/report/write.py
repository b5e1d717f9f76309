"""From a run on disk to the page: what can be had is loaded, analysed and rendered."""

import os
from collections.abc import Sequence
from pathlib import Path

from sae_lens import SAE

from sae_lens_switch.analysis import duplicate_latents, router_geometry
from sae_lens_switch.common.printable import logger
from sae_lens_switch.report.inside import look_at_weights
from sae_lens_switch.report.language_model import open_model
from sae_lens_switch.report.page import render_page
from sae_lens_switch.report.run import Run, load_run
from sae_lens_switch.report.texts import Texts, read_texts
from sae_lens_switch.saes.switch_sae import SwitchBase

# A single activation with more of the variance than this is worth a note.
_OUTLIER = 0.05


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
    compare: str | Path | None = None,
    device: str = "cpu",
    trust_model_kwargs: bool = False,
) -> Path:
    """Write one HTML page about a trained SAE.

    A model or dataset that cannot be loaded leaves a gap in the page, with the reason; if it was named here, that is
    an error.

    Args:
        run: The output folder of a runner or of the quickstart, a checkpoint or a folder of them, or an SAE.
        output: Path of the page; ``RUN/report.html`` by default.
        history: A ``history.jsonl`` or ``.wandb`` file with the training curves, if the run has none.
        model: Name or folder of the language model; by default that of the SAE's metadata.
        model_class: SAELens's name for its class; by default that of the SAE's metadata.
        dataset: Text: a name on the Hub, a folder or a file; by default the run's ``held_out`` text, or else the
            training dataset.
        contexts: Number of contexts to run through the language model; 0 for no language model.
        latents: Latents to show in any case.
        n_latents: Number of latents to choose beside these.
        n_examples: Number of texts per latent.
        threshold: Cosine above which two latents are duplicates.
        compare: Another run or SAE, of the same activations, whose codes and reconstructions are compared with these.
        device: Device of the SAE and the language model.
        trust_model_kwargs: Load the language model with all arguments that the SAE's metadata name, even if they can
            run code.

    Returns:
        The path of the page.

    Raises:
        ValueError: If there is no SAE, or an argument cannot be used.
    """
    loaded = load_run(run, history, device)
    sae, layout = loaded.sae, loaded.layout
    others = {} if compare is None else {"the other's": _other(loaded, compare, device)}
    W_dec_FD, n_shared = sae.W_dec.detach(), layout.shared_width
    duplicates = duplicate_latents(W_dec_FD, layout.n_experts, n_shared=n_shared, threshold=threshold)
    geometry = router_geometry(sae, centered=True) if isinstance(sae, SwitchBase) else None
    opened, reason = None, "--contexts 0"
    if contexts != 0:
        try:
            opened = open_model(loaded, model, model_class, dataset, device, trust_model_kwargs)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            if model or model_class or dataset:
                names = {"model": model, "model_class": model_class, "dataset": dataset}
                named = ", ".join(f"{name} {value!r}" for name, value in names.items() if value)
                raise ValueError(f"no text can be read with {named}: {reason}") from error
            logger.warning(f"no text in the report: {reason}")
    found = None
    if opened is None:
        loaded.notes.append(
            "No text was read, so this page has no typical tokens, no texts per latent and no CE loss recovered. "
            f"Reason: {reason}. Use --model and --dataset to provide them."
        )
    else:
        options = {"latents": latents, "n_latents": n_latents, "n_examples": n_examples, "others": others}
        found = read_texts(loaded, *opened, contexts=contexts, **options)
        _note_outlier(loaded, found)
    file = Path(output) if output is not None else Path(run) / "report.html"
    _write(file, render_page(loaded, duplicates, geometry, look_at_weights(loaded), found))
    return file


def _other(run: Run, compare: str | Path, device: str) -> SAE:
    """The SAE to compare with, which must be of the same activations."""
    sae = load_run(compare, device=device).sae
    ours, theirs = ((s.cfg.d_in, s.cfg.metadata.model_name, s.cfg.metadata.hook_name) for s in (run.sae, sae))
    if ours != theirs:
        raise ValueError(f"compare must be an SAE of the same activations, {ours}; got {theirs}")
    return sae


def _note_outlier(run: Run, texts: Texts) -> None:
    if texts.activity.outlier > _OUTLIER:
        run.notes.append(
            f"One token of {texts.activity.n_tokens:,} has {texts.activity.outlier:.0%} of the variance of the "
            "activations. Where tokens have massive activations, the explained variance says little about the others; "
            "seqpos_slice and exclude_special_tokens leave them out, in training and here."
        )


def _write(file: Path, page: str) -> None:
    """Atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        unfinished.write_text(page, encoding="utf-8")
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
