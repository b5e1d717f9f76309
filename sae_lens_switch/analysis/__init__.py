"""What a trained SAE does: its activity on activations, the geometry of its router, its duplicate latents."""

from sae_lens_switch.analysis.activity import (
    GATE_BINS,
    Activity,
    Duplicates,
    Examples,
    RouterGeometry,
    Routing,
    TypicalTokens,
    activations_of,
    duplicate_latents,
    observe,
    router_geometry,
)

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
