"""The trainer's config: SAELens's, the options of our trainer, and the paper's schedule where none is given."""

from dataclasses import dataclass, fields, replace

from sae_lens.config import SAETrainerConfig
from typing_extensions import override

from sae_lens_switch.common import rules
from sae_lens_switch.training import field_rules
from sae_lens_switch.training.field_rules import MomentsDtype, OnCollapse, OptimizerName


@dataclass(kw_only=True)
class TrainerOptions:
    """
    What SparseSAETrainer can do beyond SAELens's trainer.

    Args:
        optimizer (str): "adam", or "row_sparse_adam": lazy Adam, which only updates latents that were active in the step, at most k per token, however wide the dictionary.
        moments_dtype (str): Of Adam's moments of W_enc and W_dec: "float32", or "bfloat16", rounded stochastically, in half the memory; weights of at most float32.
        gradient_accumulation_steps (int): Number of parts in which each batch is computed, one after the other, in the memory of one part; their gradients are summed. Batch statistics, such as the load balance, are computed per part.
        cuda_graph (bool): Capture the training step as one CUDA graph and replay it, which removes the host's part, most of a small step. Results are the same but for the learning rate's rounding to float32. Requires "adam", one of our architectures and, with an auxiliary loss, an aux_k up to the latents of an expert; dead latents are then found by encoding with all. Nothing is captured on a CPU.
        expert_parallel (int): Number of processes that the experts of a Switch SAE are divided over; it divides n_experts and the number of processes that torchrun has started. With 1, every process has all experts, and the processes divide the data.
        latent_parallel (int): Number of processes that the latents of a sparse_topk, sparse_batchtopk or sparse_matryoshka_batchtopk SAE are divided over; it divides d_sae and the number of processes that torchrun has started. With 1, every process has all latents, and the processes divide the data.
        rank_timeout (float): Seconds after which a process of a parallel run that does not answer counts as lost, and the others stop. Longer than it takes to write a checkpoint.
        max_grad_norm (float | None): Gradients are clipped to this total norm. None: they are not.
        resume (str | None): A checkpoint to resume from, or "latest": the newest intact one below checkpoint_path, if there is one.
        keep_checkpoints (int | None): Number of checkpoints to keep; older ones are removed. None: keep all. The final one is always kept.
        max_skipped_steps (int): Steps with a non-finite loss or gradient are skipped; after this many in a row training stops.
        on_collapse (str): What to do when the router sends nearly everything to few experts, besides a warning. "report": nothing. "raise_coefficient": the load-balance coefficient doubles. "reseed": experts without tokens are re-initialised as copies of the busiest one.
        collapse_share (float | None): Share of the tokens above which an expert counts as overloaded. None: half-way between an even share and 1.
        collapse_patience (int): Consecutive steps above collapse_share, or with no tokens at all, before an expert counts as collapsed.
    """

    optimizer: OptimizerName = "adam"
    moments_dtype: MomentsDtype = "float32"
    gradient_accumulation_steps: int = 1
    cuda_graph: bool = False
    expert_parallel: int = 1
    latent_parallel: int = 1
    rank_timeout: float = 600.0
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
        lr_decay_steps (int | None): Final steps over which the learning rate decays to 0. None: the last 20 % of a constant schedule.
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


def refuse_several_processes(options: TrainerOptions) -> None:
    """Raises ValueError for experts or latents on several processes, where there is but one."""
    trainers = {"expert_parallel": "ParallelSparseSAETrainer", "latent_parallel": "LatentParallelSAETrainer"}
    for name, trainer in trainers.items():
        if vars(options)[name] > 1:
            raise ValueError(
                f"{name} must be 1 in a run of one process; got {vars(options)[name]}. Start several with torchrun, and "
                f"train with {trainer} or python -m sae_lens_switch.train"
            )


def scaling_law_lr(d_sae: int) -> float:
    """2e-4 / sqrt(d_sae / 2^14), the learning rate of arXiv 2410.08201 (from Gao et al. 2024)."""
    if d_sae < 1:
        raise ValueError(f"d_sae must be at least 1; got {d_sae}")
    return 2e-4 / (d_sae / 2**14) ** 0.5


def default_decay(steps: int, warm_up: int) -> int:
    """The last 20 % of a run, or fewer steps if the warm-up is longer than the rest."""
    return max(0, min(steps // 5, steps - warm_up))
