"""SAEs to and from the Hugging Face Hub: what is uploaded is an inference SAE, with a model card worth reading."""

import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.loading.pretrained_sae_loaders import get_sae_lens_config_from_disk, read_sae_components_from_disk
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_switch.common.printable import logger
from sae_lens_switch.hub.model_card import PICTURE, model_card
from sae_lens_switch.hub.summary_figure import sae_summary
from sae_lens_switch.saes.serialization import fold_saved_scaler

_README = "README.md"
_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RUNNER_CFG_FILENAME, PICTURE)
_NOT_FOLDED = ("expected_average_only_in", "covariance_whitening")
_NEVER_FIRED = -9.9  # SAELens's sparsity is log10(share + 1e-10)


def upload_saes_to_huggingface(
    saes_dict: Mapping[str, SAE[Any] | Path | str],
    hf_repo_id: str,
    hf_revision: str = "main",
    show_progress: bool = True,
    add_default_readme: bool = True,
    *,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    eval_dataset: str | None = None,
    expert_load: Mapping[str, Sequence[float]] | None = None,
    log_sparsity: Mapping[str, Tensor] | None = None,
    base_model: str | None = None,
    datasets: str | Sequence[str] | None = None,
    license: str | None = None,  # noqa: A002, the Hub's name
    tags: Sequence[str] = (),
    private: bool | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """SAELens's function of this name, for inference SAEs of every architecture, with a model card.

    saes_dict:    by id, the folder in the repository: an SAE, or the folder of one. A training SAE, or a checkpoint, is
                  exported for inference: folded, and ``sparse_topk`` as plain ``topk``. An inference folder's weights
                  go up as they are.
    hf_revision:  a branch; made if it is not there. So is the repository (``private`` goes for a new one alone).
    add_default_readme: write README.md, and a picture for each SAE. What was written into the card by hand, outside
                  of its marks, stays, and so do the SAEs uploaded earlier.
    metrics:      by id, numbers by name; nested as ``run_evals`` returns them, if you like
    eval_dataset: what they were measured on; the training dataset if not given
    expert_load:  by id, share of the tokens of each expert, [E], summing to 1
    log_sparsity: by id, log10 share of the tokens on which each latent fires, [F]: ``trainer.log_feature_sparsity``
    base_model, datasets, license, tags: the card's front matter. Model and datasets are the SAEs' own if not given;
                  no license is claimed unless it is.

    All is one commit: an upload that fails changes nothing in the branch. Everything is checked, by loading and
    running the SAEs that are given as folders, before anything is sent.

    Raises ValueError for an argument, id, config or weights that cannot be used, FileNotFoundError for a folder without
    its files, and huggingface_hub's errors.
    """
    if len(saes_dict) == 0:
        raise ValueError("saes_dict must hold at least one SAE; got none")
    _check_hub_name("hf_repo_id", hf_repo_id)
    for sae_id in saes_dict:
        _check_sae_id(sae_id)
    for name, given in (("metrics", metrics), ("expert_load", expert_load), ("log_sparsity", log_sparsity)):
        for sae_id in given or ():
            if sae_id not in saes_dict:
                raise ValueError(f"{name} must be by the ids of saes_dict, {', '.join(saes_dict)}; got {sae_id!r}")
    front_matter = _front_matter(base_model, datasets, license, tags)
    if eval_dataset is not None:
        _check_hub_name("eval_dataset", eval_dataset)

    configs: dict[str, dict[str, Any]] = {}
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    with TemporaryDirectory() as folder:
        for n, (sae_id, sae_ref) in enumerate(
            tqdm(saes_dict.items(), desc="Preparing SAEs", disable=not show_progress)
        ):
            files = _export(sae_id, sae_ref, Path(folder) / str(n))
            evaluations = _numbers(sae_id, (metrics or {}).get(sae_id))
            measured = {
                "evaluations": evaluations,
                "eval_dataset": eval_dataset if evaluations else None,
                "expert_load": (expert_load or {}).get(sae_id),
            }
            if log_sparsity is not None and sae_id in log_sparsity:
                files[SPARSITY_FILENAME] = Path(folder) / f"{n}-{SPARSITY_FILENAME}"
                if not isinstance(log_sparsity[sae_id], Tensor):
                    raise ValueError(f"log_sparsity[{sae_id!r}] must be a tensor; got {log_sparsity[sae_id]!r}")
                sparsity_F = log_sparsity[sae_id].detach().cpu().contiguous()
                save_file({"sparsity": sparsity_F}, files[SPARSITY_FILENAME])
            config, additions = _commit(sae_id, files, measured, picture=add_default_readme)
            configs[sae_id] = config
            operations += additions
        with _progress_bars(show_progress):
            return _send(
                HfApi(token=token),
                hf_repo_id,
                hf_revision,
                private,
                operations,
                configs,
                front_matter,
                add_default_readme,
            )


def verified_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """A loader for SAELens that compares the weights with their recorded SHA-256 before it reads them::

        SAE.from_pretrained("user/repo", "sae_id", converter=verified_loader)
        SAE.from_pretrained("user/repo", "sae_id", converter=functools.partial(verified_loader, revision="v2"))

    The digest is the one in ``cfg.json`` or, in a repository not uploaded by us, the one the Hub states. It shows
    damage, and weights that were replaced under their config. Against a repository whose owner replaces both, give a
    commit as ``revision``.

    Raises ValueError for an id that is not in the repository, and for weights that are not those recorded; and
    huggingface_hub's errors.
    """
    _check_sae_id(folder_name)
    api = HfApi(token=token)

    def fetch(name: str, revision: str | None) -> Path:
        file = f"{folder_name}/{name}"
        return Path(api.hf_hub_download(repo_id, file, revision=revision, force_download=force_download))

    try:
        cfg_path = fetch(SAE_CFG_FILENAME, revision)
        # Of the same commit, whatever is uploaded meanwhile: the cache's folders are named by it.
        commit = cfg_path.parents[folder_name.count("/") + 1].name
        weights_path = fetch(SAE_WEIGHTS_FILENAME, commit)
    except LocalEntryNotFoundError:  # no connection
        raise
    except EntryNotFoundError as error:
        files = api.list_repo_files(repo_id, revision=revision)
        ids = sorted(f.removesuffix(f"/{SAE_CFG_FILENAME}") for f in files if f.endswith(f"/{SAE_CFG_FILENAME}"))
        raise ValueError(
            f"{repo_id}, revision {revision or 'main'}, must hold {SAE_CFG_FILENAME} and {SAE_WEIGHTS_FILENAME} of SAE "
            f"{folder_name!r}; it has configs of {', '.join(ids) or 'no SAE'}"
        ) from error
    try:
        sparsity_path = fetch(SPARSITY_FILENAME, commit)
    except EntryNotFoundError:
        sparsity_path = None

    recorded = _metadata(_read_config(folder_name, cfg_path)).get("weights_sha256")
    if recorded is None:
        (info,) = api.get_paths_info(repo_id, f"{folder_name}/{SAE_WEIGHTS_FILENAME}", revision=commit)
        recorded = getattr(getattr(info, "lfs", None), "sha256", None)
    if recorded is None:
        raise ValueError(
            f"neither {SAE_CFG_FILENAME} nor the Hub records a SHA-256 for the weights of {folder_name!r} in "
            f"{repo_id}: they cannot be verified. SAE.from_pretrained without this converter loads them as they are."
        )
    found = _sha256(weights_path)
    if found != recorded:
        raise ValueError(
            f"the weights of {folder_name!r} in {repo_id} must have the recorded SHA-256, {recorded}; got {found}. "
            "They were damaged or replaced; force_download=True fetches them again."
        )
    cfg = get_sae_lens_config_from_disk(cfg_path.parent, device, cfg_overrides)
    try:
        cfg, state_dict = read_sae_components_from_disk(cfg, weights_path, device)
    except SafetensorError as error:
        raise ValueError(f"the weights of {folder_name!r} in {repo_id} are no safetensors file: {error}") from error
    return cfg, state_dict, None if sparsity_path is None else _read_tensor(sparsity_path, "sparsity")


# What can be known before anything is sent


def _check_hub_name(argument: str, name: Any) -> str:
    if not _is_hub_name(name):
        raise ValueError(f"{argument} must be an id on the Hub, such as 'gpt2' or 'user/name'; got {name!r}")
    return name


def _is_hub_name(name: Any) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str)


