"""Downloading an SAE from the Hugging Face Hub, and verifying its weights before they are read."""

import hashlib
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.loading.pretrained_sae_loaders import get_sae_lens_config_from_disk, read_sae_components_from_disk
from safetensors import SafetensorError
from torch import Tensor

from sae_lens_switch.hub.repository import check_sae_id, metadata_of, read_config, read_tensor


def verified_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, object] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[dict[str, object], dict[str, Tensor], Tensor | None]:
    """Load an SAE for SAELens after comparing the weights with their recorded SHA-256.

    ```python
    SAE.from_pretrained("user/repo", "sae_id", converter=verified_loader)
    SAE.from_pretrained("user/repo", "sae_id", converter=functools.partial(verified_loader, revision="v2"))
    ```

    The digest is the one in ``cfg.json`` or, in a repository that this package did not upload to, the one that the Hub
    states. It reveals damage, and weights replaced without their config. Where the owner of the repository may replace
    both, pass a commit as ``revision``.

    Args:
        repo_id: The repository.
        folder_name: The SAE's id.
        device: The device of the tensors.
        force_download: Download again what is in the cache.
        cfg_overrides: Settings that replace those in the config.
        revision: A branch, tag or commit; the main branch by default.
        token: A token of the Hub, if not the one the client knows.

    Returns:
        Config, weights and log10 sparsity (if there is any), as SAELens expects of a loader.

    Raises:
        ValueError: For an id that is not in the repository, or weights that are not those recorded.
    """
    check_sae_id(folder_name)
    api = HfApi(token=token)

    def fetch(name: str, revision: str | None) -> Path:
        file = f"{folder_name}/{name}"
        return Path(api.hf_hub_download(repo_id, file, revision=revision, force_download=force_download))

    try:
        cfg_path = fetch(SAE_CFG_FILENAME, revision)
        # Everything else from the same commit, whatever is uploaded meanwhile: the cache's folders are named by it.
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

    recorded = metadata_of(read_config(folder_name, cfg_path)).get("weights_sha256")
    if recorded is None:
        (info,) = api.get_paths_info(repo_id, f"{folder_name}/{SAE_WEIGHTS_FILENAME}", revision=commit)
        recorded = info.lfs.sha256 if isinstance(info, RepoFile) and info.lfs is not None else None
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
    return cfg, state_dict, None if sparsity_path is None else read_tensor(sparsity_path, "sparsity")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
