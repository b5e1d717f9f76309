"""What was measured of an SAE, checked and written into its ``cfg.json``; and the picture drawn from it."""

import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY
from safetensors import safe_open
from torch import Tensor

from sae_lens_switch.common.printable import logger
from sae_lens_switch.hub.model_card import PICTURE
from sae_lens_switch.hub.repository import hub_name, metadata_of, read_config, read_tensor
from sae_lens_switch.hub.summary_figure import sae_summary
from sae_lens_switch.saes.expert_layout import ExpertLayout

_NEVER_FIRED = -9.9  # SAELens's sparsity is log10(share + 1e-10)


def numbers(sae_id: str, metrics: object) -> dict[str, float] | None:
    """Flatten metrics to numbers by name; by the full path where two names are the same.

    Raises:
        ValueError: If something in them is not a finite number.
    """
    result: dict[str, float] = {}

    def collect(path: tuple[str, ...], value: object) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                collect((*path, str(name)), inner)
            return
        try:
            number = float(value)  # type: ignore[arg-type]  # of tensors, NumPy's numbers, ...
        except (TypeError, ValueError) as error:
            raise ValueError(f"metrics[{sae_id!r}] must hold numbers; got {value!r} for {'/'.join(path)}") from error
        if not math.isfinite(number) or not path:
            raise ValueError(
                f"metrics[{sae_id!r}] must hold finite numbers by name; got {value!r} for {'/'.join(path)}"
            )
        result["/".join(path) if path[-1] in result else path[-1]] = number

    if metrics is None:
        return None
    collect((), metrics)
    return result


def describe(
    sae_id: str, files: Mapping[str, Path], measured: Mapping[str, object], *, picture: bool
) -> tuple[dict[str, object], list[CommitOperationAdd]]:
    """Write into an SAE's config what was measured; earlier measurements stay if they are of the same weights.

    Args:
        sae_id: The SAE's id.
        files: The files of the inference SAE by name.
        measured: ``evaluations``, ``eval_dataset`` and ``expert_load``; None for what was not measured.
        picture: Whether to draw a picture.

    Returns:
        The config, and the operations that add it, the other files and the picture to the repository.
    """
    additions = {n: CommitOperationAdd(f"{sae_id}/{n}", f) for n, f in files.items() if n != SAE_CFG_FILENAME}
    cfg = read_config(sae_id, files[SAE_CFG_FILENAME])
    metadata = cfg["metadata"] = dict(metadata_of(cfg))
    sha256 = additions[SAE_WEIGHTS_FILENAME].upload_info.sha256.hex()
    before = metadata.get("measured")
    if not isinstance(before, dict) or metadata.get("weights_sha256") != sha256:
        before = {}  # measured on other weights
    measured = before | {name: value for name, value in measured.items() if value is not None}
    if "evaluations" in measured and "eval_dataset" not in measured:
        measured["eval_dataset"] = hub_name(metadata.get("dataset_path"))

    E = cfg.get("n_experts")
    if "expert_load" in measured:
        measured["expert_load"] = _shares(sae_id, measured["expert_load"], E)
    density_F = None
    if SPARSITY_FILENAME in files:
        density_F = _density(sae_id, files[SPARSITY_FILENAME], cfg["d_sae"])
        measured["dead_latents"] = int((density_F == 0).sum())
        layout = ExpertLayout.of_fields(cfg)
        if layout is not None and (routed_EM := layout.by_expert(density_F)).sum() > 0:
            measured["expert_firings"] = (routed_EM.sum(1) / routed_EM.sum()).tolist()
    metadata.pop("requires", None)
    if (plugin := _plugin(cfg)) is not None:
        metadata["requires"] = plugin
    metadata |= {"weights_sha256": sha256, "measured": {n: v for n, v in measured.items() if v is not None}}
    additions[SAE_CFG_FILENAME] = CommitOperationAdd(f"{sae_id}/{SAE_CFG_FILENAME}", json.dumps(cfg).encode())
    if picture and (png := _picture(files[SAE_WEIGHTS_FILENAME], measured, density_F)):
        additions[PICTURE] = CommitOperationAdd(f"{sae_id}/{PICTURE}", png)
    return cfg, list(additions.values())


def _plugin(cfg: Mapping[str, object]) -> str | None:
    """The package that registers the architecture, with its version; None for SAELens itself."""
    package = SAE_CLASS_REGISTRY[str(cfg.get("architecture", "standard"))][0].__module__.split(".")[0]
    if package == "sae_lens":
        return None
    version = getattr(sys.modules[package], "__version__", None)
    return f"{package}>={version}" if version else package


def _density(sae_id: str, path: Path, d_sae: object) -> Tensor:
    sparsity_F = read_tensor(path, "sparsity").float()
    if sparsity_F.shape != (d_sae,) or sparsity_F.isnan().any():
        raise ValueError(
            f"sparsity of SAE {sae_id!r} must be {d_sae} numbers, one per latent; got shape "
            f"{tuple(sparsity_F.shape)}, {int(sparsity_F.isnan().sum())} of them NaN"
        )
    return torch.where(sparsity_F > _NEVER_FIRED, 10**sparsity_F, 0)


def _shares(sae_id: str, shares: object, n_experts: object) -> list[float]:
    try:
        result = [float(share) for share in shares]  # type: ignore[attr-defined]  # lists, arrays, tensors, ...
    except (TypeError, ValueError):
        result = []
    if not result or len(result) != n_experts or min(result) < 0 or not abs(sum(result) - 1) <= 1e-3:
        raise ValueError(
            f"expert_load[{sae_id!r}] must be shares that sum to 1, one for each of n_experts={n_experts}; "
            f"got {shares!r}"
        )
    return result


def _picture(weights: Path, measured: Mapping[str, object], density_F: Tensor | None) -> bytes | None:
    """A PNG of what is known; None if that is nothing, or matplotlib is missing."""
    with safe_open(weights, framework="pt") as file:
        names = set(file.keys())
        W_enc, W_dec = (file.get_tensor(n).float() if n in names else None for n in ("W_enc", "W_dec"))
    alignment_F = None
    if W_enc is not None and W_dec is not None and W_enc.T.shape == W_dec.shape:
        alignment_F = torch.nn.functional.cosine_similarity(W_enc.T, W_dec, dim=1)
    elif density_F is None and "expert_load" not in measured:
        return None
    load, firings = measured.get("expert_load"), measured.get("expert_firings")
    load_or_firings = load or firings
    try:
        figure = sae_summary(
            expert_load=load_or_firings if isinstance(load_or_firings, Sequence) else None,
            load_of="tokens" if load else "latents' firings",
            latent_density=density_F,
            alignment=alignment_F,
        )
    except ImportError as error:
        logger.warning(f"no picture for the model card: {error}")
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
