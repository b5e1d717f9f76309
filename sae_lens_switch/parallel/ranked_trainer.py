"""What every parallel trainer does around its steps: one loop, one end and one checkpoint for all processes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens.saes.sae import T_TRAINING_SAE, T_TRAINING_SAE_CONFIG, TrainStepOutput
from sae_lens.training.sae_trainer import Evaluator, SaveCheckpointFn
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.common.atomic import sync
from sae_lens_switch.common.printable import logger
from sae_lens_switch.common.progress import Bar, Sentences, Silent
from sae_lens_switch.common.types import AnyTrainingSAE, Json, Metrics, StateDict
from sae_lens_switch.parallel.agreement import AgreedInterruption, first_does, refuse_differences
from sae_lens_switch.parallel.checkpoints import RANKS, write_together
from sae_lens_switch.parallel.evaluation import EvaluatedByAll
from sae_lens_switch.parallel.pace import Pace
from sae_lens_switch.parallel.ranks import Ranks, start_process_group
from sae_lens_switch.parallel.share import share_of
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.activations import ActivationSource
from sae_lens_switch.training.checkpoints import TRAINING_FOLDER
from sae_lens_switch.training.config import SparseSAETrainerConfig
from sae_lens_switch.training.resumable_trainer import ResumableData
from sae_lens_switch.training.trainer import SparseSAETrainer

# Of the state beyond SAELens's, what each process has of its own.
_OF_EACH_RANK = ("random", "random_cuda", "data")


def join(cfg: SparseSAETrainerConfig, row_size: int = 1, field: str = "expert_parallel") -> Ranks:
    """This process's place among those that torchrun has started; ``field`` of the config says how large rows are."""
    start_process_group(cfg.device, cfg.rank_timeout)
    return Ranks(row_size, cfg.device, cfg.rank_timeout, field)


def require(cfg: SparseSAETrainerConfig, only: Mapping[str, object], where: str) -> None:
    """Raises ValueError for a field of another value than the only one it can have ``where``."""
    for name, value in only.items():
        if vars(cfg)[name] != value:
            raise ValueError(f"{name} must be {value!r} {where}; got {vars(cfg)[name]!r}")


def compare_settings(ranks: Ranks, cfg: SparseSAETrainerConfig, sae: Json) -> None:
    """Raises ValueError on every process, if the settings of a run differ between them."""
    settings = {"sae": sae, "trainer": vars(cfg)}
    of_all = {part: {n: v for n, v in table.items() if n != "device"} for part, table in settings.items()}
    refuse_differences(ranks, of_all)


