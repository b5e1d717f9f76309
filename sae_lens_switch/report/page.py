"""The report's page: HTML of what ``report`` has found, with its plots, its style, its script, and plotly's."""

import hashlib
import json
import math
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from html import escape as escape_html
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import sae_lens_switch
from sae_lens_switch.analysis import GATE_BINS, Duplicates, RouterGeometry
from sae_lens_switch.common.printable import printable

if TYPE_CHECKING:
    from sae_lens_switch.report import Run, Texts

_PAIRS_SHOWN = 100
_INK, _BLUE, _ORANGE = "#333333", "#3b6fb6", "#d9822b"
_COSINES = [[0, _BLUE], [0.5, "#ffffff"], [1, _ORANGE]]
_COUNTS = [[0, "#ffffff"], [1, _BLUE]]
_Section = tuple[str, str, str]  # anchor, title, HTML; one without HTML is left out
_Plots = dict[str, dict[str, Any]]


def page_of(run: "Run", duplicates: Duplicates, geometry: RouterGeometry | None, texts: "Texts | None") -> str:
    """The whole file. Text of any origin is escaped, and only the page's own scripts may run in it."""
    from plotly.offline import get_plotlyjs

    plots: _Plots = {}
    about = (
        _summary(run, duplicates, texts),
        _curves(run, plots),
        _experts(run, texts, plots),
        _density(run, texts, plots),
        _router(geometry, texts, plots),
    )
    searched = _duplicates(run, duplicates, texts, plots), _typical_tokens(run, texts), _latents(run, texts)
    title = f"{_architecture(run)} of {run.sae.cfg.metadata.model_name or 'a model without a name'}"
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, body in (*about, *searched) if body)

    def html(sections: Iterable[_Section]) -> str:
        return "".join(
            f'<section id="{anchor}"><h2>{escape(name)}</h2>{body}</section>' for anchor, name, body in sections if body
        )

    scripts = [get_plotlyjs().replace("\r\n", "\n"), _SCRIPT]
    hashes = " ".join(f"'sha256-{b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><nav>{links}</nav></header>
<main>
{html(about)}
<div class="search">
<label for="search">Search latents, experts, tokens, texts</label>
<input id="search" type="search" autocomplete="off" spellcheck="false" placeholder="a word, a token, latent 12">
<span id="found" role="status"></span>
</div>
{html(searched)}
</main>
<footer>Written by sae-lens-switch {sae_lens_switch.__version__}.</footer>
<script type="application/json" id="plots">{_json_in_html(plots)}</script>
{"".join(f"<script>{script}</script>" for script in scripts)}
</body>
</html>
"""


# Pieces of HTML, and plots


def escape(text: str) -> str:
    """Text, whatever is in it, as HTML."""
    return escape_html(printable(text))


def _json_in_html(value: Any) -> str:
    """JSON in which no HTML parser finds a tag."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _numbers(values: Any) -> Any:
    """Nested lists of numbers, to five digits, null where not finite."""
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, Iterable):
        return [_numbers(v) for v in values]
    return float(f"{values:.5g}") if values is not None and math.isfinite(values) else None


def _plot(plots: _Plots, name: str, title: str, data: Any, x: str = "", y: str = "", **layout: Any) -> str:
    """The place of a plot, which the page's script draws. ``x`` and ``y`` are titles; layout goes to plotly."""
    for axis, text in (("xaxis", x), ("yaxis", y)):
        look = {"gridcolor": "#e8e8e8", "zerolinecolor": "#cccccc", "automargin": True, "title": {"text": text}}
        layout[axis] = look | layout.get(axis, {})
    plots[name] = {
        "data": data if isinstance(data, list) else [data],
        "layout": {
            "title": {"text": title, "x": 0, "xanchor": "left", "xref": "paper", "font": {"size": 13}},
            "margin": {"l": 48, "r": 12, "t": 40, "b": 44},
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": _INK},
            "legend": {"orientation": "h", "y": -0.3, "yanchor": "top", "x": 0},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "hovermode": "closest",
            **layout,
        },
    }
    return f'<div class="plot" id="plot-{name}" role="img" aria-label="{escape(title)}"></div>'


