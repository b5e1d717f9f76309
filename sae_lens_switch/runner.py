"""SAELens's runner, with what can be known before a long run checked before it."""

from typing import Any

import sae_lens
import torch
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from typing_extensions import override


class LanguageModelSAETrainingRunner(sae_lens.LanguageModelSAETrainingRunner):
    """As SAELens's ``LanguageModelSAETrainingRunner``, for any architecture.

    ``run`` raises ValueError if ``d_in`` is not the width of the model's activations at ``hook_name``.
    """

    @override
    def run(self) -> Any:
        if not self.cfg.use_cached_activations:
            self._check_d_in()
        return super().run()

    @torch.no_grad()
    def _check_d_in(self) -> None:
        cfg = self.cfg
        tokens = torch.zeros(1, 2, dtype=torch.long, device=cfg.llm_device)
        _, cache = self.model.run_with_cache(
            tokens,
            names_filter=[cfg.hook_name],
            stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(cfg.hook_name),
            prepend_bos=False,
            **cfg.model_kwargs,
        )
        activations = cache[cfg.hook_name]
        width = activations.shape[-1] if cfg.hook_head_index is not None else activations[0, 0].numel()
        if width != cfg.sae.d_in:
            raise ValueError(
                f"d_in must be the width of {cfg.model_name}'s activations at {cfg.hook_name}, {width}; "
                f"got d_in={cfg.sae.d_in}"
            )
