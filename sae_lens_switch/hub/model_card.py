"""The model card of a Hub repository of SAEs, made from their configs so that any upload can rewrite it for all.

No name is trusted: names are shown as code, with every character escaped that could be markup.
"""

import glob
import re
from collections.abc import Collection, Mapping
from urllib.parse import quote

import yaml
from huggingface_hub.repocard import RepoCard
from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

from sae_lens_switch.common.printable import printable
from sae_lens_switch.saes.expert_layout import ExpertLayout

PICTURE = "summary.png"
Config = Mapping[str, object]
_BEGIN = "<!-- sae-lens-switch: each upload rewrites from here ... -->"
_END = "<!-- sae-lens-switch: ... to here -->"
_PLAIN = re.compile(r"[\w./:=@+,' -]*", re.ASCII)
_TAGS = ("saelens", "sae", "sparse-autoencoder", "mechanistic-interpretability")
_ABOUT = {
    "switch": """\
**Switch SAE** ([Mudide et al. 2024](https://arxiv.org/abs/2410.08201)): a router sends each activation to one of many
experts, `e = argmax p`, `p = softmax((x - b_router) @ W_router)`, or to several, the most probable ones, and only
their latents are computed. If there is an `expert_bias`, it is added to the logits for this choice, but not for `p`.
At most k latents are active per token; with the activation "jumprelu" all that exceed the `threshold` of their expert
instead, gate included (of shared ones, the first entry), about k on data like that of training. The first S latents,
if any are shared, every token may use; expert e of M latents owns `S + e*M` to `S + (e+1)*M`. With the gate
"probability" they are multiplied by `p_e`, with "renormalized" by `p_e` over the sum of the chosen experts', with "one"
by nothing; shared latents by nothing. Decoding, `f @ W_dec + b_dec`, is linear in the latents, including latents that
are edited or mixed over experts.""",
    "topk": """\
**TopK SAE** ([Gao et al. 2024](https://arxiv.org/abs/2406.04093)): the k largest latents per token are kept.""",
}


def model_card(
    repo_id: str,
    configs: Mapping[str, Config],
    *,
    front_matter: Mapping[str, object],
    derived: Mapping[str, list[str]],
    pictures: Collection[str] = (),
    revision: str = "main",
    previous: str | None = None,
) -> str:
    """Write the README.md of a repository.

    Args:
        repo_id: The repository.
        configs: The SAEs' configs (``cfg.json``) by id.
        front_matter: Explicit front matter, which overrides the rest.
        derived: ``base_model`` and ``datasets`` as the SAEs name them; merged with what the card had.
        pictures: Files of the repository that may be shown.
        revision: The branch.
        previous: The current card. What is outside this package's markers is kept, in text and front matter.

    Raises:
        ValueError: If the front matter of ``previous`` is no YAML mapping, or the end marker is missing.
    """
    previous = previous or f"# {repo_id.split('/')[-1]}\n"
    # RepoCard warns if there is no front matter, so an empty one is added.
    content = previous if previous.startswith("---") else f"---\n\n---\n\n{previous}"
    try:
        card = RepoCard(content)
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"its front matter is no YAML mapping: {error}") from error
    data = card.data
    evaluations = {sae_id: _evaluations(cfg) for sae_id, cfg in configs.items()}
    architectures = sorted({str(cfg.get("architecture")) for cfg in configs.values()})
    data["library_name"] = "saelens"
    before = {key: _as_list(data.get(key)) for key in ("tags", "metrics", "base_model", "datasets")}
    joined = {
        "tags": [*before["tags"], *_TAGS, *architectures, *_as_list(front_matter.get("tags"))],
        # Metrics named by an earlier card of this package may be outdated.
        "metrics": ([] if _BEGIN in previous else before["metrics"])
        + sorted({name for numbers in evaluations.values() for name in numbers}),
        **{key: [*before[key], *values] for key, values in derived.items()},
    }
    for key, values in joined.items():
        values = [printable(value) if isinstance(value, str) else value for value in values]
        data[key] = [value for i, value in enumerate(values) if value not in values[:i]] or None
    for key, value in front_matter.items():
        if key != "tags":
            data[key] = value
    ours = set(map(printable, configs))
    others = [e for e in _as_list(data.get("model-index")) if _mapping(e).get("name") not in ours]
    data["model-index"] = [*others, *_model_index(configs)] or None
    body = "\n\n".join([_BEGIN, *_sections(repo_id, configs, evaluations, pictures, revision), _END])
    head, begin, rest = card.text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and not end:
        raise ValueError(f"it has the marker {_BEGIN!r} without its end marker, {_END!r}")
    card.text = head + body + after if begin else f"{head.rstrip()}\n\n{body}\n"
    return str(card)