def _bars(x: Any, y: Any, color: str = _BLUE, **more: Any) -> dict[str, Any]:
    return {"type": "bar", "x": list(x), "y": _numbers(y), "marker": {"color": color}, **more}


def _heatmap(z: Tensor, colors: list[Any], hover: str, **more: Any) -> dict[str, Any]:
    look = {"colorscale": colors, "colorbar": {"thickness": 10}, "hovertemplate": f"{hover}<extra></extra>"}
    return {"type": "heatmap", "z": _numbers(z), **look, **more}


def _says(sentence: str) -> str:
    return f"<p>{escape(sentence)}</p>"


def _grid(kind: str, items: Iterable[str]) -> str:
    return f'<div class="{kind}">{"".join(items)}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], row_class: str = "") -> str:
    """Of cells that are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f'<tr class="{row_class}">{"".join(f"<td>{cell}</td>" for cell in row)}</tr>' for row in rows)
    return f'<div class="table"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _readable(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (f"{value:,}" if isinstance(value, int) else f"{value:,.6g}") if number else str(value)


def _link(latent: int, texts: "Texts | None") -> str:
    return f'<a href="#latent-{latent}">{latent}</a>' if texts and latent in texts.windows else str(latent)


def _visible(text: str) -> str:
    return escape(text.replace("\n", "\u23ce").replace("\t", "\u21e5"))


def _token(text: str) -> str:
    """As ``_visible``, with the spaces that it begins with or consists of."""
    rest = text.lstrip(" ") if text.strip() else text.replace(" ", "\u2423")
    return _visible("\u2423" * (len(text) - len(rest)) + rest)


def _shaded(pieces: Sequence[str], values: Sequence[float], top: float) -> str:
    return "".join(
        f'<mark style="background:rgba(217,130,43,{0.15 + 0.75 * value / top:.2f})" title="{value:.3g}">'
        f"{_visible(text)}</mark>"
        if value > 0
        else _visible(text)
        for text, value in zip(pieces, values, strict=True)
    )


# What is known of the run, from wherever it is known


def _architecture(run: "Run") -> str:
    cfg = run.sae.cfg
    experts = f", {run.n_experts} experts" if run.n_experts > 1 else ""
    return f"{cfg.architecture()} SAE, {cfg.d_sae:,} latents{experts}"


def _dead(run: "Run", texts: "Texts | None") -> list[tuple[Tensor, str]]:
    """[F] masks of the latents that never fired, and where that was counted."""
    found = [] if run.density_F is None else [(run.density_F == 0, "in the trainer's last window")]
    if texts is not None:
        found.append((texts.activity.fired_F == 0, f"on {texts.activity.n_tokens:,} tokens of text"))
    return found


def _load(run: "Run", texts: "Texts | None") -> tuple[Tensor | None, str]:
    """[E] share of the tokens, and where that was counted."""
    if texts is not None and texts.activity.routing is not None:
        return texts.activity.routing.load_E, f"on {texts.activity.n_tokens:,} tokens of text"
    logged = [row["routing/load"] for row in run.history if "routing/load" in row]
    for load, where in ((run.metrics.get("expert_load"), "metrics.json"), (logged and logged[-1], "last logged")):
        if isinstance(load, list) and len(load) == run.n_experts:
            return torch.tensor([value or 0.0 for value in load]), where
    return None, ""


def _known(run: "Run", texts: "Texts | None", name: str, logged: str) -> tuple[float | None, str]:
    """A number by its name in metrics.json, and where it is from: this page's text, metrics.json, or the history."""
    if texts is not None:
        value = texts.loss[name] if name in texts.loss else getattr(texts.activity, name)
        return value, "on this page's text"
    if isinstance(run.metrics.get(name), int | float):
        return run.metrics[name], "metrics.json"
    values = [row[logged] for row in run.history if isinstance(row.get(logged), int | float)]
    return (values[-1], "last logged") if values else (None, "")


# The sections


