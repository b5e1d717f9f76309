"""SAEs to the Hub and back."""

import inspect
import re
from functools import partial

import pytest
import sae_lens
import torch
from helpers import D, F
from helpers.hub_saes import (
    LOG_SPARSITY,
    REPO,
    X,
    card_of,
    config_of,
    described,
    in_fresh_process,
    nothing_sent,
    switch,
    training_switch,
    training_topk,
    upload,
    upload_with_card,
)
from huggingface_hub.errors import HfHubHTTPError
from sae_lens import SAE
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import save_file

from sae_lens_switch.hub import upload_saes_to_huggingface, verified_loader


def test_the_signature_begins_as_saelens_has_it():
    stock = inspect.signature(sae_lens.upload_saes_to_huggingface).parameters
    ours = inspect.signature(upload_saes_to_huggingface).parameters
    assert list(ours)[: len(stock)] == list(stock)
    for name, parameter in stock.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind)
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in list(ours.values())[len(stock) :])


def test_there_and_back_by_the_code_in_the_card(hub, tmp_path):
    """With stock SAELens in a fresh process: topk without the plugin, switch with one import."""
    saes = {"layer_8/switch": described(training_switch()), "layer_8/topk": described(training_topk())}
    before = {name: p.clone() for sae in saes.values() for name, p in sae.state_dict().items()}
    info = upload_with_card(saes, log_sparsity={"layer_8/topk": LOG_SPARSITY}, license="mit")
    assert info.oid == hub.repos[REPO].branches["main"]
    after = {name: p for sae in saes.values() for name, p in sae.state_dict().items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    code = re.findall(r"```python\n(.*?)```", card_of(hub), re.DOTALL)
    (without,) = (block for block in code if "layer_8/topk" in block)
    (with_plugin,) = (block for block in code if "layer_8/switch" in block)
    assert "sae_lens_switch" not in without

    torch.save(X, tmp_path / "x.pt")
    expected = {name: sae(X).detach() for name, sae in saes.items()}
    result = in_fresh_process(
        hub,
        tmp_path,
        f"""
x = torch.load("x.pt")
{without}
result["out"], result["type"] = sae(x).detach(), type(sae).__module__
result["sparsity"] = SAE.from_pretrained_with_cfg_and_sparsity({REPO!r}, "layer_8/topk")[2]
try:
    SAE.from_pretrained({REPO!r}, "layer_8/switch")
except KeyError as error:
    result["error"] = repr(error)
try:
    SAE.from_pretrained({REPO!r}, "layer_8/none")
except Exception as error:
    result["missing"] = str(error)
assert "sae_lens_switch" not in sys.modules
{with_plugin}
result["switch"], result["switch_type"] = sae(x).detach(), type(sae).__name__
""",
    )
    assert (result["type"], result["switch_type"]) == ("sae_lens.saes.topk_sae", "SwitchSAE")
    torch.testing.assert_close(result["out"], expected["layer_8/topk"])
    torch.testing.assert_close(result["switch"], expected["layer_8/switch"])
    assert torch.equal(result["sparsity"], LOG_SPARSITY)
    assert result["error"] == "KeyError('switch')"
    assert "`KeyError: 'switch'`" in card_of(hub)
    assert "Entry Not Found" in result["missing"]
    assert "layer_8/none/cfg.json" in result["missing"]


def test_what_is_committed_is_for_inference_and_whole(hub, tmp_path):
    training_switch().save_model(tmp_path / "checkpoint")  # as training leaves it
    training_topk().save_inference_model(tmp_path / "final")
    (tmp_path / "final" / "runner_cfg.json").write_text("{}")
    (tmp_path / "final" / "trainer_state.pt").write_bytes(b"not ours to publish")
    save_file({"sparsity": LOG_SPARSITY}, tmp_path / "checkpoint" / "sparsity.safetensors")
    torch.manual_seed(3)
    upload({"checkpoint": tmp_path / "checkpoint", "final": str(tmp_path / "final"), "sae": switch()})
    assert hub.repos[REPO].messages == ["initial commit", "Upload SAEs checkpoint, final, sae"]
    files = hub.repos[REPO].files()
    assert set(files) == {
        ".gitattributes",
        *(f"{i}/{name}" for i in ("checkpoint", "final", "sae") for name in ("cfg.json", "sae_weights.safetensors")),
        "checkpoint/sparsity.safetensors",
        "final/runner_cfg.json",
    }
    weights = (tmp_path / "final" / "sae_weights.safetensors").read_bytes()
    assert files["final/sae_weights.safetensors"].data == weights
    for sae_id in ("checkpoint", "final", "sae"):
        cfg = config_of(hub, sae_id)
        assert cfg["architecture"] == ("topk" if sae_id == "final" else "switch")
        assert "decoder_init_norm" not in cfg
        assert cfg["metadata"]["weights_sha256"] == files[f"{sae_id}/sae_weights.safetensors"].sha256
        requires = cfg["metadata"].get("requires")
        assert requires is None if sae_id == "final" else requires.startswith("sae_lens_switch>=")
    assert config_of(hub, "checkpoint")["metadata"]["training_architecture"] == "switch"


def test_other_architectures_and_unfolded_checkpoints(hub, tmp_path):
    standard = StandardSAE(StandardSAEConfig(d_in=D, d_sae=F))
    standard.b_dec.data.normal_()
    sae = training_switch(normalize_activations="expected_average_only_in")
    sae.b_dec.data.normal_()
    with pytest.raises(ValueError, match="normalize_activations='expected_average_only_in'"):
        upload({"sae": sae})
    assert nothing_sent(hub)
    sae.save_model(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="fold_activation_norm_scaling_factor"):
        upload({"sae": tmp_path / "checkpoint"})
    ActivationScaler(scaling_factor=2.5).save(str(tmp_path / "checkpoint" / "activation_scaler.json"))
    upload({"standard": standard, "folded": tmp_path / "checkpoint"})
    assert config_of(hub, "folded")["normalize_activations"] == "none"
    torch.testing.assert_close(SAE.from_pretrained(REPO, "standard")(X), standard(X))
    torch.testing.assert_close(SAE.from_pretrained(REPO, "folded")(X), sae(X * 2.5) / 2.5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_folders(hub, tmp_path, dtype):
    training_topk().to(getattr(torch, dtype)).save_inference_model(tmp_path / "topk")
    switch().to(getattr(torch, dtype)).save_model(tmp_path / "switch")
    upload({"topk": tmp_path / "topk", "switch": tmp_path / "switch"})
    for name in ("topk", "switch"):
        assert config_of(hub, name)["dtype"].removeprefix("torch.") == dtype
        torch.testing.assert_close(
            SAE.from_pretrained(REPO, name)(X), SAE.load_from_disk(tmp_path / name, dtype="float32")(X)
        )


def test_a_revision_is_a_branch_of_its_own(hub):
    upload({"sae": switch(0)})
    main = hub.repos[REPO].branches["main"]
    upload_with_card({"sae": switch(1)}, hf_revision="v2/wide")
    assert hub.repos[REPO].branches["main"] == main
    load = partial(SAE.from_pretrained, REPO, "sae")
    assert torch.equal(load()(X), switch(0)(X))
    assert torch.equal(load(converter=partial(verified_loader, revision="v2/wide"))(X), switch(1)(X))
    assert torch.equal(load(converter=partial(verified_loader, revision=main))(X), switch(0)(X))
    assert 'revision="v2/wide"' in card_of(hub, "v2/wide")
    (code,) = re.findall(r"```python\n(.*?)```", card_of(hub, "v2/wide"), re.DOTALL)
    exec(code, scope := {})
    assert torch.equal(scope["sae"](X), switch(1)(X))
    with pytest.raises(HfHubHTTPError, match="Revision Not Found"):
        load(converter=partial(verified_loader, revision="v3"))
