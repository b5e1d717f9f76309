"""The sections of the page about the SAE as a whole: numbers, curves, experts, densities, router, duplicates."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae_lens_switch.analysis import GATE_BINS, Duplicates, RouterGeometry
from sae_lens_switch.report.plots import BLUE, COSINES, COUNTS, ORANGE, Plot, Trace, bars, heatmap, line, plot, rounded
from sae_lens_switch.report.run import Run
from sae_lens_switch.report.texts import Texts
from sae_lens_switch.training.history import Row

_PAIRS_SHOWN = 100


@dataclass(frozen=True)
class Tile:
    """A number of the summary, and where it was measured."""

    value: str
    name: str
    where: str


@dataclass(frozen=True)
class PairedLatent:
    """One of a pair of duplicates; ``has_card`` if the page shows texts of it."""

    latent: int
    owner: str
    density: str
    has_card: bool


@dataclass(frozen=True)
class Token:
    """A token of a text; ``shade`` in [0, 1] and ``value`` are of the latent's activation, if it is active there."""

    text: str
    shade: str = ""
    value: str = ""


@dataclass(frozen=True)
class Card:
    """What the text shows of a latent or an expert. The template has a form for each."""

    title: str
    latent: int | None = None
    facts: str = ""
    examples: list[tuple[str, list[Token]]] = field(default_factory=list)  # the highest activation, and the text
    tokens: list[tuple[str, str, str]] = field(default_factory=list)  # text, share of its occurrences, and the counts
    latents: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """A section of the page; the template renders its parts in this order and leaves out those that are empty."""

    anchor: str
    title: str
    tiles: list[Tile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    says: str = ""
    plots: list[Plot] = field(default_factory=list)
    pairs: list[tuple[str, list[PairedLatent]]] = field(default_factory=list)  # cosine, and the two latents
    cards: list[Card] = field(default_factory=list)


def percent(share: float) -> str:
    """A share to three digits."""
    return f"{100 * share:.3g} %"


# Numbers of the run, from wherever they are known


def architecture(run: Run) -> str:
    """Architecture and size in words."""
    cfg = run.sae.cfg
    experts = f", {run.n_experts} experts" if run.n_experts > 1 else ""
    shared = f", {run.layout.shared_width:,} of them shared" if run.layout.shared_width else ""
    return f"{cfg.architecture()} SAE, {cfg.d_sae:,} latents{shared}{experts}"


def _dead(run: Run, texts: Texts | None) -> list[tuple[Tensor, str]]:
    """[F] masks of the latents that never fired, and where that was counted."""
    found = [] if run.density_F is None else [(run.density_F == 0, "in the trainer's last window")]
    if texts is not None:
        found.append((texts.activity.fired_F == 0, _on_text(texts)))
    return found


def _on_text(texts: Texts) -> str:
    return f"on {texts.activity.n_tokens:,} tokens of text"


def _load(run: Run, texts: Texts | None) -> tuple[Tensor | None, str]:
    """[E] share of the tokens, and where that was counted."""
    if texts is not None and texts.activity.routing is not None:
        return texts.activity.routing.load_E, _on_text(texts)
    logged = [row["routing/load"] for row in run.history if "routing/load" in row]
    for load, where in ((run.metrics.get("expert_load"), "metrics.json"), (logged and logged[-1], "last logged")):
        if isinstance(load, list) and len(load) == run.n_experts:
            return torch.tensor([value or 0.0 for value in load]), where
    return None, ""


def _known(run: Run, texts: Texts | None, name: str, logged: str) -> tuple[float | None, str]:
    """A metric by its name, and where it is from: this page's text, ``metrics.json``, or the history."""
    if texts is not None:
        activity = {"explained_variance": texts.activity.explained_variance, "l0": texts.activity.l0}
        return (activity | texts.loss)[name], "on this page's text"
    value = run.metrics.get(name)
    if isinstance(value, int | float):
        return value, "metrics.json"
    values = [value for row in run.history if isinstance(value := row.get(logged), int | float)]
    return (values[-1], "last logged") if values else (None, "")


# The sections


def summary(run: Run, duplicates: Duplicates, texts: Texts | None) -> Section:
    """The numbers that matter most, notes, and a table of settings."""
    tiles: list[Tile] = []

    def tile(name: str, value: float | None, where: str, form: Callable[[float], str]) -> None:
        if value is not None and math.isfinite(value):
            tiles.append(Tile(form(value), name, where))

    explained = _known(run, texts, "explained_variance", "metrics/explained_variance")
    tile("explained variance", *explained, percent)
    tile("CE loss recovered", *_known(run, texts, "ce_loss_recovered", _CE_RECOVERED), percent)
    tile("active latents per token", *_known(run, texts, "l0", "metrics/l0"), "{:.4g}".format)
    for dead_F, where in _dead(run, texts):
        tile("dead latents", int(dead_F.sum()), f"of {run.sae.cfg.d_sae:,}; {where}", "{:,.0f}".format)
    load_E, where = _load(run, texts)
    if load_E is not None:
        where = f"uniform: {percent(1 / run.n_experts)}; {where}"
        tile("load of the busiest expert", float(load_E.max()), where, percent)
    alike = f"cosine above {duplicates.threshold:g}"
    either_F = duplicates.within_F | duplicates.across_F
    tile("latents with a duplicate", either_F.double().mean().item(), alike, percent)
    if run.n_experts > 1:
        tile("latents with a duplicate in another expert", duplicates.share_across, alike, percent)
    return Section("summary", "Summary", tiles=tiles, notes=run.notes, facts=_facts(run, texts))


def _facts(run: Run, texts: Texts | None) -> list[tuple[str, str]]:
    cfg, about, runner = run.sae.cfg, run.sae.cfg.metadata, run.runner
    settings = cfg.to_dict()
    facts: dict[str, object] = {
        "architecture": cfg.architecture(),
        "model": about.model_name,
        "hook": about.hook_name,
        "dataset": about.dataset_path,
        "text of this page": texts and texts.source,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "n_experts": settings.get("n_experts"),
        "n_shared_experts": settings.get("n_shared_experts") or None,
        "k": settings.get("k"),
        "training_tokens": runner.get("training_tokens"),
        "train_batch_size_tokens": runner.get("train_batch_size_tokens"),
        "lr": runner.get("lr"),
        "context_size": about.context_size,
        "seqpos_slice": about.seqpos_slice,
        "dtype": cfg.dtype,
        **{f"{name}, metrics.json": v for name, v in run.metrics.items() if isinstance(v, int | float)},
        **{f"{name}, this page's text": v for name, v in (texts.loss if texts else {}).items()},
    }
    return [(name, _readable(value)) for name, value in facts.items() if value not in (None, "")]


def _readable(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


_CE_RECOVERED = "model_performance_preservation/ce_loss_score"
# Title, then names in the history with their labels. Where two names mean the same, the second is the one under
# SAELens's own trainer.
_CURVES = {
    "loss": ("Squared error per token (MSE)", {"losses/mse_loss": "MSE"}),
    "balance": ("Load balance, 1 if uniform", {"routing/load_balance": "balance", "metrics/load_balance": "balance"}),
    "load-range": (
        "Load of the busiest and the least used expert",
        {
            "routing/expert_load_max": "busiest",
            "routing/expert_load_min": "least used",
            "metrics/expert_load_max": "busiest",
            "metrics/expert_load_min": "least used",
        },
    ),
    "explained": ("Explained variance", {"metrics/explained_variance": "explained variance"}),
    "recovered": ("CE loss recovered", {_CE_RECOVERED: "CE loss recovered"}),
    "dead-curve": ("Dead latents", {"sparsity/dead_features": "dead latents"}),
}
_CURVE_AXES: dict[str, Trace] = {"loss": {"type": "log"}, "dead-curve": {"rangemode": "tozero"}}


def curves(run: Run) -> Section:
    """The metrics logged in training, and the load of every expert over time."""
    plots, below = [], "training tokens"
    for anchor, (title, names) in _CURVES.items():
        lines: list[Trace] = []
        for name, label in names.items():
            rows = [row for row in run.history if isinstance(row.get(name), int | float)]
            if rows:
                lines.append(line(_tokens(rows), [row[name] for row in rows], ORANGE if lines else BLUE, label))
        if lines:
            axis, legend = _CURVE_AXES.get(anchor), len(lines) > 1
            plots.append(plot(anchor, title, lines, below, yaxis=axis, showlegend=legend))
    loads = [(row, load) for row in run.history if isinstance(load := row.get("routing/load"), list)]
    loads = [(row, load) for row, load in loads if len(load) == run.n_experts > 1]
    if loads:
        z_ET = torch.tensor([[run.n_experts * (share or 0.0) for share in load] for _, load in loads]).T
        hover, x = "expert %{y}: %{z:.2f} x uniform", _tokens([row for row, _ in loads])
        data = heatmap(z_ET, COSINES, hover, zmid=1, x=x)
        plots.append(plot("load-history", "Load of every expert, 1 if uniform", data, below, "expert"))
    says = "As logged in training; each point is one step's batch." if plots else "No curve was recorded."
    return Section("curves", "Training curves", says=says, plots=plots)


def _tokens(rows: list[Row]) -> list[object]:
    return [row.get("details/n_training_samples", row.get("step")) for row in rows]


def load(run: Run, texts: Texts | None) -> Section | None:
    """Load and dead latents per expert; None if neither is known."""
    E, (load_E, where) = run.n_experts, _load(run, texts)
    plots = []
    if load_E is not None:
        dashes = {"color": ORANGE, "dash": "dash", "width": 1.5}
        uniform = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 100 / E, "y1": 100 / E, "line": dashes}
        data, title = bars(range(E), 100 * load_E), f"Load, {where}"
        plots.append(plot("load", title, data, "expert (dashed: uniform)", "% of the tokens", shapes=[uniform]))
    dead = [
        bars(range(E), run.layout.by_expert(dead_F).sum(1), color, name=where)
        for (dead_F, where), color in zip(_dead(run, texts), (BLUE, ORANGE), strict=False)
    ]
    if dead and E > 1:
        title, axis = f"Dead latents, of {run.layout.expert_width:,} per expert", {"rangemode": "tozero"}
        plots.append(plot("dead", title, dead, "expert", "latents", yaxis=axis, showlegend=True))
    says = "Share of the tokens routed to each expert, and the number of its latents that never fired."
    for dead_F, where in _dead(run, texts) if run.layout.shared_width else ():
        n_dead = int(run.layout.shared(dead_F).sum())
        says += f" Of the {run.layout.shared_width:,} shared latents, {n_dead:,} never fired {where}."
    return Section("load", "Load and dead latents", says=says, plots=plots) if plots else None


def density(run: Run, texts: Texts | None) -> Section | None:
    """Histogram of the latents' densities, and their quartiles per expert; None if no densities are known."""
    if run.density_F is not None:
        density_F, where = run.density_F, "in the trainer's last window"
    elif texts is not None:
        density_F, where = texts.activity.density_F.double(), _on_text(texts)
    else:
        return None
    log_F = torch.where(density_F > 0, density_F.log10(), math.nan)
    if not log_F.isfinite().any():
        return Section("density", "Latent density", says=f"No latent fired {where}.")
    axis = "log10 of the share of the tokens"
    counts, edges = torch.histogram(log_F[log_F.isfinite()], bins=40)
    centres = ((edges[1:] + edges[:-1]) / 2).tolist()
    plots = [plot("density", "All latents", bars(map(rounded, centres), counts), axis, "latents", bargap=0.05)]
    if run.n_experts > 1:
        shares = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=log_F.dtype)
        quantiles = map(rounded, run.layout.by_expert(log_F).nanquantile(shares, dim=1))
        box: dict[str, object] = dict(zip(("lowerfence", "q1", "median", "q3", "upperfence"), quantiles, strict=True))
        box |= {"type": "box", "x": list(range(run.n_experts)), "marker": {"color": BLUE}}
        title = "Per expert: quartiles, 5th and 95th percentile"
        plots.append(plot("density-by-expert", title, box, "expert", axis))
    says = f"Share of the tokens on which each latent fires, {where}; latents that never fire are left out."
    return Section("density", "Latent density", says=says, plots=plots)