def _check_sae_id(sae_id: Any) -> None:
    """An id becomes a path, here and on the machine of whoever downloads."""
    parts = sae_id.split("/") if isinstance(sae_id, str) else []
    bad = (
        not parts
        or any(part in ("", ".", "..", ".git", ".cache", *_FILES, _README) or part.strip() != part for part in parts)
        or any(c == "\\" or not c.isprintable() for c in sae_id)
        or sae_id.startswith("~")
        or re.match("[A-Za-z]:", sae_id) is not None
        or len(sae_id) > 200
    )
    if bad:
        raise ValueError(
            "an SAE's id must be a relative path such as 'blocks.8.hook_resid_post/32_experts': printable, names "
            f"joined by '/', no '..', no backslash; got {sae_id!r}"
        )


def _front_matter(
    base_model: str | None,
    datasets: str | Sequence[str] | None,
    license: str | None,  # noqa: A002
    tags: Sequence[str],
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if base_model is not None:
        result["base_model"] = _check_hub_name("base_model", base_model)
    if datasets is not None:
        names = [datasets] if isinstance(datasets, str) else list(datasets)
        result["datasets"] = [_check_hub_name("datasets", name) for name in names]
    if isinstance(tags, str) or not all(isinstance(tag, str) and tag.isprintable() and tag for tag in tags):
        raise ValueError(f"tags must be a sequence of printable strings; got {tags!r}")
    result["tags"] = list(tags)
    if license is not None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(license)):
            raise ValueError(
                f"license must be one of the Hub's identifiers, such as 'mit' or 'apache-2.0'; got {license!r}"
            )
        result["license"] = license
    return result


