"""Public name of ``training.synthetic``: SAELens's synthetic runs on our trainer."""

from sae_lens_switch.training.synthetic import SyntheticSAERunner

__all__ = ["SyntheticSAERunner"]
