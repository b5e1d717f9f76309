"""Many SAEs on one stream of activations, each trained by one process; the language model's work is divided over all.

Every process runs the language model on its own part of the data, and hands the activations of each hook to the
processes that train an SAE on it. So all SAEs see all data, and no process runs the model on more than its part.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.multi_sae_trainer import MultiSAEEvaluatorProtocol
from sae_lens.training.sae_trainer import SaveCheckpointFn
from sae_lens.training.types import MultiHookDataProvider
from torch import Tensor
from typing_extensions import override

from sae_lens_switch.common.printable import logger
from sae_lens_switch.common.progress import Bar, Sentences, Silent
from sae_lens_switch.common.types import AnyTrainingSAE, Json
from sae_lens_switch.parallel.agreement import AgreedInterruption, first_does
from sae_lens_switch.parallel.checkpoints import RANKS, write_together
from sae_lens_switch.parallel.pace import Pace
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.training import checkpoints
from sae_lens_switch.training.interruption import Interruption
from sae_lens_switch.training.multi_sae_trainer import MultiSAETrainer

# What SAELens estimates of the activations before it trains, and where it keeps it.
_ESTIMATED = {"expected_average_only_in": "scaling_factor", "covariance_whitening": "whitening"}


def deal(saes: Mapping[str, TrainingSAEConfig], hook_names: Mapping[str, str], n_ranks: int) -> dict[str, int]:
    """Which process trains each SAE, by name: the next largest goes to the process with least so far.

    Of processes that are equal, to one that has the SAE's hook already, whose activations it then receives once.

    Args:
        saes: Their configs.
        hook_names: Where each takes its activations.
        n_ranks: How many processes there are.

    Raises:
        ValueError: If there are fewer SAEs than processes.
    """
    if len(saes) < n_ranks:
        raise ValueError(
            f"saes must be at least as many as the processes, {n_ranks}, each of which trains one or more; got "
            f"{len(saes)}"
        )
    loads, hooks = [0] * n_ranks, [set[str]() for _ in range(n_ranks)]
    owners = {}
    for name in sorted(saes, key=lambda name: (-saes[name].d_in * saes[name].d_sae, name)):
        owner = min(range(n_ranks), key=lambda rank: (loads[rank], hook_names[name] not in hooks[rank], rank))
        owners[name] = owner
        loads[owner] += saes[name].d_in * saes[name].d_sae
        hooks[owner].add(hook_names[name])
    return owners


class HookExchange:
    """Hands each process the activations, of all processes, of the hooks that it trains SAEs on; in one message.

    Args:
        ranks: The processes, in one row.
        hook_names: Where each SAE takes its activations, by its name.
        owners: Which process trains it.
    """

    def __init__(self, ranks: Ranks, hook_names: Mapping[str, str], owners: Mapping[str, int]) -> None:
        self.ranks = ranks
        self.hooks = [
            list(dict.fromkeys(hook for name, hook in hook_names.items() if owners[name] == rank))
            for rank in range(ranks.size)
        ]

    def __call__(self, batch: Mapping[str, Tensor], sizes: Sequence[int]) -> dict[str, Tensor]:
        """The whole batch at this process's hooks, in the order of the processes.

        Args:
            batch: This process's part of it, by hook.
            sizes: How many tokens each process's part has.
        """
        device = self.ranks.device
        numbers = [[batch[hook].to(device).flatten() for hook in hooks] for hooks in self.hooks]
        shapes = {hook: batch[hook].shape[1:] for hook in self.hooks[self.ranks.rank]}
        sent = [sum(map(len, parts)) for parts in numbers]
        received = [n * sum(shape.numel() for shape in shapes.values()) for n in sizes]
        flat = torch.cat([part for parts in numbers for part in parts])
        everybodys = self.ranks.exchange(flat, sent, received, "activations").split(received)
        by_rank = [
            part.split([n * shape.numel() for shape in shapes.values()])
            for n, part in zip(sizes, everybodys, strict=True)
        ]
        return {
            hook: torch.cat([parts[i].view(-1, *shape) for parts in by_rank])
            for i, (hook, shape) in enumerate(shapes.items())
        }


class ParallelMultiSAETrainer(MultiSAETrainer):
    """A process's part of a run of many SAEs: it trains those that it owns on the activations of all.

    Args:
        cfg: SAELens's config of the trainer, of all processes together.
        saes: The SAEs that this process owns, by name.
        hook_names: Where each of all SAEs takes its activations, by its name.
        data_provider: This process's part of every batch, at all hooks.
        evaluator: SAELens's, for this process's SAEs.
        save_checkpoint_fn: Called with a folder of this process's own in each checkpoint.
        ranks: The processes, in one row.
        owners: Which process trains each SAE, as ``deal`` says.
    """

    def __init__(
        self,
        cfg: SAETrainerConfig,
        saes: dict[str, AnyTrainingSAE],
        hook_names: dict[str, str],
        data_provider: MultiHookDataProvider,
        evaluator: MultiSAEEvaluatorProtocol | None = None,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
        *,
        ranks: Ranks,
        owners: Mapping[str, int],
    ) -> None:
        own = {name: hook_names[name] for name in saes}
        super().__init__(cfg, saes, own, data_provider, evaluator, save_checkpoint_fn)
        self.ranks = ranks
        self._exchange, self._pace = HookExchange(ranks, hook_names, owners), Pace(ranks)

    # The loop

    @override
    def _save_diverged(self) -> str:
        """The other processes, which all would have to take part, know of it once this one has ended."""
        return "Nothing is saved; the last checkpoint is whole"

    @override
    def _check_interruption(self) -> None:
        assert isinstance(self._interruption, AgreedInterruption)
        self._interruption.agree_among(self.ranks)
        self._interruption.check()

    @override
    def _new_interruption(self) -> Interruption:
        return AgreedInterruption()

    @override
    def _batches(self, stream: MultiHookDataProvider, interruption: Interruption) -> MultiHookDataProvider:
        """The whole batches at this process's hooks, until the activations of one process end."""
        assert isinstance(interruption, AgreedInterruption)
        while True:
            interruption.check()
            batch = next(stream, None)
            n_tokens = None if batch is None else len(next(iter(batch.values())))
            told = self.ranks.gather_objects((n_tokens, interruption.received, self._pace.worked()))
            interruption.agree(next((signum for _, signum, _ in told if signum is not None), None))
            self._pace.next_step([seconds for *_, seconds in told])
            ended = [str(rank) for rank, (n, *_) in enumerate(told) if n is None]
            if ended or batch is None:
                logger.warning(f"activations of rank {', '.join(ended)} ended after {self.n_training_samples} samples")
                return
            yield self._exchange(batch, [n or 0 for n, *_ in told])

    @override
    @torch.no_grad()
    def _estimate_scaling_factors(self) -> None:
        """All processes draw the batches from which one estimates."""
        needed = self.ranks.gather_objects(any(map(self._lacks_estimate, self.saes)))
        if needed[self.ranks.rank]:
            super()._estimate_scaling_factors()
        elif any(needed):
            for _ in range(self.cfg.n_batches_for_norm_estimate):
                next(self.data_provider)

    def _lacks_estimate(self, name: str) -> bool:
        estimate = _ESTIMATED.get(self.saes[name].cfg.normalize_activations)
        return estimate is not None and vars(self.trainers[name].activation_scaler)[estimate] is None

    @override
    def _progress(self, total: int, desc: str) -> Bar | Sentences | Silent:
        if self.ranks.is_first:
            return super()._progress(total, desc)
        self._bar = Silent()
        return self._bar

    # Checkpoints

    @override
    def _configs(self) -> dict[str, Json]:
        return {
            name: config
            for configs in self.ranks.gather_objects(super()._configs())
            for name, config in configs.items()
        }

    @override
    def _write_checkpoint(self, path: Path) -> None:
        """As on one process; what the runner adds is each process's own."""
        facts = self._facts()
        facts["folded"] = any(self.ranks.gather_objects(facts["folded"]))
        facts |= self._session.facts(path.parent) if self.ranks.is_first else {}
        write_together(self.ranks, path, facts, self._write_own)

    def _write_own(self, folder: Path) -> None:
        self._write_saes(folder)
        mine = folder / RANKS / f"{self.ranks.rank:05}"
        mine.mkdir(parents=True)
        if self.save_checkpoint_fn is not None:
            self.save_checkpoint_fn(checkpoint_path=mine)

    @override
    def _prune(self, written: Path, keep: int) -> None:
        if self.ranks.is_first:
            super()._prune(written, keep)

    @override
    def _verify(self, path: Path) -> None:
        configs = self._configs()
        first_does(self.ranks, lambda: checkpoints.verify(path, configs))
