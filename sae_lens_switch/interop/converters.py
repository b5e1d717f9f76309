"""SAEs trained with other libraries, as ``converter=`` of SAELens's loaders::

    SAE.load_from_disk("dictionaries/run", converter=authors_switch)            # a folder or its weights file
    SAE.from_pretrained("user/repo", "layers.10", converter=sparsify_topk)      # likewise on the Hub
    SwitchTrainingSAE.load_from_disk("dictionaries/run", converter=authors_switch)  # to resume training

``authors_switch``  the Switch SAEs of arXiv 2410.08201 (github.com/amudide/switch_sae): ``ae.pt``, ``config.json``
``sparsify_topk``   EleutherAI's sparsify: ``sae.safetensors``, ``cfg.json``
``openai_topk``     the TopK SAEs of Gao et al. 2024 (github.com/openai/sparse_autoencoder): one ``.pt`` file

Files are read as tensors and plain values only; pickled objects are never loaded.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, overload

import sae_lens
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from sae_lens.constants import DTYPE_TO_STR
from sae_lens.util import str_to_dtype
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_switch.interop.checked_files import (
    check_sizes,
    check_tensors,
    matrix_shape,
    read_json,
    read_torch,
    truth,
    whole_number,
)

# All of these were trained on the activations of the plain Hugging Face model.
_PLAIN_MODEL = {"model_from_pretrained_kwargs": {"center_writing_weights": False}}


class _Found(NamedTuple):
    """The contents of a file, in SAELens's terms."""

    fields: dict[str, object]
    weights: dict[str, Tensor]
    metadata: dict[str, object]


@dataclass(frozen=True)
class Converter:
    """A file format. SAELens calls it with the arguments of its loaders for folders, or of those for the Hub.

    The SAE has the requested dtype, or that of the file if none is requested; a router is kept in at least float32.

    Raises:
        FileNotFoundError: For missing files.
        ValueError: For anything that is not the format or that SAELens cannot express: missing or unknown keys, wrong
            shapes, NaN, pickled objects, damaged files. The message names the file and the key.
    """

    read: Callable[[Path], _Found]
    weights: str | None  # name of the weights file; None: any single .pt file
    beside: tuple[str, ...] = ()  # other files that are read, relative to the weights file

    @overload
    def __call__(
        self, path: str | Path, device: str = "cpu", cfg_overrides: dict[str, object] | None = None
    ) -> tuple[dict[str, object], dict[str, Tensor]]: ...

    @overload
    def __call__(
        self,
        repo_id: str,
        folder_name: str,
        device: str,
        force_download: bool,
        cfg_overrides: dict[str, object] | None,
    ) -> tuple[dict[str, object], dict[str, Tensor], Tensor | None]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> object:  # untyped: two signatures, told apart by a keyword
        if "repo_id" not in kwargs:
            return self._from_disk(*args, **kwargs)
        repo = {name: kwargs.pop(name) for name in ("repo_id", "folder_name", "force_download")}
        return *self._from_disk(self._download(**repo), **kwargs), None

    def _from_disk(
        self, path: str | Path, device: str | None = "cpu", cfg_overrides: dict[str, object] | None = None
    ) -> tuple[dict[str, object], dict[str, Tensor]]:
        found = self.read(self._file(Path(path)))
        own_dtype = DTYPE_TO_STR[found.weights["W_enc"].dtype]
        versions = {"sae_lens_version": sae_lens.__version__, "sae_lens_training_version": None}
        cfg: dict[str, Any] = {"dtype": own_dtype, "device": device or "cpu", **found.fields}
        cfg |= {"metadata": versions | found.metadata, **(cfg_overrides or {})}
        dtype = str_to_dtype(cfg["dtype"])
        weights = {}
        for name, tensor in found.weights.items():
            wanted = torch.promote_types(dtype, torch.float32) if "router" in name else dtype
            # Each a copy: b_dec and b_router share a storage in the authors' files, and SAELens does not save views.
            weights[name] = tensor.to(cfg["device"], wanted).clone(memory_format=torch.contiguous_format)
        return cfg, weights

    def _file(self, path: Path) -> Path:
        if not path.is_dir():
            file = path
        elif self.weights is not None:
            file = path / self.weights
        else:
            files = sorted(path.glob("*.pt"))
            if len(files) > 1:
                raise ValueError(f"{path} holds {len(files)} files, name one of them: {[f.name for f in files]}")
            file = files[0] if files else path / "*.pt"
        if not file.is_file():
            raise FileNotFoundError(f"no such file: {file}")
        return file

    def _download(self, repo_id: str, folder_name: str, force_download: bool) -> Path:
        """Download the weights file of a folder in a repository, or the file that ``folder_name`` itself names."""
        name = PurePosixPath(folder_name)
        if name.is_absolute() or ".." in name.parts or "\\" in folder_name:
            raise ValueError(f"sae_id must be a folder or file inside {repo_id}; got {folder_name!r}")
        if name.suffix != ".pt":
            if self.weights is None:
                raise ValueError(f"sae_id must name a .pt file of {repo_id}; got {folder_name!r}")
            name = name / self.weights
        file = Path(hf_hub_download(repo_id, str(name), force_download=force_download))
        for other in self.beside:
            folder = name.parent.parent if other.startswith("../") else name.parent
            with suppress(EntryNotFoundError):  # if it is needed, reading it fails
                hf_hub_download(repo_id, str(folder / PurePosixPath(other).name), force_download=force_download)
        return file