def _in_and_out(table: Mapping[str, object], of_input: str, of_output: str) -> object:
    """Both of a transcoder; the one that an SAE has."""
    found = table.get(of_input)
    return found if table.get(of_output) is None else f"{found} to {table[of_output]}"


def _sections(
    repo_id: str,
    configs: Mapping[str, Config],
    evaluations: Mapping[str, Mapping[str, float]],
    pictures: Collection[str],
    revision: str,
) -> list[str]:
    rows = []
    for sae_id, cfg in configs.items():
        metadata = _mapping(cfg.get("metadata"))
        rows.append(
            [
                sae_id,
                cfg.get("architecture"),
                _in_and_out(cfg, "d_in", "d_out"),
                *(cfg.get(name) for name in ("d_sae", "k")),
                metadata.get("model_name"),
                _in_and_out(metadata, "hook_name", "hook_name_out"),
                *(metadata.get(name) for name in ("context_size", "dataset_path")),
            ]
        )
    header = ["SAE", "architecture", "d_in", "latents", "k", "model", "hook", "context", "trained on"]
    parts = [
        "Sparse autoencoders (SAEs) for [SAELens](https://github.com/decoderesearch/SAELens).",
        _table(header, rows),
        *(_ABOUT[name] for name in _ABOUT if any(cfg.get("architecture") == name for cfg in configs.values())),
        "## Load",
        *_loading(repo_id, configs, revision),
    ]
    routed = {sae_id: cfg for sae_id, cfg in configs.items() if isinstance(cfg.get("n_experts"), int)}
    if routed:
        rows = [[sae_id, *_experts(cfg), cfg.get("k"), cfg.get("gate"), *_load(cfg)] for sae_id, cfg in routed.items()]
        header = ["SAE", "experts", "active", "latents per expert", "shared latents", "k", "gate"]
        header += ["min load, %", "uniform", "max", "share of"]
        parts += ["## Routing", _table(header, rows)]
    dead = [
        [i, n, cfg.get("d_sae")] for i, cfg in configs.items() if (n := _measured(cfg).get("dead_latents")) is not None
    ]
    if any(evaluations.values()) or dead:
        parts.append("## Evaluation")
    if any(evaluations.values()):
        names = list(dict.fromkeys(name for numbers in evaluations.values() for name in numbers))
        rows = [
            [i, _measured(configs[i]).get("eval_dataset"), *(numbers.get(name) for name in names)]
            for i, numbers in evaluations.items()
            if numbers
        ]
        parts.append(_table(["SAE", "on", *map(_code, names)], rows))
    if dead:
        parts.append("Latents that never fired when last counted:\n\n" + _table(["SAE", "dead", "of"], dead))
    for sae_id in configs:
        if (picture := f"{sae_id}/{PICTURE}") in pictures:
            parts.append(f"{_code(sae_id)}\n\n![summary of the SAE]({quote(picture)})")
    return parts