def _summary(run: "Run", duplicates: Duplicates, texts: "Texts | None") -> _Section:
    cfg, about, runner, E = run.sae.cfg, run.sae.cfg.metadata, run.runner, run.n_experts
    tiles: list[str] = []

    def tile(name: str, value: float | None, where: str, form: Callable[[float], str]) -> None:
        if value is not None and math.isfinite(value):
            small = f"<small>{escape(where)}</small>"
            tiles.append(f'<div class="tile"><b>{form(value)}</b><span>{escape(name)}</span>{small}</div>')

    explained = _known(run, texts, "explained_variance", "metrics/explained_variance")
    tile("explained variance", *explained, _percent)
    tile("CE loss recovered", *_known(run, texts, "ce_loss_recovered", _CE_RECOVERED), _percent)
    tile("active latents a token", *_known(run, texts, "l0", "metrics/l0"), "{:.4g}".format)
    for dead_F, where in _dead(run, texts):
        tile("dead latents", int(dead_F.sum()), f"of {cfg.d_sae:,}; {where}", "{:,.0f}".format)
    load_E, where = _load(run, texts)
    if load_E is not None:
        tile("load of the busiest expert", float(load_E.max()), f"even: {_percent(1 / E)}; {where}", _percent)
    alike = f"cosine above {duplicates.threshold:g}"
    either_F = duplicates.within_F | duplicates.across_F
    tile("latents with a duplicate", either_F.double().mean().item(), alike, _percent)
    if E > 1:
        tile("with one in another expert", duplicates.share_across, alike, _percent)

    facts = {
        "architecture": cfg.architecture(),
        "model": about.model_name,
        "hook": about.hook_name,
        "dataset": about.dataset_path,
        "text of this page": texts and texts.source,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "n_experts": getattr(cfg, "n_experts", None),
        "k": getattr(cfg, "k", None),
        "training_tokens": runner.get("training_tokens"),
        "train_batch_size_tokens": runner.get("train_batch_size_tokens"),
        "lr": runner.get("lr"),
        "context_size": about.context_size,
        "seqpos_slice": about.seqpos_slice,
        "dtype": cfg.dtype,
        **{f"{name}, metrics.json": v for name, v in run.metrics.items() if isinstance(v, int | float)},
        **{f"{name}, this page's text": v for name, v in (texts.loss if texts else {}).items()},
    }
    rows = [(escape(name), escape(_readable(v))) for name, v in facts.items() if v not in (None, "")]
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in run.notes)
    details = f"<details><summary>Settings and numbers</summary>{_table(('', ''), rows)}</details>"
    return "summary", "Summary", _grid("tiles", tiles) + notes + details


_CE_RECOVERED = "model_performance_preservation/ce_loss_score"
# Title, then names in the history and what they are; of two that are one, the second is under SAELens's own trainer.
_CURVES = {
    "loss": ("Squared error of a token (MSE)", {"losses/mse_loss": "MSE"}),
    "balance": ("Load balance, 1 if even", {"routing/load_balance": "balance", "metrics/load_balance": "balance"}),
    "load-range": (
        "Load, busiest and idlest expert",
        {
            "routing/expert_load_max": "busiest",
            "routing/expert_load_min": "idlest",
            "metrics/expert_load_max": "busiest",
            "metrics/expert_load_min": "idlest",
        },
    ),
    "explained": ("Explained variance", {"metrics/explained_variance": "explained variance"}),
    "recovered": ("CE loss recovered", {_CE_RECOVERED: "CE loss recovered"}),
    "dead-curve": ("Dead latents", {"sparsity/dead_features": "dead latents"}),
}


