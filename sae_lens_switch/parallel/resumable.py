"""What trainers with divided latents have in common: each process writes, reads and counts its part."""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, SAE_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import TrainingSAEConfig, TrainStepOutput
from sae_lens.training.sae_trainer import Evaluator, SaveCheckpointFn
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.common.machine import free_memory
from sae_lens_switch.common.types import AnyTrainingSAE, Json, Metrics, StateDict
from sae_lens_switch.parallel.checkpoints import (
    OPTIMIZER,
    STATISTICS,
    WEIGHTS,
    all_do,
    load_optimizer,
    optimizer_parts,
    read_optimizer_parts,
    read_weights,
    weight_parts,
)
from sae_lens_switch.parallel.ranked_trainer import RankedTrainer, checkpoint_of, compare_settings, join, require
from sae_lens_switch.parallel.reduction import firings_over_data, norm_of_all, sum_gradients_over_data_
from sae_lens_switch.parallel.shard import Shard
from sae_lens_switch.parallel.sharded_files import Part, write_parts
from sae_lens_switch.parallel.step_log import step_log
from sae_lens_switch.saes.serialization import fold_activation_scaler
from sae_lens_switch.saes.sparse_sae import SparseTrainingSAE
from sae_lens_switch.saes.step import SparseStepOutput
from sae_lens_switch.training.activations import ActivationSource
from sae_lens_switch.training.checkpoints import SHARED, TRAINING_FOLDER, CheckpointError
from sae_lens_switch.training.config import SparseSAETrainerConfig
from sae_lens_switch.training.firing import Firings
from sae_lens_switch.training.optim.row_sparse_adam import RowSparseAdam

S = TypeVar("S", bound=Shard)

# What a trainer with divided latents cannot do yet.
ONLY = {"cuda_graph": False}
_COUNTS = ("n_training_samples", "n_training_steps", "n_frac_active_samples", "started_fine_tuning")


def divided(
    cfg: SparseSAETrainerConfig, sae: SparseTrainingSAE, shard_class: type[S], what: Literal["experts", "latents"]
) -> tuple[SparseSAETrainerConfig, S]:
    """The config, resolved, of a run with divided experts or latents, and this process's part of its SAE.

    Raises:
        ValueError: For what such a run cannot do, for settings that differ between the processes, outside torchrun.
    """
    field, other = ("expert_parallel", "latent_parallel")[:: 1 if what == "experts" else -1]
    whole = sae.whole if isinstance(sae, Shard) else sae.cfg
    cfg = cfg.resolved(whole.d_sae)
    require(cfg, ONLY, "in a parallel run")
    require(cfg, {other: 1}, f"for a {whole.architecture()} SAE, whose {what} are divided")
    ranks = sae.ranks if isinstance(sae, Shard) else join(cfg, vars(cfg)[field], field)
    cfg = replace(cfg, device=str(ranks.device))
    compare_settings(ranks, cfg, whole.to_dict())
    return cfg, sae if isinstance(sae, shard_class) else shard_class.of(sae, ranks)


