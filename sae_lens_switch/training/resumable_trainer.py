"""SAELens's trainer with atomic checkpoints that hold all that a run needs to resume bit-identically."""

import copy
import json
import warnings
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import T_TRAINING_SAE, T_TRAINING_SAE_CONFIG
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.util import path_or_tmp_dir
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from sae_lens_switch.common.printable import logger
from sae_lens_switch.common.progress import track
from sae_lens_switch.common.types import Json, Options, StateDict
from sae_lens_switch.saes.serialization import fold_activation_scaler
from sae_lens_switch.training import checkpoints, manifest
from sae_lens_switch.training.checkpoints import SHARED, TRAINING_FOLDER
from sae_lens_switch.training.config import SparseSAETrainerConfig
from sae_lens_switch.training.history import History

STATE_FILENAME = "sparse_trainer_state.pt"
# What says, in an SAE's metadata, which activations a run trains on.
_SOURCE = (
    *("model_name", "hook_name", "hook_name_out", "hook_head_index", "context_size", "prepend_bos", "seqpos_slice"),
    *("exclude_special_tokens", "model_from_pretrained_kwargs"),
)
# What may differ between a run and the checkpoint it resumes from.
_NOT_IN_CHECKPOINT = {
    *("device", "checkpoint_path", "n_checkpoints", "save_final_checkpoint", "logger", "resume"),
    *("keep_checkpoints", "max_skipped_steps", "gradient_accumulation_steps", "cuda_graph"),
    *("expert_parallel", "latent_parallel", "rank_timeout"),
}


@runtime_checkable
class ResumableData(Protocol):
    """An iterator of activations that can save its place and return to it."""

    def state_dict(self) -> StateDict: ...
    def load_state_dict(self, state_dict: StateDict) -> None: ...


