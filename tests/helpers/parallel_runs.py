"""Small runs on one process and on several, to be held against each other."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers import activations
from helpers.processes import on_processes
from helpers.resumed import make_sae
from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig
from sae_lens_switch.parallel import LatentParallelSAETrainer, ParallelSparseSAETrainer
from sae_lens_switch.train import main

BATCH = 64


def config(steps: int, **fields: Any) -> SparseSAETrainerConfig:
    fields = {"lr": 3e-3, "device": "cpu", "dead_feature_window": 2, "feature_sampling_window": 7, **fields}
    return SparseSAETrainerConfig(total_training_samples=steps * BATCH, train_batch_size_samples=BATCH, **fields)


def signal_in_step(trainer: Any, number: int) -> None:
    """The second process gets SIGTERM as it begins the step with this number, from 0."""
    step = trainer.step

    def signalled(batch: Tensor):
        if trainer.n_training_steps == number and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batch)

    trainer.step = signalled


def tokens() -> Tensor:
    return torch.cat(activations(5, batch=BATCH))


def result(trainer: Any, sae: Any) -> dict[str, Any]:
    return {
        "weights": {name: p.detach().clone() for name, p in sae.named_parameters()},
        "buffers": {name: t.clone() for name, t in sae.named_buffers()},
        "rows": trainer.history.rows,
        "samples": trainer.n_training_samples,
        "density": trainer.feature_sparsity,
        "skipped": trainer.n_skipped_steps,
        "metadata": {name: sae.cfg.metadata[name] for name in ("l0", "num_dead_features")},
    }


def alone(
    steps: int,
    sae: dict[str, Any] | None = None,
    *,
    make: Callable[[], Any] | None = None,
    source: Any = None,
    **fields: Any,
) -> dict[str, Any]:
    made = make() if make is not None else make_sae(**(sae or {}))
    trainer = SparseSAETrainer(config(steps, **fields), made, tokens() if source is None else source)
    return result(trainer, trainer.fit())


def together(
    n: int,
    folder: Path,
    steps: int,
    sae: dict[str, Any] | None = None,
    *,
    make: Callable[[], Any] | None = None,
    source: Any = None,
    trainer_class: Any = ParallelSparseSAETrainer,
    divided_by: str = "expert_parallel",
    **fields: Any,
) -> list[dict[str, Any]]:
    """On ``n`` processes, with experts or latents divided over all of them; a source may be a function."""

    def run() -> dict[str, Any]:
        made = make() if make is not None else make_sae(**(sae or {}))
        cfg = config(steps, **{divided_by: n, **fields})
        given = source() if callable(source) else source
        trainer = trainer_class(cfg, made, tokens() if given is None else given)
        return result(trainer, trainer.fit().gathered())

    return on_processes(n, run, folder)


def go_on_together(
    n: int,
    folder: Path,
    until: tuple[int, int],
    make: Callable[[], Any],
    trainer_class: Any,
    source: Tensor | None = None,
    **fields: Any,
) -> list[dict[str, Any]]:
    """On ``n`` processes, from the newest checkpoint in ``folder`` if there is one, to a step of so many; saved there.

    To the last of them as a run ends.
    """
    stop, steps = until

    def run() -> dict[str, Any]:
        cfg = config(steps, **{"resume": "latest", "checkpoint_path": str(folder), **fields})
        trainer = trainer_class(cfg, make(), tokens() if source is None else source)
        if stop == steps:
            return result(trainer, trainer.fit().gathered())
        trainer.resume()
        trainer._estimate_normalization()
        while trainer.n_training_steps < stop:
            trainer.maybe_reset_sparsity()
            trainer._step_and_log(trainer._next_batch(), trainer._progress())
        trainer.save_checkpoint(str(trainer.n_training_samples))
        return result(trainer, trainer.sae.gathered())

    return on_processes(n, run, folder.parent)


def command_together(n: int, folder: Path, argv: list[str], model: Any, dataset: Any) -> list[int]:
    """Exit codes of the train command on ``n`` processes that torchrun has started."""

    def command() -> int:
        as_by_torchrun()
        return main(argv, override_model=model, override_dataset=dataset)

    return on_processes(n, command, folder)


def as_by_torchrun() -> None:
    """Give this process the environment that torchrun gives."""
    os.environ["RANK"] = str(torch.distributed.get_rank())
    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())


latents_together = partial(together, trainer_class=LatentParallelSAETrainer, divided_by="latent_parallel")


def assert_same_run(found: dict[str, Any], expected: dict[str, Any], rtol: float = 5e-4, atol: float = 5e-5) -> None:
    """But for rounding: weights and buffers, what was logged, and what is counted."""
    tensors = found["weights"] | found["buffers"]
    for name, weight in (expected["weights"] | expected["buffers"]).items():
        torch.testing.assert_close(
            tensors[name], weight, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch.testing.assert_close(found["density"], expected["density"], rtol=0, atol=max(1e-6, atol))
    assert found["samples"] == expected["samples"]
    assert len(found["rows"]) == len(expected["rows"])
    for row, row_alone in zip(found["rows"], expected["rows"], strict=True):
        assert row.keys() == row_alone.keys()
        for name, value in row_alone.items():
            as_tensors = (torch.tensor(_numbers(v), dtype=torch.float64) for v in (row[name], value))
            torch.testing.assert_close(
                *as_tensors, rtol=20 * rtol, atol=20 * atol, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
            )
    assert found["metadata"]["num_dead_features"] == expected["metadata"]["num_dead_features"]


def shared_bits(found: dict[str, Any]) -> list[bytes]:
    tensors = (*found["weights"].values(), *found["buffers"].values())
    return [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def _numbers(value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    return [float("nan") if v is None else float(v) for v in values]
