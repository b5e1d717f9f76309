"""The language-model runner on several processes, each with its own model and its own share of the dataset."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import sae_lens
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from sae_lens.config import HfDataset
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME, RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens import HookedRootModule
from typing_extensions import override

from sae_lens_switch.common.atomic import replace_files, scratch
from sae_lens_switch.common.types import AnyTrainingSAE
from sae_lens_switch.parallel.checkpoints import RANKS, weight_parts
from sae_lens_switch.parallel.consolidate import write_whole
from sae_lens_switch.parallel.data_parallel import DataParallelSAETrainer
from sae_lens_switch.parallel.expert_shard import ExpertShard
from sae_lens_switch.parallel.latent_trainer import SHARDS, LatentParallelSAETrainer
from sae_lens_switch.parallel.ranked_trainer import RankedTrainer
from sae_lens_switch.parallel.ranks import Ranks, local_device, start_process_group
from sae_lens_switch.parallel.shard import Shard
from sae_lens_switch.parallel.sharded_files import write_parts
from sae_lens_switch.parallel.trainer import ParallelSparseSAETrainer
from sae_lens_switch.saes.transcoder_fields import refuse_transcoders
from sae_lens_switch.training.config import TrainerOptions
from sae_lens_switch.training.runner_config import LanguageModelSAERunnerConfig
from sae_lens_switch.training.runners import LanguageModelSAETrainingRunner

AnyRankedTrainer = RankedTrainer[Any, Any]


class _Division(NamedTuple):
    """How SAEs are divided: the field that says over how many processes, what trains their parts, and these."""

    field: str
    trainer_class: type[AnyRankedTrainer]
    shard_classes: Mapping[str, type[Shard]]  # by architecture


_EXPERTS = _Division("expert_parallel", ParallelSparseSAETrainer, {"switch": ExpertShard})
_LATENTS = _Division("latent_parallel", LatentParallelSAETrainer, SHARDS)


class ParallelLanguageModelSAETrainingRunner(LanguageModelSAETrainingRunner):
    """As ``LanguageModelSAETrainingRunner``, one for each process that torchrun has started.

    Counts in the config are of all processes together; ``n_batches_in_buffer`` is each one's. ``device="cuda"`` is the
    process's own GPU. Each process reads its own part of the dataset, or of cached activations. There is no evaluation
    by the language model during training.

    Raises:
        ValueError: As the runner of one process; also outside torchrun.
        RankLostError: By ``run``, once another process has died or does not answer.
    """

    _is_parallel = True

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_sae: AnyTrainingSAE | None = None,
    ) -> None:
        refuse_transcoders("an SAE trained on several processes", cfg.sae)
        division = _division_of(cfg)
        cfg.device = cfg.sae.device = local_device(cfg.device)
        cfg.llm_device = local_device(cfg.llm_device or cfg.device)
        cfg.act_store_device = local_device(cfg.act_store_device or cfg.device)
        start_process_group(cfg.device, cfg.rank_timeout)
        row_size, field = (1, "expert_parallel") if division is None else (vars(cfg)[division.field], division.field)
        self.ranks = Ranks(row_size, cfg.device, cfg.rank_timeout, field)
        if not self.ranks.is_first:
            os.environ["WANDB_MODE"] = "disabled"  # the first process logs for all
        # Both hold names that SAELens has drawn at random.
        cfg.checkpoint_path, cfg.logger = self.ranks.first_says((cfg.checkpoint_path, cfg.logger))
        if division is not None:
            shard_class = division.shard_classes[cfg.sae.architecture()]
            override_sae = self._own_part(cfg, shard_class, override_sae)
        self._trainer_class = DataParallelSAETrainer if division is None else division.trainer_class
        super().__init__(cfg, override_dataset, override_model, override_sae)
        self._take_share_of_data()

    def _own_part(
        self, cfg: LanguageModelSAERunnerConfig[Any], shard_class: type[Shard], given: AnyTrainingSAE | None
    ) -> Shard:
        if given is None and cfg.from_pretrained_path is None:
            return shard_class.fresh(cfg.sae, self.ranks)
        whole = given or TrainingSAE.load_from_disk(cfg.from_pretrained_path or "", "cpu")
        wanted, found = cfg.sae.architecture(), whole.cfg.architecture()
        if found != wanted:
            raise ValueError(f"the SAE to train must be a {wanted} SAE, as the config's; got {found}")
        return shard_class.of(whole, self.ranks)

    def _take_share_of_data(self) -> None:
        store, ranks = self.activations_store, self.ranks
        if store.dataset is not None:
            store.dataset = _share_of(store.dataset, ranks)
        if store.cached_activation_dataset is not None:
            cached = store.cached_activation_dataset
            store.cached_activation_dataset = split_dataset_by_node(cached, ranks.rank, ranks.size)
        first, end = (self.cfg.train_batch_size_tokens * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
        store.train_batch_size_tokens = end - first

    @override
    def _trainer(self) -> Callable[..., AnyRankedTrainer]:
        def make(*, evaluator: object = None, **arguments: Any) -> AnyRankedTrainer:  # noqa: ARG001
            return self._trainer_class(**arguments)

        return make

    @override
    def _find_checkpoint(self) -> None:
        """The first process looks; the trainer resumes by itself, since SAELens knows of files of one process only."""
        error = None
        if self.ranks.is_first:
            try:
                super()._find_checkpoint()
            except ValueError as failure:
                error = failure
        found = self.ranks.first_says((error, self.cfg.resume_from_checkpoint, self.cfg.checkpoint_path))
        error, self._resume_from, self.cfg.checkpoint_path = found
        self.cfg.resume_from_checkpoint = None
        if isinstance(self.cfg, TrainerOptions):
            self.cfg.resume = None
        if error is not None:
            raise error

    @override
    def run_trainer_with_interruption_handling(self, trainer: Any) -> AnyTrainingSAE:
        if self._resume_from is not None:
            checkpoint = Path(self._resume_from)
            trainer.load_trainer_state(checkpoint)
            trainer.load_weights(checkpoint)
            self._return_to_place(checkpoint)
        return super().run_trainer_with_interruption_handling(trainer)

    def _return_to_place(self, checkpoint: Path) -> None:
        """In this process's part of the dataset: of another number of parts, by what all have read together."""
        files = sorted((checkpoint / RANKS).glob(f"*/{ACTIVATIONS_STORE_STATE_FILENAME}"))
        if len(files) == self.ranks.size:
            self.activations_store.load(str(files[self.ranks.rank]))
        elif files:
            n_read = sum(int(load_file(file)["n_dataset_processed"]) for file in files) // self.ranks.size
            with TemporaryDirectory() as folder:
                place = Path(folder) / ACTIVATIONS_STORE_STATE_FILENAME
                save_file({"n_dataset_processed": torch.tensor(n_read)}, place)
                self.activations_store.load(str(place))

    @override
    def save_final_sae(self, sae: AnyTrainingSAE, output_path: str, log_feature_sparsity: Tensor | None = None) -> None:
        """The whole SAE in the ordinary format, one process's part at a time in memory."""
        if not isinstance(sae, Shard):
            if self.ranks.is_first:
                super().save_final_sae(sae, output_path, log_feature_sparsity)
            return
        Path(output_path).mkdir(parents=True, exist_ok=True)
        weights = self.ranks.first_says(scratch(Path(output_path), "saving", "weights"))
        try:
            write_parts(weights, weight_parts(sae, for_inference=True), self.ranks)
            if self.ranks.is_first:
                self._save_whole(sae, weights, Path(output_path), log_feature_sparsity)
        finally:
            if self.ranks.is_first:
                shutil.rmtree(weights, ignore_errors=True)

    def _save_whole(self, sae: Shard, weights: Path, output: Path, sparsity_F: Tensor | None) -> None:
        cfg = sae.config_of_whole().get_inference_sae_cfg_dict()

        def save(folder: Path) -> tuple[Path, Path]:
            if sparsity_F is not None:
                save_file({"sparsity": sparsity_F}, folder / SPARSITY_FILENAME)
            (folder / RUNNER_CFG_FILENAME).write_text(json.dumps(self.cfg.to_dict()), encoding="utf-8")
            self._history.save(folder)
            return write_whole(weights, folder, cfg, for_training=False)

        replace_files(output, save)