def _curves(run: "Run", plots: _Plots) -> _Section:
    def tokens(rows: list[dict[str, Any]]) -> list[Any]:
        return [row.get("details/n_training_samples", row.get("step")) for row in rows]

    places, below = [], "training tokens"
    for anchor, (title, names) in _CURVES.items():
        lines = []
        for name, label in names.items():
            rows = [row for row in run.history if isinstance(row.get(name), int | float)]
            color = _ORANGE if lines else _BLUE
            line = {"type": "scatter", "mode": "lines", "name": label, "line": {"color": color}}
            if rows:
                lines.append(line | {"x": tokens(rows), "y": [row[name] for row in rows]})
        if lines:
            axis = {"loss": {"type": "log"}, "dead-curve": {"rangemode": "tozero"}}.get(anchor, {})
            places.append(_plot(plots, anchor, title, lines, below, yaxis=axis, showlegend=len(lines) > 1))
    loads = [row.get("routing/load") for row in run.history]
    known = [isinstance(load, list) and len(load) == run.n_experts > 1 for load in loads]
    rows = [row for row, is_known in zip(run.history, known, strict=True) if is_known]
    if rows:
        z_ET = torch.tensor([[run.n_experts * (load or 0.0) for load in row["routing/load"]] for row in rows]).T
        data = _heatmap(z_ET, _COSINES, "expert %{y}: %{z:.2f} times even", zmid=1, x=tokens(rows))
        places.append(_plot(plots, "load-history", "Load of every expert, 1 if even", data, below, "expert"))
    says = "What was logged in training; a point is the batch of one step." if places else "No curve was recorded."
    return "curves", "Training curves", _says(says) + _grid("plots", places)


def _experts(run: "Run", texts: "Texts | None", plots: _Plots) -> _Section:
    E, (load_E, where) = run.n_experts, _load(run, texts)
    places = []
    if load_E is not None:
        dashes = {"color": _ORANGE, "dash": "dash", "width": 1.5}
        even = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 100 / E, "y1": 100 / E, "line": dashes}
        bars, title = _bars(range(E), 100 * load_E), f"Load, {where}"
        places.append(_plot(plots, "load", title, bars, "expert (dashed: even)", "% of the tokens", shapes=[even]))
    dead = [
        _bars(range(E), dead_F.view(E, -1).sum(1), color, name=where)
        for (dead_F, where), color in zip(_dead(run, texts), (_BLUE, _ORANGE), strict=False)
    ]
    if dead and E > 1:
        title, axis = f"Dead latents, of {run.sae.cfg.d_sae // E:,} an expert", {"rangemode": "tozero"}
        places.append(_plot(plots, "dead", title, dead, "expert", "latents", yaxis=axis, showlegend=True))
    says = "How many tokens the router sends to each expert, and how many of its latents never fired."
    return "load", "Load and dead latents", _says(says) + _grid("plots", places) if places else ""


def _density(run: "Run", texts: "Texts | None", plots: _Plots) -> _Section:
    if run.density_F is not None:
        density_F, where = run.density_F, "in the trainer's last window"
    elif texts is not None:
        density_F, where = texts.activity.density_F.double(), f"on {texts.activity.n_tokens:,} tokens of text"
    else:
        return "density", "Latent density", ""
    log_EM = torch.where(density_F > 0, density_F.log10(), math.nan).view(run.n_experts, -1)
    if not log_EM.isfinite().any():
        return "density", "Latent density", _says(f"No latent fired {where}.")
    axis = "log10 of the share of the tokens"
    counts, edges = torch.histogram(log_EM[log_EM.isfinite()], bins=40)
    bars = _bars(_numbers((edges[1:] + edges[:-1]) / 2), counts)
    places = [_plot(plots, "density", "All latents", bars, axis, "latents", bargap=0.05)]
    if run.n_experts > 1:
        shares = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=log_EM.dtype)
        quantiles = zip(*_numbers(log_EM.nanquantile(shares, dim=1).T), strict=True)
        box = dict(zip(("lowerfence", "q1", "median", "q3", "upperfence"), map(list, quantiles), strict=True))
        box |= {"type": "box", "x": list(range(run.n_experts)), "marker": {"color": _BLUE}}
        title = "By expert: quartiles, 5 and 95 %"
        places.append(_plot(plots, "density-by-expert", title, box, "expert", axis))
    says = f"On what share of the tokens each latent fires, {where}; latents that never do are left out."
    return "density", "Latent density", _says(says) + _grid("plots", places)


