"""Names for the untyped things that SAELens, torch and JSON hand around."""

from typing import Any, TypeAlias

from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig

AnySAE: TypeAlias = SAE[Any]
AnyTrainingSAE: TypeAlias = TrainingSAE[Any]
# An object of a JSON file, or of what is written as one.
Json: TypeAlias = dict[str, Any]
# A torch state dict, of a module, an optimiser or our own.
StateDict: TypeAlias = dict[str, Any]
# Keyword arguments that are handed on to something of another library.
Options: TypeAlias = dict[str, Any]
# What a trainer logs, by name.
Metrics: TypeAlias = dict[str, Any]

__all__ = ["AnySAE", "AnyTrainingSAE", "Json", "Metrics", "Options", "SAEConfig", "StateDict", "TrainingSAEConfig"]
