"""SAEs that others trained, as ``converter=`` of SAELens's loaders::

    SAE.load_from_disk("dictionaries/run", converter=authors_switch)            # a folder, or the file of weights
    SAE.from_pretrained("user/repo", "layers.10", converter=sparsify_topk)      # likewise, on the Hub
    SwitchTrainingSAE.load_from_disk("dictionaries/run", converter=authors_switch)  # to go on training

``authors_switch``  the Switch SAEs of arXiv 2410.08201 (github.com/amudide/switch_sae): ``ae.pt``, ``config.json``
``sparsify_topk``   EleutherAI's sparsify: ``sae.safetensors``, ``cfg.json``
``openai_topk``     the TopK SAEs of Gao et al. 2024 (github.com/openai/sparse_autoencoder): one ``.pt`` file

Files are read as tensors and plain values: no pickled object is ever loaded.
"""

import json
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

# All of these were trained on the activations of the plain Hugging Face model.
_PLAIN_MODEL = {"model_from_pretrained_kwargs": {"center_writing_weights": False}}


class _Found(NamedTuple):
    """What a file holds, in SAELens's terms."""

    fields: dict[str, Any]
    weights: dict[str, Tensor]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Converter:
    """A format of files. Called by SAELens, with the arguments of its loaders for folders or of those for the Hub.

    dtype and device are as asked; the dtype of the file if none is. A router stays in float32 at least.

    Raises FileNotFoundError for files that are not there, and ValueError, naming the file and the key, for all that
    is not the format or cannot be expressed in SAELens: keys missing or unknown, wrong shapes, NaN, pickled objects,
    damaged files.
    """

    read: Callable[[Path], _Found]
    weights: str | None  # the name of the file of weights; None: any single .pt
    beside: tuple[str, ...] = ()  # files that are read as well, where they lie from there

    @overload
    def __call__(
        self, path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]: ...

    @overload
    def __call__(
        self,
        repo_id: str,
        folder_name: str,
        device: str,
        force_download: bool,
        cfg_overrides: dict[str, Any] | None,
    ) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "repo_id" not in kwargs:
            return self._from_disk(*args, **kwargs)
        repo = {name: kwargs.pop(name) for name in ("repo_id", "folder_name", "force_download")}
        return *self._from_disk(self._download(**repo), **kwargs), None

    def _from_disk(
        self, path: str | Path, device: str | None = "cpu", cfg_overrides: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        found = self.read(self._file(Path(path)))
        own_dtype = DTYPE_TO_STR[found.weights["W_enc"].dtype]
        versions = {"sae_lens_version": sae_lens.__version__, "sae_lens_training_version": None}
        cfg = {"dtype": own_dtype, "device": device or "cpu", **found.fields, "metadata": versions | found.metadata}
        cfg |= cfg_overrides or {}
        dtype = str_to_dtype(cfg["dtype"])
        weights = {}
        for name, tensor in found.weights.items():
            wanted = torch.promote_types(dtype, torch.float32) if "router" in name else dtype
            # A copy each: the authors' files hold b_dec and b_router as one storage, and SAELens saves no views.
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
        """The file of weights of a folder of a repository, or of the file that ``folder_name`` names itself."""
        name = PurePosixPath(folder_name)
        if name.is_absolute() or ".." in name.parts or "\\" in folder_name:
            raise ValueError(f"sae_id must be a folder or file inside {repo_id}; got {folder_name!r}")
        if name.suffix != ".pt":
            if self.weights is None:
                raise ValueError(f"sae_id must name a .pt file of {repo_id}; got {folder_name!r}")
            name = name / self.weights
        options: dict[str, Any] = {"repo_id": repo_id, "force_download": force_download}
        file = Path(hf_hub_download(filename=str(name), **options))
        for other in self.beside:
            folder = name.parent.parent if other.startswith("../") else name.parent
            with suppress(EntryNotFoundError):  # reading says so, if it is needed
                hf_hub_download(filename=str(folder / PurePosixPath(other).name), **options)
        return file


# The formats


def _read_authors_switch(file: Path) -> _Found:
    tensors = _read_torch(file)
    config_file = next(
        # ae.pt lies beside its config, checkpoints/ae_1000.pt one folder below.
        (folder / "config.json" for folder in (file.parent, file.parent.parent) if (folder / "config.json").is_file()),
        file.parent / "config.json",
    )
    outer = _read_json(config_file)
    config = outer.get("trainer", outer)
    if not isinstance(config, dict):
        raise ValueError(f"{config_file}: trainer must be a table of settings; got {config!r}")
    F, D = _matrix(file, tensors, "encoder.weight")
    E = _whole_number(config_file, config, "experts")
    _agree(config_file, config, {"dict_size": F, "activation_dim": D}, file)
    router = tensors.get("router.weight")
    if isinstance(router, Tensor) and router.shape == (E - 1, D):
        raise ValueError(
            f"{file}: router.weight has one row fewer than experts={E}: this is the variant with an expert that is "
            "always on, which is not a Switch SAE"
        )
    shapes = {"encoder.weight": (F, D), "decoder": (F, D), "router.weight": (E, D), "b_dec": (D,), "b_router": (D,)}
    _check(file, tensors, shapes)
    one_bias = torch.equal(tensors["b_dec"], tensors["b_router"])
    balance = config.get("lb_alpha")
    fields = {
        "architecture": "switch",
        "d_in": D,
        "d_sae": F,
        "n_experts": E,
        "k": _whole_number(config_file, config, "k"),
        "gate": "one" if _truth(config_file, config, "heaviside") else "probability",
        "tie_router_bias": one_bias,
        "load_balance_scale": "d_in",
        **({"load_balance_coefficient": balance} if isinstance(balance, int | float) else {}),
    }
    metadata = {"model_name": config.get("lm_name"), "converted_from": "amudide/switch_sae"}
    if isinstance(config.get("layer"), int):
        # Their config does not say which part of a layer it was; all of the paper's main runs are on its output.
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
    config = _read_json(config_file)
    for name, reason in (
        ("transcode", "it predicts another module's output"),
        ("skip_connection", "SAELens's topk has no skip connection"),
        ("embed_skip", "SAELens's topk has no skip connection"),
        ("gram_lookup", "SAELens's topk knows no n-gram table"),
        ("signed", "SAELens's topk has no negative latents"),
    ):
        if _truth(config_file, config, name):
            raise ValueError(f"{config_file}: {name} is true: {reason}")
    if config.get("activation", "topk") != "topk":
        raise ValueError(f"{config_file}: activation must be 'topk'; got {config['activation']!r}")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, or not a safetensors file: {error}") from error
    F, D = _matrix(file, tensors, "encoder.weight")
    stated = config.get("num_latents") or D * _whole_number(config_file, config, "expansion_factor")
    _agree(config_file, config | {"num_latents": stated}, {"d_in": D, "num_latents": F}, file)
    _check(file, tensors, {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)})
    weights = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    metadata = {"hook_name": _hook_of_module(file.parent.name), "converted_from": "EleutherAI/sparsify"}
    run_file = file.parent.parent / "config.json"
    if run_file.is_file():
        run = _read_json(run_file)
        for name, theirs in (("model_name", "model"), ("dataset_path", "dataset"), ("context_size", "ctx_len")):
            metadata[name] = run.get(theirs)
    fields = _topk_fields(D, F, _whole_number(config_file, config, "k"), config_file)
    return _Found(fields, weights, metadata | _PLAIN_MODEL)