def _router(geometry: RouterGeometry | None, texts: "Texts | None", plots: _Plots) -> _Section:
    if geometry is None:
        return "router", "Router", ""
    places = []
    for anchor, title, cosines_EE in (
        ("router", "Between router directions", geometry.router_EE),
        ("router-encoder", "With the experts' mean encoder", geometry.encoder_EE),
        ("router-decoder", "With the experts' mean decoder", geometry.decoder_EE),
    ):
        data = _heatmap(cosines_EE, _COSINES, "%{y}, %{x}: %{z:.3f}", zmin=-1, zmax=1)
        axis = {"autorange": "reversed"}
        places.append(_plot(plots, anchor, title, data, "expert", "router direction", yaxis=axis))
    says = "Cosines of the router's directions, each less their mean, which a softmax does not see."
    routing = texts.activity.routing if texts is not None else None
    if routing is not None:
        centres = [(b + 0.5) / GATE_BINS for b in range(GATE_BINS)]
        bars = _bars(centres, 100 * routing.gate_counts / routing.gate_counts.sum())
        title, axis = "Gate: probability of the chosen expert", {"range": [0, 1]}
        places.append(_plot(plots, "gates", title, bars, "gate", "% of the tokens", xaxis=axis, bargap=0.05))
        says += (
            f" The mean gate is {routing.gate_mean:.3f}; the mean entropy of a token's probabilities is "
            f"{routing.entropy:.3f} nats, of {math.log(len(routing.tokens_E)):.3f} at most."
        )
    return "router", "Router", _says(says) + _grid("plots", places)


def _duplicates(run: "Run", duplicates: Duplicates, texts: "Texts | None", plots: _Plots) -> _Section:
    E, M = run.n_experts, run.sae.cfg.d_sae // run.n_experts
    says = (
        f"{duplicates.n_pairs:,} pairs of latents have decoder directions with a cosine above "
        f"{duplicates.threshold:g}. {_percent(duplicates.share_within)} of the latents have such a twin in their own "
        f"expert, {_percent(duplicates.share_across)} in another."
    )
    content = _says(says)
    if E > 1 and duplicates.n_pairs:
        data = _heatmap(duplicates.n_pairs_EE, _COUNTS, "%{y}, %{x}: %{z} pairs")
        axis = {"autorange": "reversed"}
        place = _plot(plots, "duplicates", "Pairs between experts", data, "expert", "expert", yaxis=axis)
        content += _grid("plots", [place])
    shown = duplicates.pairs_P2[:_PAIRS_SHOWN].tolist()
    if shown:
        density_F = texts.activity.density_F if texts is not None else run.density_F
        fires = ["\u2013"] * run.sae.cfg.d_sae if density_F is None else list(map(_percent, density_F.tolist()))
        rows = [
            (f"{c:.3f}", *(f"{_link(f, texts)}, expert {f // M}, fires on {fires[f]}" for f in pair))
            for pair, c in zip(shown, duplicates.cosines_P.tolist(), strict=False)
        ]
        content += _says(f"The {len(shown):,} most similar:") + _table(("cosine", "latent", "latent"), rows, "item")
    return "duplicates", "Duplicate latents", content


