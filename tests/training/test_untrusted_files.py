"""What is read from files is never run, and broken or odd files do no harm."""

import ast
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.on_disk import saved_sae

from sae_lens_switch import report
from sae_lens_switch.training.history import History, read_history


def loads_of(file: Path) -> list[str]:
    """Calls that read what could hold code, without saying that they do not run it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        unsafe = {
            "torch.load": options.get("weights_only") != "True",
            "yaml.load": True,
            "yaml.unsafe_load": True,
            "yaml.full_load": True,
            "np.load": options.get("allow_pickle") != "False",
            "numpy.load": options.get("allow_pickle") != "False",
            "pd.read_pickle": True,
            "eval": True,
            "exec": True,
        }
        if unsafe.get(name) or name.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"):
            found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_what_is_read_from_files_is_never_run():
    files = [
        f for folder in ("sae_lens_switch", "kernels", "benchmarks", "examples") for f in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 40
    assert [call for file in files for call in loads_of(file)] == []


def test_the_search_finds_what_it_looks_for(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "x.py"
    file.write_text("torch.load(f)\ntorch.load(f, weights_only=True)\npickle.loads(x)\nyaml.load(x, L)\nnp.load(f)\n")
    assert [call.split(": ")[0] for call in loads_of(file)] == ["x.py:1", "x.py:3", "x.py:4", "x.py:5"]


BROKEN = {
    "no JSON": b'{"step": 1}\n{"step": 2, "losses/m',
    "no object": b"[1, 2]\n",
    "binary": bytes(range(256)) * 9,
    "deep": b"[" * 200_000 + b"]" * 200_000,
    "deep object": b'{"a":' * 100_000,
    "huge whole number": b'{"step": ' + b"9" * 10_000 + b"}\n",
    "empty lines": b"\n\n\n",
}

# Readable, with values that no curve can have.
ODD = [
    '{"step": 1, "losses/mse_loss": NaN, "routing/load": [0.5, Infinity, "x", 0.1]}',
    '{"step": 1' + "0" * 400 + ', "losses/mse_loss": 1e999, "routing/load": 7, "metrics/l0": {"a": [[[1]]]}}',
    '{"step": "\\ud800\\u001b[2J", "losses/mse_loss": [1, 2], "routing/load": [1, 2, 3, -Infinity]}',
    '{"step": null, "losses/mse_loss": true, "routing/load": [[1], [2], [3], [4]], "metrics/explained_variance": "x"}',
    '{"step": 5, "losses/mse_loss": 2.5, "routing/load": [0.25, 0.25, 0.25, 0.25], "\\ud800\\u001b": 1}',
    '{"step": 6, "losses/mse_loss": -1e308, "routing/load": [0.25, null, 1e400, 0.25], "details/x": {}}',
]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_history_does_no_harm_to_a_report_or_a_resumed_run(kind, tmp_path, caplog):
    run = saved_sae(tmp_path / "run")
    (run / "history.jsonl").write_bytes(BROKEN[kind])
    page = report.write_report(run, contexts=0).read_text(encoding="utf-8")
    assert "The history of the run cannot be read: " in page
    with pytest.raises(ValueError, match=r"history.jsonl, line \d+: expected"):
        report.load_run(run, history=run / "history.jsonl")
    history = History(100)
    history.rows = [{"step": 1}]
    history.load(run)
    assert history.rows == []
    assert "the curves begin anew: " in caplog.text


def test_a_history_that_is_too_large_is_not_read(tmp_path):
    file = tmp_path / "history.jsonl"
    with open(file, "wb") as handle:
        handle.truncate(1 << 40)  # it takes no space on disk
    with pytest.raises(ValueError, match="expected at most 268,435,456 bytes; got 1,099,511,627,776"):
        read_history(file)


def test_a_damaged_wandb_file_is_a_value_error(tmp_path):
    file = tmp_path / "run.wandb"
    data = b"\xff" * 40
    file.write_bytes(b":W&B\x00\x00\x00" + b"\x00" * 4 + len(data).to_bytes(2, "little") + b"\x01" + data)
    with pytest.raises(ValueError, match="is damaged: "):
        read_history(file)


def test_odd_values_in_a_history_are_left_out(tmp_path):
    run = saved_sae(tmp_path / "run")
    (run / "history.jsonl").write_text("\n".join(ODD) + "\n")
    rows = read_history(run / "history.jsonl")
    assert [row.get("losses/mse_loss", "none") for row in rows] == [None, None, [1, 2], "none", 2.5, -1e308]
    assert [row.get("routing/load", "none") for row in rows] == [
        *("none", 7, [1, 2, 3, None], "none"),
        *([0.25] * 4, [0.25, None, None, 0.25]),
    ]
    page = report.write_report(run, contexts=0).read_text(encoding="utf-8")
    assert "plot-loss" in page
    assert "plot-load-history" in page
    history = History(100)
    history.load(run)
    history.save(tmp_path)
    assert read_history(tmp_path / "history.jsonl") == rows


@pytest.mark.parametrize("text", ["[" * 10**5, '{"n": ' + "9" * 9999 + "}", "NaN", "\x00\x01"])
def test_a_broken_metrics_file_is_named(text, tmp_path):
    run = saved_sae(tmp_path / "run")
    (run / "metrics.json").write_text(text)
    if text == "NaN":  # which Python reads; there is no table in it
        assert report.load_run(run).metrics == {}
    else:
        with pytest.raises(ValueError, match="metrics.json is not JSON"):
            report.load_run(run)
    (run / "metrics.json").write_text(
        '{"l0": 1e999, "explained_variance": NaN, "ce_loss_recovered": 1' + "0" * 400 + "}"
    )
    assert "Summary" in report.write_report(run, contexts=0).read_text(encoding="utf-8")
