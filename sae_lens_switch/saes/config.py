"""The configs of the SAEs: Switch for inference and training, and SAELens's own trained on sparse kernels."""

from dataclasses import dataclass
from itertools import pairwise

from sae_lens.saes.abstopk_sae import AbsTopKSAEConfig, AbsTopKTrainingSAEConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig
from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAEConfig
from sae_lens_switch_kernels import EncoderPrecision
from typing_extensions import override

from sae_lens_switch.common import rules
from sae_lens_switch.saes import field_rules
from sae_lens_switch.saes.expert_layout import ExpertLayout
from sae_lens_switch.saes.field_rules import BiasStart, Gate, LoadBalanceScale, LoadBalancing
from sae_lens_switch.saes.transcoder_fields import TranscoderFields

_PER_TOKEN = ("constant_norm_rescale", "layer_norm")
# 3 * d_in is the authors' choice. In units of the activations' variance, see `load_balance_scale`.
_DEFAULT_COEFFICIENT = {"d_in": 3.0, "variance": 0.3}


@dataclass
class SwitchSAEConfig(SAEConfig):
    """
    Config of a Switch SAE for inference (arXiv 2410.08201).

    Args:
        n_experts (int): Experts E; must divide d_sae. Each owns equally many latents, one expert after the other. Those of shared experts come first and are not counted here.
        k (int): Active latents per token, of all its experts together; at most as many as these have.
        n_active_experts (int): Experts that each token is sent to. 1 as in the paper; with more, the k largest latents of all of them are kept, and the encoder costs as many times more.
        n_shared_experts (int): Experts that every token uses beside the routed ones, with a gate of 1. They own the first latents.
        shared_width (int | None): Latents of all shared experts together, out of d_sae. None: each is as wide as a routed one, so that n_experts + n_shared_experts must divide d_sae.
        gate (str): "probability": latents are scaled by the router's probability of their expert, as in the paper. "renormalized": by that among the token's own experts, which sum to 1. "one": they are not.
        load_balancing (str): "bias": experts are chosen by their logits plus expert_bias, which training has fitted. Gates are without it. "loss": there is none.
    """

    n_experts: int = 16
    k: int = 32
    n_active_experts: int = 1
    n_shared_experts: int = 0
    shared_width: int | None = None
    gate: Gate = "probability"
    load_balancing: LoadBalancing = "loss"

    @property
    def layout(self) -> ExpertLayout:
        return ExpertLayout.of(self.d_sae, self.n_experts, self.n_shared_experts, self.shared_width)

    @override
    @classmethod
    def architecture(cls) -> str:
        return "switch"

    @override
    def __post_init__(self) -> None:
        check_sae(self)
        super().__post_init__()


