"""The rules for every field of the SAEs' configs."""

from dataclasses import dataclass
from typing import Literal, get_args

from sae_lens.saes.sae import SAEMetadata
from sae_lens_switch_kernels import EncoderPrecision

from sae_lens_switch.common.rules import Choice, Device, Dtype, Each, Flag, Number, Rule, Text, Whole

Gate = Literal["probability", "renormalized", "one"]
LoadBalancing = Literal["loss", "bias"]
# In training, and after.
Activation = Literal["topk", "batchtopk"]
InferenceActivation = Literal["topk", "jumprelu"]
LoadBalanceScale = Literal["variance", "d_in"]
BiasStart = Literal["geometric_median", "mean", "zeros"]

_count, _size, _flag = Whole(), Whole(at_least=1), Flag()
_coefficient = Number(at_least=0)


@dataclass(frozen=True, kw_only=True)
class Metadata(Rule):
    """SAELens's metadata; also as the dict that a config has of it while it is read from a file."""

    def plain(self, value: object) -> SAEMetadata:
        if isinstance(value, SAEMetadata):
            return value
        if not isinstance(value, dict):
            raise ValueError
        try:
            return SAEMetadata(**value)
        except TypeError as error:  # keys that are no names, or one that no attribute can have
            raise ValueError from error

    def expected(self) -> str:
        return "a SAEMetadata or dict with names as keys"


SAE: dict[str, Rule] = {
    **dict.fromkeys(("d_in", "d_sae"), _size),
    "dtype": Dtype(),
    "device": Device(),
    "apply_b_dec_to_input": _flag,
    "normalize_activations": Choice(
        ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "covariance_whitening")
    ),
    "reshape_activations": Choice(("none", "hook_z")),
    "metadata": Metadata(),
    "decoder_init_norm": Number(above=0, optional=True),
    "matryoshka_widths": Each(_size, as_list=True),  # SAELens appends to them
}
SWITCH: dict[str, Rule] = {
    **SAE,
    **dict.fromkeys(("n_experts", "n_active_experts", "k"), _size),
    "n_shared_experts": _count,
    "shared_width": Whole(at_least=1, optional=True),
    "gate": Choice(get_args(Gate)),
    "load_balancing": Choice(get_args(LoadBalancing)),
    "load_balance_bias_rate": Number(at_least=0),
    **dict.fromkeys(("router_z_loss_coefficient", "expert_overlap_coefficient"), _coefficient),
    "load_balance_coefficient": Number(at_least=0, optional=True),
    "load_balance_scale": Choice(get_args(LoadBalanceScale)),
    "load_balance_warm_up_steps": _count,
    **dict.fromkeys(("normalize_decoder", "project_decoder_grad", "tie_router_bias"), _flag),
    "bias_start": Choice(get_args(BiasStart)),
    "router_start_std": Number(above=0, optional=True),
    "aux_loss_coefficient": _coefficient,
    "aux_k": Whole(at_least=1, optional=True),
    "encoder_precision": Choice(get_args(EncoderPrecision)),
    "activation": Choice(("topk", "batchtopk", "jumprelu")),
    "topk_threshold_lr": Number(at_least=0, at_most=1),
    "matryoshka_widths": Each(_size, as_list=True, optional=True),
}
SPARSE_TOPK: dict[str, Rule] = {
    **SAE,
    "k": _size,
    **dict.fromkeys(("use_sparse_activations", "rescale_acts_by_decoder_norm"), _flag),
    "aux_loss_coefficient": _coefficient,
    "encoder_precision": Choice(get_args(EncoderPrecision)),
}
SPARSE_BATCHTOPK: dict[str, Rule] = {
    **SPARSE_TOPK,
    "k": Number(above=0),
    "topk_threshold_lr": Number(at_least=0, at_most=1),
}
SPARSE_MATRYOSHKA_BATCHTOPK: dict[str, Rule] = {
    **SPARSE_BATCHTOPK,
    "use_matryoshka_aux_loss": _flag,
}
_TRANSCODER: dict[str, Rule] = {
    "d_out": Whole(at_least=1, optional=True),
    "skip_connection": _flag,
    "hook_name_out": Text(optional=True),
}
# By architecture; SAELens's own have the rules of SAE.
TABLES: dict[str, dict[str, Rule]] = {
    "switch": SWITCH,
    "sparse_topk": SPARSE_TOPK,
    "sparse_abstopk": SPARSE_TOPK,
    "sparse_batchtopk": SPARSE_BATCHTOPK,
    "sparse_matryoshka_batchtopk": SPARSE_MATRYOSHKA_BATCHTOPK,
    "switch_transcoder": {**SWITCH, **_TRANSCODER},
    "sparse_topk_transcoder": {**SPARSE_TOPK, **_TRANSCODER},
    "sparse_batchtopk_transcoder": {**SPARSE_BATCHTOPK, **_TRANSCODER},
}