def is_parallel(cfg: sae_lens.LanguageModelSAERunnerConfig[Any]) -> bool:
    """Whether torchrun has started this process, or the config asks for several."""
    wants = isinstance(cfg, LanguageModelSAERunnerConfig) and (cfg.expert_parallel > 1 or cfg.latent_parallel > 1)
    return wants or {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def _division_of(cfg: LanguageModelSAERunnerConfig[Any]) -> _Division | None:
    """None: each process has the whole SAE. Raises ValueError for a field that divides SAEs of another architecture."""
    architecture = cfg.sae.architecture()
    for division in (_EXPERTS, _LATENTS):
        n, divided = vars(cfg)[division.field], division.shard_classes
        if architecture not in divided and n > 1:
            raise ValueError(
                f"{division.field} must be 1 for a {architecture} SAE, as it divides {' and '.join(divided)}; got {n}"
            )
    if architecture in _EXPERTS.shard_classes:
        return _EXPERTS
    return _LATENTS if cfg.latent_parallel > 1 else None


def _share_of(dataset: HfDataset, ranks: Ranks) -> HfDataset:
    if isinstance(dataset, Dataset):
        return split_dataset_by_node(dataset, ranks.rank, ranks.size)
    if isinstance(dataset, IterableDataset):
        return split_dataset_by_node(dataset, ranks.rank, ranks.size)
    raise ValueError(f"the dataset must be one split, such as train; got a {type(dataset).__name__}")
