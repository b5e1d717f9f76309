"""The ordinary folder of an SAE from the files of many processes."""

import json
import os
import shutil
from pathlib import Path

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.registry import get_sae_training_class
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sae_lens_switch.common.atomic import replace_files
from sae_lens_switch.common.torch_private import consolidate_safetensors, part_metadata, part_offsets
from sae_lens_switch.common.types import Json, StateDict
from sae_lens_switch.parallel.checkpoints import WEIGHTS
from sae_lens_switch.parallel.sharded_files import shapes
from sae_lens_switch.saes.config import SwitchTrainingSAEConfig
from sae_lens_switch.saes.serialization import FRESH
from sae_lens_switch.saes.weight_files import INDEX_FILENAME, file_name, split_by_size, write_index
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.checkpoints import SHARED, CheckpointError
from sae_lens_switch.training.history import FILENAME as HISTORY_FILENAME


def consolidate(
    checkpoint: str | Path, output: str | Path, *, for_training: bool = False, max_file_bytes: float | None = None
) -> Path:
    """Make the SAE of a parallel run's checkpoint an ordinary one, which loads without this package's ``parallel``.

    One weight matrix, half of the SAE, is in memory at a time, and one process's part.

    Args:
        checkpoint: A folder that a parallel run has written; its files are verified first.
        output: The folder of the SAE, created if necessary; its files are replaced together.
        for_training: Whether the SAE is to be loaded as a training SAE, to be trained further, rather than for use.
        max_file_bytes: Of a file of weights; tensors that do not fit into one go into several, a larger tensor into one
            by itself, to be loaded with ``converter=sharded_safetensors``. None: all go into one file, which SAELens
            loads by itself.

    Returns:
        The folder of the SAE.

    Raises:
        CheckpointError: If the checkpoint is damaged, or of a run on one process.
        ValueError: If ``max_file_bytes`` is not positive, or if there are weights in ``output`` that those to be
            written would not replace.
    """
    if max_file_bytes is not None and not max_file_bytes > 0:
        raise ValueError(f"max_file_bytes must be positive; got {max_file_bytes}")
    checkpoint, output = Path(checkpoint), Path(output)
    checkpoints.verify(checkpoint)
    if not (checkpoint / SHARED).exists():
        raise CheckpointError(f"checkpoint {checkpoint} is of a run on one process: it has nothing to consolidate")
    whole = json.loads((checkpoint / SAE_CFG_FILENAME).read_text(encoding="utf-8"))
    trained = get_sae_training_class(whole["architecture"])[1].from_dict(whole)
    cfg = whole if for_training else trained.get_inference_sae_cfg_dict()

    def save(folder: Path) -> tuple[Path, Path]:
        for name in (SPARSITY_FILENAME, HISTORY_FILENAME):
            if (checkpoint / name).exists():
                shutil.copy2(checkpoint / name, folder / name)
        weights = checkpoint / WEIGHTS
        if not for_training and not isinstance(trained, SwitchTrainingSAEConfig):
            weights = folder / "for use"
            write_for_use(checkpoint / WEIGHTS, weights, vars(trained)["rescale_acts_by_decoder_norm"])
        n_files = max(split_by_size(_sizes(weights, for_training), max_file_bytes).values())
        # One file beside the index of several would be loaded in their place, or they in its.
        other = output / (SAE_WEIGHTS_FILENAME if n_files > 1 else INDEX_FILENAME)
        if other.exists():
            raise ValueError(f"output must be a folder without {other.name}, of an SAE in other files; got {output}")
        written = write_whole(weights, folder, cfg, for_training=for_training, max_file_bytes=max_file_bytes)
        if weights != checkpoint / WEIGHTS:
            shutil.rmtree(weights)
        return written

    replace_files(output, save)
    return output


def write_for_use(weights: Path, folder: Path, fold_norms: bool) -> None:
    """The parts of a TopK or BatchTopK SAE's weights as inference has them, one process's at a time.

    As SAELens's ``process_state_dict_for_saving_inference``, which has the whole SAE in memory.

    Args:
        weights: The parts as training has them.
        folder: Of the parts to be written.
        fold_norms: Whether the norms of the decoder's rows go into the encoder.
    """
    folder.mkdir()
    files, ((F, _), dtype) = sorted(weights.glob("*.safetensors")), shapes(weights)["W_dec"]
    norms_F = torch.ones(F, dtype=dtype)
    for file in files if fold_norms else ():
        tensors, offsets = _part(file)
        if "W_dec" in tensors:
            first, W_dec_FD = offsets["W_dec"][0], tensors["W_dec"]
            norms_F[first : first + len(W_dec_FD)] = W_dec_FD.norm(dim=-1).clamp(min=1e-8)
    for file in files:
        tensors, offsets = _part(file)
        for name, dim in {"W_enc": 1, "b_enc": 0, "W_dec": 0}.items():
            if name in tensors and fold_norms:
                t, first = tensors[name], offsets[name][dim]
                norms = norms_F[first : first + t.shape[dim]]
                tensors[name] = t / norms.unsqueeze(1) if name == "W_dec" else t * norms
        if "topk_threshold" in tensors:
            tensors["threshold"] = tensors.pop("topk_threshold").to(dtype).repeat(F)
            offsets["threshold"] = [0]
        save_file(tensors, folder / file.name, part_metadata({name: offsets[name] for name in tensors}))


def _part(file: Path) -> tuple[StateDict, dict[str, list[int]]]:
    """What one process has written, and where its tensors begin in the whole ones."""
    with safe_open(file, "pt") as opened:
        return load_file(file), part_offsets(opened.metadata())


def write_whole(
    weights: Path, folder: Path, cfg: Json, *, for_training: bool, max_file_bytes: float | None = None
) -> tuple[Path, Path]:
    """The files of an ordinary SAE, from its weights by many processes, one whole tensor at a time in memory.

    Returns:
        The weights, or their index if there are several files, and the config.
    """
    sizes = _sizes(weights, for_training)
    number_of = split_by_size(sizes, max_file_bytes)
    aside = folder / "consolidating"
    files = consolidate_safetensors(weights, aside, number_of)
    for i, file in enumerate(files, start=1):
        os.replace(file, folder / file_name(i, len(files)))
    shutil.rmtree(aside)
    (folder / SAE_CFG_FILENAME).write_text(json.dumps(cfg), encoding="utf-8")
    if len(files) > 1:
        file_of = {name: file_name(i, len(files)) for name, i in number_of.items()}
        return write_index(folder, file_of, sum(sizes.values())), folder / SAE_CFG_FILENAME
    return folder / SAE_WEIGHTS_FILENAME, folder / SAE_CFG_FILENAME


def _sizes(weights: Path, for_training: bool) -> dict[str, int]:
    """Bytes of each tensor of an SAE."""
    found = {name: entry for name, entry in shapes(weights).items() if for_training or name != FRESH}
    return {name: shape.numel() * dtype.itemsize for name, (shape, dtype) in found.items()}
