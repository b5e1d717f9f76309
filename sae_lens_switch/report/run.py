"""What training left on disk: the SAE, its settings, curves, densities and metrics."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SPARSITY_FILENAME, TRAINER_STATE_FILENAME
from torch import Tensor

from sae_lens_switch.hub.repository import read_tensor
from sae_lens_switch.saes.config import layout_of
from sae_lens_switch.saes.expert_layout import ExpertLayout
from sae_lens_switch.saes.serialization import fold_saved_scaler
from sae_lens_switch.saes.transcoder_fields import refuse_transcoders
from sae_lens_switch.saes.weight_files import sharded_safetensors
from sae_lens_switch.training.checkpoints import TRAINING_FOLDER
from sae_lens_switch.training.history import FILENAME as HISTORY_FILENAME
from sae_lens_switch.training.history import Row, numbers_of, read_history

METRICS_FILENAME = "metrics.json"
TEXT_FOLDER = "held_out"


@dataclass
class Run:
    """What was found of a training run.

    Attributes:
        folder: The folder of the SAE.
        sae: The SAE, of the raw activations.
        runner: The settings of the training run.
        density_F: Share of the tokens on which each latent fired in the trainer's last window.
        history: The logged metrics, one row per kept step.
        metrics: The numbers in ``metrics.json``.
        text: The folder of held-out text.
        notes: Sentences for the reader about what is missing or unusual.
    """

    folder: Path
    sae: SAE
    runner: dict[str, object] = field(default_factory=dict)
    density_F: Tensor | None = None
    history: list[Row] = field(default_factory=list)
    metrics: Row = field(default_factory=dict)
    text: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def n_experts(self) -> int:
        """Number of experts; 1 for an SAE without a router."""
        return self.layout.n_experts

    @property
    def layout(self) -> ExpertLayout:
        """Which latents each of them owns."""
        return layout_of(self.sae.cfg)


def find_sae(run: Path) -> Path:
    """Find the SAE below a run: the folder itself, the only one, or the newest checkpoint of one run.

    Raises:
        ValueError: If there is none, or several and no telling which is meant.
    """
    if not run.is_dir():
        raise ValueError(f"RUN must be the folder of a run, a checkpoint or an SAE; {run} is no folder")
    if (run / SAE_CFG_FILENAME).exists():
        return run
    found = sorted(
        file.parent
        for level in (1, 2)
        for file in run.glob("/".join(["*"] * level + [SAE_CFG_FILENAME]))
        if not any(part.startswith(".") or part.endswith("~") for part in file.relative_to(run).parts)
    )
    if not found:
        raise ValueError(f"RUN must hold an SAE; there is no {SAE_CFG_FILENAME} in {run} or two levels below")
    if len(found) == 1:
        return found[0]
    samples = [folder.name.rpartition("_")[2] for folder in found]
    if len({folder.parent for folder in found}) == 1 and all(name.isdigit() for name in samples):
        return max(zip(map(int, samples), found, strict=True))[1]
    names = ", ".join(str(folder.relative_to(run)) for folder in found[:8])
    raise ValueError(f"RUN must hold one SAE; {run} has {len(found)}: {names}. Name one of them")


def load_run(run: str | Path, history: str | Path | None = None, device: str = "cpu") -> Run:
    """Load everything but the language model.

    Args:
        run: The output folder of a runner or of the quickstart, a checkpoint or a folder of them, or an SAE.
        history: A ``history.jsonl`` or ``.wandb`` file, if the run has none.
        device: The device of the SAE.

    Raises:
        ValueError: If there is no SAE, or a file is not what its name says.
    """
    run = Path(run)
    folder = find_sae(run)
    in_training = (folder / TRAINER_STATE_FILENAME).exists() or (folder / TRAINING_FOLDER).is_dir()
    try:
        sae: SAE = (TrainingSAE if in_training else SAE).load_from_disk(
            folder, device=device, converter=sharded_safetensors
        )
        fold_saved_scaler(sae, folder)
    except Exception as error:  # a damaged config or weights can fail in any way
        raise ValueError(f"RUN must hold an SAE that can be loaded; {folder}: {error!r}") from error
    refuse_transcoders("the SAE of a report", sae.cfg)
    if str(sae.cfg.metadata.hook_name).endswith("_z"):
        sae.turn_off_forward_pass_hook_z_reshaping()  # the activation store concatenates the heads
    loaded = Run(folder, sae.eval(), runner=_json(folder / RUNNER_CFG_FILENAME))
    loaded.density_F = _density(folder / SPARSITY_FILENAME, sae.cfg.d_sae)
    loaded.metrics = numbers_of(_json(run / METRICS_FILENAME))
    loaded.text = run / TEXT_FOLDER if (run / TEXT_FOLDER).is_dir() else None
    candidates = [Path(history)] if history else [folder / HISTORY_FILENAME, run / HISTORY_FILENAME]
    file = next((file for file in candidates if file.exists()), None)
    if file is not None:
        try:
            loaded.history = read_history(file)
        except (ValueError, OSError) as error:
            if history:
                raise
            loaded.notes.append(f"The history of the run cannot be read: {error}")
    elif history:
        raise ValueError(f"--history must be a {HISTORY_FILENAME} or a .wandb file; there is no {history}")
    if not loaded.history and not loaded.notes:
        loaded.notes.append(
            f"No curve was recorded: there is no {HISTORY_FILENAME} with the SAE. If the run was logged to W&B, online "
            "or offline, pass its file: --history wandb/run-.../run-....wandb"
        )
    return loaded


def _json(file: Path) -> dict[str, object]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _density(file: Path, d_sae: int) -> Tensor | None:
    """Invert SAELens's log10(density + 1e-10). None if the trainer's last window was empty when it was written."""
    if not file.exists():
        return None
    log_density_F = read_tensor(file, "sparsity").double()
    if log_density_F.shape != (d_sae,) or not log_density_F.isfinite().all() or log_density_F.max() < -9.5:
        return None
    return torch.where(log_density_F < -9.5, 0.0, 10**log_density_F)