def _typical_tokens(run: "Run", texts: "Texts | None") -> _Section:
    cards = []
    for e, tokens in enumerate(texts.typical if texts is not None else ()):
        chips = "".join(
            f'<span class="chip" title="{n} of its {total} times">{_token(text)}'
            f"<small>{_percent(n / total)}</small></span>"
            for text, n, total in tokens
        )
        assert texts is not None
        own = (f for f in texts.windows if f * run.n_experts // run.sae.cfg.d_sae == e)
        links = ", ".join(_link(f, texts) for f in own)
        latents = f"<p><small>latents {links}</small></p>" if links else ""
        cards.append(f'<article class="item"><h3>Expert {e}</h3><p>{chips or "None."}</p>{latents}</article>')
    says = (
        "The tokens that tell most about an expert's being chosen, and what share of their occurrences comes to it; "
        f"\u2423 is a space. From {texts.source if texts else ''}."
    )
    return "experts", "Typical tokens of the experts", _says(says) + _grid("cards", cards) if cards else ""


def _latents(run: "Run", texts: "Texts | None") -> _Section:
    cards = []
    for latent, windows in texts.windows.items() if texts is not None else ():
        assert texts is not None
        top = max((max(values) for _, values in windows), default=0.0)
        examples = "".join(
            f'<p class="example"><b>{max(values):.3g}</b><span>{_shaded(pieces, values, top)}</span></p>'
            for pieces, values in windows
        )
        expert = f", expert {latent * run.n_experts // run.sae.cfg.d_sae}" if run.n_experts > 1 else ""
        density, mean = float(texts.activity.density_F[latent]), float(texts.activity.mean_F[latent])
        facts = f"<small>fires on {_percent(density)} of the tokens, there {mean:.3g} on average</small>"
        cards.append(
            f'<article class="item" id="latent-{latent}"><h3>Latent {latent}{expert} {facts}</h3>'
            f"{examples or _says('It fires nowhere in this text.')}</article>"
        )
    says = (
        "The contexts in which a latent fires most strongly, its highest activation in front, darker where it is "
        "stronger. Of each expert, those with the highest mean activation among the latents that fire in a few "
        "contexts and on few of the tokens; and any that were asked for."
    )
    return "latents", "What latents fire on", _says(says) + _grid("cards wide", cards) if cards else ""


_STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
html { scroll-padding-top: 5.5rem }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: #333; background: #f6f6f4; overflow-wrap: anywhere }
header, main, footer { max-width: 1200px; margin: 0 auto; padding: 0 16px }
h1 { font-size: 1.4rem; margin: 1rem 0 .5rem }
h2 { font-size: 1.15rem; margin: 0 0 .25rem }
h3 { font-size: 1rem; margin: 0 0 .4rem }
p { margin: .25rem 0 .75rem }
small { color: #666; font-weight: 400 }
a { color: #2a5796 }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem }
footer { color: #666; padding-bottom: 2rem }
section { background: #fff; border: 1px solid #e3e3df; border-radius: 8px; padding: 16px; margin: 16px 0 }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 8px; margin-bottom: .75rem }
.tile { border: 1px solid #e3e3df; border-radius: 6px; padding: 8px 10px }
.tile b { display: block; font-size: 1.3rem; color: #3b6fb6 }
.tile span, .tile small { display: block; line-height: 1.3 }
.note { border-left: 4px solid #d9822b; padding-left: 10px }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 12px }
.plot { min-width: 0; max-width: 600px; height: 320px }
.table { overflow: auto; max-height: 420px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 3px 14px 3px 0; border-bottom: 1px solid #eee; overflow-wrap: normal }
.search { position: sticky; top: 0; z-index: 5; background: #f6f6f4; padding: 10px 0 }
.search { display: flex; flex-wrap: wrap; gap: 4px 10px; align-items: center }
.search input { flex: 1 1 200px; min-width: 0; font: inherit; padding: 6px 10px; border: 1px solid #bbb }
.search input { border-radius: 6px }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 12px }
.cards.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)) }
article { border: 1px solid #e3e3df; border-radius: 6px; padding: 10px; min-width: 0 }
article:target { border-color: #d9822b }
article p:last-child { margin-bottom: 0 }
[hidden] { display: none !important }
.chip { display: inline-block; background: #eef2f8; border-radius: 4px; padding: 0 6px; margin: 0 4px 4px 0 }
.chip, .example span { font-family: ui-monospace, monospace; font-size: .83rem }
.chip small { margin-left: 5px; font-family: system-ui, sans-serif; font-size: .72rem }
.example { display: flex; gap: 10px; margin: 0 0 .35rem }
.example b { flex: 0 0 3.2em; text-align: right; font-weight: 400; color: #666; font-size: .8rem }
.example span { white-space: pre-wrap; min-width: 0 }
mark { color: inherit; border-radius: 2px }
"""

_SCRIPT = """
"use strict";
const plots = JSON.parse(document.getElementById("plots").textContent);
for (const [name, plot] of Object.entries(plots)) {
  Plotly.newPlot("plot-" + name, plot.data, plot.layout, {responsive: true, displayModeBar: false});
}
const items = [...document.querySelectorAll(".item")];
const texts = items.map(item => item.textContent.toLowerCase());
const search = document.getElementById("search");
search.addEventListener("input", () => {
  const wanted = search.value.toLowerCase();
  items.forEach((item, i) => { item.hidden = !texts[i].includes(wanted); });
  const found = items.filter(item => !item.hidden).length;
  document.getElementById("found").textContent = wanted ? found + " of " + items.length : "";
});
"""
