"""The configs: of the SAEs, and of a language-model run named by its architecture."""

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import sae_lens
from sae_lens.config import T_TRAINING_SAE_CONFIG, SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig
from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAEConfig
from typing_extensions import override

from sae_lens_switch.common import validation
from sae_lens_switch.common.validation import BiasStart, Gate, LoadBalanceScale, OnCollapse, OptimizerName
from sae_lens_switch.training.optim.constrained_adam import scaling_law_lr

# 3 * d_in is the authors' choice. In units of the activations' variance, see `load_balance_scale`.
_DEFAULT_COEFFICIENT = {"d_in": 3.0, "variance": 0.3}


@dataclass
class SwitchSAEConfig(SAEConfig):
    """
    Config of a Switch SAE for inference (arXiv 2410.08201).

    Args:
        n_experts (int): Experts E; must divide d_sae. Expert e owns latents e * d_sae / E to (e + 1) * d_sae / E.
        k (int): Active latents per token, all of one expert; at most d_sae / n_experts.
        gate (str): "probability": latents are weighted by the router's probability of their expert, as in the paper. "one": they are not.
    """

    n_experts: int = 16
    k: int = 32
    gate: Gate = "probability"

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
        n_experts (int): Experts E; must divide d_sae. Expert e owns latents e * d_sae / E to (e + 1) * d_sae / E.
        k (int): Active latents per token, all of one expert; at most d_sae / n_experts.
        gate (str): "probability": latents are weighted by the router's probability of their expert, as in the paper. "one": they are not, and the router learns from the load balance alone.
        load_balance_coefficient (float): Weight of the load-balance loss, times its scale. None: 0.3 for "variance", the authors' 3 for "d_in".
        load_balance_scale (str): "variance": the batch's E||x - mean||^2, so that the loss means the same for activations of any size. "d_in": the authors' constant.
        load_balance_warm_up_steps (int): Steps over which the coefficient rises linearly from 0.
        normalize_decoder (bool): Scale decoder rows to unit norm after every optimiser step.
        project_decoder_grad (bool): Before every optimiser step, after clipping, remove from each decoder row's gradient the part parallel to the row. Only with normalize_decoder.
        decoder_init_norm (float | None): Norm of the decoder rows at the start; the encoder starts as the decoder's transpose.
        bias_start (str): Where b_dec and b_router start, taken from the first batch: its "geometric_median" (the paper), its "mean", or "zeros".
        router_start_std (float | None): Standard deviation that the router's logits are scaled to on the first batch, so that routing starts equally sharp for activations of any size. None: as initialised, uniform in +-1/sqrt(d_in), as the authors do.
        aux_loss_coefficient (float): Weight of AuxK, by which the dead latents of a token's own expert learn from what the others leave. The paper has none.
        aux_k (int | None): How many of them, for a token. None: k.
        tie_router_bias (bool): The router subtracts b_dec, and b_router follows it: the authors' checkpoints have one vector for both.
    """

    n_experts: int = 16
    k: int = 32
    gate: Gate = "probability"
    load_balance_coefficient: float | None = None
    load_balance_scale: LoadBalanceScale = "variance"
    load_balance_warm_up_steps: int = 0
    normalize_decoder: bool = True
    project_decoder_grad: bool = True
    decoder_init_norm: float | None = 1.0
    bias_start: BiasStart = "geometric_median"
    router_start_std: float | None = 1.0
    aux_loss_coefficient: float = 0.0
    aux_k: int | None = None
    tie_router_bias: bool = False

    @override
    @classmethod
    def architecture(cls) -> str:
        return "switch"

    @override
    def __post_init__(self) -> None:
        check_sae(self)
        if self.load_balance_coefficient is None:
            self.load_balance_coefficient = _DEFAULT_COEFFICIENT[self.load_balance_scale]
        if self.aux_k is None:
            self.aux_k = self.k
        super().__post_init__()


@dataclass
class SparseTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """
    Config of a TopK SAE trained on sparse kernels: SAELens's TopKTrainingSAEConfig, field by field. use_sparse_activations changes nothing: latents are sparse.

    The trained SAE is saved as a plain "topk", and whoever loads it does not need this package.
    """

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


def check_sae(cfg: SAEConfig) -> None:
    """Every field of an SAE's config by its rule, and what they must be together. Raises ValueError."""
    if isinstance(cfg, SwitchSAEConfig | SwitchTrainingSAEConfig):
        validation.check(cfg, validation.SWITCH)
        _check_experts(cfg)
    elif isinstance(cfg, SparseTopKTrainingSAEConfig):
        validation.check(cfg, validation.SPARSE_TOPK)
        if cfg.k > cfg.d_sae:
            raise ValueError(f"k must be at most d_sae={cfg.d_sae}; got k={cfg.k}")
    else:
        validation.check(cfg, validation.SAE)


