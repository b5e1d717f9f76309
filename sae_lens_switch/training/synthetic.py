"""SAELens's runner on synthetic activations, on our trainer; apart, because SAELens imports its own only when asked."""

from pathlib import Path
from typing import Any

from sae_lens.synthetic import synthetic_sae_runner as synthetic_module
from typing_extensions import override

from sae_lens_switch.common.machine import check_run_fits
from sae_lens_switch.common.substitution import constructing
from sae_lens_switch.training.config import TrainerOptions
from sae_lens_switch.training.runner_config import check_synthetic_run
from sae_lens_switch.training.runners import with_options
from sae_lens_switch.training.trainer import SparseSAETrainer


class SyntheticSAERunner(synthetic_module.SyntheticSAERunner):
    """As SAELens's ``SyntheticSAERunner``, on ``SparseSAETrainer``."""

    def __init__(self, cfg: Any, *args: Any, options: TrainerOptions | None = None, **kwargs: Any) -> None:
        check_synthetic_run(cfg)
        check_run_fits(cfg, cfg.sae)
        super().__init__(cfg, *args, **kwargs)
        self.options = options or TrainerOptions()

    @override
    def run(self) -> Any:
        with constructing(synthetic_module, "SAETrainer", self._make_trainer):
            return super().run()

    def _make_trainer(self, **kwargs: Any) -> SparseSAETrainer[Any, Any]:
        trainer = with_options(self.options)(**kwargs)
        self._history = trainer.history
        return trainer

    @override
    def _save_outputs(self, output_path: Path, *args: Any, **kwargs: Any) -> None:
        """As SAELens's, with the run's ``history.jsonl``."""
        super()._save_outputs(output_path, *args, **kwargs)
        self._history.save(output_path)
