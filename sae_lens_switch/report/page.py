"""The page: what was found about a run, rendered by ``template.html`` with its style and scripts into one file."""

import hashlib
from base64 import b64encode
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import sae_lens_switch
from sae_lens_switch.analysis import Duplicates, RouterGeometry
from sae_lens_switch.common.printable import printable
from sae_lens_switch.report import cards, inside, sections
from sae_lens_switch.report.run import Run
from sae_lens_switch.report.texts import Texts


def render_page(
    run: Run, duplicates: Duplicates, geometry: RouterGeometry | None, weights: inside.Weights, texts: Texts | None
) -> str:
    """Render the whole file.

    Text of any origin is escaped by the template engine, and the page's policy lets only its own scripts run and
    nothing be fetched.
    """
    from plotly.offline import get_plotlyjs

    about = [
        sections.summary(run, duplicates, texts),
        sections.curves(run),
        sections.load(run, texts),
        sections.density(run, texts),
        sections.router(geometry, texts),
        inside.alignment(weights.alignment),
        inside.neighbours(run, duplicates.nearest, weights.encoder),
    ]
    if texts is not None:
        routing = texts.activity.routing
        about += [inside.choices(run, texts), inside.together(routing.coactivation if routing else None)]
        about += [inside.alike(texts.similarity)]
    searched = [sections.duplicate_pairs(run, duplicates, texts)]
    if texts is not None:
        searched += [cards.typical_tokens(run, texts), cards.latents(run, texts)]
    about, searched = ([section for section in some if section is not None] for some in (about, searched))
    # An HTML parser reads \r\n as \n, and the hashes in the policy are of what it reads.
    scripts = [Markup(get_plotlyjs().replace("\r\n", "\n")), _asset("report.js")]
    hashes = " ".join(f"'sha256-{b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        environment()
        .get_template("template.html")
        .render(
            title=f"{sections.architecture(run)} of {run.sae.cfg.metadata.model_name or 'a model without a name'}",
            policy=f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:",
            about=about,
            searched=searched,
            plots={p.name: {"data": p.data, "layout": p.layout} for s in (*about, *searched) for p in s.plots},
            style=_asset("report.css"),
            scripts=scripts,
            version=sae_lens_switch.__version__,
        )
    )


@cache
def environment() -> Environment:
    """Templates that escape by default, fail on missing names, and write out control characters."""
    # The template is this package's own; its values are not.
    environment = Environment(
        loader=PackageLoader("sae_lens_switch.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _printable(value: object) -> object:
    return value if isinstance(value, Markup) else printable(value)


def _asset(name: str) -> Markup:
    """A file of this package, which needs no escaping."""
    return Markup(files("sae_lens_switch.report").joinpath(name).read_text(encoding="utf-8"))
