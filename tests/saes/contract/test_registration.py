"""SAELens knows ``switch`` once the plugin is imported, and nothing else about SAELens or torch has changed."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import D, random_input, switch_sae
from helpers.reloading import reloaded
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)

import sae_lens_switch
from sae_lens_switch import SwitchSAE, SwitchSAEConfig, SwitchTrainingSAE, SwitchTrainingSAEConfig


def test_importing_registers_our_architectures_and_no_others(fresh_process):
    both = {"sparse_topk", "sparse_abstopk", "sparse_topk_transcoder", "switch", "switch_transcoder"}
    assert set(fresh_process["new_inference"]) == both
    saved_as_saelens_own = {"sparse_batchtopk", "sparse_matryoshka_batchtopk", "sparse_batchtopk_transcoder"}
    assert set(fresh_process["new_training"]) == both | saved_as_saelens_own
    assert fresh_process["replaced"] == []


def test_loading_a_switch_folder_without_importing_the_plugin_raises_keyerror_switch(fresh_process):
    assert fresh_process["error_before_import"] == "KeyError('switch')"
    assert fresh_process["outputs_after_import_equal"]


def test_importing_changes_nothing_else_of_sae_lens_or_torch(fresh_process):
    assert fresh_process["changed_sae_lens_attributes"] == []
    assert fresh_process["global_optimizer_hooks"] == 0
    assert fresh_process["triton_imported"] is False
    assert fresh_process["rng_untouched"]
    assert fresh_process["defaults_untouched"]


FRESH_PROCESS = """
import json, sys
import torch, sae_lens
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY as inference, SAE_TRAINING_CLASS_REGISTRY as training

folder = sys.argv[1]
report = {}
try:
    SAE.load_from_disk(folder)
except Exception as error:
    report["error_before_import"] = repr(error)

def attributes():
    return {
        (module_name, name): id(value)
        for module_name, module in list(sys.modules.items()) if module_name.split(".")[0] == "sae_lens"
        for holder in [module, *(v for v in vars(module).values() if isinstance(v, type))]
        for name, value in vars(holder).items()
        if not name.startswith("__")
    }

modules = set(sys.modules)
before, before_attributes = (dict(inference), dict(training)), attributes()
rng, defaults = torch.get_rng_state(), (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
import sae_lens_switch
after = (dict(inference), dict(training))
report["new_inference"], report["new_training"] = (sorted(b.keys() - a.keys()) for a, b in zip(before, after))
report["replaced"] = [k for a, b in zip(before, after) for k in a if a[k] is not b[k]]
now = attributes()
report["changed_sae_lens_attributes"] = [str(k) for k, v in before_attributes.items() if now.get(k) != v]
report["triton_imported"] = any(m.split(".")[0] == "triton" for m in set(sys.modules) - modules)
report["rng_untouched"] = bool(torch.equal(rng, torch.get_rng_state()))
report["defaults_untouched"] = defaults == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
optimizer = sys.modules["torch.optim.optimizer"]
hooks = optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks
report["global_optimizer_hooks"] = sum(map(len, hooks))
saved = torch.load(folder + "/expected.pt")
out = SAE.load_from_disk(folder)(saved["x"])
report["outputs_after_import_equal"] = bool(torch.equal(out, saved["out"]))
print("REPORT" + json.dumps(report))
"""


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("switch")
    sae, x = switch_sae(), random_input(5, D)
    sae.save_model(folder)
    torch.save({"x": x, "out": sae(x).detach()}, folder / "expected.pt")
    run = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(folder)], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.split("REPORT")[1])


def test_the_registries_hold_our_classes():
    assert SAE_CLASS_REGISTRY["switch"] == (SwitchSAE, SwitchSAEConfig)
    assert SAE_TRAINING_CLASS_REGISTRY["switch"] == (SwitchTrainingSAE, SwitchTrainingSAEConfig)
    assert SwitchSAEConfig.architecture() == SwitchTrainingSAEConfig.architecture() == "switch"


def test_registering_twice_and_reloading_the_package_do_nothing():
    before = dict(SAE_CLASS_REGISTRY), dict(SAE_TRAINING_CLASS_REGISTRY)
    sae_lens_switch.saes.registration.register()
    with reloaded(sae_lens_switch.saes.registration, sae_lens_switch):
        assert (dict(SAE_CLASS_REGISTRY), dict(SAE_TRAINING_CLASS_REGISTRY)) == before


def test_the_name_cannot_be_registered_for_another_class():
    with pytest.raises(ValueError, match="switch"):
        register_sae_class("switch", SwitchSAE, SwitchSAEConfig)
    with pytest.raises(ValueError, match="switch"):
        register_sae_training_class("switch", SwitchTrainingSAE, SwitchTrainingSAEConfig)


@pytest.mark.parametrize("registry", [SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY], ids=["inference", "training"])
def test_we_do_not_replace_another_class_that_took_the_name_first(registry, monkeypatch):
    other = (type("OtherSAE", (), {}), type("OtherConfig", (), {}))
    monkeypatch.setitem(registry, "switch", other)
    with pytest.raises(ValueError, match="switch"):
        sae_lens_switch.saes.registration.register()
    assert registry["switch"] is other
