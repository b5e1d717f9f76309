"""SAELens's BatchTopK SAEs on several processes: the batch they choose from is that of all."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
from torch import Tensor, nn

from sae_lens_switch.common.types import AnyTrainingSAE
from sae_lens_switch.parallel.latent_exchange import RowBatch
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.saes.running_thresholds import least_active, move_thresholds_


@contextmanager
def over_batch_of_all(sae: AnyTrainingSAE, ranks: Ranks) -> Iterator[None]:
    """Within it, steps of a BatchTopK SAE choose from, and move the threshold by, the tokens of all processes.

    Each must take the step. Other SAEs are as before, also those whose class chooses in a way of its own.
    """
    if not isinstance(sae, BatchTopKTrainingSAE) or not _is_saelens_s(sae):
        yield
        return

    @torch.no_grad()
    def update_topk_threshold(acts_topk: Tensor) -> None:
        least = ranks.gather(least_active(acts_topk), "the least active latent").amin()
        move_thresholds_(sae.topk_threshold, least, sae.cfg.topk_threshold_lr)

    own = sae.activation_fn
    sae.activation_fn = _BatchTopKOfAll(sae.cfg.k, ranks)
    sae.update_topk_threshold = update_topk_threshold
    try:
        yield
    finally:
        sae.activation_fn = own
        del sae.update_topk_threshold


def _is_saelens_s(sae: BatchTopKTrainingSAE) -> bool:
    moves_threshold = type(sae).update_topk_threshold is BatchTopKTrainingSAE.update_topk_threshold
    return moves_threshold and type(sae.activation_fn) is BatchTopK


class _BatchTopKOfAll(nn.Module):
    """SAELens's ``BatchTopK`` of this process's tokens among those of all."""

    def __init__(self, k: float, ranks: Ranks) -> None:
        super().__init__()
        self.k, self.ranks = k, ranks

    def forward(self, hidden_pre: Tensor) -> Tensor:
        """Latents, 0 where not chosen; all [..., F]."""
        acts_S = hidden_pre.relu().flatten()
        batch = RowBatch.of(hidden_pre.shape[:-1].numel(), (0,), self.ranks)
        k = int(self.k * batch.n_tokens)
        best = acts_S.topk(min(k, len(acts_S)))
        # The border is told with a count, for which half precision would not do.
        ranked = best.values.detach().to(torch.promote_types(acts_S.dtype, torch.float32))
        is_chosen = batch.choose_of_batch(ranked, k)
        chosen = torch.zeros_like(acts_S).scatter(0, best.indices, best.values * is_chosen)
        return chosen.view(hidden_pre.shape)