@dataclass
class SwitchTrainingSAEConfig(TrainingSAEConfig):
    """
    Config of a Switch SAE for training (arXiv 2410.08201). The defaults are the paper's recipe, except for the scale of the load-balance loss.

    Args:
        n_experts (int): Experts E; must divide d_sae. Each owns equally many latents, one expert after the other. Those of shared experts come first and are not counted here.
        k (int): Active latents per token, of all its experts together; at most as many as these have.
        n_active_experts (int): Experts that each token is sent to. 1 as in the paper; with more, the k largest latents of all of them are kept, and the encoder costs as many times more.
        n_shared_experts (int): Experts that every token uses beside the routed ones, with a gate of 1. They own the first latents.
        shared_width (int | None): Latents of all shared experts together, out of d_sae. None: each is as wide as a routed one, so that n_experts + n_shared_experts must divide d_sae.
        gate (str): "probability": latents are scaled by the router's probability of their expert, as in the paper. "renormalized": by that among the token's own experts, which sum to 1. "one": they are not, and the router learns from the load balance alone, as with "renormalized" and one expert.
        load_balancing (str): How tokens are spread over the experts. "loss": by the load-balance loss, as in the paper. "bias": by expert_bias, a number per expert that is added to its logit for the choice of experts alone, never to the gate, and moved against its load after every step (arXiv 2408.15664).
        load_balance_bias_rate (float): By how much a step moves each expert_bias, up or down. 0: it stays as it is.
        load_balance_coefficient (float): Weight of the load-balance loss, times its scale. None: 0.3 for "variance", the authors' 3 for "d_in"; 0 with load_balancing="bias".
        load_balance_scale (str): "variance": the batch's E||x - mean||^2, so that the coefficient means the same for activations of any scale. "d_in": the authors' constant.
        load_balance_warm_up_steps (int): Steps over which the coefficient rises linearly from 0.
        router_z_loss_coefficient (float): Weight of the router z-loss, mean_B logsumexp(logits)^2 (arXiv 2202.08906), times load_balance_scale. 0: there is none.
        normalize_decoder (bool): Scale decoder rows to unit norm after every optimiser step.
        project_decoder_grad (bool): Before every optimiser step, after clipping, remove from each decoder row's gradient the part parallel to the row. Only with normalize_decoder.
        decoder_init_norm (float | None): Norm of the decoder rows at the start; the encoder starts as the decoder's transpose.
        bias_start (str): Initial value of b_dec and b_router, from the first batch: its "geometric_median" (the paper), its "mean", or "zeros".
        router_start_std (float | None): Standard deviation to which the router's logits are scaled on the first batch, so that routing starts equally sharp for activations of any scale. None: W_router stays as initialised, uniform in +-1/sqrt(d_in), as in the authors' code.
        aux_loss_coefficient (float): Weight of AuxK, in which the dead latents of a token's own expert reconstruct its residual. The paper has none.
        aux_k (int | None): Number of dead latents per token that do so. None: k.
        expert_overlap_coefficient (float): Weight, times load_balance_scale, of a penalty on similar decoder rows of different experts: for one token in eight, those that fire against those that would fire in the next best expert, where their cosine exceeds 0.3. Not with row-sparse Adam. 0: none.
        encoder_precision (str): Precision of the encoder's product, which only selects latents: "full", that of the weights; "bfloat16" or "float8", with the values of what it selects computed again in full. Values and gradients are exact in either; the choice may differ among nearly equal latents.
        tie_router_bias (bool): The router subtracts b_dec, and b_router is kept equal to it: the authors' checkpoints have one vector for both.
    """

    n_experts: int = 16
    k: int = 32
    n_active_experts: int = 1
    n_shared_experts: int = 0
    shared_width: int | None = None
    gate: Gate = "probability"
    load_balancing: LoadBalancing = "loss"
    load_balance_bias_rate: float = 0.01
    load_balance_coefficient: float | None = None
    load_balance_scale: LoadBalanceScale = "variance"
    load_balance_warm_up_steps: int = 0
    router_z_loss_coefficient: float = 0.0
    normalize_decoder: bool = True
    project_decoder_grad: bool = True
    decoder_init_norm: float | None = 1.0
    bias_start: BiasStart = "geometric_median"
    router_start_std: float | None = 1.0
    aux_loss_coefficient: float = 0.0
    aux_k: int | None = None
    expert_overlap_coefficient: float = 0.0
    encoder_precision: EncoderPrecision = "full"
    tie_router_bias: bool = False

    @property
    def layout(self) -> ExpertLayout:
        return ExpertLayout.of(self.d_sae, self.n_experts, self.n_shared_experts, self.shared_width)

    @override
    @classmethod
    def architecture(cls) -> str:
        return "switch"

    @override
    def __post_init__(self) -> None:
        check_sae(self)
        self.resolve()
        super().__post_init__()

    def resolve(self) -> None:
        """Give fields that are None what that stands for; they may have been set since the config was made."""
        if self.load_balance_coefficient is None:
            default = _DEFAULT_COEFFICIENT[self.load_balance_scale]
            self.load_balance_coefficient = default if self.load_balancing == "loss" else 0.0
        if self.aux_k is None:
            self.aux_k = self.k


@dataclass
class SparseTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """
    Config of a TopK SAE trained on sparse kernels: SAELens's TopKTrainingSAEConfig, field by field. use_sparse_activations changes nothing: latents are sparse.

    The trained SAE is saved as a plain "topk", which loads without this package.

    Args:
        encoder_precision (str): Precision of the encoder's product, which only selects latents: "full", that of the weights; "bfloat16" or "float8", with the values of what it selects computed again in full. Values and gradients are exact in either; the choice may differ among nearly equal latents.
    """

    encoder_precision: EncoderPrecision = "full"

    @override
    @classmethod
    def architecture(cls) -> str:
        return "sparse_topk"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig

    @override
    def __post_init__(self) -> None:
        check_sae(self)
        super().__post_init__()


