"""SAELens's runner on synthetic activations, on our trainer; apart, because SAELens imports its own only when asked."""

from typing import Any

from sae_lens.synthetic import synthetic_sae_runner as synthetic_module
from typing_extensions import override

from sae_lens_switch.config import TrainerOptions
from sae_lens_switch.runner import constructing, with_options


class SyntheticSAERunner(synthetic_module.SyntheticSAERunner):
    """As SAELens's ``SyntheticSAERunner``, on ``SparseSAETrainer``."""

    def __init__(self, *args: Any, options: TrainerOptions | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options = options or TrainerOptions()

    @override
    def run(self) -> Any:
        with constructing(synthetic_module, "SAETrainer", with_options(self.options)):
            return super().run()