def _numbers(sae_id: str, metrics: Any) -> dict[str, float] | None:
    """Numbers by name, of a mapping that may be nested; the full path where two names are the same."""
    result: dict[str, float] = {}

    def collect(path: tuple[str, ...], value: Any) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                collect((*path, str(name)), inner)
            return
        try:
            number = float(value)
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


# From an SAE to files


def _export(sae_id: str, sae_ref: SAE[Any] | Path | str, folder: Path) -> dict[str, Path]:
    """The files of an inference SAE, by their names; those that have to be made are made in ``folder``."""
    if not isinstance(sae_ref, SAE | Path | str):
        raise ValueError(f"saes_dict[{sae_id!r}] must be an SAE or a folder; got {type(sae_ref).__name__}")
    kept: dict[str, Path] = {}
    if isinstance(sae_ref, SAE):
        sae = sae_ref
    else:
        path = Path(sae_ref)
        sae = _load(sae_id, path)
        names = _FILES[:4] if not isinstance(sae, TrainingSAE) else (SPARSITY_FILENAME, RUNNER_CFG_FILENAME)
        kept = {name: path / name for name in names if (path / name).is_file()}
    if sae.cfg.normalize_activations in _NOT_FOLDED:
        raise ValueError(
            f"SAE {sae_id!r} has normalize_activations={sae.cfg.normalize_activations!r}: fold it into the weights "
            "first (fold_activation_norm_scaling_factor, fold_activation_whitening), or the outputs change on loading"
        )
    if SAE_WEIGHTS_FILENAME in kept:
        return kept
    made = sae.save_inference_model(folder) if isinstance(sae, TrainingSAE) else sae.save_model(folder)
    return kept | {Path(file).name: Path(file) for file in made}


def _load(sae_id: str, path: Path) -> SAE[Any]:
    """The SAE in a folder, loaded as SAELens does and run once; with what a checkpoint keeps beside it folded in."""
    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
        if not (path / name).is_file():
            there = ", ".join(sorted(f.name for f in path.glob("*"))) or "nothing"
            raise FileNotFoundError(
                f"the folder of SAE {sae_id!r} must hold {name}: {path / name} not found, there is {there}"
            )
    cfg = _read_config(sae_id, path / SAE_CFG_FILENAME)
    architecture = cfg.get("architecture", "standard")
    known = sorted(SAE_CLASS_REGISTRY.keys() | SAE_TRAINING_CLASS_REGISTRY.keys())
    if architecture not in known:
        raise ValueError(f"architecture of SAE {sae_id!r} must be one of {', '.join(known)}; got {architecture!r}")
    training = architecture not in SAE_CLASS_REGISTRY or "decoder_init_norm" in cfg
    try:
        # Built without memory, filled from the file: a config that lies about its size allocates nothing.
        sae = (TrainingSAE if training else SAE).load_from_disk(path)
        x = torch.zeros(2, sae.cfg.d_in, dtype=sae.dtype)
        with torch.no_grad():
            sae(x.view(2, 1, 1, -1) if sae.hook_z_reshaping_mode else x)
        if training:
            fold_saved_scaler(sae, path)
    except Exception as error:  # a config or weights of a stranger can go wrong in any way
        raise ValueError(f"SAE {sae_id!r} must be one that SAELens can load and run; {path}: {error!r}") from error
    return sae


