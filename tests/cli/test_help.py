"""The help: what it lists and explains, and that what is made in advance is what introspection finds."""

import re

import pytest
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_switch.cli import help as help_module
from sae_lens_switch.cli.flags import HIDDEN
from sae_lens_switch.cli.settings import settings_of
from sae_lens_switch.train import main


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_architectures_and_says_where_their_flags_are(capsys, flag):
    assert main([flag]) == 0
    text = capsys.readouterr().out
    for name in SAE_TRAINING_CLASS_REGISTRY:
        assert re.search(rf"^  {name} +\S", text, re.MULTILINE)
    assert "--architecture switch --help" in text
    assert "--n-experts 32" in text  # of the example


def test_help_of_an_architecture_explains_every_flag(capsys):
    assert main(["--architecture", "switch", "--help"]) == 0
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    for expected in (
        "--n-experts int Experts E; must divide d_sae.",
        "--d-in int Width of the activations at hook_name. (required)",
        "--resume str|none A checkpoint to resume from",
        "--load-balance-scale variance|d_in",
        "(default: 2e-4 / sqrt(d_sae / 2^14))",
        "--streaming [true|false]",
    ):
        assert expected in flat
    assert "hook-eval" not in text  # deprecated: accepted, not shown
    assert max(map(len, text.splitlines())) <= 120
    settings = [s for s in settings_of("switch").values() if s.name not in HIDDEN]
    assert all(s.flag in text for s in settings)
    assert [s.name for s in settings if not s.doc and s.home != "logger" and not s.name.startswith("sae.")] == []
    assert main(["--architecture", "topk", "--help"]) == 0
    assert "n-experts" not in capsys.readouterr().out.split("what to do:")[1]


def test_the_help_made_in_advance_is_what_introspection_finds(tmp_path):
    known = help_module.known_help()
    if known is None:
        pytest.skip("help.json was made from other sources of SAELens than are installed")
    help_module.write_known_help(tmp_path / "help.json")
    now = (tmp_path / "help.json").read_text()
    assert now == help_module._FILE.read_text(), "python -m sae_lens_switch.cli.help writes it anew"
    assert known.flags.keys() == known.architectures.keys() == SAE_TRAINING_CLASS_REGISTRY.keys()


def test_the_help_made_in_advance_is_left_aside_for_other_sources_of_saelens(monkeypatch):
    monkeypatch.setattr(help_module, "sources_digest", lambda: "of another version")
    assert help_module.known_help() is None


def test_the_digest_of_saelens_follows_its_configs_and_not_its_version(tmp_path, monkeypatch):
    package = tmp_path / "sae_lens"
    (package / "saes").mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "1"\nregister()\n')
    (package / "config.py").write_text("a = 1")
    (package / "saes" / "sae.py").write_text("b = 1")
    spec = type("Spec", (), {"origin": str(package / "__init__.py")})
    monkeypatch.setattr(help_module, "find_spec", lambda _: spec)
    before = help_module.sources_digest()
    (package / "__init__.py").write_text('__version__ = "2"\nregister()\n')
    assert help_module.sources_digest() == before
    for file in ("__init__.py", "config.py", "saes/sae.py"):
        (package / file).write_text((package / file).read_text() + "\nc = 2")
        assert help_module.sources_digest() != before
        before = help_module.sources_digest()