# The formats


def _read_authors_switch(file: Path) -> _Found:
    state = read_torch(file)
    config_file = next(
        # ae.pt lies beside its config, checkpoints/ae_1000.pt one folder below.
        (folder / "config.json" for folder in (file.parent, file.parent.parent) if (folder / "config.json").is_file()),
        file.parent / "config.json",
    )
    outer = read_json(config_file)
    config = outer.get("trainer", outer)
    if not isinstance(config, dict):
        raise ValueError(f"{config_file}: trainer must be a table of settings; got {config!r}")
    F, D = matrix_shape(file, state, "encoder.weight")
    E = whole_number(config_file, config, "experts")
    check_sizes(config_file, config, {"dict_size": F, "activation_dim": D}, file)
    router = state.get("router.weight")
    if isinstance(router, Tensor) and router.shape == (E - 1, D):
        raise ValueError(
            f"{file}: router.weight has one row fewer than experts={E}: this is the variant with an expert that is "
            "always on, which is not a Switch SAE"
        )
    shapes = {"encoder.weight": (F, D), "decoder": (F, D), "router.weight": (E, D), "b_dec": (D,), "b_router": (D,)}
    tensors = check_tensors(file, state, shapes)
    one_bias = torch.equal(tensors["b_dec"], tensors["b_router"])
    balance = config.get("lb_alpha")
    fields: dict[str, object] = {
        "architecture": "switch",
        "d_in": D,
        "d_sae": F,
        "n_experts": E,
        "k": whole_number(config_file, config, "k"),
        "gate": "one" if truth(config_file, config, "heaviside") else "probability",
        "tie_router_bias": one_bias,
        "load_balance_scale": "d_in",
        **({"load_balance_coefficient": balance} if isinstance(balance, int | float) else {}),
    }
    metadata: dict[str, object] = {"model_name": config.get("lm_name"), "converted_from": "amudide/switch_sae"}
    if isinstance(config.get("layer"), int):
        # Their config does not name the part of the layer; the paper's main runs are all on its output.
        metadata["hook_name"] = f"blocks.{config['layer']}.hook_resid_post"
    buffer = outer.get("buffer")
    if isinstance(buffer, dict) and isinstance(buffer.get("ctx_len"), int):
        metadata["context_size"] = buffer["ctx_len"]
    weights = {
        "W_enc": tensors["encoder.weight"].T,
        "W_dec": tensors["decoder"],
        "b_dec": tensors["b_dec"],
        "W_router": tensors["router.weight"].T,
        "b_router": tensors["b_router"],
    }
    return _Found(fields, weights, metadata | _PLAIN_MODEL)