def _read_config(sae_id: str, path: Path) -> dict[str, Any]:
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{SAE_CFG_FILENAME} of SAE {sae_id!r} must be JSON: {error}") from error
    if not isinstance(cfg, dict) or not isinstance(cfg.get("metadata") or {}, dict):
        raise ValueError(f"{SAE_CFG_FILENAME} of SAE {sae_id!r} must be a JSON object, and so must its metadata")
    return cfg


def _metadata(cfg: dict[str, Any]) -> dict[str, Any]:
    return cfg.get("metadata") or {}


def _commit(
    sae_id: str, files: dict[str, Path], measured: dict[str, Any], *, picture: bool
) -> tuple[dict[str, Any], list[CommitOperationAdd]]:
    """The config as it goes up, and what is to be added to the repository."""
    additions = {n: CommitOperationAdd(f"{sae_id}/{n}", f) for n, f in files.items() if n != SAE_CFG_FILENAME}
    cfg = _read_config(sae_id, files[SAE_CFG_FILENAME])
    metadata = cfg["metadata"] = dict(_metadata(cfg))
    sha256 = additions[SAE_WEIGHTS_FILENAME].upload_info.sha256.hex()
    before = metadata.get("measured")
    if not isinstance(before, dict) or metadata.get("weights_sha256") != sha256:
        before = {}  # measured on other weights
    measured = before | {name: value for name, value in measured.items() if value is not None}
    if "evaluations" in measured and "eval_dataset" not in measured:
        measured["eval_dataset"] = _hub_name(metadata.get("dataset_path"))

    E = cfg.get("n_experts")
    if "expert_load" in measured:
        measured["expert_load"] = _shares(sae_id, measured["expert_load"], E)
    density_F = None
    if SPARSITY_FILENAME in files:
        sparsity_F = _read_tensor(files[SPARSITY_FILENAME], "sparsity").float()
        if sparsity_F.shape != (cfg["d_sae"],) or sparsity_F.isnan().any():
            raise ValueError(
                f"sparsity of SAE {sae_id!r} must be {cfg['d_sae']} numbers, one a latent; got shape "
                f"{tuple(sparsity_F.shape)}, {int(sparsity_F.isnan().sum())} of them NaN"
            )
        density_F = torch.where(sparsity_F > _NEVER_FIRED, 10**sparsity_F, 0)
        measured["dead_latents"] = int((density_F == 0).sum())
        if E is not None and density_F.sum() > 0:
            measured["expert_firings"] = (density_F.view(E, -1).sum(1) / density_F.sum()).tolist()
    metadata.pop("requires", None)
    plugin = SAE_CLASS_REGISTRY[cfg.get("architecture", "standard")][0].__module__.split(".")[0]
    if plugin != "sae_lens":
        version = getattr(sys.modules[plugin], "__version__", None)
        metadata["requires"] = f"{plugin}>={version}" if version else plugin
    metadata |= {"weights_sha256": sha256, "measured": {n: v for n, v in measured.items() if v is not None}}
    additions[SAE_CFG_FILENAME] = CommitOperationAdd(f"{sae_id}/{SAE_CFG_FILENAME}", json.dumps(cfg).encode())
    if picture and (png := _picture(cfg, files[SAE_WEIGHTS_FILENAME], density_F)):
        additions[PICTURE] = CommitOperationAdd(f"{sae_id}/{PICTURE}", png)
    return cfg, list(additions.values())


def _shares(sae_id: str, shares: Any, n_experts: int | None) -> list[float]:
    try:
        result = [float(share) for share in shares]
    except (TypeError, ValueError):
        result = []
    if not result or len(result) != n_experts or min(result) < 0 or not abs(sum(result) - 1) <= 1e-3:
        raise ValueError(
            f"expert_load[{sae_id!r}] must be shares that sum to 1, one for each of n_experts={n_experts}; "
            f"got {shares!r}"
        )
    return result