def _read_openai_topk(file: Path) -> _Found:
    state = _read_torch(file)
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
    F, D = _matrix(file, state, "encoder.weight")
    statistics = {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"}
    tensors = {name: value for name, value in state.items() if name not in statistics}
    shapes = {"encoder.weight": (F, D), "decoder.weight": (D, F), "latent_bias": (F,), "pre_bias": (D,)}
    _check(file, tensors, shapes)
    weights = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["latent_bias"],
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors["pre_bias"],
    }
    # Their code normalises the inputs of whatever is TopK; the file does not say so.
    fields = _topk_fields(D, F, _whole_number(file, settings, "k"), file) | {"normalize_activations": "layer_norm"}
    return _Found(fields, weights, {"converted_from": "openai/sparse_autoencoder", **_of_openai_path(file)})


def _topk_fields(D: int, F: int, k: int, where: Path) -> dict[str, Any]:
    if k > F:
        raise ValueError(f"{where}: k must be at most the number of latents, {F}; got {k}")
    fields = {"architecture": "topk", "d_in": D, "d_sae": F, "k": k}
    return fields | {"rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": True}


def _hook_of_module(name: str) -> str | None:
    """sparsify names its folders after the model's modules: layers.10, h.3.mlp, layers.0.self_attn."""
    match = re.fullmatch(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)(?:\.(mlp|attn|self_attn|attention))?", name)
    if match is None:
        return "hook_embed" if name.endswith("embed_tokens") else None
    part = {None: "resid_post", "mlp": "mlp_out"}.get(match[2], "attn_out")
    return f"blocks.{match[1]}.hook_{part}"


def _of_openai_path(file: Path) -> dict[str, Any]:
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


# Reading, with suspicion


def _read_torch(file: Path) -> dict[str, Any]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{file} is damaged, or holds other things than tensors and plain values, which are never loaded"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} must hold a state dict; got {type(state).__name__}")
    return dict(state)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    try:
        value = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a table of settings; got {type(value).__name__}")
    return value


def _matrix(file: Path, tensors: dict[str, Any], name: str) -> tuple[int, int]:
    matrix = tensors.get(name)
    if not isinstance(matrix, Tensor) or matrix.dim() != 2:
        what = "nothing" if matrix is None else list(getattr(matrix, "shape", [])) or type(matrix).__name__
        raise ValueError(f"{file}: {name} must be a matrix; got {what}, among {sorted(map(str, tensors))}")
    return matrix.shape[0], matrix.shape[1]


def _check(file: Path, tensors: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """These keys and no others, of these shapes, plain and finite."""
    missing, unknown = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
    if missing or unknown:
        raise ValueError(
            f"{file} must hold {sorted(shapes)}; missing: {sorted(missing)}, unknown: {sorted(map(str, unknown))}"
        )
    for name, shape in shapes.items():
        tensor = tensors[name]
        plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.dtype not in DTYPE_TO_STR:
            what = f"{tensor.layout}, {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{file}: {name} must be a dense tensor of {sorted(DTYPE_TO_STR.values())}; got {what}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{file}: {name} must have shape {shape}; got {tuple(tensor.shape)}")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(f"{file}: {name} claims {tensor.numel()} numbers, the file does not hold as many")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: {name} holds NaN or infinite values")


def _whole_number(file: Path, settings: dict[str, Any], name: str) -> int:
    value = settings.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{file}: {name} must be a whole number, at least 1; got {value!r}")
    return value


def _truth(file: Path, settings: dict[str, Any], name: str) -> bool:
    value = settings.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{file}: {name} must be true or false; got {value!r}")
    return value


def _agree(file: Path, settings: dict[str, Any], found: dict[str, int], weights: Path) -> None:
    for name, size in found.items():
        if name in settings and settings[name] != size:
            raise ValueError(f"{file}: {name} is {settings[name]!r}, but {weights.name} has {size}")
