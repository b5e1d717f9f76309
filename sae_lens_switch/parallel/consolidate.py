"""The ordinary folder of an SAE from the files of many processes."""

import json
import shutil
from pathlib import Path

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.registry import get_sae_training_class
from torch import Tensor

from sae_lens_switch.common.atomic import replace_files
from sae_lens_switch.common.streamed_safetensors import Box, Shapes, blocks, write_streamed
from sae_lens_switch.common.types import Json
from sae_lens_switch.parallel.checkpoints import WEIGHTS
from sae_lens_switch.parallel.shard import LATENT_DIM
from sae_lens_switch.parallel.sharded_files import Whole
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

    Weights are read and written in blocks: memory does not grow with them, but for a number per latent.

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

    weights = Whole(checkpoint / WEIGHTS)
    if not for_training and not isinstance(trained, SwitchTrainingSAEConfig):
        weights = ForUse(weights, vars(trained)["rescale_acts_by_decoder_norm"])

    def save(folder: Path) -> tuple[Path, Path]:
        for name in (SPARSITY_FILENAME, HISTORY_FILENAME):
            if (checkpoint / name).exists():
                shutil.copy2(checkpoint / name, folder / name)
        n_files = max(split_by_size(_sizes(_saved(weights, for_training)), max_file_bytes).values())
        # One file beside the index of several would be loaded in their place, or they in its.
        other = output / (SAE_WEIGHTS_FILENAME if n_files > 1 else INDEX_FILENAME)
        if other.exists():
            raise ValueError(f"output must be a folder without {other.name}, of an SAE in other files; got {output}")
        return write_whole(weights, folder, cfg, for_training=for_training, max_file_bytes=max_file_bytes)

    replace_files(output, save)
    return output


class ForUse:
    """The weights of a TopK or BatchTopK SAE as inference has them, from those of training, a block at a time.

    As SAELens's ``process_state_dict_for_saving_inference``, which has the whole SAE in memory.

    Args:
        trained: The weights as training has them.
        fold_norms: Whether the norms of the decoder's rows go into the encoder.
    """

    def __init__(self, trained: Whole, fold_norms: bool) -> None:
        self._trained = trained
        (F, D), dtype = trained.shapes["W_dec"]
        self.shapes = {name: entry for name, entry in trained.shapes.items() if name != "topk_threshold"}
        if "topk_threshold" in trained.shapes:
            self.shapes["threshold"] = (torch.Size([F]), dtype)
        self._norms_F = torch.ones(F, dtype=dtype)
        for (rows,) in blocks(torch.Size([F]), D * dtype.itemsize) if fold_norms else ():
            norms = trained.read("W_dec", (rows, slice(0, D))).norm(dim=-1)
            self._norms_F[rows] = norms.clamp(min=1e-8)

    def read(self, name: str, box: Box) -> Tensor:
        """As ``Whole.read``."""
        if name == "threshold":
            (threshold,) = self._trained.read("topk_threshold", (slice(0, 1),))
            return threshold.to(self._norms_F.dtype).repeat(box[0].stop - box[0].start)
        block = self._trained.read(name, box)
        if name not in ("W_enc", "b_enc", "W_dec"):
            return block
        norms = self._norms_F[box[LATENT_DIM[name]]]
        return block / norms.unsqueeze(1) if name == "W_dec" else block * norms


def write_whole(
    weights: Whole | ForUse, folder: Path, cfg: Json, *, for_training: bool, max_file_bytes: float | None = None
) -> tuple[Path, Path]:
    """The files of an ordinary SAE, a block of its weights at a time.

    Returns:
        The weights, or their index if there are several files, and the config.
    """
    saved = _saved(weights, for_training)
    sizes = _sizes(saved)
    number_of = split_by_size(sizes, max_file_bytes)
    n = max(number_of.values())
    for i in range(1, n + 1):
        of_file = {name: saved[name] for name in saved if number_of[name] == i}
        write_streamed(folder / file_name(i, n), of_file, weights.read)
    (folder / SAE_CFG_FILENAME).write_text(json.dumps(cfg), encoding="utf-8")
    if n > 1:
        file_of = {name: file_name(i, n) for name, i in number_of.items()}
        return write_index(folder, file_of, sum(sizes.values())), folder / SAE_CFG_FILENAME
    return folder / SAE_WEIGHTS_FILENAME, folder / SAE_CFG_FILENAME


def _saved(weights: Whole | ForUse, for_training: bool) -> Shapes:
    return {name: entry for name, entry in weights.shapes.items() if for_training or name != FRESH}


def _sizes(shapes: Shapes) -> dict[str, int]:
    """Bytes of each tensor."""
    return {name: shape.numel() * dtype.itemsize for name, (shape, dtype) in shapes.items()}