def router(geometry: RouterGeometry | None, texts: Texts | None) -> Section | None:
    """Cosines of the router's directions, and the distribution of its gates; None without a router."""
    if geometry is None:
        return None
    plots = []
    for anchor, title, cosines_EE in (
        ("router", "Between router directions", geometry.router_EE),
        ("router-encoder", "With the experts' mean encoder", geometry.encoder_EE),
        ("router-decoder", "With the experts' mean decoder", geometry.decoder_EE),
    ):
        data = heatmap(cosines_EE, COSINES, "%{y}, %{x}: %{z:.3f}", zmin=-1, zmax=1)
        plots.append(plot(anchor, title, data, "expert", "router direction", yaxis={"autorange": "reversed"}))
    says = "Cosines of the router's directions, after subtracting their mean, to which a softmax is invariant."
    routing = texts.activity.routing if texts is not None else None
    if routing is not None:
        centres = [(b + 0.5) / GATE_BINS for b in range(GATE_BINS)]
        data = bars(centres, 100 * routing.gate_counts / routing.gate_counts.sum())
        title, axis = "Gate: probability of the chosen expert", {"range": [0, 1]}
        plots.append(plot("gates", title, data, "gate", "% of the tokens", xaxis=axis, bargap=0.05))
        says += (
            f" The mean gate is {routing.gate_mean:.3f}; the mean entropy of the probabilities per token is "
            f"{routing.entropy:.3f} nats, of at most {math.log(len(routing.tokens_E)):.3f}."
        )
    return Section("router", "Router", says=says, plots=plots)