def _check_experts(cfg: SwitchSAEConfig | SwitchTrainingSAEConfig) -> None:
    if cfg.d_sae % cfg.n_experts:
        raise ValueError(f"d_sae must be a multiple of n_experts={cfg.n_experts}; got d_sae={cfg.d_sae}")
    width = cfg.d_sae // cfg.n_experts
    if cfg.k > width:
        raise ValueError(
            f"k must be at most d_sae / n_experts = {cfg.d_sae} / {cfg.n_experts} = {width}, the latents of one "
            f"expert; got k={cfg.k}"
        )
    if cfg.normalize_activations == "covariance_whitening" and not cfg.apply_b_dec_to_input:
        raise ValueError(
            "apply_b_dec_to_input must be True with normalize_activations='covariance_whitening': "
            "a Switch SAE has no encoder bias that could absorb the mean"
        )
    if isinstance(cfg, SwitchTrainingSAEConfig) and cfg.normalize_decoder and cfg.decoder_init_norm not in (None, 1.0):
        raise ValueError(
            f"decoder_init_norm must be 1.0 or None when normalize_decoder is on; got {cfg.decoder_init_norm!r}"
        )


@dataclass(kw_only=True)
class TrainerOptions:
    """
    What SparseSAETrainer can do beyond SAELens's trainer.

    Args:
        optimizer (str): "adam", or "row_sparse_adam": lazy Adam, which touches only the latents that were active: at most k of every token, however wide the dictionary.
        gradient_accumulation_steps (int): Parts that each batch is computed in, one after the other, in the memory of one part; their gradients are summed to the batch's. What is taken from a batch as a whole, such as the load balance, is taken from each part.
        cuda_graph (bool): On a GPU, steps are captured as one CUDA graph and replayed: the host's part, most of a small step, is gone. Results are the same but for the learning rate's rounding to float32. With "adam", for switch and sparse_topk without auxiliary loss. On a CPU it changes nothing.
        max_grad_norm (float | None): Gradients are scaled down to this norm. None: they are not.
        resume (str | None): A checkpoint to go on from, or "latest": the newest whole one below checkpoint_path, if there is any.
        keep_checkpoints (int | None): Older checkpoints than this many are removed. None: all stay. The final one always does.
        max_skipped_steps (int): A step whose loss or gradient is not finite is skipped; after this many in a row training stops.
        on_collapse (str): What happens when the router sends everything to few experts, besides the warning. "report": nothing. "raise_coefficient": the load-balance coefficient doubles. "reseed": experts without tokens start again as twins of the busiest.
        collapse_share (float | None): An expert with more than this share of the tokens is too busy. None: half-way between an even share and all.
        collapse_patience (int): For how many steps in a row, until it counts as collapse; likewise without tokens.
    """

    optimizer: OptimizerName = "adam"
    gradient_accumulation_steps: int = 1
    cuda_graph: bool = False
    max_grad_norm: float | None = 1.0
    resume: str | None = None
    keep_checkpoints: int | None = None
    max_skipped_steps: int = 10
    on_collapse: OnCollapse = "report"
    collapse_share: float | None = None
    collapse_patience: int = 200

    def __post_init__(self) -> None:
        validation.check(self, validation.OPTIONS)


@dataclass
class SparseSAETrainerConfig(TrainerOptions, SAETrainerConfig):
    """
    SAELens's SAETrainerConfig with the options of our trainer, and the paper's schedule where none is given.

    Args:
        lr (float | None): None: 2e-4 / sqrt(d_sae / 2^14).
        lr_decay_steps (int | None): Steps at the end over which the learning rate falls to 0. None: the last 20 %, of a constant schedule.
    """

    lr: float | None = None  # type: ignore[assignment]
    lr_decay_steps: int | None = None  # type: ignore[assignment]

    @override
    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Every field by its rule, and whether the schedule fits into the steps. Raises ValueError."""
        validation.check(self, validation.TRAINER)
        validation.check_schedule(self)

    def resolved(self, d_sae: int) -> "SparseSAETrainerConfig":
        """With every None that depends on the SAE or the length of training filled in. Raises ValueError."""
        self.check()
        lr = scaling_law_lr(d_sae) if self.lr is None else self.lr
        constant = self.lr_scheduler_name.lower() == "constant"
        decay = _default_decay(self.total_training_steps, self.lr_warm_up_steps) if constant else 0
        return replace(
            self,
            lr=lr,
            lr_end=lr / 10 if self.lr_end is None else self.lr_end,
            lr_decay_steps=decay if self.lr_decay_steps is None else self.lr_decay_steps,
        )

    @classmethod
    def of(cls, cfg: SAETrainerConfig) -> "SparseSAETrainerConfig":
        """SAELens's own config as ours: its fields, and the options' defaults. Raises ValueError."""
        if isinstance(cfg, cls):
            return cfg
        return cls(**{f.name: getattr(cfg, f.name) for f in fields(cfg)})


class UnknownFieldError(ValueError, TypeError):
    """An unknown keyword: a ValueError like all bad input here, a TypeError as Python's own."""


