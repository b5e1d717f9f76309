"""Which optimiser a run takes, in place of SAELens's Adam and under the same schedule."""

from typing import Any

from sae_lens.saes.sae import TrainingSAE
from sae_lens_switch_kernels import to_huge_pages

from sae_lens_switch.saes.sparse_sae import SparseTrainingSAE
from sae_lens_switch.training.config import SparseSAETrainerConfig
from sae_lens_switch.training.optim.constrained_adam import ConstrainedAdam
from sae_lens_switch.training.optim.gradients import trained
from sae_lens_switch.training.optim.row_sparse_adam import RowSparseAdam


def optimizer_for(sae: TrainingSAE[Any], cfg: SparseSAETrainerConfig) -> ConstrainedAdam | RowSparseAdam:
    """The optimiser of ``cfg.optimizer``; moves the SAE to ``cfg.device``, on a CPU into huge pages.

    Raises:
        ValueError: If nothing is to be trained, for row-sparse Adam of an SAE without sparse gradients, or for moments
            in bfloat16 of weights in float64.
    """
    assert cfg.lr is not None
    if not trained(sae.parameters()):
        raise ValueError("an SAE to train must have a parameter with requires_grad=True; this one has none")
    sae.to(cfg.device)
    for p in sae.parameters():
        p.data = to_huge_pages(p.data)  # every step goes through all of it
    betas, low = (cfg.adam_beta1, cfg.adam_beta2), cfg.moments_dtype == "bfloat16"
    if cfg.optimizer == "row_sparse_adam":
        return RowSparseAdam(sae, cfg.lr, betas, low_moments=low)
    if not isinstance(sae, SparseTrainingSAE):
        matrices = [p for p in sae.parameters() if p.ndim == 2]
        return ConstrainedAdam(sae.parameters(), cfg.lr, betas, low_moments=matrices if low else ())
    constraint = sae.decoder_constraint
    return ConstrainedAdam(
        sae.parameters(),
        cfg.lr,
        betas,
        unit_rows=None if constraint is None else constraint.W_dec,
        project=constraint is not None and constraint.project,
        copied=(sae.W_enc, sae.W_dec),
        low_moments=(sae.W_enc, sae.W_dec) if low else (),
        after_step=sae.after_own_step,
    )
