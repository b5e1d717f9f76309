"""The trainer's config: SAELens's, the options of our trainer, and the paper's schedule where none is given."""

from dataclasses import dataclass, fields, replace

from sae_lens.config import SAETrainerConfig
from typing_extensions import override

from sae_lens_switch.common import rules
from sae_lens_switch.training import field_rules
from sae_lens_switch.training.field_rules import OnCollapse, OptimizerName


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
        rules.check(self, field_rules.OPTIONS)


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
        rules.check(self, field_rules.TRAINER)
        field_rules.check_schedule(self)

    def resolved(self, d_sae: int) -> "SparseSAETrainerConfig":
        """With every None that depends on the SAE or the length of training filled in. Raises ValueError."""
        self.check()
        lr = scaling_law_lr(d_sae) if self.lr is None else self.lr
        constant = self.lr_scheduler_name.lower() == "constant"
        decay = default_decay(self.total_training_steps, self.lr_warm_up_steps) if constant else 0
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


def scaling_law_lr(d_sae: int) -> float:
    """2e-4 / sqrt(d_sae / 2^14), the learning rate of arXiv 2410.08201 (from Gao et al. 2024)."""
    if d_sae < 1:
        raise ValueError(f"d_sae must be at least 1; got {d_sae}")
    return 2e-4 / (d_sae / 2**14) ** 0.5


def default_decay(steps: int, warm_up: int) -> int:
    """The last 20 % of a run, or what the warm-up leaves of it."""
    return max(0, min(steps // 5, steps - warm_up))