def _picture(cfg: dict[str, Any], weights: Path, density_F: Tensor | None) -> bytes | None:
    measured = cfg["metadata"]["measured"]
    with safe_open(weights, framework="pt") as file:
        names = set(file.keys())
        W_enc, W_dec = (file.get_tensor(n).float() if n in names else None for n in ("W_enc", "W_dec"))
    alignment_F = None
    if W_enc is not None and W_dec is not None and W_enc.T.shape == W_dec.shape:
        alignment_F = torch.nn.functional.cosine_similarity(W_enc.T, W_dec, dim=1)
    elif density_F is None and "expert_load" not in measured:
        return None
    load = measured.get("expert_load")
    try:
        figure = sae_summary(
            expert_load=load or measured.get("expert_firings"),
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


def _hub_name(name: Any) -> str | None:
    """The name if it can be one on the Hub, and is not that of something on this machine."""
    return name if _is_hub_name(name) and not Path(name).exists() else None


def _base_model(name: Any) -> str | None:
    """The Hub's name of a model that TransformerLens may know by another."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        return get_official_model_name(name) if _is_hub_name(name) else None
    except ValueError:
        return _hub_name(name)


def _read_tensor(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path.name} must be a safetensors file that holds {name!r}; {path}: {error}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# To the Hub


def _send(
    api: HfApi,
    repo_id: str,
    revision: str,
    private: bool | None,
    operations: list[CommitOperationAdd | CommitOperationDelete],
    configs: dict[str, dict[str, Any]],
    front_matter: dict[str, Any],
    readme: bool,
) -> CommitInfo:
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        try:
            head = api.repo_info(repo_id, revision=revision).sha
        except RevisionNotFoundError:
            api.create_branch(repo_id, branch=revision)
            head = api.repo_info(repo_id, revision=revision).sha
        there = set(api.list_repo_files(repo_id, revision=head))
        ours = {operation.path_in_repo for operation in operations}
        # What an earlier SAE of the same id had and this one has not would be taken for this one's.
        stale = {f"{sae_id}/{name}" for sae_id in configs for name in _FILES} & there - ours
        operations = [*operations, *(CommitOperationDelete(path) for path in sorted(stale))]
        if readme:
            card = _card(api, repo_id, revision, head, there, configs, front_matter, (there | ours) - stale)
            operations.append(CommitOperationAdd(_README, card.encode()))
        names = ", ".join(configs)
        message = f"Upload SAE{'s' * (len(configs) > 1)} {names if len(names) <= 100 else names[:100] + '...'}"
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=head)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            error.append_to_message(
                f"\nUploading to {repo_id} needs a token that may write there: `hf auth login`, or token=..."
            )
        raise


def _card(
    api: HfApi,
    repo_id: str,
    revision: str,
    head: str | None,
    there: set[str],
    configs: dict[str, dict[str, Any]],
    front_matter: dict[str, Any],
    pictures: set[str],
) -> str:
    """The new card, with the SAEs that are in the repository already."""
    others = {f.removesuffix(f"/{SAE_CFG_FILENAME}") for f in there if f.endswith(f"/{SAE_CFG_FILENAME}")}
    others -= configs.keys()
    snapshot = Path()
    if others or _README in there:
        wanted = [_README, f"*/{SAE_CFG_FILENAME}"]
        snapshot = Path(api.snapshot_download(repo_id, revision=head, allow_patterns=wanted))
    everything: dict[str, dict[str, Any]] = {}
    for sae_id in others:
        try:
            everything[sae_id] = _read_config(sae_id, snapshot / sae_id / SAE_CFG_FILENAME)
        except ValueError as error:
            logger.warning(f"left out of the model card: {error}")
    everything |= configs
    metadata = [_metadata(cfg) for cfg in everything.values()]
    derived = {
        "base_model": [name for m in metadata if (name := _base_model(m.get("model_name")))],
        "datasets": [name for m in metadata if (name := _hub_name(m.get("dataset_path")))],
    }
    try:
        previous = (snapshot / _README).read_text(encoding="utf-8-sig") if _README in there else None
        return model_card(
            repo_id,
            dict(sorted(everything.items())),
            front_matter=front_matter,
            derived=derived,
            pictures=pictures,
            revision=revision,
            previous=previous,
        )
    except ValueError as error:
        raise ValueError(
            f"{_README} of {repo_id} cannot be extended (add_default_readme=False leaves it alone): {error}"
        ) from error


@contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    if show or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
