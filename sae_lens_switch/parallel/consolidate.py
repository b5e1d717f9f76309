"""The ordinary folder of an SAE from the files of many processes."""

import json
import os
import shutil
from pathlib import Path

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE

from sae_lens_switch.common.atomic import replace_files
from sae_lens_switch.common.torch_private import consolidate_safetensors
from sae_lens_switch.common.types import Json
from sae_lens_switch.parallel.checkpoints import WEIGHTS
from sae_lens_switch.parallel.sharded_files import shapes
from sae_lens_switch.saes.config import SwitchTrainingSAEConfig
from sae_lens_switch.saes.serialization import FRESH
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.checkpoints import SHARED, CheckpointError
from sae_lens_switch.training.history import FILENAME as HISTORY_FILENAME


def consolidate(checkpoint: str | Path, output: str | Path, *, for_training: bool = False) -> Path:
    """Make the SAE of a parallel run's checkpoint an ordinary one, which loads without this package's ``parallel``.

    One process's part is in memory at a time; of a TopK SAE for use all of it, as decoder norms change its weights.

    Args:
        checkpoint: A folder that a parallel run has written; its files are verified first.
        output: The folder of the SAE, created if necessary; its files are replaced together.
        for_training: Whether the SAE is to be loaded as a training SAE, to be trained further, rather than for use.

    Returns:
        The folder of the SAE.

    Raises:
        CheckpointError: If the checkpoint is damaged, or of a run on one process.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    checkpoints.verify(checkpoint)
    if not (checkpoint / SHARED).exists():
        raise CheckpointError(f"checkpoint {checkpoint} is of a run on one process: it has nothing to consolidate")
    whole = json.loads((checkpoint / SAE_CFG_FILENAME).read_text(encoding="utf-8"))
    trained = get_sae_training_class(whole["architecture"])[1].from_dict(whole)
    # Of any other SAE weights may change with their use, as where decoder norms are folded into the encoder.
    folds = not for_training and not isinstance(trained, SwitchTrainingSAEConfig)
    keeps_all = for_training or folds
    cfg = whole if keeps_all else trained.get_inference_sae_cfg_dict()

    def save(folder: Path) -> tuple[Path, Path]:
        for name in (SPARSITY_FILENAME, HISTORY_FILENAME):
            if (checkpoint / name).exists():
                shutil.copy2(checkpoint / name, folder / name)
        written = write_whole(checkpoint / WEIGHTS, folder, cfg, for_training=keeps_all)
        return TrainingSAE.load_from_disk(folder).save_inference_model(folder) if folds else written

    replace_files(output, save)
    return output


def write_whole(weights: Path, folder: Path, cfg: Json, *, for_training: bool) -> tuple[Path, Path]:
    """The files of an ordinary SAE, from its weights by many processes, one process's part at a time in memory."""
    names = [name for name in shapes(weights) if for_training or name != FRESH]
    aside = folder / "consolidating"
    aside.mkdir()
    consolidate_safetensors(weights, aside, names)
    (written,) = aside.glob("*.safetensors")
    os.replace(written, folder / SAE_WEIGHTS_FILENAME)
    shutil.rmtree(aside)
    (folder / SAE_CFG_FILENAME).write_text(json.dumps(cfg), encoding="utf-8")
    return folder / SAE_WEIGHTS_FILENAME, folder / SAE_CFG_FILENAME