def _read_sparsify_topk(file: Path) -> _Found:
    config_file = file.parent / "cfg.json"
    config = read_json(config_file)
    for name, reason in (
        ("transcode", "it predicts another module's output"),
        ("skip_connection", "SAELens's topk has no skip connection"),
        ("embed_skip", "SAELens's topk has no skip connection"),
        ("gram_lookup", "SAELens's topk knows no n-gram table"),
        ("signed", "SAELens's topk has no negative latents"),
    ):
        if truth(config_file, config, name):
            raise ValueError(f"{config_file}: {name} is true: {reason}")
    if config.get("activation", "topk") != "topk":
        raise ValueError(f"{config_file}: activation must be 'topk'; got {config['activation']!r}")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, or not a safetensors file: {error}") from error
    F, D = matrix_shape(file, tensors, "encoder.weight")
    stated = config.get("num_latents") or D * whole_number(config_file, config, "expansion_factor")
    check_sizes(config_file, config | {"num_latents": stated}, {"d_in": D, "num_latents": F}, file)
    check_tensors(file, tensors, {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)})
    weights = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    hook_name = _hook_of_module(file.parent.name)
    metadata: dict[str, object] = {"hook_name": hook_name, "converted_from": "EleutherAI/sparsify"}
    run_file = file.parent.parent / "config.json"
    if run_file.is_file():
        run = read_json(run_file)
        for name, theirs in (("model_name", "model"), ("dataset_path", "dataset"), ("context_size", "ctx_len")):
            metadata[name] = run.get(theirs)
    fields = _topk_fields(D, F, whole_number(config_file, config, "k"), config_file)
    return _Found(fields, weights, metadata | _PLAIN_MODEL)


def _read_openai_topk(file: Path) -> _Found:
    state = read_torch(file)
    activation = state.pop("activation", None)
    if activation != "TopK":
        raise ValueError(f"{file}: activation must be 'TopK'; got {activation!r}")
    settings = state.pop("activation_state_dict", None)
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: activation_state_dict must hold k and postact_fn; got {type(settings).__name__}")
    if settings.get("postact_fn") != "ReLU":
        raise ValueError(
            f"{file}: postact_fn must be 'ReLU', as SAELens's topk has; got {settings.get('postact_fn')!r}"
        )
    F, D = matrix_shape(file, state, "encoder.weight")
    statistics = {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"}
    state = {name: value for name, value in state.items() if name not in statistics}
    shapes = {"encoder.weight": (F, D), "decoder.weight": (D, F), "latent_bias": (F,), "pre_bias": (D,)}
    tensors = check_tensors(file, state, shapes)
    weights = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["latent_bias"],
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors["pre_bias"],
    }
    # Their code normalises the inputs of every TopK SAE; the file does not say so.
    fields = _topk_fields(D, F, whole_number(file, settings, "k"), file) | {"normalize_activations": "layer_norm"}
    return _Found(fields, weights, {"converted_from": "openai/sparse_autoencoder", **_of_openai_path(file)})


def _topk_fields(D: int, F: int, k: int, where: Path) -> dict[str, object]:
    if k > F:
        raise ValueError(f"{where}: k must be at most the number of latents, {F}; got {k}")
    return {
        "architecture": "topk",
        "d_in": D,
        "d_sae": F,
        "k": k,
        "rescale_acts_by_decoder_norm": False,
        "apply_b_dec_to_input": True,
    }


def _hook_of_module(name: str) -> str | None:
    """sparsify names its folders after the model's modules: layers.10, h.3.mlp, layers.0.self_attn."""
    match = re.fullmatch(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)(?:\.(mlp|attn|self_attn|attention))?", name)
    if match is None:
        return "hook_embed" if name.endswith("embed_tokens") else None
    part = {None: "resid_post", "mlp": "mlp_out"}.get(match[2], "attn_out")
    return f"blocks.{match[1]}.hook_{part}"


def _of_openai_path(file: Path) -> dict[str, object]:
    """Model and hook, where a file is still called as in their storage: resid_post_mlp_v5_32k/autoencoders/8.pt."""
    hooks = {
        "resid_delta_attn": "attn_out",
        "resid_post_attn": "resid_mid",
        "resid_delta_mlp": "mlp_out",
        "resid_post_mlp": "resid_post",
    }
    match = re.search(rf"({'|'.join(hooks)})_v5_\d+k/autoencoders/(\d+)\.pt$", file.as_posix())
    if match is None:
        return {}
    hook = f"blocks.{match[2]}.hook_{hooks[match[1]]}"
    return {"model_name": "gpt2", "hook_name": hook, "context_size": 64, **_PLAIN_MODEL}


authors_switch = Converter(_read_authors_switch, "ae.pt", ("config.json", "../config.json"))
sparsify_topk = Converter(_read_sparsify_topk, "sae.safetensors", ("cfg.json", "../config.json"))
openai_topk = Converter(_read_openai_topk, None)