@dataclass
class SparseAbsTopKTrainingSAEConfig(SparseTopKTrainingSAEConfig, AbsTopKTrainingSAEConfig):
    """
    Config of an AbsTopK SAE trained on sparse kernels: SAELens's AbsTopKTrainingSAEConfig, field by field, and encoder_precision as of SparseTopKTrainingSAEConfig.

    The trained SAE is saved as a plain "abstopk", which loads without this package.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "sparse_abstopk"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return AbsTopKSAEConfig


@dataclass
class SparseBatchTopKTrainingSAEConfig(BatchTopKTrainingSAEConfig):
    """
    Config of a BatchTopK SAE trained on sparse kernels: SAELens's BatchTopKTrainingSAEConfig, field by field. use_sparse_activations changes nothing: latents are sparse.

    The trained SAE is saved as a plain "jumprelu", which loads without this package.

    Args:
        encoder_precision (str): Precision of the encoder's product, which only selects latents: "full", that of the weights; "bfloat16" or "float8", with the values of what it selects computed again in full. Values and gradients are exact in either; the choice may differ among nearly equal latents.
    """

    encoder_precision: EncoderPrecision = "full"

    @override
    @classmethod
    def architecture(cls) -> str:
        return "sparse_batchtopk"

    @override
    def __post_init__(self) -> None:
        check_sae(self)
        super().__post_init__()


@dataclass
class SparseMatryoshkaBatchTopKTrainingSAEConfig(MatryoshkaBatchTopKTrainingSAEConfig):
    """
    Config of a Matryoshka BatchTopK SAE trained on sparse kernels: SAELens's MatryoshkaBatchTopKTrainingSAEConfig, field by field. use_sparse_activations changes nothing: latents are sparse.

    The trained SAE is saved as a plain "jumprelu", which loads without this package.

    Args:
        encoder_precision (str): Precision of the encoder's product, which only selects latents: "full", that of the weights; "bfloat16" or "float8", with the values of what it selects computed again in full. Values and gradients are exact in either; the choice may differ among nearly equal latents.
    """

    encoder_precision: EncoderPrecision = "full"

    @override
    @classmethod
    def architecture(cls) -> str:
        return "sparse_matryoshka_batchtopk"

    @override
    def __post_init__(self) -> None:
        check_sae(self)
        super().__post_init__()


# SAELens's architectures on sparse kernels.
SPARSE_CONFIGS = (
    SparseTopKTrainingSAEConfig,
    SparseBatchTopKTrainingSAEConfig,
    SparseMatryoshkaBatchTopKTrainingSAEConfig,
)


def check_sae(cfg: SAEConfig) -> None:
    """Every field of an SAE's config by its rule, and what they must be together. Raises ValueError."""
    rules.check(cfg, field_rules.TABLES.get(cfg.architecture(), field_rules.SAE))
    if isinstance(cfg, TranscoderFields):
        cfg.check_transcoder()
    if isinstance(cfg, SwitchSAEConfig | SwitchTrainingSAEConfig):
        _check_experts(cfg)
    elif isinstance(cfg, SPARSE_CONFIGS) and cfg.k > cfg.d_sae:
        raise ValueError(f"k must be at most d_sae={cfg.d_sae}; got k={cfg.k}")
    if isinstance(cfg, MatryoshkaBatchTopKTrainingSAEConfig):
        _check_levels(cfg)


def _check_levels(cfg: MatryoshkaBatchTopKTrainingSAEConfig) -> None:
    widths = cfg.matryoshka_widths
    if not widths or widths[-1] > cfg.d_sae or any(a >= b for a, b in pairwise([0, *widths])):
        raise ValueError(
            f"matryoshka_widths must be one or more widths, ascending, up to d_sae={cfg.d_sae}; got {widths}"
        )
    if cfg.normalize_activations in _PER_TOKEN:
        raise ValueError(
            "normalize_activations must not be per token with matryoshka_widths: SAELens undoes it for one "
            f"reconstruction only; got {cfg.normalize_activations!r}"
        )


