"""SAELens's evaluation in a run on several processes: each evaluates on its own data; the mean of all is logged."""

from collections.abc import Sequence
from typing import Any

import torch
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import Evaluator
from sae_lens.training.types import DataProvider

from sae_lens_switch.common.printable import logger
from sae_lens_switch.common.types import AnyTrainingSAE, Metrics
from sae_lens_switch.parallel.ranks import Ranks


class EvaluatedByAll:
    """An evaluator that returns the mean of what each process's own finds.

    Once a process has too little memory for it, a warning says so, and ``is_possible`` is False from then on.
    """

    def __init__(self, evaluator: Evaluator[Any], ranks: Ranks) -> None:
        self._evaluator: Evaluator[Any] | None = evaluator
        self._ranks = ranks

    @property
    def is_possible(self) -> bool:
        return self._evaluator is not None

    def __call__(self, sae: AnyTrainingSAE, data_provider: DataProvider, scaler: ActivationScaler) -> Metrics:
        """Every process must take part; empty if one ran out of memory."""
        assert self._evaluator is not None, "asked although is_possible is False"
        found: Metrics | None = None
        sae.eval()
        try:
            found = self._evaluator(sae, data_provider, scaler)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        finally:
            sae.train()
        of_all = [metrics for metrics in self._ranks.gather_objects(found) if metrics is not None]
        if len(of_all) < self._ranks.size:
            self.give_up()
            return {}
        return _mean(of_all)

    def give_up(self) -> None:
        self._evaluator = None
        if self._ranks.is_first:
            logger.warning(
                "there is no evaluation by the language model: the whole SAE, or its dense latents, take more memory "
                "than one process has left"
            )


def _mean(values: Sequence[Any]) -> Any:
    """Of numbers; of tables of numbers, entry by entry."""
    first = values[0]
    if isinstance(first, dict):
        return {name: _mean([value[name] for value in values]) for name in first}
    return sum(values) / len(values)
