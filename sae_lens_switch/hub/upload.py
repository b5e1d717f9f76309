"""Uploading inference SAEs to the Hugging Face Hub, with a model card."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SPARSITY_FILENAME
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_switch.common.printable import logger
from sae_lens_switch.hub.export import export
from sae_lens_switch.hub.measured import describe, numbers
from sae_lens_switch.hub.model_card import model_card
from sae_lens_switch.hub.repository import (
    FILES,
    README,
    base_model_name,
    check_hub_name,
    check_sae_id,
    hub_name,
    metadata_of,
    read_config,
)

_Configs = dict[str, dict[str, object]]  # by the SAEs' ids


def upload_saes_to_huggingface(
    saes_dict: Mapping[str, SAE | Path | str],
    hf_repo_id: str,
    hf_revision: str = "main",
    show_progress: bool = True,
    add_default_readme: bool = True,
    *,
    metrics: Mapping[str, Mapping[str, object]] | None = None,
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
    """Upload inference SAEs of any architecture, with a model card; SAELens's function of this name, extended.

    The upload is one commit, so one that fails changes nothing in the branch. Everything is checked before anything is
    sent; SAEs given as folders are loaded and run once.

    Args:
        saes_dict: SAEs, or folders of them, by id: the folder in the repository. A training SAE, or a checkpoint, is
            exported for inference: folded, and ``sparse_topk`` as plain ``topk``. The weights of an inference folder
            are uploaded as they are.
        hf_repo_id: The repository, created if it does not exist.
        hf_revision: A branch, created if it does not exist.
        show_progress: Show progress bars.
        add_default_readme: Write README.md, and a picture per SAE. What was written into the card by hand, outside
            this package's markers, is kept, and so are SAEs uploaded earlier.
        metrics: Numbers by name, per id; nested as ``run_evals`` returns them, or flat.
        eval_dataset: What they were measured on; the training dataset by default.
        expert_load: Share of the tokens per expert, [E], summing to 1, per id.
        log_sparsity: log10 of the share of the tokens on which each latent fires, [F], per id:
            ``trainer.log_feature_sparsity``.
        base_model: The card's base model; by default those that the SAEs name.
        datasets: The card's datasets; by default those that the SAEs name.
        license: The card's license; by default none is claimed.
        tags: Further tags of the card.
        private: Whether a new repository is private.
        token: A token of the Hub, if not the one the client knows.

    Returns:
        huggingface_hub's description of the commit.

    Raises:
        ValueError: For an argument, id, config or weights that cannot be used.
        FileNotFoundError: For a folder without its files.
    """
    if len(saes_dict) == 0:
        raise ValueError("saes_dict must hold at least one SAE; got none")
    check_hub_name("hf_repo_id", hf_repo_id)
    for sae_id in saes_dict:
        check_sae_id(sae_id)
    for name, given in (("metrics", metrics), ("expert_load", expert_load), ("log_sparsity", log_sparsity)):
        for sae_id in given or ():
            if sae_id not in saes_dict:
                raise ValueError(f"{name} must be by the ids of saes_dict, {', '.join(saes_dict)}; got {sae_id!r}")
    front_matter = _front_matter(base_model, datasets, license, tags)
    if eval_dataset is not None:
        check_hub_name("eval_dataset", eval_dataset)

    configs: _Configs = {}
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    with TemporaryDirectory() as folder:
        for n, (sae_id, sae_ref) in enumerate(
            tqdm(saes_dict.items(), desc="Preparing SAEs", disable=not show_progress)
        ):
            files = export(sae_id, sae_ref, Path(folder) / str(n))
            evaluations = numbers(sae_id, (metrics or {}).get(sae_id))
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
            config, additions = describe(sae_id, files, measured, picture=add_default_readme)
            configs[sae_id] = config
            operations += additions
        with _progress_bars(show_progress):
            api = HfApi(token=token)
            return _send(
                api, hf_repo_id, hf_revision, private, operations, configs, front_matter if add_default_readme else None
            )


def _front_matter(
    base_model: str | None,
    datasets: str | Sequence[str] | None,
    license: str | None,  # noqa: A002
    tags: Sequence[str],
) -> dict[str, object]:
    result: dict[str, object] = {}
    if base_model is not None:
        result["base_model"] = check_hub_name("base_model", base_model)
    if datasets is not None:
        names = [datasets] if isinstance(datasets, str) else list(datasets)
        result["datasets"] = [check_hub_name("datasets", name) for name in names]
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


def _send(
    api: HfApi,
    repo_id: str,
    revision: str,
    private: bool | None,
    operations: Sequence[CommitOperationAdd | CommitOperationDelete],
    configs: _Configs,
    front_matter: Mapping[str, object] | None,
) -> CommitInfo:
    """One commit of all; without a model card if there is no front matter for it."""
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        try:
            head = api.repo_info(repo_id, revision=revision).sha
        except RevisionNotFoundError:
            api.create_branch(repo_id, branch=revision)
            head = api.repo_info(repo_id, revision=revision).sha
        there = set(api.list_repo_files(repo_id, revision=head))
        ours = {operation.path_in_repo for operation in operations}
        # Files that an earlier SAE of the same id had and this one lacks would be taken for this one's.
        stale = {f"{sae_id}/{name}" for sae_id in configs for name in FILES} & there - ours
        operations = [*operations, *(CommitOperationDelete(path) for path in sorted(stale))]
        if front_matter is not None:
            card = _card(api, repo_id, revision, head, there, configs, front_matter, (there | ours) - stale)
            operations.append(CommitOperationAdd(README, card.encode()))
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
    configs: _Configs,
    front_matter: Mapping[str, object],
    pictures: set[str],
) -> str:
    """The new card, including the SAEs that are already in the repository."""
    others = {f.removesuffix(f"/{SAE_CFG_FILENAME}") for f in there if f.endswith(f"/{SAE_CFG_FILENAME}")}
    others -= configs.keys()
    snapshot = Path()
    if others or README in there:
        wanted = [README, f"*/{SAE_CFG_FILENAME}"]
        snapshot = Path(api.snapshot_download(repo_id, revision=head, allow_patterns=wanted))
    everything: _Configs = {}
    for sae_id in others:
        try:
            everything[sae_id] = read_config(sae_id, snapshot / sae_id / SAE_CFG_FILENAME)
        except ValueError as error:
            logger.warning(f"left out of the model card: {error}")
    everything |= configs
    metadata = [metadata_of(cfg) for cfg in everything.values()]
    derived = {
        "base_model": [name for m in metadata if (name := base_model_name(m.get("model_name")))],
        "datasets": [name for m in metadata if (name := hub_name(m.get("dataset_path")))],
    }
    try:
        previous = (snapshot / README).read_text(encoding="utf-8-sig") if README in there else None
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
            f"{README} of {repo_id} cannot be extended (add_default_readme=False leaves it alone): {error}"
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
