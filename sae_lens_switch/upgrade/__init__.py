"""SAEs made from trained SAEs: a Switch SAE from a TopK SAE, and one with more experts. Both go on training."""

from sae_lens_switch.upgrade.growing import grow
from sae_lens_switch.upgrade.splitting import Split, SplitReport, split, split_topk

__all__ = ["Split", "SplitReport", "grow", "split", "split_topk"]