def _check_experts(cfg: SwitchSAEConfig | SwitchTrainingSAEConfig) -> None:
    _check_layout(cfg)
    if cfg.n_active_experts > cfg.n_experts:
        raise ValueError(f"n_active_experts must be at most n_experts={cfg.n_experts}; got {cfg.n_active_experts}")
    overlap = cfg.expert_overlap_coefficient if isinstance(cfg, SwitchTrainingSAEConfig) else 0
    if overlap and cfg.n_active_experts == cfg.n_experts:
        raise ValueError(
            f"expert_overlap_coefficient must be 0 unless n_active_experts={cfg.n_active_experts} is less than "
            f"n_experts={cfg.n_experts}; got {overlap}"
        )
    if overlap and cfg.n_shared_experts:
        raise ValueError(
            f"expert_overlap_coefficient must be 0 with shared experts, of which there are {cfg.n_shared_experts}; "
            f"got {overlap}"
        )
    S, width, A = cfg.layout.shared_width, cfg.layout.expert_width, cfg.n_active_experts
    if cfg.k > S + A * width:
        several = "" if A == 1 else "n_active_experts * "
        factor, whose = ("", "one expert") if A == 1 else (f"{A} * ", f"{A} experts")
        most = f"{several}d_sae / n_experts = {factor}{cfg.d_sae} / {cfg.n_experts} = {A * width}"
        if S:
            most = (
                f"shared_width + {several}(d_sae - shared_width) / n_experts = {S} + {factor}{width} = {S + A * width}"
            )
            whose += " and the shared ones"
        raise ValueError(f"k must be at most {most}, the latents of {whose}; got k={cfg.k}")
    if cfg.normalize_activations == "covariance_whitening" and not cfg.apply_b_dec_to_input:
        raise ValueError(
            "apply_b_dec_to_input must be True with normalize_activations='covariance_whitening': "
            "a Switch SAE has no encoder bias that could absorb the mean"
        )
    if isinstance(cfg, SwitchTrainingSAEConfig) and cfg.normalize_decoder and cfg.decoder_init_norm not in (None, 1.0):
        raise ValueError(
            f"decoder_init_norm must be 1.0 or None when normalize_decoder is on; got {cfg.decoder_init_norm!r}"
        )


def _check_layout(cfg: SwitchSAEConfig | SwitchTrainingSAEConfig) -> None:
    E, n, S = cfg.n_experts, cfg.n_shared_experts, cfg.shared_width
    if n == 0 and S is not None:
        raise ValueError(f"shared_width must be None without shared experts, n_shared_experts=0; got {S}")
    if n == 0 and cfg.d_sae % E:
        raise ValueError(f"d_sae must be a multiple of n_experts={E}; got d_sae={cfg.d_sae}")
    if n and S is None and cfg.d_sae % (E + n):
        raise ValueError(
            f"d_sae must be a multiple of n_experts + n_shared_experts = {E + n} unless shared_width is given; "
            f"got d_sae={cfg.d_sae}"
        )
    if n and S is not None and not cfg.layout.is_possible:
        raise ValueError(
            f"shared_width must leave a multiple of n_experts={E} of the d_sae={cfg.d_sae} latents; got shared_width={S}"
        )


def layout_of(cfg: SAEConfig) -> ExpertLayout:
    """Of an SAE without a router, one expert."""
    return cfg.layout if isinstance(cfg, SwitchSAEConfig | SwitchTrainingSAEConfig) else ExpertLayout(cfg.d_sae)


def check_trainable(cfg: SAEConfig) -> None:
    """As ``check_sae``, and what would only stop a run once a first latent is dead. Raises ValueError."""
    check_sae(cfg)
    ours = isinstance(cfg, (SwitchTrainingSAEConfig, *SPARSE_CONFIGS))
    if ours and cfg.aux_loss_coefficient != 0 and cfg.normalize_activations in _PER_TOKEN:
        raise ValueError(
            f"aux_loss_coefficient must be 0 with normalize_activations={cfg.normalize_activations!r}: dead latents "
            f"would reconstruct a normalised residual; got {cfg.aux_loss_coefficient}"
        )