class ShardedTrainer(RankedTrainer[S, TrainingSAEConfig]):
    """Checkpoints by all processes together; another number of them can resume."""

    def __init__(
        self,
        cfg: SparseSAETrainerConfig,
        shard: S,
        data_provider: ActivationSource,
        save_checkpoint_fn: SaveCheckpointFn | None,
        evaluator: Evaluator[Any] | None = None,
    ) -> None:
        super().__init__(cfg, shard, data_provider, save_checkpoint_fn, shard.ranks, evaluator)
        self.optimizer.total_norm = lambda grads: norm_of_all(grads, shard)
        if isinstance(self.optimizer, RowSparseAdam):
            self.optimizer.create_state()  # that of other processes has a counterpart, also where no latent was active

    # The step

    @override
    def _parts_of(self, batch: Tensor) -> tuple[Tensor, ...]:
        self._batches_of_parts = []
        return super()._parts_of(batch)

    @override
    def _share_of(self, part: Tensor, batch: Tensor) -> float:
        """By the tokens of all processes."""
        self._batches_of_parts.append(self.sae.batch)
        return 1.0 if self.cfg.gradient_accumulation_steps == 1 else self.sae.n_tokens / self._n_tokens

    @override
    def _over_ranks(self, output: TrainStepOutput, firings: list[Firings]) -> tuple[TrainStepOutput, list[Firings]]:
        self.sae.batch = type(self.sae.batch).of_parts(self._batches_of_parts)
        sum_gradients_over_data_(self.sae.divided_parameters(), self.optimizer.row_grads, self.ranks, self.sae.W_dec)
        return output, firings_over_data(firings, self.sae.cfg.d_sae, self.ranks)

    # What is logged and shown

    @override
    def _describe(self, output: TrainStepOutput) -> Metrics:
        """Without the dead latents, which only all processes together can count."""
        facts = super()._describe(output)
        facts.pop("dead latents", None)
        return facts

    def _log_of(self, output: SparseStepOutput, mean_D: Tensor, n_training_samples: int) -> Metrics:
        """Of the whole batch, whose mean is ``mean_D``, and of all latents."""
        log = step_log(output, self.sae, mean_D, self.dead_neurons, self.n_forward_passes_since_fired)
        log |= {
            "details/current_learning_rate": self.optimizer.param_groups[0]["lr"],
            "details/n_training_samples": n_training_samples,
            "details/skipped_steps": self.n_skipped_steps,
        }
        return log | {f"details/{name}_coefficient": s.value for name, s in self.coefficient_schedulers.items()}

    @property
    @override
    def feature_sparsity(self) -> Tensor:
        """Share of the tokens for which each latent fired, of all latents; every process must take part.

        It is put together on the host: no message may fail for want of memory on one GPU.
        """
        return self.sae.gathered_latents(super().feature_sparsity.cpu())

    @override
    @torch.no_grad()
    def set_final_sae_metadata(self) -> None:
        super().set_final_sae_metadata()
        n_dead = self.sae.gathered_latents(self.dead_neurons).sum()
        if self.n_frac_active_samples > 0:
            self.sae.cfg.metadata.num_dead_features = int(n_dead)

    @override
    def config_of_record(self) -> Json:
        sae = {n: v for n, v in self.sae.whole.to_dict().items() if n not in ("metadata", "device")}
        return super().config_of_record() | {"sae": sae}

    @override
    def _whole_sae(self) -> AnyTrainingSAE | None:
        """Put together on every process, in at most twice its memory: with one matrix in parts, and a part of it."""
        sae, whole = self.sae, None
        own = sum(p.nbytes for p in sae.divided_parameters())
        if 2 * own * self.ranks.row_size < free_memory(self.ranks.device):
            try:
                whole = sae.new_whole()
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        is_there = all(self.ranks.gather_objects(whole is not None))
        return sae.gathered_into(whole) if is_there and whole is not None else None

    # Saving

    @override
    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        self._refuse_to_be_apart()
        super().save_checkpoint(checkpoint_name, base_path, wandb_aliases)

    @override
    def write_checkpoint(self, folder: Path) -> None:
        sae, scaler = self.sae, self.activation_scaler

        def write(name: str, parts: Callable[[], dict[str, Part]]) -> None:
            # A process may lack the memory for its parts: all know that before they write them together.
            write_parts(folder / name, all_do(self.ranks, str(folder / name), parts), self.ranks)

        if scaler.scaling_factor is not None or scaler.whitening is not None:
            # As in one process: the SAE takes raw activations, and training resumes from weights that take scaled ones.
            write(f"{TRAINING_FOLDER}/{WEIGHTS}", lambda: weight_parts(self.sae))
            sae = all_do(self.ranks, str(folder), self._folded)
        write(WEIGHTS, lambda: weight_parts(sae))
        write(OPTIMIZER, self._optimizer_parts)
        sparsity_F = self.log_feature_sparsity
        state = self._write_own_state(folder)
        if self.ranks.is_first:
            self._write_shared(folder, sae, sparsity_F, state)

    def _folded(self) -> S:
        """This process's part of the SAE, with the activations' scaling in its weights."""
        sae = copy.deepcopy(self.sae)
        fold_activation_scaler(sae, copy.copy(self.activation_scaler))
        return sae

    def _optimizer_parts(self) -> dict[str, Part]:
        statistics = (self.act_freq_scores, self.firing.passes_since_fired_F)
        of_latents = {name: Part(torch.as_tensor(t), 0) for name, t in zip(STATISTICS, statistics, strict=True)}
        return optimizer_parts(self.sae, self.optimizer) | of_latents

    def _refuse_to_be_apart(self) -> None:
        """Raises RuntimeError if what all processes share is not the same: machines that round differently."""
        shared = torch.cat([p.detach().reshape(-1).double() for p in self.sae.shared_parameters()])
        digests = self.ranks.gather_objects(hashlib.sha256(shared.cpu().numpy().tobytes()).hexdigest())
        if len(set(digests)) > 1:
            apart = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            raise RuntimeError(
                "b_dec and the router, if any, must have the same bits on all processes; those of rank "
                f"{', '.join(map(str, apart))} differ from rank 0's, as on machines that round differently"
            )

    def _write_shared(self, folder: Path, sae: Shard, sparsity_F: Tensor, state: StateDict) -> None:
        (folder / SAE_CFG_FILENAME).write_text(json.dumps(sae.config_of_whole().to_dict()))
        save_file({"sparsity": sparsity_F}, folder / SPARSITY_FILENAME)
        self.activation_scaler.save(str(folder / ACTIVATION_SCALER_CFG_FILENAME))
        self.history.save(folder)
        of_saelens = {
            **{name: vars(self)[name] for name in _COUNTS},
            "param_groups": self.optimizer.state_dict()["param_groups"],
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "coefficient_schedulers": {name: s.state_dict() for name, s in self.coefficient_schedulers.items()},
        }
        torch.save({"beyond": state, "saelens": of_saelens}, folder / SHARED)

    # Resuming

    @override
    def _verify(self, path: Path) -> None:
        super()._verify(path)
        if not (path / SHARED).exists():
            raise CheckpointError(
                f"checkpoint {path} is not of a run with divided experts or latents: load its SAE with "
                "TrainingSAE.load_from_disk, and start a parallel run with that"
            )

    @override
    def _read_saelens_state(self, folder: Path) -> None:
        """What SAELens's trainer keeps, from files of any number of processes."""
        path = checkpoint_of(folder)
        self.activation_scaler.load(path / ACTIVATION_SCALER_CFG_FILENAME)
        state = self._read_shared(path)["saelens"]
        parts = read_optimizer_parts(path / OPTIMIZER, self.sae)
        self.act_freq_scores, self.n_forward_passes_since_fired = (parts.pop(name) for name in STATISTICS)
        load_optimizer(self.sae, self.optimizer, parts, state.pop("param_groups"))
        self.lr_scheduler.load_state_dict(state.pop("lr_scheduler"))
        for name, of_scheduler in state.pop("coefficient_schedulers").items():
            self.coefficient_schedulers[name].load_state_dict(of_scheduler)
        vars(self).update({name: state[name] for name in _COUNTS})

    @override
    def _read_state_beyond_saelens(self, folder: Path) -> StateDict:
        path = checkpoint_of(folder)
        return self._read_shared(path)["beyond"] | self._read_own_state(path)

    def _read_shared(self, path: Path) -> StateDict:
        return torch.load(path / SHARED, map_location="cpu", weights_only=True)

    @override
    def load_weights(self, path: Path) -> None:
        read_weights(path / WEIGHTS, self.sae)

    @override
    def restore_training_weights(self) -> None:
        if self._training_weights is not None:
            read_weights(self._training_weights.parent / WEIGHTS, self.sae)
            self._training_weights = None
