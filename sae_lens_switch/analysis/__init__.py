"""What a trained SAE has learned: its activity on data, what its experts share, and what its router goes by."""

from sae_lens_switch.analysis.accumulators import GATE_BINS, Examples, Routing, TypicalTokens
from sae_lens_switch.analysis.activity import Activity, activations_of, observe
from sae_lens_switch.analysis.coactivation import CoActivation, coactivation
from sae_lens_switch.analysis.duplicates import Duplicates, duplicate_latents
from sae_lens_switch.analysis.geometry import RouterGeometry, router_geometry
from sae_lens_switch.analysis.information import MutualInformation, mutual_information
from sae_lens_switch.analysis.label_counts import LabelCounts, count_labels
from sae_lens_switch.analysis.log_odds import OverRepresented, over_represented
from sae_lens_switch.analysis.neighbours import Neighbours, nearest_neighbours
from sae_lens_switch.analysis.router_alignment import Alignment, RouterAlignment, router_alignment
from sae_lens_switch.analysis.similarity import Similarity, compare_saes, similarity

__all__ = [
    "GATE_BINS",
    "Activity",
    "Alignment",
    "CoActivation",
    "Duplicates",
    "Examples",
    "LabelCounts",
    "MutualInformation",
    "Neighbours",
    "OverRepresented",
    "RouterAlignment",
    "RouterGeometry",
    "Routing",
    "Similarity",
    "TypicalTokens",
    "activations_of",
    "coactivation",
    "compare_saes",
    "count_labels",
    "duplicate_latents",
    "mutual_information",
    "nearest_neighbours",
    "observe",
    "over_represented",
    "router_alignment",
    "router_geometry",
    "similarity",
]
