"""Reports without a language model, without logs, and of what cannot be had; the command."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import D, F, K, randomize, switch_sae
from helpers.report_pages import Tags, plots_of
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from safetensors.torch import save_file

import sae_lens_switch
from sae_lens_switch import SwitchSAE, report
from sae_lens_switch.analysis import observe
from sae_lens_switch.report import language_model, load_run, main, write_report
from sae_lens_switch.training.history import FILENAME

pytestmark = [
    pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]


def test_without_a_model_the_page_has_what_weights_and_logs_give(output, tmp_path):
    sae = SwitchSAE.load_from_disk(output)
    sae.cfg.metadata.model_name = str(tmp_path / "gone")
    sae.save_model(str(tmp_path / "run"))
    for name in (FILENAME, "sparsity.safetensors"):
        shutil.copy(output / name, tmp_path / "run" / name)
    (tmp_path / "run" / "metrics.json").write_text('{"explained_variance": 0.625, "expert_load": [0.1, 0.2, 0.3, 0.4]}')
    page = write_report(tmp_path / "run").read_text()
    tags = Tags(page)
    assert tags.sections == [
        *("summary", "curves", "load", "density", "router", "alignment", "neighbours", "duplicates")
    ]
    assert "No text was read" in tags.text
    assert "62.5 %" in tags.text
    assert plots_of(page)["load"]["data"][0]["y"] == [10, 20, 30, 40]


def test_weights_alone_make_a_page(tmp_path):
    switch_sae().save_model(str(tmp_path / "switch"))
    randomize(TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=K))).save_model(str(tmp_path / "topk"))
    tags = Tags(write_report(tmp_path / "switch").read_text())
    assert tags.sections == ["summary", "curves", "router", "alignment", "neighbours", "duplicates"]
    assert "No curve was recorded" in tags.text
    assert "metadata name no" in tags.text
    sections = Tags(write_report(tmp_path / "topk", contexts=0).read_text()).sections
    assert sections == ["summary", "curves", "neighbours", "duplicates"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere/at-all"], "nowhere/at-all"),
        (["--dataset", "text.pkl"], "text.pkl"),
        (["--latents", "40"], "latents must be between 0 and 39; got 40"),
        (["--n-examples", "0"], "n_examples must be at least 1; got 0"),
        (["--contexts", "-3"], "contexts must be at least 1; got -3"),
        (["--threshold", "2"], "threshold must be between 0 and 1; got 2.0"),
        (["--history", "nothing.jsonl"], "there is no nothing.jsonl"),
    ],
)
def test_what_was_named_must_be_there_and_no_page_is_left_otherwise(options, message, output, tmp_path, capsys):
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit) as ended:
        main([str(output), "--output", str(page), *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_says_where_the_page_is(output, tmp_path, capsys):
    main([str(output), "--output", str(tmp_path / "sub" / "page.html"), "--contexts", "3"])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'sub' / 'page.html'} (")
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["page.html"]


def test_help_waits_for_no_library(tmp_path):
    """With the package around it empty: what that imports is not this command's affair."""
    code = f"""
import sys, types
package = types.ModuleType("sae_lens_switch")
package.__path__ = [{str(Path(sae_lens_switch.__file__).parent)!r}]
sys.modules["sae_lens_switch"] = package
from sae_lens_switch import report
try:
    report.main(["--help"])
except SystemExit:
    print(sorted({{"torch", "sae_lens", "numpy", "jinja2", "plotly"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m sae_lens_switch.report" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_every_public_name_of_the_report_is_there_and_no_other():
    assert all(callable(getattr(report, name)) for name in report.__all__)
    assert {*report.__all__} <= {*dir(report)}
    with pytest.raises(AttributeError, match="module 'sae_lens_switch.report' has no attribute 'nothing'"):
        _ = report.nothing


@pytest.mark.parametrize(
    "kwargs", [{"trust_remote_code": True}, {"weights_only": False}, {"attn_implementation": "a/b"}]
)
def test_metadata_may_not_run_code_unless_that_is_wanted(kwargs, output, tmp_path, monkeypatch):
    """An SAE may be anybody's, and names the language model that is loaded, and how."""
    sae = SwitchSAE.load_from_disk(output)
    sae.cfg.metadata.model_from_pretrained_kwargs = {"revision": "main", **kwargs}
    sae.save_model(str(tmp_path))
    run, given = load_run(tmp_path), []
    monkeypatch.setattr(
        language_model, "load_model", lambda *_, **options: given.append(options) or pytest.fail("loaded")
    )
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"loaded with {name}, which could run code; .* --trust-model-kwargs"):
        report.open_model(run, dataset=str(output / "held_out"))
    assert not given
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        report.open_model(run, dataset=str(output / "held_out"), trust_model_kwargs=True)
    assert given[0]["model_from_pretrained_kwargs"] == {"revision": "main", **kwargs}


def test_a_page_without_the_model_says_what_would_have_to_be_trusted(output, tmp_path):
    sae = SwitchSAE.load_from_disk(output)
    sae.cfg.metadata.model_from_pretrained_kwargs = {"trust_remote_code": True}
    sae.save_model(str(tmp_path))
    assert "--trust-model-kwargs" in Tags(write_report(tmp_path).read_text()).text


@pytest.mark.parametrize("content", [b"no safetensors", None])
def test_a_damaged_sparsity_is_named(content, tmp_path):
    switch_sae().save_model(str(tmp_path))
    file = tmp_path / "sparsity.safetensors"
    if content is None:
        save_file({"other": torch.zeros(F)}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="sparsity.safetensors must be a safetensors file that holds 'sparsity'"):
        load_run(tmp_path)


@pytest.mark.parametrize("architecture", ["sparse_batchtopk_transcoder", "switch_transcoder"])
def test_a_transcoder_is_refused_however_it_is_saved(architecture, tmp_path):
    sae_class, config_class = get_sae_training_class(architecture)
    fields = {"n_experts": 4} if architecture == "switch_transcoder" else {}
    randomize(sae_class(config_class(d_in=D, d_out=D, d_sae=40, k=K, **fields))).save_inference_model(tmp_path)
    with pytest.raises(ValueError, match="the SAE of a report must not be a transcoder; got "):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="sae must not be a transcoder; got "):
        observe(SAE.load_from_disk(tmp_path), [torch.randn(4, D)])