def _loading(repo_id: str, configs: Mapping[str, Config], revision: str) -> list[str]:
    by_requirement: dict[str, dict[str, str]] = {}
    for sae_id, cfg in configs.items():
        requires = str(_mapping(cfg.get("metadata")).get("requires") or "")
        by_requirement.setdefault(requires, {}).setdefault(str(cfg.get("architecture")), sae_id)
    parts = []
    for requires, examples in sorted(by_requirement.items()):
        names = ", ".join(map(_code, examples))
        package, _, version = requires.partition(">=")
        imports = "from sae_lens import SAE\n"
        if re.fullmatch(r"[A-Za-z_]\w*", package, re.ASCII):
            imports += f"import {package}  # registers its architectures with SAELens\n"
            needs = _code(package) + (f", {_code(version)} or later" if version else "")
            errors = ", ".join(_code(f"KeyError: '{name}'") for name in examples)
            parts.append(
                f"Architecture {names}: needs the package {needs}. Unless it is imported, SAELens does not know the "
                f"architecture, and loading fails with {errors}."
            )
        else:
            parts.append(f"Architecture {names}: needs SAELens alone, no plugin.")
        sae_id = next(iter(examples.values()))
        call = f'sae = SAE.from_pretrained("{repo_id}", {_literal(sae_id)})'
        if revision != "main":  # from_pretrained has no argument for it
            imports = f"from huggingface_hub import snapshot_download\n{imports}"
            where = f"revision={_literal(revision)}, allow_patterns={_literal(f'{glob.escape(sae_id)}/*')}"
            call = f"""folder = snapshot_download("{repo_id}", {where})
sae = SAE.load_from_disk(folder + {_literal(f"/{sae_id}")})"""
        parts.append(f"```python\n{imports}\n{call}\n```")
    loader = "verified_loader"
    if revision != "main":
        loader = f"functools.partial(verified_loader, revision={_literal(revision)})"
    parts.append(
        "To compare the weights with the SHA-256 in `cfg.json` before they are used, load them with "
        f"`SAE.from_pretrained(..., converter={loader})`, after `from sae_lens_switch.hub import verified_loader`."
    )
    return parts


def _model_index(configs: Mapping[str, Config]) -> list[dict[str, object]]:
    entries: list[dict[str, object]] = []
    for sae_id, cfg in configs.items():
        dataset = _measured(cfg).get("eval_dataset")
        on = printable(dataset)
        results = [
            EvalResult("feature-extraction", on, on, printable(name), value, task_name="reconstruction of activations")
            for name, value in _evaluations(cfg).items()
            if isinstance(dataset, str)
        ]
        entries += eval_results_to_model_index(printable(sae_id), results) if results else []
    return entries


def _load(cfg: Config) -> list[object]:
    """Least, uniform and largest share per expert in percent, and of what."""
    measured = _measured(cfg)
    for key, of in (("expert_load", "tokens"), ("expert_firings", "firings of latents")):
        shares = measured.get(key)
        if isinstance(shares, list) and shares and all(isinstance(s, int | float) for s in shares):
            return [100.0 * min(shares), 100 / len(shares), 100.0 * max(shares), of]
    return [None] * 4


def _experts(cfg: Config) -> list[object]:
    """How many, how many of them active per token, the latents of each, and those that are shared."""
    layout = ExpertLayout.of_fields(cfg)
    width, shared = (None, None) if layout is None else (layout.expert_width, layout.shared_width or None)
    return [cfg.get("n_experts"), cfg.get("n_active_experts", 1), width, shared]


def _measured(cfg: Config) -> Config:
    return _mapping(_mapping(cfg.get("metadata")).get("measured"))


def _evaluations(cfg: Config) -> dict[str, float]:
    numbers = _mapping(_measured(cfg).get("evaluations"))
    return {str(name): value for name, value in numbers.items() if isinstance(value, int | float)}


def _mapping(value: object) -> Config:
    return value if isinstance(value, Mapping) else {}


def _as_list(value: object) -> list[object]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


# Escaping


def _table(header: list[str], rows: list[list[object]]) -> str:
    """A table without its empty columns."""
    kept = [j for j in range(len(header)) if any(row[j] is not None for row in rows)]
    lines = [[header[j] for j in kept], ["---"] * len(kept), *([_cell(row[j]) for j in kept] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, int) else _code(value)


def _code(value: object) -> str:
    """A name as inline code. Entities cannot open or close anything in Markdown or HTML."""
    text = printable(value)
    text = text if len(text) <= 200 else text[:200] + "..."
    if text.strip() and _PLAIN.fullmatch(text):
        return f"`{text}`"
    escaped = "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in text)
    return f"<code>{escaped}</code>"


def _literal(text: str) -> str:
    """The text as a Python string literal, in characters that end neither it nor the code block around it."""
    return '"' + "".join(c if _PLAIN.fullmatch(c) else f"\\U{ord(c):08x}" for c in text) + '"'
