"""Public name of ``training.history``: what a run logged, without W&B."""

from sae_lens_switch.training.history import History, numbers_of, read_history

__all__ = ["History", "numbers_of", "read_history"]
