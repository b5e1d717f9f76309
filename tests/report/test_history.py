"""The history of a run, as written and read."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import wandb

from sae_lens_switch.training.history import FILENAME, History, read_history


def test_history_keeps_numbers_of_at_most_200_steps(tmp_path):
    history = History(1234)
    for step in range(1, 1235):
        if history.is_due(step):
            loads = {f"routing/load_expert_{e}": e / 10 for e in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9, 11)}
            history.add(step, {"loss": step / 3, "bad": math.nan, "n": step, "text": "no", "flag": True, **loads})
    assert len(history.rows) == 1234 // 7 == 176
    file = history.save(tmp_path)
    rows = read_history(file)
    assert rows == history.rows
    assert rows[0] == {"step": 7, "loss": 2.33333, "bad": None, "n": 7, "routing/load": [e / 10 for e in range(12)]}
    assert "NaN" not in file.read_text()
    again = History(1234)
    again.load(tmp_path)
    assert again.rows == rows
    again.load(tmp_path / "none")
    assert again.rows == []
    assert [p.name for p in tmp_path.iterdir()] == [FILENAME]


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 2: expected one JSON"), ("[1]", r"line 2: expected a JSON object")]
)
def test_a_damaged_history_is_named(line, message, tmp_path):
    (tmp_path / FILENAME).write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        read_history(tmp_path / FILENAME)


def test_the_history_of_a_run_that_kept_no_step_is_empty(tmp_path, caplog):
    history = History(10**6)
    assert read_history(history.save(tmp_path)) == []
    history.load(tmp_path)
    assert history.rows == []
    assert not caplog.text


@contextmanager
def wandb_offline(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
            patch.setenv(f"WANDB_{name}", str(folder))
        for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "ERROR_REPORTING": "false"}.items():
            patch.setenv(f"WANDB_{name}", value)
        wandb.teardown()
        try:
            yield
        finally:
            wandb.teardown()


def test_the_history_of_an_offline_wandb_run(tmp_path):
    with wandb_offline(tmp_path):
        run = wandb.init(project="tested")
        for step in range(200):  # more than one block of 32 KiB
            run.log(
                {"losses/mse_loss": 1 / (step + 1), **{f"routing/load_expert_{e}": e / 100 for e in range(12)}},
                step=step,
            )
        run.log({"model_performance_preservation": {"ce_loss_score": 0.5}, "plots/x": wandb.Histogram([1.0])}, step=200)
        run.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows = read_history(file)
    assert len(rows) == 201
    assert [row["losses/mse_loss"] for row in rows[:-1]] == pytest.approx([1 / (i + 1) for i in range(200)], rel=1e-5)
    assert all(row["routing/load"] == [e / 100 for e in range(12)] for row in rows[:-1])
    assert rows[-1]["model_performance_preservation/ce_loss_score"] == 0.5
    cut = tmp_path / "cut.wandb"
    cut.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert 50 < len(read_history(cut)) < 150  # of a run that was killed
    cut.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not a file of W&B"):
        read_history(cut)
