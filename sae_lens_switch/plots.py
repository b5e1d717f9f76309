"""The pictures. matplotlib is asked for only when one is drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _BLUE, _ORANGE = "#333333", "#3b6fb6", "#d9822b"


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
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
    """How a training run went, in three panels: the loss, the load of each expert, the density of the latents.

    mse:            mean squared L2 error per token, one number per training step
    expert_load:    share of the tokens that each expert received; sums to 1
    latent_density: share of the tokens on which each latent fired, [F]
    variance:       E||x - mean||^2, drawn as the level that the loss starts from when nothing is explained
    """
    figure = _figure(13, 3.9)
    loss_axes, load_axes, density_axes = figure.subplots(1, 3)
    for axes in (loss_axes, load_axes, density_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_color(_INK)

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

    n_experts = len(expert_load)
    uniform = 100 / n_experts
    load_axes.bar(range(n_experts), [100 * share for share in expert_load], color=_BLUE, width=0.75)
    load_axes.axhline(uniform, color=_ORANGE, linestyle="--", linewidth=1.2, label=f"uniform: {uniform:.3g} %")
    load_axes.set(title="Load of the experts", xlabel="expert", ylabel="share of the tokens (%)")
    load_axes.set_ylim(0, 1.25 * max(uniform, 100 * max(expert_load)))  # room for the legend above the bars
    load_axes.xaxis.get_major_locator().set_params(integer=True)
    load_axes.legend(frameon=False, loc="upper right")

    fired = latent_density[latent_density > 0].log10()
    n_dead = len(latent_density) - len(fired)
    density_axes.hist(fired.tolist(), bins=50, color=_BLUE)
    density_axes.set(
        title=f"Latent density ({n_dead:,} of {len(latent_density):,} dead)",
        xlabel=r"$\log_{10}$ share of the tokens a latent fires on",
        ylabel="latents",
    )
    if title:
        figure.suptitle(title, fontsize=11, color=_INK)
    return figure