class ResumableTrainer(SAETrainer[T_TRAINING_SAE, T_TRAINING_SAE_CONFIG]):
    """What of SparseSAETrainer concerns checkpoints: writing them, and resuming from them."""

    cfg: SparseSAETrainerConfig
    history: History
    session: checkpoints.Session
    n_batches_drawn: int
    _normalizes: str  # the SAE's normalize_activations before anything was folded
    _training_weights: Path | None = None

    @abstractmethod
    def _own_state(self) -> StateDict:
        """What the trainer keeps beyond SAELens's; plain numbers and tensors."""

    @abstractmethod
    def _restore_own_state(self, state: StateDict) -> None: ...

    def _make_schedule(self, cfg: SparseSAETrainerConfig) -> LRScheduler:
        assert cfg.lr is not None
        assert cfg.lr_end is not None
        assert cfg.lr_decay_steps is not None
        return get_lr_scheduler(
            cfg.lr_scheduler_name,
            lr=cfg.lr,
            optimizer=self.optimizer,
            warm_up_steps=cfg.lr_warm_up_steps,
            decay_steps=cfg.lr_decay_steps,
            training_steps=cfg.total_training_steps,
            lr_end=cfg.lr_end,
            num_cycles=cfg.n_restart_cycles,
        )

    # Saving

    @override
    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """Write a checkpoint atomically: a folder that is whole and on disk when it appears.

        Raises:
            OSError: E.g. when the disk is full.
        """
        base = self.cfg.checkpoint_path if base_path is None else base_path
        if base is None and not self.cfg.logger.log_to_wandb:
            if self.save_checkpoint_fn is not None:
                self.save_checkpoint_fn(checkpoint_path=None)
            return
        with path_or_tmp_dir(base) as parent:
            path = Path(parent) / checkpoint_name
            with checkpoints.whole_folder(path, self.checkpoint_facts() | self.session.facts(path.parent)) as folder:
                self.write_checkpoint(folder)
                if self.save_checkpoint_fn is not None:
                    self.save_checkpoint_fn(checkpoint_path=folder if base is not None else None)
            self.log_artifacts(path, wandb_aliases)
            if base is not None and self.cfg.keep_checkpoints is not None:
                checkpoints.prune(Path(parent), self.cfg.keep_checkpoints, path)

    def write_checkpoint(self, folder: Path) -> None:
        """Write SAELens's files and ours into a folder that exists."""
        save_file({"sparsity": self.log_feature_sparsity}, folder / SPARSITY_FILENAME)
        self.history.save(folder)
        scaler = self.activation_scaler
        if scaler.scaling_factor is None and scaler.whitening is None:
            self.sae.save_model(str(folder))
            self.save_trainer_state(folder)
            return
        # The SAE takes raw activations, as at the end of training; training resumes from its own weights, which take
        # scaled ones.
        folded = copy.deepcopy(self.sae)
        fold_activation_scaler(folded, copy.copy(scaler))
        folded.save_model(str(folder))
        training = folder / TRAINING_FOLDER
        self.save_trainer_state(training)
        weights = self.sae.state_dict()
        self.sae.process_state_dict_for_saving(weights)
        save_file(weights, training / SAE_WEIGHTS_FILENAME)

    def log_artifacts(self, folder: Path, aliases: list[str] | None) -> None:
        if self.cfg.logger.log_to_wandb:
            self.cfg.logger.log(
                self,
                folder / "sae_weights.safetensors",
                folder / "cfg.json",
                sparsity_path=folder / SPARSITY_FILENAME,
                wandb_aliases=aliases,
            )

    def checkpoint_facts(self) -> Json:
        """What ``checkpoint.json`` says of the run."""
        return {
            "n_training_samples": self.n_training_samples,
            "n_training_steps": self.n_training_steps,
            "folded": self.is_folded,
            "config": self.config_of_record(),
        }

    @property
    def is_folded(self) -> bool:
        """Whether the activations' scaling has gone into the weights, as at the end: training cannot resume from it."""
        return self.sae.cfg.normalize_activations != self._normalizes

    def config_of_record(self) -> Json:
        """The settings that a run and the checkpoint it resumes from must share."""
        sae = {n: v for n, v in self.sae.cfg.to_dict().items() if n not in ("metadata", "device")}
        trainer = {n: v for n, v in vars(self.cfg).items() if n not in _NOT_IN_CHECKPOINT}
        return {"sae": sae, "trainer": trainer}

    @override
    def save_trainer_state(self, checkpoint_path: Path) -> None:
        super().save_trainer_state(checkpoint_path)
        torch.save(self._state_beyond_saelens(), checkpoint_path / STATE_FILENAME)

    def _state_beyond_saelens(self) -> StateDict:
        state: StateDict = {
            **self._own_state(),
            "n_batches_drawn": self.n_batches_drawn,
            "coefficients": {
                name: {"final_value": s.final_value, "warm_up_steps": s.warm_up_steps}
                for name, s in self.coefficient_schedulers.items()
            },
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }
        if isinstance(self.data_provider, ResumableData):
            state["data"] = self.data_provider.state_dict()
        return state

    # Resuming

    def resume(self, checkpoint: Path | str = "latest") -> Path | None:
        """Resume from a checkpoint: weights, everything the trainer keeps, and the place in the activations.

        An iterator that is ``ResumableData`` restores its position; any other must start from its beginning, and
        the batches already used are drawn and dropped.

        Args:
            checkpoint: A folder, or "latest": the newest whole one below ``checkpoint_path``.

        Returns:
            The checkpoint; None if there is none.
        """
        path: Path | None = Path(checkpoint)
        if checkpoint == "latest":
            if self.cfg.checkpoint_path is None:
                raise ValueError("resume='latest' needs a checkpoint_path; it is None")
            path = self._latest(self.cfg.checkpoint_path)
        if path is None:
            return None
        with checkpoints.loading(path):
            state = self._load(path)
            self.load_weights(path)
            self.restore_training_weights()
        if "data" in state and isinstance(self.data_provider, ResumableData):
            self.data_provider.load_state_dict(state["data"])
        else:
            self._draw_and_drop(path)
        _restore_random(state)  # last, since drawing may have used random numbers
        logger.info(f"resumed from {path} at {self.n_training_samples} samples")
        return path

    def load_weights(self, path: Path) -> None:
        """The SAE of a checkpoint."""
        self.sae.load_weights_from_checkpoint(path)

    def _latest(self, base: str) -> Path | None:
        return checkpoints.latest(base, self.config_of_record(), self.cfg.total_training_samples)

    def _verify(self, path: Path) -> None:
        checkpoints.verify(path, self.config_of_record())

    def _draw_and_drop(self, path: Path) -> None:
        for i in track(range(self.n_batches_drawn), desc="Returning to the place in the activations"):
            if next(self.data_provider, None) is None:
                raise ValueError(
                    f"activations ended after {i} of {self.n_batches_drawn} batches, before the place of "
                    f"checkpoint {path}"
                )

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """State of the optimiser, schedules, statistics and random numbers; weights are loaded by the SAE.

        A checkpoint of SAELens's own trainer is read as well.

        Raises:
            CheckpointError: For a checkpoint that is damaged or of another configuration.
        """
        with checkpoints.loading(Path(checkpoint_path)):
            _restore_random(self._load(Path(checkpoint_path)))

    def _load(self, path: Path) -> StateDict:
        """Everything but what concerns the activations and random numbers, which is returned."""
        self._verify(path)
        self._check_source(path)
        self.session.go_on_from(path)
        training = path / TRAINING_FOLDER
        self._training_weights = training / SAE_WEIGHTS_FILENAME if training.is_dir() else None
        training = training if training.is_dir() else path
        self._load_saelens_state(path, training)
        self.history.load(path)
        state = self._read_state_beyond_saelens(training)
        if state:
            self.n_batches_drawn = state["n_batches_drawn"]
            self._restore_own_state(state)
            for name, values in state["coefficients"].items():
                scheduler = self.coefficient_schedulers[name]
                vars(scheduler).update(values)
                scheduler.load_state_dict(scheduler.state_dict())  # its value follows from these
        else:  # SAELens's trainer counts no batches
            scaler = self.activation_scaler
            estimated = scaler.scaling_factor is not None or scaler.whitening is not None
            self.n_batches_drawn = self.n_training_samples // self.cfg.train_batch_size_samples
            self.n_batches_drawn += self.cfg.n_batches_for_norm_estimate if estimated else 0
        # Thresholds that were passed make no checkpoint again.
        self.checkpoint_thresholds = [t for t in self.checkpoint_thresholds if t >= self.n_training_samples]
        return state

    def _read_state_beyond_saelens(self, folder: Path) -> StateDict:
        if not (folder / STATE_FILENAME).exists():
            return {}
        return torch.load(folder / STATE_FILENAME, map_location="cpu", weights_only=True)

    def _read_saelens_state(self, folder: Path) -> None:
        if (folder / SHARED).exists():
            raise checkpoints.CheckpointError(f"checkpoint {folder} is of several processes: resume it under torchrun")
        super().load_trainer_state(folder)

    def _load_saelens_state(self, path: Path, training: Path) -> None:
        """SAELens's part, and the schedule of a run whose planned length has changed."""
        plan = {name: value for name, value in vars(self.cfg).items() if name in manifest.MAY_CHANGE}
        plan_before = {n: v for n, v in manifest.config_of(path).get("trainer", {}).items() if n in plan}
        changes = plan | plan_before != plan
        if changes:
            before = replace(self.cfg, n_checkpoints=0, **plan_before)  # which may now be more than it had steps
            self.lr_scheduler = self._make_schedule(before)  # what is saved is of this one
        self._read_saelens_state(training)
        if changes:
            self._follow_new_plan(plan_before)

    def _follow_new_plan(self, before: Options) -> None:
        """Give a run that is now to be longer, or shorter, than its checkpoint's the schedule of its new length."""
        planned, steps = self.cfg.total_training_samples, self.cfg.total_training_steps
        was = before.get("total_training_samples", planned)
        lr_before = self.optimizer.param_groups[0]["lr"]
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.lr
        self.lr_scheduler = self._make_schedule(self.cfg)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch misses the optimiser's steps in between
            for _ in range(self.n_training_steps):
                self.lr_scheduler.step()
        logger.warning(
            f"the run was planned for {was} samples and now continues to {planned}, from {self.n_training_samples}; "
            f"the learning rate is {self.optimizer.param_groups[0]['lr']:.4g} from here ({lr_before:.4g} by the plan "
            f"before), and follows lr_scheduler_name={self.cfg.lr_scheduler_name!r} with lr_decay_steps="
            f"{self.cfg.lr_decay_steps} to the end at step {steps}"
        )

    def _check_source(self, path: Path) -> None:
        """Raises CheckpointError if the checkpoint's activations were of another model or place in it."""
        now = self.sae.cfg.metadata.to_dict()
        try:
            before = json.loads((path / SAE_CFG_FILENAME).read_text(encoding="utf-8")).get("metadata") or {}
        except (OSError, ValueError, AttributeError):  # a checkpoint of several SAEs has none here
            return
        differences = {
            name: f"{name} was {before[name]!r}, is {now[name]!r}"
            for name in (*_SOURCE, "dataset_path")
            if before.get(name) is not None
            and now.get(name) is not None
            and before[name] != json.loads(json.dumps(now[name], default=str))
        }
        moved = differences.pop("dataset_path", None)
        if differences:
            raise checkpoints.CheckpointError(
                f"checkpoint {path} is of other activations: {'; '.join(differences.values())}"
            )
        if moved is not None:
            logger.warning(f"the run resumes from {path} with other data, unless it has only moved: {moved}")

    def restore_training_weights(self) -> None:
        """After the checkpoint's SAE has been loaded: the weights that training resumes from, if they are others."""
        if self._training_weights is not None:
            weights = load_file(self._training_weights)
            self.sae.process_state_dict_for_loading(weights)
            self.sae.load_state_dict(weights)
            self._training_weights = None


def _restore_random(state: StateDict) -> None:
    if "random" in state:
        torch.set_rng_state(state["random"])
        for i, cuda in enumerate(state["random_cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda, i)
