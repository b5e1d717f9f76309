"""The widths of Matryoshka SAEs: what they must be, and how a list of them is completed."""

import warnings
from collections.abc import Sequence
from itertools import pairwise

PER_TOKEN = ("constant_norm_rescale", "layer_norm")


def check_widths(widths: Sequence[int], whole: int, of: str, normalize_activations: str) -> None:
    """Raises ValueError unless they ascend to at most ``whole``, which ``of`` names, with a normalisation that fits."""
    if not widths or widths[-1] > whole or any(a >= b for a, b in pairwise([0, *widths])):
        raise ValueError(f"matryoshka_widths must be one or more widths, ascending, up to {of}={whole}; got {widths}")
    if normalize_activations in PER_TOKEN:
        raise ValueError(
            "normalize_activations must not be per token with matryoshka_widths: SAELens undoes it for one "
            f"reconstruction only; got {normalize_activations!r}"
        )


def completed(widths: Sequence[int], whole: int) -> list[int]:
    """With the whole as the last width. Warns where it was not, as SAELens does."""
    if widths[-1] == whole:
        return list(widths)
    warnings.warn(
        f"matryoshka_widths end with {widths[-1]}: {whole}, the width of an expert, is added as the last",
        stacklevel=2,
    )
    return [*widths, whole]
