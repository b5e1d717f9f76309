"""The configs of the SAEs: Switch for inference and training, and SAELens's own trained on sparse kernels."""

from dataclasses import dataclass
from typing import Any

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
from sae_lens_switch.saes.field_rules import (
    Activation,
    BiasStart,
    Gate,
    InferenceActivation,
    LoadBalanceScale,
    LoadBalancing,
)
from sae_lens_switch.saes.switch_checks import check_experts
from sae_lens_switch.saes.transcoder_fields import TranscoderFields
from sae_lens_switch.saes.widths import PER_TOKEN, check_widths, completed

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
        activation (str): "topk": the k largest latents of a token are active. "jumprelu": all that exceed the threshold of their expert, which "batchtopk" becomes after training; k is then the mean number on the batches of training.
    """

    n_experts: int = 16
    k: int = 32
    n_active_experts: int = 1
    n_shared_experts: int = 0
    shared_width: int | None = None
    gate: Gate = "probability"
    load_balancing: LoadBalancing = "loss"
    activation: InferenceActivation = "topk"

    @property
    def layout(self) -> ExpertLayout:
        return ExpertLayout.of(self.d_sae, self.n_experts, self.n_shared_experts, self.shared_width)

    @override
    @classmethod
    def architecture(cls) -> str:
        return "switch"

    @override
    def __post_init__(self) -> None:
        if self.activation == "batchtopk":  # in the config of a checkpoint
            self.activation = "jumprelu"
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
        activation (str): "topk": the k largest latents of a token are active, as in the paper. "batchtopk": of B tokens the k B largest, gate included, among the latents of each token's own experts (Bussmann et al. 2024); after training, all that exceed the threshold of their expert.
        topk_threshold_lr (float): With "batchtopk", by how much of the difference a step moves each expert's threshold towards its least active latent.
        matryoshka_widths (list[int] | None): Widths inside each expert, ascending, at each of which the first latents of all experts also have to reconstruct by themselves (arXiv 2503.17547); shared latents count to each. The width of an expert is added as the last. None: the whole dictionary alone.
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
    activation: Activation = "topk"
    topk_threshold_lr: float = 0.01
    matryoshka_widths: list[int] | None = None

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
        if self.matryoshka_widths is not None:
            self.matryoshka_widths = completed(self.matryoshka_widths, self.layout.expert_width)

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        """As SAELens's; what a batch selects, thresholds do after training."""
        selects = {"activation": "jumprelu"} if self.activation == "batchtopk" else {}
        return super().get_inference_sae_cfg_dict() | selects


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
        check_experts(cfg, cfg if isinstance(cfg, SwitchTrainingSAEConfig) else None)
    elif isinstance(cfg, SPARSE_CONFIGS) and cfg.k > cfg.d_sae:
        raise ValueError(f"k must be at most d_sae={cfg.d_sae}; got k={cfg.k}")
    if isinstance(cfg, MatryoshkaBatchTopKTrainingSAEConfig):
        check_widths(cfg.matryoshka_widths, cfg.d_sae, "d_sae", cfg.normalize_activations)


def layout_of(cfg: SAEConfig) -> ExpertLayout:
    """Of an SAE without a router, one expert."""
    return cfg.layout if isinstance(cfg, SwitchSAEConfig | SwitchTrainingSAEConfig) else ExpertLayout(cfg.d_sae)


def check_trainable(cfg: SAEConfig) -> None:
    """As ``check_sae``, and what would only stop a run once a first latent is dead. Raises ValueError."""
    check_sae(cfg)
    ours = isinstance(cfg, (SwitchTrainingSAEConfig, *SPARSE_CONFIGS))
    if ours and cfg.aux_loss_coefficient != 0 and cfg.normalize_activations in PER_TOKEN:
        raise ValueError(
            f"aux_loss_coefficient must be 0 with normalize_activations={cfg.normalize_activations!r}: dead latents "
            f"would reconstruct a normalised residual; got {cfg.aux_loss_coefficient}"
        )
