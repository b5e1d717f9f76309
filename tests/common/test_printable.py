"""Names and messages that mean harm reach no terminal, log, report or model card as they are."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sae_lens
from helpers import HOOK, ROOT, D, E, F, K, run_fields
from helpers.on_disk import saved_sae
from yaml import safe_load

from sae_lens_switch import report
from sae_lens_switch.common import printable
from sae_lens_switch.hub.model_card import model_card
from sae_lens_switch.train import main

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\x00\u202e\ud800end"
HARMFUL = [*map(chr, (*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x202E, 0x2066, 0xD800, 0xDFFF))]


def test_what_is_shown_holds_nothing_that_a_terminal_obeys():
    assert printable.printable("a\x1b[31mb\r\x9b\ud800") == "a\\x1b[31mb\\r\\x9b\\ud800"
    assert not set(printable.printable("".join(HARMFUL))) & set(HARMFUL)
    kept = "Zwölf\tBoxkämpfer\n日本語 \u200d\xa0עברית 🎉"
    assert printable.printable(kept) == kept
    assert printable.printable(Path("x\x07")) == "x\\x07"


def shown_without_harm(text: str) -> bool:
    return not set(text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass")) & set(HARMFUL)


def test_names_in_a_report_and_its_file_do_no_harm(tmp_path, capsys):
    run = saved_sae(tmp_path / "run\x1b[2J\x07", model_name=EVIL, hook_name=f"blocks.{EVIL}", dataset_path=EVIL)
    report.main([str(run), "--contexts", "0"])
    out, err = capsys.readouterr()
    assert "run\\x1b[2J\\x07/report.html" in out
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "\\x1b[2J" in page
    assert shown_without_harm(page.split("<script")[0])
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path / "no\x1b[2J")])
    assert end.value.code == 2
    out_after, err_after = capsys.readouterr()
    assert "no\\x1b[2J is no folder" in err_after
    assert all(map(shown_without_harm, (out, err, out_after, err_after)))


def test_names_in_a_model_card_do_no_harm():
    cfg = {"architecture": "switch", "d_in": D, "d_sae": F, "k": K, "n_experts": E, "gate": EVIL}
    cfg["metadata"] = {"model_name": EVIL, "hook_name": EVIL, "dataset_path": EVIL, "measured": {}}
    cfg["metadata"]["measured"] |= {"eval_dataset": EVIL, "evaluations": {EVIL: 0.5}}
    card = model_card("someone/saes", {EVIL: cfg}, front_matter={}, derived={"base_model": [EVIL], "datasets": []})
    assert shown_without_harm(card)
    assert safe_load(card.split("---")[1])["library_name"] == "saelens"


def test_names_and_messages_of_training_do_no_harm(tmp_path, capsys, caplog, model, dataset):
    file = tmp_path / "evil.json"
    settings = {"architecture": "switch", "d_in": D, "d_sae": F, "n_experts": E, "k": K, "hook_name": HOOK}
    name = EVIL.replace("\0", "")  # which no text may hold
    given = run_fields(tmp_path / "x\x1b[2J", dataset_path=name, log_to_wandb=False)
    settings |= {n: v for n, v in given.items() if n not in ("logger", "hook_name")}
    file.write_text(json.dumps(settings))
    assert main(["--config", str(file), "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert main(["--config", str(file), f"--{EVIL}"]) == 2
    assert main(["--config", f"{file}{EVIL[:5]}"]) == 2
    file.write_text(json.dumps(settings | {"log_to_wandb": True}))
    assert main(["--config", str(file)]) == 2  # W&B would fail after training
    file.write_text(json.dumps(settings | {"hook_name": f"no{EVIL}"}))
    assert main(["--config", str(file), "--dry-run"]) == 2
    file.write_text(json.dumps(settings))
    assert main(["--config", str(file)], override_model=model, override_dataset=dataset) == 0
    more = capsys.readouterr()
    assert "saved: " in more.out
    assert "x\\x1b[2J" in more.out
    assert all(map(shown_without_harm, (*shown, *more, caplog.text)))


def test_our_log_and_in_a_command_saelens_too_do_no_harm(caplog):
    printable.logger.warning(f"passed over: {EVIL}")
    with printable.printable_logs():
        sae_lens.logger.warning("model %s", EVIL)
    assert sae_lens.logger.filters == []
    assert len(caplog.records) == 2
    assert shown_without_harm(caplog.text)


def test_every_message_of_ours_goes_through_it():
    for file in (ROOT / "sae_lens_switch").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        imported = {
            a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "sae_lens" for a in n.names
        }
        assert "logger" not in imported, file
        if file.name not in ("printable.py", "cost.py"):  # the cost's table is of numbers
            assert not calls & {"print", "sys.stderr.write", "sys.stdout.write"}, file


def test_output_that_cannot_be_encoded_or_that_nobody_reads_ends_no_run():
    program = """
import os, sys
from sae_lens_switch.common.printable import say
say("caf\\u00e9 \\ud800")
say("there", error=True)
read, write = os.pipe()
os.dup2(write, 1)
os.close(write)
os.close(read)
for _ in range(3):
    say("nobody reads this")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        timeout=600,
    )
    assert done.stdout == b"caf\\xe9 \\ud800\n"
    assert done.stderr.endswith(b"there\n")
    assert done.returncode == 0
