"""The rules for every field of the trainer's and the runners' configs, and how a schedule must fit into a run."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from sae_lens.config import LoggingConfig
from sae_lens.saes.sae import TrainingSAEConfig

from sae_lens_switch.common.rules import (
    Anything,
    Choice,
    Device,
    Dtype,
    Each,
    Either,
    Flag,
    Kind,
    Number,
    Rule,
    Text,
    Whole,
)

OptimizerName = Literal["adam", "row_sparse_adam"]
MomentsDtype = Literal["float32", "bfloat16"]
OnCollapse = Literal["report", "raise_coefficient", "reseed"]

_INT32, _INT64 = 2**31 - 1, 2**63 - 1
_count, _size = Whole(), Whole(at_least=1)
_flag, _path, _text = Flag(), Text(path=True, optional=True), Text(optional=True)
_share = Number(at_least=0, at_most=1)
# Adam moves every weight by about this much per step.
_most_lr = 1000

LOGGING: dict[str, Rule] = {
    **dict.fromkeys(("log_to_wandb", "log_activations_store_to_wandb", "log_optimizer_state_to_wandb"), _flag),
    "log_weights_to_wandb": _flag,
    "wandb_project": Text(),
    **dict.fromkeys(("wandb_id", "run_name", "wandb_entity"), _text),
    **dict.fromkeys(("wandb_log_frequency", "eval_every_n_wandb_logs"), _size),
}

OPTIONS: dict[str, Rule] = {
    "optimizer": Choice(get_args(OptimizerName)),
    "moments_dtype": Choice(get_args(MomentsDtype)),
    "gradient_accumulation_steps": _size,
    "cuda_graph": _flag,
    **dict.fromkeys(("expert_parallel", "latent_parallel"), _size),
    "rank_timeout": Number(above=0, at_most=_INT32),
    "max_grad_norm": Number(above=0, optional=True),
    "resume": _path,
    "keep_checkpoints": Whole(at_least=1, optional=True),
    "max_skipped_steps": _size,
    "on_collapse": Choice(get_args(OnCollapse)),
    "collapse_share": Number(above=0, at_most=1, optional=True),
    "collapse_patience": _size,
}
# What a trainer's config and a runner's have in common.
_TRAINING: dict[str, Rule] = {
    "lr": Number(above=0, at_most=_most_lr),
    "lr_end": Number(at_least=0, optional=True),
    "lr_scheduler_name": Choice(("constant", "cosineannealing", "cosineannealingwarmrestarts"), any_case=True),
    **dict.fromkeys(("lr_warm_up_steps", "lr_decay_steps"), _count),
    "n_restart_cycles": _size,
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Number(at_least=0, below=1)),
    "device": Device(),
    "autocast": _flag,
    "dead_feature_window": Whole(at_most=_INT32),  # compared with int32 counts
    "feature_sampling_window": _size,
    "n_checkpoints": _count,
    "checkpoint_path": _path,
    "save_final_checkpoint": _flag,
    "logger": Kind((LoggingConfig,), LOGGING),
    "n_batches_for_norm_estimate": _size,
}
STOCK_TRAINER: dict[str, Rule] = {
    **_TRAINING,
    **dict.fromkeys(("total_training_samples", "train_batch_size_samples"), _size),
}
TRAINER: dict[str, Rule] = {
    **STOCK_TRAINER,
    **OPTIONS,
    "lr": Number(above=0, at_most=_most_lr, optional=True),
    "lr_decay_steps": Whole(optional=True),
}

_each_table = Kind((dict,))
RUNNER: dict[str, Rule] = {
    **_TRAINING,
    **OPTIONS,
    "sae": Kind((TrainingSAEConfig,)),
    **dict.fromkeys(("model_name", "model_class_name", "hook_name", "hook_eval"), Text()),
    "hook_head_index": Whole(optional=True),
    "dataset_path": Text(path=True, may_be_empty=True),  # not needed where the dataset itself is given
    **dict.fromkeys(("dataset_trust_remote_code", "streaming", "is_dataset_tokenized"), _flag),
    **dict.fromkeys(("use_chat_formatting", "use_cached_activations", "disable_concat_sequences"), _flag),
    **dict.fromkeys(("prepend_bos", "autocast_lm", "compile_llm", "compile_sae", "verbose"), _flag),
    **dict.fromkeys(("cached_activations_path", "from_pretrained_path"), _path),
    **dict.fromkeys(("output_path", "resume_from_checkpoint"), _path),
    "context_size": Whole(at_least=1, at_most=2**24),  # SAELens makes a list of all positions
    **dict.fromkeys(("n_batches_in_buffer", "store_batch_size_prompts"), _size),
    **dict.fromkeys(("training_tokens", "train_batch_size_tokens", "n_eval_batches"), _size),
    "eval_batch_size_prompts": Whole(at_least=1, optional=True),
    "seqpos_slice": Each(Whole(at_least=-_INT64, optional=True), at_most=3),
    "sequence_separator_token": Either((Whole(), Choice(("bos", "eos", "sep"))), optional=True),
    "activations_mixing_fraction": _share,
    "llm_device": Device(optional=True),
    "act_store_device": Device(also=("with_model",), optional=True),
    "prefetch_llm_batches": Either((_flag, Whole(at_most=_INT32))),
    "seed": _count,
    "dtype": Dtype(),
    **dict.fromkeys(("llm_compilation_mode", "sae_compilation_mode"), _text),
    "dead_feature_threshold": _share,
    "model_kwargs": _each_table,
    "model_from_pretrained_kwargs": Kind((dict,), optional=True),
    **dict.fromkeys(("sae_lens_version", "sae_lens_training_version"), Text()),
    "exclude_special_tokens": Either((_flag, Each(Whole()))),
}
MULTI_RUNNER: dict[str, Rule] = {
    **RUNNER,
    "saes": Kind((Mapping,)),
    "hook_names": Either((Text(), Kind((Mapping,)))),
    "hook_head_indices": Either((Whole(), Kind((Mapping,))), optional=True),
    "evaluator": Anything(),
    **dict.fromkeys(("_hook_names_per_sae", "_hook_head_indices_per_sae"), _each_table),
}
SYNTHETIC_RUNNER: dict[str, Rule] = {
    **_TRAINING,
    "synthetic_model": Anything(),
    "sae": Kind((TrainingSAEConfig,)),
    **dict.fromkeys(("training_samples", "batch_size", "eval_samples"), _size),
    "eval_frequency": _count,
    **dict.fromkeys(("autocast_sae", "autocast_data", "save_synthetic_model", "run_final_eval"), _flag),
    "output_path": _path,
    "sae_lens_version": Text(),
}


def check_schedule(cfg: Any, *, total: str = "total_training_samples", batch: str = "train_batch_size_samples") -> None:
    """What SAELens's schedules divide by, and where their parts lie: of fields that are each by their rules.

    ``lr``, ``lr_end`` and ``lr_decay_steps`` may be None still. Raises ValueError.
    """
    samples, size = getattr(cfg, total), getattr(cfg, batch)
    steps = samples // size
    if steps < 1:
        raise ValueError(f"{total} must be at least {batch}, {size}, for one training step; got {samples}")
    warm_up, decay = cfg.lr_warm_up_steps, cfg.lr_decay_steps or 0
    schedule = cfg.lr_scheduler_name.lower()
    own = steps - warm_up - decay  # of the schedule itself, between warm-up and decay
    needed = {"constant": 0, "cosineannealing": 1}.get(schedule, cfg.n_restart_cycles)
    if own < needed:
        of_its_own = f", and leave {needed} for lr_scheduler_name={schedule!r}" if needed else ""
        if schedule == "cosineannealingwarmrestarts":
            of_its_own += f" with n_restart_cycles={needed}"
        raise ValueError(
            f"lr_warm_up_steps and lr_decay_steps must fit into the {steps} training steps ({total} // {batch} = "
            f"{samples} // {size}){of_its_own}; got {warm_up} and {decay}"
        )
    if schedule != "constant" and cfg.lr_end is not None:
        if cfg.lr is not None and cfg.lr_end > cfg.lr:
            raise ValueError(f"lr_end must be at most lr={cfg.lr} with {schedule}; got {cfg.lr_end}")
        if decay and cfg.lr_end == 0:
            raise ValueError(f"lr_end must be positive with {schedule} and lr_decay_steps={decay}; got {cfg.lr_end}")
    if cfg.n_checkpoints > steps:
        raise ValueError(f"n_checkpoints must be at most the {steps} training steps; got {cfg.n_checkpoints}")
