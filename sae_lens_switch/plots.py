"""Public name of ``hub.summary_figure``: pictures of an SAE and of a run."""

from sae_lens_switch.hub.summary_figure import sae_summary, training_summary

__all__ = ["sae_summary", "training_summary"]
