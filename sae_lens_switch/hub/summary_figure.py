"""Summary figures of a training run and of an SAE. matplotlib is imported only when one is drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _BLUE, _ORANGE = "#333333", "#3b6fb6", "#d9822b"


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install matplotlib") from error
    # Not pyplot: no global state, no window, and it works without a display.
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def training_summary(
    mse: Sequence[float],
    expert_load: Sequence[float],
    latent_density: Tensor,
    *,
    tokens_per_step: int,
    variance: float | None = None,
    title: str = "",
) -> "Figure":
    """Draw a training run in three panels: loss, load per expert, density of the latents.

    Args:
        mse: Squared L2 error per token, one number per training step.
        expert_load: Share of the tokens routed to each expert; sums to 1.
        latent_density: Share of the tokens on which each latent fired, [F].
        tokens_per_step: Number of tokens per training step.
        variance: E||x - mean||^2, drawn as the loss of an SAE that explains nothing.
        title: Title of the figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = _figure(13, 3.9)
    loss_axes, load_axes, density_axes = figure.subplots(1, 3)
    _tidy(loss_axes, load_axes, density_axes)

    steps = torch.arange(1, len(mse) + 1) * tokens_per_step / 1000
    loss_axes.plot(steps.tolist(), list(mse), color=_BLUE, linewidth=1.4)
    if variance is not None:
        loss_axes.axhline(variance, color=_ORANGE, linestyle="--", linewidth=1.2, label="variance of the activations")
        loss_axes.legend(frameon=False, loc="upper right")
    loss_axes.set(
        title="Reconstruction loss", xlabel="training tokens (thousands)", ylabel=r"$\|x-\hat{x}\|^2$ per token"
    )
    loss_axes.set_yscale("log")
    loss_axes.set_xlim(left=0)
    loss_axes.grid(which="both", alpha=0.2)

    _draw_load(load_axes, expert_load)
    _draw_density(density_axes, latent_density)
    if title:
        figure.suptitle(title, fontsize=11, color=_INK)
    return figure


def sae_summary(
    *,
    expert_load: Sequence[float] | None = None,
    latent_density: Tensor | None = None,
    alignment: Tensor | None = None,
    load_of: str = "tokens",
    title: str = "",
) -> "Figure":
    """Draw a trained SAE, with one panel for each quantity that is given.

    Args:
        expert_load: Share of the tokens, or of what ``load_of`` names, per expert, [E].
        latent_density: Share of the tokens on which each latent fired, [F].
        alignment: Cosine between the encoder and decoder weights of each latent, [F].
        load_of: What the load is a share of.
        title: Title of the figure.

    Raises:
        ValueError: If nothing is given.
        ImportError: If matplotlib is not installed.
    """
    known = [data is not None for data in (expert_load, latent_density, alignment)]
    if not any(known):
        raise ValueError("give at least one of expert_load, latent_density and alignment")
    figure = _figure(4.4 * sum(known), 3.9)
    panels = list(figure.subplots(1, sum(known), squeeze=False).flat)
    _tidy(*panels)
    if expert_load is not None:
        _draw_load(panels.pop(0), expert_load, load_of)
    if latent_density is not None:
        _draw_density(panels.pop(0), latent_density)
    if alignment is not None:
        axes = panels.pop(0)
        axes.hist(alignment.tolist(), bins=50, color=_BLUE)
        axes.set(title="Encoder-decoder alignment", xlabel="cosine of encoder and decoder weights", ylabel="latents")
    if title:
        figure.suptitle(title, fontsize=11, color=_INK, parse_math=False)
    return figure


def _tidy(*panels: "Axes") -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_color(_INK)


def _draw_load(axes: "Axes", expert_load: Sequence[float], load_of: str = "tokens") -> None:
    uniform = 100 / len(expert_load)
    axes.bar(range(len(expert_load)), [100 * share for share in expert_load], color=_BLUE, width=0.75)
    axes.axhline(uniform, color=_ORANGE, linestyle="--", linewidth=1.2, label=f"uniform: {uniform:.3g} %")
    axes.set(title="Load per expert", xlabel="expert", ylabel=f"share of the {load_of} (%)")
    axes.set_ylim(0, 1.25 * max(uniform, 100 * max(expert_load)))  # room for the legend above the bars
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[reportCallIssue]
    axes.legend(frameon=False, loc="upper right")


def _draw_density(axes: "Axes", latent_density: Tensor) -> None:
    fired = latent_density[latent_density > 0].log10()
    n_dead = len(latent_density) - len(fired)
    axes.hist(fired.tolist(), bins=50, color=_BLUE)
    axes.set(
        title=f"Latent density ({n_dead:,} of {len(latent_density):,} dead)",
        xlabel=r"$\log_{10}$ share of tokens on which a latent fires",
        ylabel="latents",
    )