class RankedTrainer(SparseSAETrainer[T_TRAINING_SAE, T_TRAINING_SAE_CONFIG]):
    """A process's part of a trainer on several; all of them draw, step, save and end together."""

    _is_parallel = True
    _verified: Path | None = None  # a checkpoint that is to be loaded next

    def __init__(
        self,
        cfg: SparseSAETrainerConfig,
        sae: T_TRAINING_SAE,
        data_provider: ActivationSource,
        save_checkpoint_fn: SaveCheckpointFn | None,
        ranks: Ranks,
        evaluator: Evaluator[Any] | None = None,
    ) -> None:
        self.ranks = ranks
        share = share_of(data_provider, cfg.train_batch_size_samples, ranks)
        super().__init__(cfg, sae, share, None, save_checkpoint_fn)
        self._interruption = AgreedInterruption()
        self._pace = Pace(ranks)
        self._evaluated = None if evaluator is None else EvaluatedByAll(evaluator, ranks)

    def _count_others(self, n_tokens: int, mine: int) -> None:
        """The batch of the step has ``n_tokens``, of which this process has counted its own."""
        self.n_training_samples += n_tokens - mine
        self.n_frac_active_samples += n_tokens - mine

    # The loop

    @override
    def _parts_of(self, batch: Tensor) -> tuple[Tensor, ...]:
        """As many on every process, each with tokens of every process: all take part in each."""
        sizes = [len(batch)]
        if self.cfg.gradient_accumulation_steps > 1:
            sizes = self.ranks.gather_objects(len(batch))
        self._n_tokens = sum(sizes)
        return batch.tensor_split(max(1, min(self.cfg.gradient_accumulation_steps, *sizes)))

    @override
    def _next_batch(self) -> Tensor | None:
        """None for all processes once the activations of one have ended."""
        interruption = self._interruption
        assert isinstance(interruption, AgreedInterruption)
        interruption.check()
        with torch.enable_grad():
            batch = next(self.data_provider, None)
        told = self.ranks.gather_objects((batch is not None, interruption.received, self._pace.worked()))
        interruption.agree(next((signum for _, signum, _ in told if signum is not None), None))
        self._pace.next_step([seconds for *_, seconds in told])
        ended = [rank for rank, (has_batch, *_) in enumerate(told) if not has_batch]
        if ended:
            logger.warning(
                f"activations of rank {', '.join(map(str, ended))} ended after {self.n_training_samples} of "
                f"{self.cfg.total_training_samples} samples: training ends here"
            )
            return None
        return batch

    @override
    def _check_interruption(self) -> None:
        assert isinstance(self._interruption, AgreedInterruption)
        self._interruption.agree_among(self.ranks)
        super()._check_interruption()

    @override
    def _batches_for_estimate(self) -> Iterator[Tensor]:
        for batch in super()._batches_for_estimate():
            yield self.ranks.gather_rows(batch.to(self.cfg.device), "batches to estimate their norm")

    @override
    def _non_finite_weights(self) -> list[str]:
        everybodys = self.ranks.gather_objects(super()._non_finite_weights())
        return sorted({name for names in everybodys for name in names})

    @override
    def _progress(self) -> Bar | Sentences | Silent:
        return super()._progress() if self.ranks.is_first else Silent()

    @override
    def _log_step(self, output: TrainStepOutput) -> None:
        if self._is_logging_step():
            self._log(self.build_train_step_log_dict(output, self.n_training_samples))
        every = self.cfg.logger.wandb_log_frequency * self.cfg.logger.eval_every_n_wandb_logs
        if self.cfg.logger.log_to_wandb and (self.n_training_steps + 1) % every == 0:
            self._log(self._evaluation())

    @torch.no_grad()
    def _evaluation(self) -> Metrics:
        """SAELens's, and its histograms; every process must take part."""
        if self._evaluated is None or not self._evaluated.is_possible:
            return {}
        sae = self._whole_sae()
        if sae is None:
            self._evaluated.give_up()
            return {}
        metrics = self._evaluated(sae, self.data_provider, self.activation_scaler)
        return metrics | {name: wandb.Histogram(values) for name, values in sae.log_histograms().items()}  # type: ignore[arg-type]

    def _whole_sae(self) -> AnyTrainingSAE | None:
        """The SAE that each process evaluates; None on all if one has too little memory for it."""
        return self.sae

    @override
    def _log(self, metrics: Metrics) -> None:
        if self.ranks.is_first:
            super()._log(metrics)

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
        path = Path(base) / checkpoint_name
        facts = self.checkpoint_facts() | (self.session.facts(path.parent) if self.ranks.is_first else {})
        write_together(self.ranks, path, facts, self.write_checkpoint)
        if self.cfg.keep_checkpoints is not None and self.ranks.is_first:
            checkpoints.prune(Path(base), self.cfg.keep_checkpoints, path)

    def _write_own_state(self, folder: Path) -> StateDict:
        """Write what only this process has; returns the rest of the state beyond SAELens's."""
        state = self._state_beyond_saelens()
        own = {name: state.pop(name) for name in _OF_EACH_RANK if name in state}
        if isinstance(self.data_provider, ResumableData):
            own["data"] = self.data_provider.state_dict()
        mine = folder / RANKS / f"{self.ranks.rank:05}"
        mine.mkdir(parents=True, exist_ok=True)
        torch.save(own | {"size": self.ranks.size}, mine / "state.pt")
        sync(mine / "state.pt")
        if self.save_checkpoint_fn is not None:
            self.save_checkpoint_fn(checkpoint_path=mine)
        return state

    def _read_own_state(self, path: Path) -> StateDict:
        """What ``_write_own_state`` kept of this process; of other numbers of processes, a place that all shared."""
        states = [_load(file) for file in sorted((path / RANKS).glob("*/state.pt"))]
        if not states:
            return {}
        sizes = [state.pop("size") for state in states]
        if sizes == [self.ranks.size] * self.ranks.size:
            return states[self.ranks.rank]
        places = [state.get("data") for state in states]
        return {"data": places[0]} if places[0] is not None and all(_same(place, places[0]) for place in places) else {}

    # Resuming

    @override
    def _latest(self, base: str) -> Path | None:
        self._verified = first_does(self.ranks, lambda: SparseSAETrainer._latest(self, base))
        return self._verified

    @override
    def _verify(self, path: Path) -> None:
        """Not again what ``_latest`` has just found."""
        verified, self._verified = self._verified, None
        if path != verified:
            first_does(self.ranks, lambda: SparseSAETrainer._verify(self, path))


def checkpoint_of(folder: Path) -> Path:
    """The checkpoint, of which ``folder`` may be the part that training resumes from."""
    return folder.parent if folder.name == TRAINING_FOLDER else folder


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(value, b[name]) for name, value in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def _load(file: Path) -> StateDict:
    return torch.load(file, map_location="cpu", weights_only=True)
