"""From an SAE, in memory or in a folder, to the files of an inference SAE."""

from pathlib import Path

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from sae_lens_switch.hub.repository import SAELENS_FILES, read_config
from sae_lens_switch.saes.serialization import fold_saved_scaler

_NOT_FOLDED = ("expected_average_only_in", "covariance_whitening")


def export(sae_id: str, sae_ref: SAE | Path | str, folder: Path) -> dict[str, Path]:
    """The files of an inference SAE by name; those that have to be written are written to ``folder``.

    Raises:
        ValueError: For what is no SAE, cannot be loaded and run, or normalises activations in a way not yet folded
            into the weights.
        FileNotFoundError: If ``sae_ref`` is a folder without config or weights.
    """
    if not isinstance(sae_ref, SAE | Path | str):
        raise ValueError(f"saes_dict[{sae_id!r}] must be an SAE or a folder; got {type(sae_ref).__name__}")
    kept: dict[str, Path] = {}
    if isinstance(sae_ref, SAE):
        sae = sae_ref
    else:
        path = Path(sae_ref)
        sae = _load(sae_id, path)
        names = SAELENS_FILES if not isinstance(sae, TrainingSAE) else (SPARSITY_FILENAME, RUNNER_CFG_FILENAME)
        kept = {name: path / name for name in names if (path / name).is_file()}
    if sae.cfg.normalize_activations in _NOT_FOLDED:
        raise ValueError(
            f"SAE {sae_id!r} has normalize_activations={sae.cfg.normalize_activations!r}: fold it into the weights "
            "first (fold_activation_norm_scaling_factor, fold_activation_whitening), or the outputs change on loading"
        )
    if SAE_WEIGHTS_FILENAME in kept:
        return kept
    written = sae.save_inference_model(folder) if isinstance(sae, TrainingSAE) else sae.save_model(folder)
    return kept | {Path(file).name: Path(file) for file in written}


def _load(sae_id: str, path: Path) -> SAE:
    """Load the SAE in a folder as SAELens does, run it once, and fold in the scaler that a checkpoint comes with."""
    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
        if not (path / name).is_file():
            there = ", ".join(sorted(f.name for f in path.glob("*"))) or "nothing"
            raise FileNotFoundError(
                f"the folder of SAE {sae_id!r} must hold {name}: {path / name} not found, there is {there}"
            )
    cfg = read_config(sae_id, path / SAE_CFG_FILENAME)
    architecture = cfg.get("architecture", "standard")
    known = sorted(SAE_CLASS_REGISTRY.keys() | SAE_TRAINING_CLASS_REGISTRY.keys())
    if architecture not in known:
        raise ValueError(f"architecture of SAE {sae_id!r} must be one of {', '.join(known)}; got {architecture!r}")
    training = architecture not in SAE_CLASS_REGISTRY or "decoder_init_norm" in cfg
    try:
        # Built on the meta device and filled from the file: a config that lies about its size allocates nothing.
        sae: SAE = (TrainingSAE if training else SAE).load_from_disk(path)
        x = torch.zeros(2, sae.cfg.d_in, dtype=sae.dtype)
        with torch.no_grad():
            sae(x.view(2, 1, 1, -1) if sae.hook_z_reshaping_mode else x)
        if training:
            fold_saved_scaler(sae, path)
    except Exception as error:  # a stranger's config or weights can fail in any way
        raise ValueError(f"SAE {sae_id!r} must be one that SAELens can load and run; {path}: {error!r}") from error
    return sae
