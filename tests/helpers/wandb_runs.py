"""Offline runs of W&B, and their files read back."""

import base64
import hashlib
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import wandb
from sae_lens import LoggingConfig
from wandb.proto.wandb_internal_pb2 import Record

from helpers import E

# Eight steps of 64 tokens: logged on every second, evaluated on every fourth, sparsity on every fourth, one checkpoint.
STEPS, BATCH, WINDOW = 8, 64, 2
LOGGED, EVALUATED, SPARSITY = {1, 3, 5, 7}, {3, 7}, {4, 8}
FIELDS = {"training_tokens": STEPS * BATCH, "dead_feature_window": WINDOW, "feature_sampling_window": 4}
OF_WANDB = {"_step", "_runtime", "_timestamp"}
OF_EVERY_SAE = {
    "losses/overall_loss",
    "losses/mse_loss",
    "losses/auxiliary_reconstruction_loss",
    "metrics/explained_variance",
    "metrics/explained_variance_legacy",
    "metrics/explained_variance_legacy_std",
    "metrics/l0",
    "sparsity/dead_features",
    "sparsity/mean_passes_since_fired",
    "details/current_learning_rate",
    "details/n_training_samples",
    "details/skipped_steps",
}
OF_SWITCH = {
    "losses/load_balance_loss",
    "details/load_balance_coefficient",
    *(f"routing/expert_load_{name}" for name in ("max", "min", "entropy")),
    *(f"routing/{name}" for name in ("gate_mean", "load_balance", "dead_experts", "interventions")),
    *(f"routing/{name}_expert_{e}" for name in ("load", "dead_latents") for e in range(E)),
}
HISTOGRAMS_OF_SWITCH = {
    "weights/W_router_norms",
    *(f"routing/{name}_histogram" for name in ("load", "gates", "dead_latents", "latent_density")),
}
OF_SPARSITY_WINDOW = {
    *("metrics/mean_log10_feature_sparsity", "plots/feature_density_line_chart"),
    *("sparsity/below_1e-5", "sparsity/below_1e-6"),
}


def logging() -> LoggingConfig:
    return LoggingConfig(wandb_project="tested", run_name="tiny run", wandb_log_frequency=2, eval_every_n_wandb_logs=2)


@contextmanager
def offline(folder: Path) -> Iterator[None]:
    """W&B as it is, but offline and writing only below ``folder``."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
            patch.setenv(f"WANDB_{name}", str(folder))
        for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "ERROR_REPORTING": "false"}.items():
            patch.setenv(f"WANDB_{name}", value)
        wandb.teardown()  # settings are read from the environment once
        try:
            yield
        finally:
            wandb.teardown()


def written(folder: Path) -> list[Record]:
    """The records of the only run below ``folder``: a LevelDB log behind seven bytes of header."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, records, whole, place = file.read_bytes(), [], b"", 7
    assert data[:4] == b":W&B"
    while place < len(data):
        left_in_block = 2**15 - place % 2**15
        if left_in_block < 7:
            place += left_in_block
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            records.append(Record.FromString(whole))
            whole = b""
    assert records[-1].WhichOneof("record_type") in ("exit", "final", "footer")
    return records


def history(records: list[Record]) -> dict[int, dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.HasField("history"):
            assert record.history.step.num not in rows
            row = rows[record.history.step.num] = {}
            for item in record.history.item:
                *parents, name = item.nested_key or [item.key]
                place = row
                for parent in parents:
                    place = place.setdefault(parent, {})
                place[name] = json.loads(item.value_json)
    return {step: {name: value for name, value in row.items() if name not in OF_WANDB} for step, row in rows.items()}


def artifacts(records: list[Record]) -> list[tuple[str, set[str], dict[str, str]]]:
    """Type, aliases, and the digest of each file."""
    logged = [record.artifact for record in records if record.HasField("artifact")]
    return [(a.type, set(a.aliases), {file.path: file.digest for file in a.manifest.contents}) for a in logged]


def digests(folder: Path, *names: str) -> dict[str, str]:
    return {n: base64.b64encode(hashlib.md5((folder / n).read_bytes()).digest()).decode() for n in names}
