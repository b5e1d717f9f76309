"""The sections of the page that look inside: neighbours, router against chance, tokens of experts, similarity."""

import html
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_lens_switch.analysis import (
    CoActivation,
    LabelCounts,
    Neighbours,
    RouterAlignment,
    Similarity,
    mutual_information,
    nearest_neighbours,
    router_alignment,
)
from sae_lens_switch.common.printable import printable
from sae_lens_switch.report.plots import BLUE, COSINES, COUNTS, ORANGE, Plot, Trace, bars, heatmap, plot, rounded
from sae_lens_switch.report.run import Run
from sae_lens_switch.report.sections import Section, percent
from sae_lens_switch.report.texts import DistinctToken, Texts
from sae_lens_switch.saes.switch_sae import SwitchBase

_THRESHOLDS = (0.7, 0.8, 0.9)
_BINS = 50
# What keeps the page quick: the widest encoder to compare, multiply-adds of the null, places shown.
_ENCODER_LATENTS, _NULL_FLOPS, _PLACES = 2**16, 2e11, 128


@dataclass(frozen=True)
class Weights:
    """What the weights say beside duplicates and router directions; None where the SAE has nothing to compare."""

    encoder: Neighbours | None
    alignment: RouterAlignment | None


def look_at_weights(run: Run) -> Weights:
    """Compare the encoder's latents, if they are not too many, and test the router, if there is one."""
    sae, F = run.sae, run.sae.cfg.d_sae
    W_enc = dict(sae.named_parameters()).get("W_enc")
    wanted = W_enc is not None and W_enc.shape == (sae.cfg.d_in, F) and F <= _ENCODER_LATENTS
    encoder = None
    if W_enc is not None and wanted:
        encoder = nearest_neighbours(W_enc.detach().T, run.n_experts, n_shared=run.layout.shared_width)
    alignment = None
    if isinstance(sae, SwitchBase) and run.n_experts > 1:
        each = 4 * run.n_experts * F * sae.cfg.d_in
        alignment = router_alignment(sae, n_permutations=int(min(200, max(20, _NULL_FLOPS // each))))
    return Weights(encoder, alignment)


def neighbours(run: Run, decoder: Neighbours, encoder: Neighbours | None) -> Section:
    """Cosines with the nearest latent, in the decoder and the encoder, and shares above thresholds."""
    plots, shares = [], []
    for name, found in (("decoder", decoder), ("encoder", encoder)):
        if found is None:
            continue
        kinds = [("own expert" if run.n_experts > 1 else name, found.within_F, BLUE)]
        kinds += [("another expert", found.across_F, ORANGE)] if run.n_experts > 1 else []
        traces = [_histogram(cosine_F, kind, color) for kind, cosine_F, color in kinds]
        title = f"Cosine with the nearest latent, {name}"
        legend = len(traces) > 1
        plots.append(plot(f"nearest-{name}", title, traces, "cosine", "latents", barmode="overlay", showlegend=legend))
        above = [(t, found.share_across(t) if run.n_experts > 1 else found.share_within(t)) for t in _THRESHOLDS]
        shares.append(f"{name} " + ", ".join(f"{percent(share)} above {t:g}" for t, share in above))
    where = "in another expert" if run.n_experts > 1 else "at all"
    says = (
        "Each latent's cosine with the most similar other latent. Mass near 1 is capacity spent twice; where the "
        f"orange bars reach further right than the blue, experts repeat each other. Latents with a neighbour {where}: "
        f"{'; '.join(shares)}."
    )
    if run.n_experts == 1:
        says = says.replace("; where the orange bars reach further right than the blue, experts repeat each other", "")
    return Section("neighbours", "Nearest latents", says=says, plots=plots)


def _histogram(cosine_F: Tensor, name: str, color: str) -> Trace:
    cosine_F = cosine_F[cosine_F.isfinite()].float().clamp(-1, 1)
    counts, edges = torch.histogram(cosine_F.cpu(), bins=_BINS, range=(-1.0, 1.0))
    first = int(counts.nonzero().min()) if counts.any() else 0
    centres = ((edges[1:] + edges[:-1]) / 2)[first:].tolist()
    return bars(map(rounded, centres), counts[first:], color, name=name, opacity=0.6)


def alignment(found: RouterAlignment | None) -> Section | None:
    """Each router direction's cosine with the mean of its expert, beside that of shuffled experts; None without one."""
    if found is None:
        return None
    plots, said = [], []
    for name, one in (("encoder", found.encoder), ("decoder", found.decoder)):
        null = {"array": rounded(2 * one.null_cosine_PE.std(0)), "visible": True}
        experts = range(len(one.cosine_E))
        chance = {"type": "scatter", "mode": "markers", "name": "shuffled: mean and 2 standard deviations"}
        chance |= {"x": list(experts), "y": rounded(one.null_cosine_PE.mean(0)), "error_y": null}
        traces = [bars(experts, one.cosine_E, name="own expert"), {**chance, "marker": {"color": ORANGE}}]
        title = f"Router direction and mean {name}"
        plots.append(plot(f"alignment-{name}", title, traces, "expert", "cosine", showlegend=True))
        said.append(f"{name} {percent(one.r_squared)} (z {one.z:.1f}, p {one.p:.2g})")
    says = (
        "Does the router send a token to the expert whose latents point its way? The orange range is what remains when "
        "latents are dealt out to the experts at random; bars outside it are more than chance. Bars below zero are "
        "latents that point against what their expert's tokens share, perhaps in place of the encoder bias that a "
        "Switch SAE does not have. Share of the router's weights explained by a factor times the experts' means: "
        f"{'; '.join(said)}."
    )
    return Section("alignment", "Router against chance", says=says, plots=plots)


def choices(run: Run, texts: Texts) -> Section | None:
    """How much token and position tell of the expert, which tokens and places it gets; None without a router."""
    counted = {"token": texts.activity.token_counts, "position": texts.activity.position_counts}
    found = {n: mutual_information(c) for n, c in counted.items() if c is not None}
    if not found or run.n_experts == 1:
        return None
    names = list(found)
    traces = [
        bars(names, torch.tensor([one.corrected for one in found.values()]), BLUE, name="beyond chance"),
        bars(names, torch.tensor([one.shuffled for one in found.values()]), ORANGE, name="of shuffled labels"),
    ]
    title = "What tells the expert"
    plots = [plot("information", title, traces, "", "bits", barmode="stack", showlegend=True)]
    plots += _clusters(texts.distinct) if texts.distinct else []
    plots += _places(counted["position"]) if counted["position"] is not None else []
    said = [f"{name} {percent(one.normalized)}" for name, one in found.items()]
    entropy = next(iter(found.values())).expert_entropy
    says = (
        f"An expert's choice has {entropy:.2f} bits. Share of them that is known from one thing alone, beyond chance: "
        f"{', '.join(said)}. Bright cells of the second plot are tokens that mostly go to one expert; in the third, "
        "orange is where in the context an expert gets more than its share."
    )
    return Section("choices", "What decides the expert", says=says, plots=plots)


def _clusters(distinct: list[DistinctToken]) -> list[Plot]:
    # plotly reads a little HTML in its labels.
    labels = [html.escape(printable(token.text.replace("\n", "\u23ce"))[:16]) for token in distinct]
    axis = {"autorange": "reversed", "tickvals": list(range(len(labels))), "ticktext": labels, "tickfont": {"size": 8}}
    shares = torch.tensor([token.share_E for token in distinct])
    data = heatmap(shares, COUNTS, "to expert %{x}: %{z:.2f}", zmin=0, zmax=1)
    title = "Over-represented tokens: share to each expert"
    return [plot("clusters", title, data, "expert", "", yaxis=axis)]


def _places(counts: LabelCounts) -> list[Plot]:
    n_places = min(_PLACES, int(counts.labels_P.max()) + 1)
    dense_ET = counts.dense(int(counts.labels_P.max()) + 1)[:, :n_places].double()
    usual_E = counts.of_expert_E / counts.n
    ratio_ET = dense_ET / dense_ET.sum(0) / usual_E[:, None]
    data = heatmap(ratio_ET, COSINES, "expert %{y}, position %{x}: %{z:.2f} x its share", zmid=1, zmin=0, zmax=2)
    return [plot("places", "Load by position, 1 if as elsewhere", data, "position in the context", "expert")]


def together(found: CoActivation | None) -> Section | None:
    """How often experts are chosen together, against independence; None if tokens have one expert."""
    if found is None:
        return None
    data = heatmap(found.lift_EE, COSINES, "%{y}, %{x}: %{z:.2f} x", zmid=1, zmin=0, zmax=2)
    axis = {"autorange": "reversed"}
    plots = [plot("together", "Chosen together, 1 if independent", data, "expert", "expert", yaxis=axis)]
    says = (
        "How often two experts get the same token, over what their loads alone would give: orange pairs complement "
        "each other, blue ones stand in for each other."
    )
    return Section("together", "Experts chosen together", says=says, plots=plots)


def alike(found: Similarity | None) -> Section | None:
    """Similarity of activations, codes and reconstructions; None without text."""
    if found is None:
        return None
    plots = []
    for anchor, title, value_RR in (("cka", "Linear CKA", found.cka_RR), ("rsa", "RSA", found.rsa_RR)):
        names, axis = list(found.names), {"autorange": "reversed"}
        data = heatmap(value_RR, COSINES, "%{y}, %{x}: %{z:.3f}", zmin=-1, zmax=1, x=names, y=names)
        plots.append(plot(anchor, title, data, yaxis=axis))
    says = (
        f"Do two representations of {found.n_tokens:,} tokens hold the same tokens to be alike? 1 says that they do, 0 "
        "that they have nothing in common. CKA compares inner products and is led by the directions with most "
        "variance, RSA compares the order of all distances."
    )
    return Section("similarity", "Similarity of representations", says=says, plots=plots)
