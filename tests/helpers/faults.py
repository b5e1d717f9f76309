"""Training runs that are interrupted, killed or fed with bad numbers, and what is compared of them."""

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers import D, activations
from sae_lens_switch import (
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)

F, E, K = 96, 4, 3
BATCH, STEPS = 32, 30
PATIENCE = 600  # seconds; a machine may be busy with other things
ARCHITECTURES = ["switch", "sparse_topk"]


def make_sae(architecture: str = "switch", **fields: Any) -> Any:
    torch.manual_seed(0)
    if architecture == "switch":
        return SwitchTrainingSAE(SwitchTrainingSAEConfig(d_in=D, d_sae=F, n_experts=E, **{"k": K, **fields}))
    return SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=D, d_sae=F, **{"k": K, **fields}))


def make_trainer(
    path: Path | None,
    source: Any = None,
    sae: dict[str, Any] | None = None,
    trainer_class: Any = SparseSAETrainer,
    **fields: Any,
) -> Any:
    cfg = {
        "total_training_samples": STEPS * BATCH,
        "train_batch_size_samples": BATCH,
        "lr": 1e-2,
        "checkpoint_path": None if path is None else str(path),
        **fields,
    }
    return trainer_class(
        SparseSAETrainerConfig(**cfg), make_sae(**(sae or {})), data("generator") if source is None else source
    )


def data(kind: str, n: int = STEPS + 10) -> Any:
    if kind == "tensor":  # a few epochs
        return torch.cat(activations(13, batch=BATCH))
    return (batch for batch in activations(n, batch=BATCH))


def interrupted_after(n: int, batches: Iterable[Tensor] | None = None) -> Iterator[Tensor]:
    yield from islice(data("generator") if batches is None else batches, n)
    raise KeyboardInterrupt


def everything(trainer: Any) -> dict[str, Any]:
    """All that training has changed, by name."""
    found = {f"weights of {name}": t.clone() for name, t in trainer.sae.state_dict().items()}
    optimizer = trainer.optimizer.state_dict()
    for i, state in optimizer["state"].items():
        found |= {f"{name} of parameter {i}": t.clone() for name, t in state.items()}
    found |= {f"master of parameter {i}": t.clone() for i, t in optimizer.get("masters", {}).items()}
    found["frequencies"] = trainer.act_freq_scores.clone()
    found["since fired"] = trainer.n_forward_passes_since_fired
    for name in ("n_training_steps", "n_training_samples", "n_frac_active_samples"):
        found[name] = torch.tensor(getattr(trainer, name))
    found["learning rate"] = torch.tensor(trainer.lr_scheduler.get_last_lr(), dtype=torch.float64)
    if getattr(trainer, "routing", None) is not None:
        found |= {f"routing {name}": t.clone() for name, t in trainer.routing.state_dict().items()}
    return found


def what_differs(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [n for n in a.keys() | b.keys() if n not in a or n not in b or not same_bits(a[n], b[n])]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def uninterrupted(source: Any = None, **setup: Any) -> dict[str, Tensor]:
    trainer = make_trainer(None, source, **setup)
    trainer.fit()
    return everything(trainer)


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir()) if path.exists() else []


def wait_until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)
