"""The sections of the page that show text: tokens typical of each expert, and contexts in which latents fire."""

from collections.abc import Sequence

from sae_lens_switch.report.run import Run
from sae_lens_switch.report.sections import Card, Section, Token, percent
from sae_lens_switch.report.texts import Texts

_SPACE, _NEWLINE, _TAB = "\u2423", "\u23ce", "\u21e5"


def typical_tokens(run: Run, texts: Texts) -> Section | None:
    """A card per expert; None without a router."""
    cards = []
    for e, tokens in enumerate(texts.typical):
        chips = [(_token(text), percent(n / total), f"{n} of its {total} occurrences") for text, n, total in tokens]
        own = [f for f in texts.windows if run.layout.expert_of(f) == e]
        cards.append(Card(f"Expert {e}", tokens=chips, latents=own))
    says = (
        "The tokens most informative about an expert being chosen, and the share of their occurrences that is routed "
        f"to it; {_SPACE} is a space. From {texts.source}."
    )
    return Section("experts", "Typical tokens of the experts", says=says, cards=cards) if cards else None


def latents(run: Run, texts: Texts) -> Section | None:
    """A card per chosen latent; None if none was chosen."""
    cards = []
    for latent, windows in texts.windows.items():
        top = max((max(values) for _, values in windows), default=0.0)
        examples = [(f"{max(values):.3g}", _shaded(pieces, values, top)) for pieces, values in windows]
        expert = f", {run.layout.owner_of(latent)}" if run.n_experts > 1 else ""
        density, mean = float(texts.activity.density_F[latent]), float(texts.activity.mean_F[latent])
        facts = f"fires on {percent(density)} of the tokens, with a mean activation of {mean:.3g}"
        cards.append(Card(f"Latent {latent}{expert}", latent=latent, facts=facts, examples=examples))
    says = (
        "The contexts in which each latent fires most strongly, its highest activation in front, darker where it is "
        "stronger. Shown per expert are the latents with the highest mean activation among those that fire in a few "
        "contexts and on few of the tokens, and any that were requested."
    )
    return Section("latents", "What latents fire on", says=says, cards=cards) if cards else None


def _visible(text: str) -> str:
    return text.replace("\n", _NEWLINE).replace("\t", _TAB)


def _token(text: str) -> str:
    """As ``_visible``, with leading spaces marked, or all of them if there is nothing else."""
    rest = text.lstrip(" ") if text.strip() else text.replace(" ", _SPACE)
    return _visible(_SPACE * (len(text) - len(rest)) + rest)


def _shaded(pieces: Sequence[str], values: Sequence[float], top: float) -> list[Token]:
    def token(text: str, value: float) -> Token:
        if value <= 0:
            return Token(_visible(text))
        return Token(_visible(text), shade=f"{0.15 + 0.75 * value / top:.2f}", value=f"{value:.3g}")

    return list(map(token, pieces, values))