@dataclass(init=False)
class LanguageModelSAERunnerConfig(TrainerOptions, sae_lens.LanguageModelSAERunnerConfig[T_TRAINING_SAE_CONFIG]):
    """SAELens's runner config, with the SAE named by its architecture and described in the same call::

        LanguageModelSAERunnerConfig(architecture="switch", d_in=768, d_sae=24576, n_experts=32, k=32,
                                     model_name="gpt2", hook_name="blocks.8.hook_resid_post", ...)

    Fields of that architecture's training config build ``sae``; the others go to the runner; ``dtype`` and
    ``device`` go to both. ``sae_kwargs`` names SAE fields explicitly and wins. ``sae=...`` works as in SAELens.
    Any architecture registered with SAELens can be named; ``"topk"`` means ``"sparse_topk"``, the same on sparse
    kernels (for SAELens's own, give ``sae=TopKTrainingSAEConfig(...)``). The options of our trainer
    (``TrainerOptions``: ``optimizer``, ``resume``, ...) are fields too, and left out of ``to_dict`` where they are
    the defaults, so that SAELens can read it.

    With ``architecture="switch"``, what is not given follows the paper: ``lr = 2e-4 / sqrt(d_sae / 2^14)`` and
    ``lr_decay_steps`` = the last 20 % of the steps.

    Raises ValueError for an unknown architecture or field, with the nearest known name.
    """

    def __init__(
        self,
        sae: TrainingSAEConfig | None = None,
        *,
        architecture: str | None = None,
        sae_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if (sae is None) == (architecture is None):
            raise ValueError("give exactly one of architecture='...' and sae=...")
        stock = sae_lens.LanguageModelSAERunnerConfig
        options = {name: kwargs.pop(name) for name in _option_names() & kwargs.keys()}
        vars(self).update(vars(TrainerOptions(**options)))
        runner_fields = {f.name for f in fields(stock)} - {"sae"}
        if architecture is None:
            reject_unknown(kwargs, runner_fields | _option_names())
            if sae_kwargs:
                raise ValueError(
                    "sae_kwargs goes with architecture='...'; with sae=... set the fields on the SAE config"
                )
            stock.__init__(self, sae=cast(Any, sae), **(_buffer(kwargs) | kwargs))
            return
        sae_config_class = training_config_class(architecture)
        sae_fields = {f.name for f in fields(sae_config_class)} - {"metadata"}
        reject_unknown(kwargs, runner_fields | sae_fields | _option_names())
        reject_unknown(sae_kwargs or {}, sae_fields)
        own = {name: value for name, value in kwargs.items() if name in sae_fields} | (sae_kwargs or {})
        missing = {"d_in", "d_sae"} - own.keys()
        if missing:
            raise ValueError(f"architecture={architecture!r} needs {' and '.join(sorted(missing))}")
        sae = sae_config_class(**own)
        runner = {name: value for name, value in kwargs.items() if name in runner_fields}
        stock.__init__(self, sae=cast(Any, sae), **(_recipe(sae, runner) | _buffer(runner) | runner))

    @override
    def __post_init__(self) -> None:
        check_run(self, validation.RUNNER, self.sae)
        sae_lens.LanguageModelSAERunnerConfig.__post_init__(self)

    @override
    def to_dict(self) -> dict[str, Any]:
        defaults = vars(TrainerOptions())
        return {n: v for n, v in super().to_dict().items() if n not in defaults or v != defaults[n]}

    @override
    def to_sae_trainer_config(self) -> SparseSAETrainerConfig:
        options = {name: getattr(self, name) for name in _option_names()}
        return SparseSAETrainerConfig(**vars(super().to_sae_trainer_config()), **options)


def _option_names() -> set[str]:
    return {f.name for f in fields(TrainerOptions)}


def _given(runner: dict[str, Any], *names: str) -> tuple[Any, ...]:
    """What a run will have in these fields: as given, by their rules, or by default."""
    stock = sae_lens.LanguageModelSAERunnerConfig
    values = (runner.get(name, getattr(stock, name)) for name in names)
    return tuple(
        validation.check_value(name, value, validation.RUNNER[name]) for name, value in zip(names, values, strict=True)
    )


def _recipe(sae: TrainingSAEConfig, runner: dict[str, Any]) -> dict[str, Any]:
    """The paper's learning rate and decay, for the SAEs that are the paper's."""
    if not isinstance(sae, SwitchTrainingSAEConfig):
        return {}
    tokens, batch, schedule, warm_up = _given(
        runner, "training_tokens", "train_batch_size_tokens", "lr_scheduler_name", "lr_warm_up_steps"
    )
    recipe: dict[str, Any] = {"lr": scaling_law_lr(sae.d_sae)}
    if schedule.lower() == "constant":  # the schedule the paper decays
        recipe["lr_decay_steps"] = _default_decay(tokens // batch, warm_up)
    return recipe


def _default_decay(steps: int, warm_up: int) -> int:
    """The last 20 % of a run, or what the warm-up leaves of it."""
    return max(0, min(steps // 5, steps - warm_up))


def _buffer(runner: dict[str, Any]) -> dict[str, Any]:
    """A buffer of two batches where SAELens's default would not hold one, and no run could begin."""
    n, batch, context, positions = _given(
        runner, "n_batches_in_buffer", "train_batch_size_tokens", "context_size", "seqpos_slice"
    )
    used = _positions_used(positions, context)
    enough = n * used >= batch
    return {} if enough or "n_batches_in_buffer" in runner else {"n_batches_in_buffer": -(-2 * batch // used)}


def check_run(
    cfg: Any,
    table: dict[str, validation.Rule],
    *saes: SAEConfig,
    total: str = "training_tokens",
    batch: str = "train_batch_size_tokens",
) -> None:
    """Every field of a runner's config and of its SAEs' by its rule, and what they must be together, ours or SAELens's.

    Raises ValueError.
    """
    validation.check(cfg, table)
    if hasattr(cfg, "llm_device"):  # as SAELens fills them in when the config is made
        cfg.llm_device = cfg.llm_device or cfg.device
        elsewhere = {None: cfg.device, "with_model": cfg.llm_device}
        cfg.act_store_device = elsewhere.get(cfg.act_store_device, cfg.act_store_device)
    for sae in saes:
        check_trainable(sae)
    validation.check_schedule(cfg, total=total, batch=batch)
    if hasattr(cfg, "n_batches_in_buffer"):
        used = _positions_used(cfg.seqpos_slice, cfg.context_size)
        if cfg.n_batches_in_buffer * used < cfg.train_batch_size_tokens:
            raise ValueError(
                f"n_batches_in_buffer must be at least {-(-cfg.train_batch_size_tokens // used)}, for that many contexts "
                f"(context_size={cfg.context_size}, seqpos_slice={cfg.seqpos_slice}) to hold "
                f"train_batch_size_tokens={cfg.train_batch_size_tokens}; got {cfg.n_batches_in_buffer}"
            )


def _positions_used(positions: tuple[int | None, ...], context_size: int) -> int:
    """How many tokens of a context are trained on. Raises ValueError if none are."""
    if len(positions) == 0 or (len(positions) == 3 and (positions[2] or 1) <= 1):  # SAELens takes no step of 1
        raise ValueError(f"seqpos_slice must be start, end, or both, and a step of at least 2 or none; got {positions}")
    used = len(range(context_size)[slice(*positions)])
    if used == 0:
        raise ValueError(f"seqpos_slice must leave tokens of context_size={context_size}; got {positions}")
    return used


def check_trainable(cfg: SAEConfig) -> None:
    """As ``check_sae``, and what a training run would only stop at when a first latent is dead. Raises ValueError."""
    check_sae(cfg)
    ours = isinstance(cfg, SwitchTrainingSAEConfig | SparseTopKTrainingSAEConfig)
    if ours and cfg.aux_loss_coefficient != 0 and cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
        raise ValueError(
            f"aux_loss_coefficient must be 0 with normalize_activations={cfg.normalize_activations!r}: dead latents "
            f"would reconstruct a normalised residual; got {cfg.aux_loss_coefficient}"
        )


def training_config_class(architecture: str) -> type[TrainingSAEConfig]:
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        raise ValueError(
            f"architecture must be one of {', '.join(sorted(SAE_TRAINING_CLASS_REGISTRY))}; "
            f"got {architecture!r}{nearest_name(architecture, SAE_TRAINING_CLASS_REGISTRY)}"
        )
    return get_sae_training_class("sparse_topk" if architecture == "topk" else architecture)[1]


def reject_unknown(given: Any, known: Any) -> None:
    for name in given:
        if name not in known:
            raise UnknownFieldError(f"unknown field {name!r}{nearest_name(name, known)}")


def nearest_name(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