def duplicate_pairs(run: Run, found: Duplicates, texts: Texts | None) -> Section:
    """How many latents have a duplicate, between which experts, and the most similar pairs."""
    says = (
        f"{found.n_pairs:,} pairs of latents have decoder directions with a cosine above {found.threshold:g}. "
        f"{percent(found.share_within)} of the latents have such a duplicate in their own expert, "
        f"{percent(found.share_across)} in another."
    )
    plots = []
    if run.n_experts > 1 and found.n_pairs:
        data, axis = heatmap(found.n_pairs_EE, COUNTS, "%{y}, %{x}: %{z} pairs"), {"autorange": "reversed"}
        title = "Pairs between experts" + (", and shared latents, the last" if run.layout.shared_width else "")
        plots.append(plot("duplicates", title, data, "expert", "expert", yaxis=axis))
    density_F = texts.activity.density_F if texts is not None else run.density_F

    def paired(latent: int) -> PairedLatent:
        fires = "\u2013" if density_F is None else percent(density_F[latent].item())
        has_card = texts is not None and latent in texts.windows
        return PairedLatent(latent, run.layout.owner_of(latent), fires, has_card)

    pairs = [
        (f"{cosine:.3f}", [paired(latent) for latent in pair])
        for pair, cosine in zip(found.pairs_P2[:_PAIRS_SHOWN].tolist(), found.cosines_P.tolist(), strict=False)
    ]
    return Section("duplicates", "Duplicate latents", says=says, plots=plots, pairs=pairs)
