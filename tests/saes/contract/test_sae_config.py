"""The configs of ``switch`` do what SAELens does with a config: dictionaries, JSON, copies, command line."""

import copy
import json
import pickle
from dataclasses import fields, replace

import pytest
from helpers import HOOK, K, switch_config, training_config
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.saes.sae import SAEConfig, SAEMetadata, TrainingSAEConfig

from sae_lens_switch import SwitchSAE, SwitchSAEConfig, SwitchTrainingSAE, SwitchTrainingSAEConfig

OTHER_FIELDS = {
    "n_experts": 5,
    "k": 8,
    "gate": "one",
    "apply_b_dec_to_input": False,
    "normalize_activations": "layer_norm",
}
OTHER_TRAINING_FIELDS = OTHER_FIELDS | {
    "load_balance_coefficient": 0.0,
    "load_balance_scale": "d_in",
    "load_balance_warm_up_steps": 7,
    "normalize_decoder": False,
    "project_decoder_grad": False,
    "decoder_init_norm": None,
    "bias_start": "mean",
    "router_start_std": None,
    "aux_loss_coefficient": 0.25,
    "aux_k": 5,
    "tie_router_bias": True,
}


@pytest.mark.parametrize(
    ("base", "make_config", "options"),
    [
        (SAEConfig, switch_config, {}),
        (SAEConfig, switch_config, OTHER_FIELDS),
        (TrainingSAEConfig, training_config, {}),
        (TrainingSAEConfig, training_config, OTHER_TRAINING_FIELDS),
    ],
    ids=["inference-default", "inference-other", "training-default", "training-other"],
)
def test_a_config_survives_to_dict_json_and_from_dict(base, make_config, options):
    cfg = make_config(metadata=SAEMetadata(hook_name=HOOK), **options)
    read = base.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert type(read) is type(cfg)
    assert read == cfg
    assert read.to_dict() == cfg.to_dict()
    assert cfg.to_dict()["architecture"] == "switch"


@pytest.mark.parametrize("options", [{}, OTHER_TRAINING_FIELDS], ids=["default", "other"])
def test_a_training_config_tells_its_inference_config_and_keeps_its_history_in_the_metadata(options):
    cfg = training_config(metadata=SAEMetadata(hook_name=HOOK), **options)
    inference = SAEConfig.from_dict(json.loads(json.dumps(cfg.get_inference_sae_cfg_dict())))
    assert type(inference) is SwitchSAEConfig
    for field in fields(SwitchSAEConfig):
        if field.name != "metadata":
            assert getattr(inference, field.name) == getattr(cfg, field.name)
    assert inference.metadata.hook_name == HOOK
    assert inference.metadata.training_architecture == "switch"
    details = inference.metadata.training_architecture_details
    inference_only = {f.name for f in fields(SwitchSAEConfig)}
    assert details == {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in inference_only}
    assert json.loads(json.dumps(details)) == details


@pytest.mark.parametrize("make_config", [switch_config, training_config])
def test_configs_can_be_replaced_pickled_copied_and_printed(make_config):
    cfg = make_config(gate="one")
    assert replace(cfg, k=K + 1).k == K + 1
    assert replace(cfg, k=K + 1).gate == "one"
    assert pickle.loads(pickle.dumps(cfg)) == cfg
    assert copy.deepcopy(cfg) == cfg
    assert copy.deepcopy(cfg).metadata is not cfg.metadata
    assert "n_experts=4" in repr(cfg)
    assert cfg != replace(cfg, k=K + 1)


def test_from_dict_ignores_fields_of_other_versions_as_saelens_does():
    assert SAEConfig.from_dict({**switch_config().to_dict(), "not_yet_known": 1}) == switch_config()


@pytest.mark.parametrize("make_config", [switch_config, training_config])
def test_configs_take_any_attribute_saelens_sets_on_them(make_config):
    cfg = make_config()
    cfg.sae_lens_training_version = "7"
    cfg.hook_layer = 3
    assert "hook_layer" not in cfg.to_dict()


def test_the_command_line_of_saelens_offers_switch_and_its_flags():
    flags = {
        "architecture": "switch",
        "d_in": 12,
        "d_sae": 40,
        "n_experts": 4,
        "k": 3,
        "gate": "one",
        "load_balance_scale": "d_in",
        "load_balance_coefficient": 2.5,
        "tie_router_bias": True,
        "router_start_std": 0.5,
        "lr": 0.01,
    }
    cfg = _parse_cfg_args([str(part) for name, value in flags.items() for part in (f"--{name}", value)])
    assert type(cfg.sae) is SwitchTrainingSAEConfig
    assert (cfg.sae.d_in, cfg.sae.d_sae, cfg.sae.n_experts, cfg.sae.k, cfg.sae.gate) == (12, 40, 4, 3, "one")
    assert (cfg.sae.load_balance_scale, cfg.sae.load_balance_coefficient) == ("d_in", 2.5)
    assert (cfg.sae.tie_router_bias, cfg.sae.router_start_std, cfg.lr) == (True, 0.5, 0.01)
    assert cfg.sae.decoder_init_norm == 1.0


def test_the_command_line_defaults_of_saelens_make_a_valid_switch_config():
    assert _parse_cfg_args(["--architecture", "switch"]).sae == SwitchTrainingSAEConfig(d_in=512, d_sae=1024)


def test_none_that_is_set_after_a_config_is_made_stands_for_the_default():
    cfg = training_config(load_balance_coefficient=0.7, aux_k=2, aux_loss_coefficient=1.0)
    cfg.load_balance_coefficient = cfg.aux_k = None
    sae = SwitchTrainingSAE(cfg)
    assert sae.get_coefficients()["load_balance"].value == training_config().load_balance_coefficient
    assert sae.aux_k == cfg.k


@pytest.mark.parametrize("kind", ["inference", "training"])
def test_metadata_may_be_a_dict_and_is_kept_as_saelens_has_it(kind):
    make_config = switch_config if kind == "inference" else training_config
    make_sae = SwitchSAE if kind == "inference" else SwitchTrainingSAE
    for given in ({}, {"hook_name": HOOK}):
        cfg = make_config(metadata=given)
        assert cfg == make_config(metadata=SAEMetadata(**given))
        assert type(cfg.metadata) is SAEMetadata
        cfg.metadata = given
        assert make_sae(cfg).cfg.to_dict() == make_config(metadata=SAEMetadata(**given)).to_dict()


@pytest.mark.parametrize("given", [{3: HOOK}, {"self": HOOK}, {"__class__": HOOK}, [("hook_name", HOOK)]], ids=str)
def test_metadata_that_saelens_cannot_hold_is_refused(given):
    for make_config in (switch_config, training_config):
        with pytest.raises(ValueError, match="metadata must be a SAEMetadata or dict with names as keys; got"):
            make_config(metadata=given)
