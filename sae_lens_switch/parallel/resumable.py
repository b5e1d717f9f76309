"""What of a parallel trainer concerns checkpoints: each process writes and reads its part."""

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import torch
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, SAE_CFG_FILENAME, SPARSITY_FILENAME
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.common.atomic import sync
from sae_lens_switch.common.types import Json, StateDict
from sae_lens_switch.parallel.checkpoints import (
    OPTIMIZER,
    RANKS,
    SHARED,
    STATISTICS,
    WEIGHTS,
    load_optimizer,
    optimizer_parts,
    read_optimizer_parts,
    read_weights,
    weight_parts,
    write_together,
)
from sae_lens_switch.parallel.expert_shard import ExpertShard
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.parallel.sharded_files import Part, write_parts
from sae_lens_switch.saes.config import SwitchTrainingSAEConfig
from sae_lens_switch.saes.serialization import fold_activation_scaler
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.checkpoints import TRAINING_FOLDER, CheckpointError
from sae_lens_switch.training.trainer import SparseSAETrainer

T = TypeVar("T")

# Of the state beyond SAELens's, what each process has of its own.
_OF_EACH_RANK = ("random", "random_cuda", "data")


class ResumableParallelTrainer(SparseSAETrainer[ExpertShard, SwitchTrainingSAEConfig]):
    """Checkpoints by all processes together; another number of them can resume."""

    ranks: Ranks

    @override
    def config_of_record(self) -> Json:
        sae = {n: v for n, v in self.sae.whole.to_dict().items() if n not in ("metadata", "device")}
        return super().config_of_record() | {"sae": sae}

    # Saving

    @override
    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """As SparseSAETrainer's; every process must take part, and see one file system. Nothing goes to W&B."""
        base = self.cfg.checkpoint_path if base_path is None else base_path
        if base is None:
            if self.save_checkpoint_fn is not None:
                self.save_checkpoint_fn(checkpoint_path=None)
            return
        self._refuse_routers_apart()
        path = Path(base) / checkpoint_name
        facts = self.checkpoint_facts() | (self.session.facts(path.parent) if self.ranks.is_first else {})
        write_together(self.ranks, path, facts, self.write_checkpoint)
        if self.cfg.keep_checkpoints is not None and self.ranks.is_first:
            checkpoints.prune(Path(base), self.cfg.keep_checkpoints, path)

    def _refuse_routers_apart(self) -> None:
        """Raises RuntimeError if what all processes share is not the same: machines that round differently."""
        shared = torch.cat([p.detach().reshape(-1).double() for p in self.sae.shared_parameters()])
        digests = self.ranks.gather_objects(hashlib.sha256(shared.cpu().numpy().tobytes()).hexdigest())
        if len(set(digests)) > 1:
            apart = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            raise RuntimeError(
                "the router and b_dec must have the same bits on all processes; those of rank "
                f"{', '.join(map(str, apart))} differ from rank 0's, as on machines that round differently"
            )

    @override
    def write_checkpoint(self, folder: Path) -> None:
        sae, scaler = self.sae, self.activation_scaler
        if scaler.scaling_factor is not None or scaler.whitening is not None:
            # As in one process: the SAE takes raw activations, and training resumes from weights that take scaled ones.
            write_parts(folder / TRAINING_FOLDER / WEIGHTS, weight_parts(sae), self.ranks)
            sae = copy.deepcopy(sae)
            fold_activation_scaler(sae, copy.copy(scaler))
        write_parts(folder / WEIGHTS, weight_parts(sae), self.ranks)
        statistics = (self.act_freq_scores, self.firing.passes_since_fired_F)
        of_latents = {name: Part(torch.as_tensor(t), 0) for name, t in zip(STATISTICS, statistics, strict=True)}
        write_parts(folder / OPTIMIZER, optimizer_parts(self.sae, self.optimizer) | of_latents, self.ranks)
        sparsity_F = self.log_feature_sparsity
        state = self._state_beyond_saelens()
        of_rank = {name: state.pop(name) for name in _OF_EACH_RANK if name in state}
        mine = folder / RANKS / f"{self.ranks.rank:05}"
        mine.mkdir(parents=True, exist_ok=True)
        torch.save(of_rank, mine / "state.pt")
        sync(mine / "state.pt")
        if self.save_checkpoint_fn is not None:
            self.save_checkpoint_fn(checkpoint_path=mine)
        if self.ranks.is_first:
            self._write_shared(folder, sparsity_F, state)

    def _write_shared(self, folder: Path, sparsity_F: Tensor, state: StateDict) -> None:
        whole = self.sae.whole.to_dict() | {"normalize_activations": self._normalization_of_saved()}
        (folder / SAE_CFG_FILENAME).write_text(json.dumps(whole))
        save_file({"sparsity": sparsity_F}, folder / SPARSITY_FILENAME)
        self.activation_scaler.save(str(folder / ACTIVATION_SCALER_CFG_FILENAME))
        self.history.save(folder)
        names = ("n_training_samples", "n_training_steps", "n_frac_active_samples", "started_fine_tuning")
        of_saelens = {
            **{name: vars(self)[name] for name in names},
            "param_groups": self.optimizer.state_dict()["param_groups"],
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "coefficient_schedulers": {name: s.state_dict() for name, s in self.coefficient_schedulers.items()},
        }
        torch.save({"beyond": state, "saelens": of_saelens, "size": self.ranks.size}, folder / SHARED)

    def _normalization_of_saved(self) -> str:
        """Of the SAE in the checkpoint, which takes raw activations."""
        scaled = self.activation_scaler.scaling_factor is not None or self.activation_scaler.whitening is not None
        return "none" if scaled else self.sae.cfg.normalize_activations

    # Resuming

    @override
    def _latest(self, base: str) -> Path | None:
        return self._first_does(lambda: SparseSAETrainer._latest(self, base))

    @override
    def _verify(self, path: Path) -> None:
        self._first_does(lambda: SparseSAETrainer._verify(self, path))
        if not (path / SHARED).exists():
            raise CheckpointError(
                f"checkpoint {path} is of a run on one process: load its SAE with TrainingSAE.load_from_disk, and "
                "start a parallel run with that"
            )

    def _first_does(self, action: Callable[[], T]) -> T:
        """On the first process, for all. Raises CheckpointError on every one, if it does there."""
        result, error = None, None
        if self.ranks.is_first:
            try:
                result = action()
            except CheckpointError as failure:
                error = str(failure)
        result, error = self.ranks.first_says((result, error))
        if error is not None:
            raise CheckpointError(error)
        return cast(T, result)

    @override
    def _read_saelens_state(self, folder: Path) -> None:
        """What SAELens's trainer keeps, from files of any number of processes."""
        path = folder.parent if folder.name == TRAINING_FOLDER else folder
        self.activation_scaler.load(path / ACTIVATION_SCALER_CFG_FILENAME)
        state = _load(path / SHARED)["saelens"]
        parts = read_optimizer_parts(path / OPTIMIZER, self.sae)
        self.act_freq_scores, passes_F = (parts.pop(name) for name in STATISTICS)
        self.n_forward_passes_since_fired = passes_F
        load_optimizer(self.sae, self.optimizer, parts, state.pop("param_groups"))
        self.lr_scheduler.load_state_dict(state.pop("lr_scheduler"))
        for name, of_scheduler in state.pop("coefficient_schedulers").items():
            self.coefficient_schedulers[name].load_state_dict(of_scheduler)
        vars(self).update(state)

    @override
    def _read_state_beyond_saelens(self, folder: Path) -> StateDict:
        """With this process's own random numbers and place in the activations, if there are as many as before."""
        path = folder.parent if folder.name == TRAINING_FOLDER else folder
        shared = _load(path / SHARED)
        mine = path / RANKS / f"{self.ranks.rank:05}" / "state.pt"
        if shared["size"] == self.ranks.size:
            return shared["beyond"] | _load(mine)
        places = [_load(path / RANKS / f"{rank:05}" / "state.pt").get("data") for rank in range(shared["size"])]
        same = {} if places[0] is None or any(place != places[0] for place in places) else {"data": places[0]}
        return shared["beyond"] | same

    @override
    def _load_weights(self, path: Path) -> None:
        read_weights(path / WEIGHTS, self.sae)

    @override
    def restore_training_weights(self) -> None:
        if self._training_weights is not None:
            read_weights(self._training_weights.parent / WEIGHTS, self.sae)
            self._training_weights = None


def _load(file: Path) -> StateDict:
    return torch.load(file, map_location="cpu", weights_only=True)
