"""The config of a language-model run, with its SAE named by architecture, and the checks of every runner's config."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import sae_lens
from sae_lens.config import T_TRAINING_SAE_CONFIG
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig
from typing_extensions import override

from sae_lens_switch.common import rules
from sae_lens_switch.common.rules import nearest_name, reject_unknown
from sae_lens_switch.saes.config import SwitchTrainingSAEConfig, check_trainable
from sae_lens_switch.saes.registration import OVERRIDABLE
from sae_lens_switch.training import field_rules
from sae_lens_switch.training.config import SparseSAETrainerConfig, TrainerOptions, default_decay, scaling_law_lr

if TYPE_CHECKING:  # SAELens imports its own only when asked
    from sae_lens.synthetic.synthetic_sae_runner import SyntheticSAERunnerConfig

LanguageModelRun: TypeAlias = sae_lens.LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig


@dataclass(init=False)
class LanguageModelSAERunnerConfig(TrainerOptions, sae_lens.LanguageModelSAERunnerConfig[T_TRAINING_SAE_CONFIG]):
    """SAELens's runner config, with the SAE named by its architecture and described in the same call.

    ```python
    LanguageModelSAERunnerConfig(architecture="switch", d_in=768, d_sae=24576, n_experts=32, k=32,
                                 model_name="gpt2", hook_name="blocks.8.hook_resid_post", ...)
    ```

    Fields of that architecture's training config build ``sae``; the others go to the runner; ``dtype`` and
    ``device`` go to both. ``sae_kwargs`` names SAE fields explicitly and wins. ``sae=...`` works as in SAELens.
    Any architecture registered with SAELens can be named; ``"topk"`` means ``"sparse_topk"``, the same on sparse
    kernels, and likewise ``"abstopk"``, ``"batchtopk"`` and ``"matryoshka_batchtopk"`` (for SAELens's own,
    give ``sae=TopKTrainingSAEConfig(...)``). The options of our trainer
    (``TrainerOptions``: ``optimizer``, ``resume``, ...) are fields too, and left out of ``to_dict`` where they are
    the defaults, so that SAELens can read it. A transcoder, such as ``"switch_transcoder"``, also needs
    ``hook_name_out``, and ``d_out`` unless it is ``d_in``.

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
        check_language_model_run(self, field_rules.RUNNER, self.sae)
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
        rules.check_value(name, value, field_rules.RUNNER[name]) for name, value in zip(names, values, strict=True)
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
        recipe["lr_decay_steps"] = default_decay(tokens // batch, warm_up)
    return recipe


def _buffer(runner: dict[str, Any]) -> dict[str, Any]:
    """A buffer of two batches where SAELens's default would not hold one, and no run could begin."""
    n, batch, context, positions = _given(
        runner, "n_batches_in_buffer", "train_batch_size_tokens", "context_size", "seqpos_slice"
    )
    used = _positions_used(positions, context)
    enough = n * used >= batch
    return {} if enough or "n_batches_in_buffer" in runner else {"n_batches_in_buffer": -(-2 * batch // used)}


def check_language_model_run(cfg: LanguageModelRun, table: Mapping[str, rules.Rule], *saes: SAEConfig) -> None:
    """Every field of a runner's config and of its SAEs' by its rule, and what they must be together, ours or SAELens's.

    Raises:
        ValueError: Names the field, its value and what was expected.
    """
    rules.check(cfg, table)
    # As SAELens fills them in when the config is made; fields may have been set since.
    cfg.llm_device = cfg.llm_device or cfg.device
    elsewhere = {None: cfg.device, "with_model": cfg.llm_device}
    cfg.act_store_device = elsewhere.get(cfg.act_store_device, cfg.act_store_device)
    for sae in saes:
        check_trainable(sae)
    field_rules.check_schedule(cfg, total="training_tokens", batch="train_batch_size_tokens")
    used = _positions_used(cfg.seqpos_slice, cfg.context_size)
    if cfg.n_batches_in_buffer * used < cfg.train_batch_size_tokens:
        raise ValueError(
            f"n_batches_in_buffer must be at least {-(-cfg.train_batch_size_tokens // used)}, for that many contexts "
            f"(context_size={cfg.context_size}, seqpos_slice={cfg.seqpos_slice}) to hold "
            f"train_batch_size_tokens={cfg.train_batch_size_tokens}; got {cfg.n_batches_in_buffer}"
        )


def check_synthetic_run(cfg: "SyntheticSAERunnerConfig[Any]") -> None:
    """As ``check_language_model_run``, for a run on synthetic activations. Raises ValueError."""
    rules.check(cfg, field_rules.SYNTHETIC_RUNNER)
    check_trainable(cfg.sae)
    field_rules.check_schedule(cfg, total="training_samples", batch="batch_size")


def _positions_used(positions: tuple[int | None, ...], context_size: int) -> int:
    """How many tokens of a context are trained on. Raises ValueError if none are."""
    if len(positions) == 0 or (len(positions) == 3 and (positions[2] or 1) <= 1):  # SAELens takes no step of 1
        raise ValueError(f"seqpos_slice must be start, end, or both, and a step of at least 2 or none; got {positions}")
    used = len(range(context_size)[slice(*positions)])
    if used == 0:
        raise ValueError(f"seqpos_slice must leave tokens of context_size={context_size}; got {positions}")
    return used


def training_config_class(architecture: str) -> type[TrainingSAEConfig]:
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        raise ValueError(
            f"architecture must be one of {', '.join(sorted(SAE_TRAINING_CLASS_REGISTRY))}; "
            f"got {architecture!r}{nearest_name(architecture, SAE_TRAINING_CLASS_REGISTRY)}"
        )
    on_sparse_kernels = f"sparse_{architecture}" if architecture in OVERRIDABLE else architecture
    return get_sae_training_class(on_sparse_kernels)[1]
