"""What a trained SAE has learned: its activity on data, the geometry of its router, its duplicate latents."""

from sae_lens_switch.analysis.accumulators import GATE_BINS, Examples, Routing, TypicalTokens
from sae_lens_switch.analysis.activity import Activity, activations_of, observe
from sae_lens_switch.analysis.duplicates import Duplicates, duplicate_latents
from sae_lens_switch.analysis.geometry import RouterGeometry, router_geometry

__all__ = [
    "GATE_BINS",
    "Activity",
    "Duplicates",
    "Examples",
    "RouterGeometry",
    "Routing",
    "TypicalTokens",
    "activations_of",
    "duplicate_latents",
    "observe",
    "router_geometry",
]
