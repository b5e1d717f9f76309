"""What SAELens, and whoever builds on it, expects of an architecture, asked of ``switch``: no trainer here."""

import copy
import importlib
import io
import json
import pickle
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import sae_lens.saes.sae as host
import torch
from helpers import (
    HOOK,
    HOOK_SHAPES,
    HOOK_Z,
    D,
    E,
    F,
    K,
    M,
    random_input,
    randomize,
    switch_config,
    switch_sae,
    training_config,
    training_sae,
)
from sae_lens import SAE
from sae_lens.config import LoggingConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import SAEConfig, SAEMetadata, TrainingSAE, TrainingSAEConfig, TrainStepInput, _disable_hooks
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sae_lens_switch
from sae_lens_switch import SwitchSAE, SwitchSAEConfig, SwitchTrainingSAE, SwitchTrainingSAEConfig

PARAMETERS = {
    "W_enc": (D, F),
    "W_dec": (F, D),
    "b_dec": (D,),
    "W_router": (D, E),
    "b_router": (D,),
}
NORMALISATIONS = ["none", "expected_average_only_in", "layer_norm", "constant_norm_rescale", "covariance_whitening"]
RUN_TIME_NORMALISATIONS = ["layer_norm", "constant_norm_rescale"]
ROUTER = ("W_router", "b_router")
exactly = {"rtol": 0, "atol": 0}
tightly = {"rtol": 1e-10, "atol": 1e-10}


def make(kind: str, **options):
    """A randomised inference or training SAE with the same weights."""
    if kind == "inference":
        return switch_sae(**options)
    return randomize(SwitchTrainingSAE(training_config(**options)))


both_kinds = pytest.mark.parametrize("kind", ["inference", "training"])


def step_input(x: Tensor, coefficient: float = 0.5, step: int = 1) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x,
        coefficients={"load_balance": coefficient},
        dead_neuron_mask=torch.zeros(F, dtype=torch.bool),
        n_training_steps=step,
        is_logging_step=False,
    )


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def dense_oracle(sae: SwitchSAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """f and x_hat of x [B, D] by the formulas of the paper, with every latent of every expert computed."""
    probs = ((x - sae.b_router) @ sae.W_router).softmax(-1)
    expert = probs.argmax(-1)
    pre = ((x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x) @ sae.W_enc).relu()
    own = torch.arange(F) // M == expert[:, None]
    kth = pre.where(own, torch.tensor(-1.0, dtype=x.dtype)).sort(descending=True).values[:, sae.cfg.k - 1, None]
    gate = probs.gather(-1, expert[:, None]) if sae.cfg.gate == "probability" else 1.0
    acts = pre * own * (pre >= kth) * gate
    return acts, acts @ sae.W_dec + sae.b_dec


# --- Registration


def test_importing_registers_our_architectures_and_no_others(fresh_process):
    assert sorted(fresh_process["new_inference"]) == ["sparse_topk", "switch"]
    assert sorted(fresh_process["new_training"]) == ["sparse_topk", "switch"]
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
    importlib.reload(sae_lens_switch.saes.registration)
    importlib.reload(sae_lens_switch)
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


# --- Configs

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


# --- Shapes and initialisation


@both_kinds
def test_parameters_have_the_names_and_shapes_of_saelens(kind):
    sae = make(kind)
    assert {name: tuple(p.shape) for name, p in sae.named_parameters()} == PARAMETERS
    assert not dict(sae.named_buffers())
    assert all(p.requires_grad for p in sae.parameters())
    assert (sae.dtype, sae.device) == (torch.float64, torch.device("cpu"))
    assert not hasattr(sae, "b_enc")


@pytest.mark.parametrize(
    ("options", "norm"),
    [({}, 1.0), ({"normalize_decoder": False, "decoder_init_norm": 0.1}, 0.1), ({"decoder_init_norm": None}, None)],
)
def test_the_decoder_starts_at_decoder_init_norm_and_the_encoder_as_its_transpose(options, norm):
    sae = training_sae(**options)
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T, **exactly)
    if norm is not None:
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((F,), norm).double())
    else:
        assert sae.W_dec.norm(dim=1).std() > 1e-3
    assert not sae.b_dec.any()
    assert sae.W_enc.untyped_storage().data_ptr() != sae.W_dec.untyped_storage().data_ptr()
    assert sae.b_dec.untyped_storage().data_ptr() != sae.b_router.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("args", "kwargs", "device", "dtype"),
    [
        (("cpu",), {}, "cpu", torch.float64),
        ((torch.device("cpu"),), {}, "cpu", torch.float64),
        ((torch.float32,), {}, "cpu", torch.float32),
        (("cpu", torch.float32), {}, "cpu", torch.float32),
        ((torch.zeros(1, dtype=torch.bfloat16),), {}, "cpu", torch.bfloat16),
        ((), {"dtype": torch.float16}, "cpu", torch.float16),
        ((), {"device": "cpu", "dtype": torch.bfloat16}, "cpu", torch.bfloat16),
        (("meta",), {}, "meta", torch.float64),
        ((), {"device": "meta", "dtype": torch.bfloat16}, "meta", torch.bfloat16),
    ],
    ids=str,
)
@both_kinds
def test_to_in_every_spelling_moves_parameters_attributes_and_config(kind, args, kwargs, device, dtype):
    sae = make(kind)
    assert sae.to(*args, **kwargs) is sae
    assert (sae.dtype, str(sae.device)) == (dtype, device)
    assert (sae.cfg.dtype, sae.cfg.device) == (str(dtype).removeprefix("torch."), device)
    assert {p.device.type for p in sae.parameters()} == {device}
    for name, parameter in sae.named_parameters():
        assert parameter.dtype == (torch.promote_types(dtype, torch.float32) if name in ROUTER else dtype)


def test_get_name_is_that_of_every_sae():
    sae = switch_sae(metadata=SAEMetadata(model_name="tiny", hook_name=HOOK))
    assert sae.get_name() == f"sae_tiny_{HOOK}_{F}"


def test_from_dict_builds_the_sae_of_the_architecture():
    assert type(SAE.from_dict(switch_config().to_dict())) is SwitchSAE
    assert type(TrainingSAE.from_dict(training_config().to_dict())) is SwitchTrainingSAE


# --- The mathematics, for inputs of any shape


@both_kinds
@pytest.mark.parametrize(
    "options",
    [{}, {"gate": "one"}, {"apply_b_dec_to_input": False}, {"k": M}, {"k": 1}, {"n_experts": 1, "k": 7}],
    ids=str,
)
def test_encode_decode_and_forward_follow_the_formulas(kind, options):
    if options.get("n_experts") == 1:
        sae = make(kind, **options)
        x = random_input(50, D)
        pre = ((x - sae.b_dec) @ sae.W_enc).relu()
        top = pre.topk(7)
        acts = torch.zeros_like(pre).scatter(1, top.indices, top.values)
        out = acts @ sae.W_dec + sae.b_dec
    else:
        sae = make(kind, **options)
        x = random_input(50, D)
        acts, out = dense_oracle(sae, x)
    torch.testing.assert_close(sae.encode(x), acts, **tightly)
    torch.testing.assert_close(sae.decode(acts), out, **tightly)
    torch.testing.assert_close(sae(x), out, **tightly)


@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (2, 1, 3), (1, 2, 2, 3), (2, 1, 2, 1, 3)], ids=str)
@both_kinds
def test_any_leading_dimensions_equal_the_flattened_input(kind, lead):
    sae = make(kind)
    x = random_input(*lead, D)
    flat = x.reshape(-1, D)
    acts, codes = sae.encode(x), sae.encode_sparse(x)
    assert acts.shape == (*lead, F)
    assert codes.values.shape == codes.indices.shape == (*lead, K)
    assert codes.d_sae == F
    torch.testing.assert_close(acts.reshape(-1, F), sae.encode(flat), **tightly)
    torch.testing.assert_close(codes.to_dense(), acts, **exactly)
    torch.testing.assert_close(codes.to_coo().to_dense(), acts, **exactly)
    assert codes.to_coo().is_sparse
    for out in (sae.decode(acts), sae.decode(codes), sae(x)):
        assert out.shape == (*lead, D)
        torch.testing.assert_close(out.reshape(-1, D), sae(flat), **tightly)


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
@both_kinds
def test_an_empty_batch_gives_empty_results(kind, lead):
    sae = make(kind)
    x = torch.zeros(*lead, D, dtype=torch.float64)
    codes = sae.encode_sparse(x)
    assert codes.values.shape == (*lead, K)
    assert codes.to_dense().shape == sae.encode(x).shape == codes.to_coo().shape == (*lead, F)
    assert sae.decode(codes).shape == sae.decode(codes.to_dense()).shape == sae(x).shape == (*lead, D)


@pytest.mark.parametrize("k", [1, K, M])
def test_at_most_k_latents_are_active_all_of_one_expert_and_none_negative(k):
    sae = switch_sae(k=k)
    acts = sae.encode(random_input(300, D))
    assert ((acts != 0).sum(1) <= k).all()
    assert (acts >= 0).all()
    experts_used = (acts.view(-1, E, M) != 0).any(2).sum(1)
    assert (experts_used <= 1).all()
    if k < 5:
        assert (acts != 0).sum(1).double().mean() > 0.8 * k


def test_decode_is_linear_in_any_dense_latents_mixed_over_experts():
    sae = switch_sae()
    f, g = random_input(6, F, seed=3), random_input(6, F, seed=4)
    origin = sae.decode(torch.zeros(6, F, dtype=torch.float64))
    torch.testing.assert_close(origin, sae.b_dec.expand(6, D), **exactly)
    mixed = sae.decode(2 * f - 3 * g)
    torch.testing.assert_close(mixed - origin, 2 * (sae.decode(f) - origin) - 3 * (sae.decode(g) - origin), **tightly)
    one_latent = torch.eye(F, dtype=torch.float64)
    torch.testing.assert_close(sae.decode(one_latent), sae.W_dec + sae.b_dec, **tightly)


def test_encode_returns_a_fresh_tensor_that_may_be_edited_in_place():
    sae, x = switch_sae(), random_input(6, D)
    with torch.no_grad():
        acts = sae.encode(x)
        expected = acts.clone()
        expected[:, 5] = 7.0
        acts[:, 5] = 7.0
        torch.testing.assert_close(sae.decode(acts), expected @ sae.W_dec + sae.b_dec, **tightly)
        torch.testing.assert_close(sae.encode(x)[:, 6:], expected[:, 6:], **exactly)


@both_kinds
def test_inputs_and_parameters_get_the_gradients_of_the_dense_formulas(kind):
    sae = make(kind)
    x = random_input(2, 9, D).requires_grad_()
    leaves = [x, *sae.parameters()]
    upstream = random_input(2, 9, D, seed=5)
    ours = torch.autograd.grad(sae(x), leaves, upstream)
    oracle = torch.autograd.grad(dense_oracle(sae, x.reshape(-1, D))[1].reshape(2, 9, D), leaves, upstream)
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a, b, **tightly)


def test_decode_gives_dense_latents_their_gradient_those_not_active_too():
    sae = switch_sae()
    acts = sae.encode(random_input(4, D)).detach().requires_grad_()
    sae.decode(acts).sum().backward()
    torch.testing.assert_close(acts.grad, sae.W_dec.sum(1).expand(4, F), **tightly)


def test_an_untrained_and_a_training_sae_encode_like_the_inference_sae_with_their_weights():
    train, inference = make("training"), switch_sae(seed=9)
    inference.load_state_dict(train.state_dict())
    x = random_input(3, 5, D)
    for mode in (True, False):
        train.train(mode)
        torch.testing.assert_close(train.encode(x), inference.encode(x), **exactly)
        torch.testing.assert_close(train.encode_with_hidden_pre(x)[0], inference.encode(x), **exactly)
        torch.testing.assert_close(train(x), inference(x), **exactly)


def test_inputs_of_another_dtype_are_cast_to_that_of_the_sae():
    sae = switch_sae()
    x = random_input(5, D, dtype=torch.float32)
    assert sae(x).dtype == sae.encode(x).dtype == sae.encode_sparse(x).values.dtype == torch.float64
    torch.testing.assert_close(sae(x), sae(x.double()), **exactly)


@both_kinds
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_encode_and_decode_need_no_gradients(kind, mode):
    sae, x = make(kind), random_input(2, 3, D)
    expected = sae(x)
    with mode():
        torch.testing.assert_close(sae(x), expected, **exactly)
        torch.testing.assert_close(sae.decode(sae.encode_sparse(x)), expected, **tightly)
        assert not sae(x).requires_grad


# --- Hooks


def seeing(seen: dict[str, list[Tensor]], name: str):
    def read(value, hook):  # noqa: ARG001
        seen.setdefault(name, []).append(value.detach().clone())

    return read


@both_kinds
def test_every_hook_fires_once_in_forward_and_seeing_changes_nothing(kind):
    sae, x = make(kind), random_input(2, 3, D)
    plain = sae(x)
    seen: dict[str, list[Tensor]] = {}
    out = sae.run_with_hooks(x, fwd_hooks=[(name, seeing(seen, name)) for name in HOOK_SHAPES])
    assert {name: [tuple(v.shape) for v in values] for name, values in seen.items()} == {
        name: [(2, 3, width)] for name, width in HOOK_SHAPES.items()
    }
    torch.testing.assert_close(out, plain, **tightly)
    torch.testing.assert_close(seen["hook_sae_input"][0], x, **exactly)
    torch.testing.assert_close(seen["hook_sae_acts_post"][0], sae.encode(x), **tightly)
    torch.testing.assert_close(seen["hook_sae_recons"][0], plain, **tightly)
    probs = seen["hook_sae_router_logits"][0].softmax(-1)
    torch.testing.assert_close(seen["hook_sae_router_probs"][0], probs, **tightly)
    own = torch.arange(F) // M == probs.argmax(-1, keepdim=True)
    pre = (x - sae.b_dec) @ sae.W_enc
    torch.testing.assert_close(seen["hook_sae_acts_pre"][0][own], pre[own], **tightly)


def test_all_hooks_are_direct_attributes_as_disabling_them_needs():
    sae = switch_sae()
    assert set(sae.hook_dict) == {*HOOK_SHAPES, "hook_sae_error"}
    for name, hook in sae.hook_dict.items():
        assert getattr(sae, name) is hook


def test_disabled_hooks_are_silent_and_come_back():
    sae, x = switch_sae(), random_input(4, D)
    seen: dict[str, list[Tensor]] = {}
    with sae.hooks([(name, seeing(seen, name)) for name in HOOK_SHAPES]):
        with _disable_hooks(sae):
            sae(x)
        assert seen == {}
        sae(x)
        assert seen.keys() == HOOK_SHAPES.keys()


def test_run_with_cache_holds_every_hook():
    _, cache = switch_sae().run_with_cache(random_input(4, D))
    assert set(cache) == set(HOOK_SHAPES)


@both_kinds
def test_editing_pre_activations_changes_which_latents_are_selected(kind):
    sae, x = make(kind), random_input(20, D)
    probs = ((x - sae.b_router) @ sae.W_router).softmax(-1)
    gate, expert = probs.max(-1)

    def lift_the_first_latent_of_every_expert(pre, hook):  # noqa: ARG001
        pre = pre.clone()
        pre[:, ::M] = 100.0
        return pre

    sae.add_hook("hook_sae_acts_pre", lift_the_first_latent_of_every_expert)
    acts = sae.encode(x)
    sae.reset_hooks()
    rows = torch.arange(20)
    torch.testing.assert_close(acts[rows, expert * M], 100 * gate, **tightly)
    others = acts.clone()
    others[rows, expert * M] = 0
    assert ((others != 0).sum(1) <= K - 1).all()
    assert (others.view(20, E, M)[:, :, 0] == 0).all()


@both_kinds
@pytest.mark.parametrize("in_place", [True, False])
def test_editing_activations_changes_the_output_by_the_decoder_row(kind, in_place):
    sae, x = make(kind), random_input(2, 4, D)

    def steer(acts, hook):  # noqa: ARG001
        if not in_place:
            acts = acts.clone()
        acts[..., 11] += 2.0
        return None if in_place else acts

    plain = sae(x)
    out = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", steer)])
    torch.testing.assert_close(out, plain + 2 * sae.W_dec[11], **tightly)
    torch.testing.assert_close(sae(x), plain, **exactly)


@pytest.mark.parametrize("dense", [True, False])
def test_editing_router_logits_reroutes_and_editing_probabilities_regates(dense):
    sae, x = switch_sae(), random_input(10, D)

    def encode():
        return sae.encode(x) if dense else sae.encode_sparse(x).to_dense()

    sae.add_hook("hook_sae_router_logits", lambda logits, hook: logits.index_fill(-1, torch.tensor(2), 99.0))  # noqa: ARG005
    acts = encode()
    sae.reset_hooks()
    assert (acts.view(10, E, M)[:, [0, 1, 3]] == 0).all()
    expected = ((x - sae.b_dec) @ sae.W_enc[:, 2 * M : 3 * M]).relu().topk(K).values
    torch.testing.assert_close(acts.topk(K).values, expected, **tightly)

    plain = encode()
    sae.add_hook("hook_sae_router_probs", lambda probs, hook: probs / 2)  # noqa: ARG005
    torch.testing.assert_close(encode(), plain / 2, **tightly)
    sae.reset_hooks()


@pytest.mark.parametrize(
    ("name", "shifted"),
    [
        ("hook_sae_input", lambda sae, x: sae(x + 1)),
        ("hook_sae_recons", lambda sae, x: sae(x) + 1),
        ("hook_sae_output", lambda sae, x: sae(x) + 1),
    ],
)
def test_editing_input_reconstruction_or_output_is_seen_downstream(name, shifted):
    sae, x = switch_sae(), random_input(10, D)
    expected = shifted(sae, x)
    out = sae.run_with_hooks(x, fwd_hooks=[(name, lambda value, hook: value + 1)])  # noqa: ARG005
    torch.testing.assert_close(out, expected, **tightly)


def test_backward_hooks_see_the_gradients_of_pre_and_post_activations():
    sae, x = switch_sae(), random_input(10, D)
    expert = ((x - sae.b_router) @ sae.W_router).argmax(-1)
    seen: dict[str, list[Tensor]] = {}

    def read(name):
        return lambda grad, hook: seen.setdefault(name, []).append(grad.clone())  # noqa: ARG005

    for name in ("hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_router_logits"):
        sae.add_hook(name, read(name), dir="bwd")
    sae(x).sum().backward()
    sae.reset_hooks()
    torch.testing.assert_close(seen["hook_sae_acts_post"][0], sae.W_dec.sum(1).expand(10, F), **tightly)
    own = torch.arange(F) // M == expert[:, None]
    assert (seen["hook_sae_acts_pre"][0][~own] == 0).all()
    assert seen["hook_sae_acts_pre"][0][own].any()
    assert seen["hook_sae_router_logits"][0].any()


def loss_and_gradients(sae: SwitchTrainingSAE, x: Tensor):
    sae.zero_grad()
    output = sae.training_forward_pass(step_input=step_input(x))
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in sae.named_parameters()}


@pytest.mark.parametrize("name", [n for n in HOOK_SHAPES if n != "hook_sae_output"])
def test_a_hook_that_only_sees_fires_in_the_training_pass_and_changes_neither_loss_nor_gradients(name):
    sae, x = make("training", normalize_decoder=False), random_input(30, D)
    plain, plain_gradients = loss_and_gradients(sae, x)
    seen: dict[str, list[Tensor]] = {}
    with sae.hooks([(name, seeing(seen, name))]):
        hooked, hooked_gradients = loss_and_gradients(sae, x)
    assert [tuple(v.shape) for v in seen[name]] == [(30, HOOK_SHAPES[name])]
    torch.testing.assert_close(hooked.loss, plain.loss, **tightly)
    torch.testing.assert_close(hooked.feature_acts.to_dense(), plain.feature_acts.to_dense(), **tightly)
    for parameter, gradient in plain_gradients.items():
        torch.testing.assert_close(hooked_gradients[parameter], gradient, **tightly)


def test_an_editing_hook_works_in_the_training_pass():
    sae, x = make("training", normalize_decoder=False), random_input(30, D)
    plain, _ = loss_and_gradients(sae, x)

    def steer(acts, hook):  # noqa: ARG001
        return acts.index_add(1, torch.tensor([11]), torch.full((30, 1), 2.0, dtype=acts.dtype))

    with sae.hooks([("hook_sae_acts_post", steer)]):
        hooked, _ = loss_and_gradients(sae, x)
    torch.testing.assert_close(hooked.sae_out, plain.sae_out + 2 * sae.W_dec[11], **tightly)
    difference = hooked.feature_acts.to_dense() - plain.feature_acts.to_dense()
    assert (difference[:, 11] == 2).all()
    expected = (hooked.sae_out - x).square().sum(-1).mean()
    torch.testing.assert_close(hooked.losses["mse_loss"], expected, **tightly)


# --- Error term


@pytest.mark.filterwarnings("ignore:Setting use_error_term:DeprecationWarning")
@pytest.mark.parametrize("normalize_activations", ["none", *RUN_TIME_NORMALISATIONS])
def test_the_error_term_restores_the_input_and_survives_ablation(normalize_activations):
    sae = switch_sae(normalize_activations=normalize_activations)
    x = random_input(2, 5, D)
    plain = sae(x)
    sae.use_error_term = True
    seen: dict[str, list[Tensor]] = {}

    def ablate(acts, hook):  # noqa: ARG001
        return torch.zeros_like(acts)

    with sae.hooks([("hook_sae_error", seeing(seen, "error")), ("hook_sae_input", seeing(seen, "input"))]):
        torch.testing.assert_close(sae(x), x, **tightly)
        ablated = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", ablate)], reset_hooks_end=False)
    for error in seen["error"]:
        torch.testing.assert_close(error, x - plain, **tightly)
    assert len(seen["input"]) == 2  # the clean pass is silent
    assert not torch.allclose(ablated, x)


# --- hook_z


def hook_z_metadata() -> SAEMetadata:
    return SAEMetadata(hook_name=HOOK_Z)


@pytest.mark.parametrize("lead", [(3,), (2, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
def test_hook_z_heads_are_joined_on_the_way_in_and_split_on_the_way_out(lead, normalize_activations):
    options = {"normalize_activations": normalize_activations}
    joined = switch_sae(**options)
    sae = switch_sae(reshape_activations="hook_z", metadata=hook_z_metadata(), **options)
    x = random_input(*lead, 3, D // 3)
    flat = x.reshape(*lead, D)
    assert sae.hook_z_reshaping_mode
    torch.testing.assert_close(sae.encode(x), joined.encode(flat), **exactly)
    sae.decode(sae.encode(x))
    torch.testing.assert_close(sae.decode(sae.encode_sparse(x)), joined(flat).reshape(x.shape), **tightly)
    torch.testing.assert_close(sae(x), joined(flat).reshape(x.shape), **tightly)
    sae.turn_off_forward_pass_hook_z_reshaping()
    torch.testing.assert_close(sae(flat), joined(flat), **exactly)
    sae.turn_on_forward_pass_hook_z_reshaping()
    torch.testing.assert_close(sae(x), joined(flat).reshape(x.shape), **tightly)


def test_a_training_sae_for_hook_z_takes_the_stores_flat_activations():
    sae = training_sae(reshape_activations="hook_z", metadata=hook_z_metadata())
    assert not sae.hook_z_reshaping_mode
    assert sae(random_input(4, D)).shape == (4, D)


def test_a_hook_z_sae_comes_back_from_disk_as_one(tmp_path):
    train = make("training", reshape_activations="hook_z", metadata=hook_z_metadata())
    train.save_inference_model(tmp_path)
    sae = SAE.load_from_disk(tmp_path)
    x = random_input(4, 3, D // 3)
    assert sae.hook_z_reshaping_mode
    torch.testing.assert_close(sae(x), train(x.reshape(4, D)).reshape(x.shape), **exactly)


# --- Activation normalisation, and the folds


def normalised(x: Tensor, normalize_activations: str) -> tuple[Tensor, Tensor, Tensor]:
    """z, scale and shift with x = z * scale + shift."""
    if normalize_activations == "layer_norm":
        shift = x.mean(-1, keepdim=True)
        scale = (x - shift).std(-1, keepdim=True)
        return (x - shift) / (scale + 1e-5), scale, shift
    scale = x.norm(dim=-1, keepdim=True) / D**0.5
    return x / scale, scale, torch.zeros_like(scale)


@both_kinds
@pytest.mark.parametrize("normalize_activations", RUN_TIME_NORMALISATIONS)
def test_run_time_normalisation_is_seen_by_router_encoder_and_decoder(kind, normalize_activations):
    sae = make(kind, normalize_activations=normalize_activations)
    bare = make(kind)
    x = random_input(2, 6, D) * 30 + 4
    z, scale, shift = normalised(x, normalize_activations)
    torch.testing.assert_close(sae.encode(x), bare.encode(z), **tightly)
    torch.testing.assert_close(sae(x), bare(z) * scale + shift, **tightly)
    torch.testing.assert_close(sae.decode(sae.encode_sparse(x)), bare(z) * scale + shift, **tightly)
    if kind == "training":
        flat = x.reshape(-1, D)
        output = sae.training_forward_pass(step_input=step_input(flat))
        torch.testing.assert_close(output.sae_out, sae(flat), **tightly)
        torch.testing.assert_close(output.losses["mse_loss"], (sae(flat) - flat).square().sum(-1).mean(), **tightly)


@both_kinds
@pytest.mark.parametrize("normalize_activations", ["none", "expected_average_only_in", "covariance_whitening"])
def test_normalisation_by_the_trainer_is_no_business_of_the_sae(kind, normalize_activations):
    x = random_input(6, D)
    sae, bare = make(kind, normalize_activations=normalize_activations), make(kind)
    torch.testing.assert_close(sae(x), bare(x), **exactly)


@both_kinds
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("gate", ["probability", "one"])
@pytest.mark.parametrize("scale", [0.01, 3.7])
def test_folding_the_scaling_factor_equals_scaling_the_activations(kind, apply_b_dec_to_input, gate, scale):
    sae = make(
        kind, normalize_activations="expected_average_only_in", apply_b_dec_to_input=apply_b_dec_to_input, gate=gate
    )
    folded = copy.deepcopy(sae)
    folded.fold_activation_norm_scaling_factor(scale)
    x = random_input(80, D) / scale
    torch.testing.assert_close(folded.encode(x), sae.encode(x * scale), **tightly)
    torch.testing.assert_close(folded(x) * scale, sae(x * scale), **tightly)
    assert len({int(e) for e in folded.encode(x).view(-1, E, M).any(2).int().argmax(1)}) > 1
    torch.testing.assert_close(folded.W_enc, sae.W_enc * scale, **tightly)
    assert folded.cfg.normalize_activations == "none"
    assert sae.cfg.normalize_activations == "expected_average_only_in"


def whitening(condition: float = 10.0) -> tuple[Tensor, Tensor, Tensor]:
    """A mean, a matrix and its inverse; far from symmetric."""
    left = torch.linalg.qr(random_input(D, D, seed=21)).Q
    right = torch.linalg.qr(random_input(D, D, seed=22)).Q
    spectrum = torch.logspace(0, -1, D, base=condition, dtype=torch.float64)
    return random_input(D, seed=20) * 5, (left * spectrum) @ right, right.T @ (left / spectrum).T


@both_kinds
@pytest.mark.parametrize("gate", ["probability", "one"])
def test_folding_the_whitening_equals_whitening_the_activations(kind, gate):
    sae = make(kind, normalize_activations="covariance_whitening", gate=gate)
    folded = copy.deepcopy(sae)
    mean, matrix, inverse = whitening()
    folded.fold_activation_whitening(mean=mean, whitening_matrix=matrix, unwhitening_matrix=inverse)
    z = random_input(80, D)
    x = z @ inverse + mean
    torch.testing.assert_close(folded.encode(x), sae.encode(z), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(folded(x), sae(z) @ inverse + mean, rtol=1e-8, atol=1e-8)
    assert len({int(e) for e in folded.encode(x).view(-1, E, M).any(2).int().argmax(1)}) > 1
    assert folded.cfg.normalize_activations == "none"


def test_the_router_is_folded_in_the_precision_of_the_whitening_statistics():
    # as SAELens folds the rest: products in the statistics' float64, one rounding at the end
    sae = make("training", normalize_activations="covariance_whitening", dtype="float32")
    mean, matrix, inverse = whitening(condition=1000.0)
    W, b = sae.W_router.double(), sae.b_router.double()
    sae.fold_activation_whitening(mean=mean, whitening_matrix=matrix, unwhitening_matrix=inverse)
    one_rounding = {"rtol": torch.finfo(torch.float32).eps, "atol": 0}
    torch.testing.assert_close(sae.W_router, (matrix @ W).float(), **one_rounding)
    torch.testing.assert_close(sae.b_router, (b @ inverse + mean).float(), **one_rounding)


@both_kinds
def test_a_low_precision_sae_keeps_its_float32_router_through_the_folds(kind):
    sae = make(kind, dtype="bfloat16", normalize_activations="covariance_whitening")
    mean, matrix, inverse = whitening(condition=2.0)
    expected = sae.W_router.detach().double()
    sae.fold_activation_whitening(mean=mean, whitening_matrix=matrix, unwhitening_matrix=inverse)
    sae.fold_activation_norm_scaling_factor(3.0)
    assert sae.W_router.dtype == sae.b_router.dtype == torch.float32
    torch.testing.assert_close(sae.W_router.double(), 3 * (matrix @ expected), rtol=1e-5, atol=1e-6)


def with_norms(norms: Tensor, kind: str = "inference", **options):
    sae = make(kind, **options)
    with torch.no_grad():
        W = sae.W_dec.double()
        sae.W_dec.copy_(W / W.norm(dim=1, keepdim=True) * norms[:, None])
    return sae


@both_kinds
@pytest.mark.parametrize("norm", [torch.ones(E), torch.tensor([0.2, 1.0, 3.0, 50.0])], ids=["unit", "per expert"])
def test_fold_w_dec_norm_is_exact_where_the_norms_of_an_expert_are_equal(kind, norm):
    sae = with_norms(norm.repeat_interleave(M), kind)
    folded = copy.deepcopy(sae)
    folded.fold_W_dec_norm()
    x = random_input(80, D)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(F, dtype=torch.float64), **tightly)
    torch.testing.assert_close(folded(x), sae(x), **tightly)
    scaled = sae.encode(x) * sae.W_dec.norm(dim=1)
    torch.testing.assert_close(folded.encode(x), scaled, **tightly)
    for name in ROUTER:
        torch.testing.assert_close(getattr(folded, name), getattr(sae, name), **exactly)


@both_kinds
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("ratio", [1.1, 2.0])
def test_fold_w_dec_norm_refuses_where_it_would_select_other_latents(kind, dtype, ratio):
    norms = torch.ones(F)
    norms[M + 2] = ratio
    sae = with_norms(norms, kind, dtype=dtype)
    before = copy.deepcopy(sae)
    with pytest.raises(NotImplementedError, match="norm"):
        sae.fold_W_dec_norm()
    assert same_weights(sae, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fold_w_dec_norm_accepts_unit_rows_as_rounded_to_the_dtype(dtype):
    sae = with_norms(torch.ones(F), dtype=dtype)
    before = copy.deepcopy(sae)
    sae.fold_W_dec_norm()
    eps = torch.finfo(sae.dtype).eps
    torch.testing.assert_close(sae.W_dec, before.W_dec, rtol=2 * eps, atol=0)
    torch.testing.assert_close(sae.W_enc, before.W_enc, rtol=2 * eps, atol=0)


def test_fold_w_dec_norm_of_zero_rows_leaves_everything_finite():
    norms = torch.ones(F)
    norms[:M] = 0
    sae = with_norms(norms)
    x = random_input(80, D)
    before = sae(x)
    sae.fold_W_dec_norm()
    assert all(torch.isfinite(p).all() for p in sae.parameters())
    torch.testing.assert_close(sae(x), before, **tightly)


# --- Dtype


def float32_sae() -> SwitchSAE:
    return switch_sae(dtype="float32")


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@both_kinds
def test_half_precision_leaves_the_router_in_float32_bit_for_bit(kind, half):
    sae = make(kind, dtype="float32")
    router = [getattr(sae, name).detach().clone() for name in ROUTER]
    for to in (half, torch.float32, half):
        sae.to(to)
        assert sae.W_enc.dtype == sae.W_dec.dtype == sae.b_dec.dtype == to
        for name, before in zip(ROUTER, router, strict=True):
            torch.testing.assert_close(getattr(sae, name).detach(), before, **exactly)
            assert getattr(sae, name).requires_grad


def test_a_half_precision_copy_routes_every_token_as_the_original_does():
    sae, x = float32_sae(), random_input(500, D, dtype=torch.bfloat16)
    half = copy.deepcopy(sae).to(torch.bfloat16)
    expert = sae.encode_sparse(x).indices[:, 0] // M
    assert torch.equal(half.encode_sparse(x).indices[:, 0] // M, expert)
    assert half.encode(x).dtype == half(x).dtype == half.decode(half.encode_sparse(x)).dtype == torch.bfloat16
    error = (half(x).float() - sae(x)).square().sum() / sae(x).square().sum()
    assert error < 1e-3


def test_gradients_follow_their_parameters_through_a_change_of_dtype():
    sae = float32_sae()
    sae(random_input(5, D)).sum().backward()
    sae.to(torch.bfloat16)
    for parameter in sae.parameters():
        assert parameter.grad.dtype == parameter.dtype


@pytest.mark.parametrize("saved_as", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("load", [SAE.load_from_disk, TrainingSAE.load_from_disk], ids=["SAE", "TrainingSAE"])
def test_the_router_comes_back_bit_for_bit_when_loaded_in_bfloat16(tmp_path, saved_as, load):
    sae = float32_sae() if load == SAE.load_from_disk else make("training", dtype="float32")
    expected = {name: getattr(sae, name).detach().clone() for name in ROUTER}
    sae.to(getattr(torch, saved_as)).save_model(tmp_path)
    loaded = load(tmp_path, dtype="bfloat16")
    assert loaded.W_enc.dtype == torch.bfloat16
    assert torch.equal(loaded.W_enc, sae.W_enc.bfloat16())
    for name, before in expected.items():
        torch.testing.assert_close(getattr(loaded, name).detach(), before, **exactly)


@pytest.mark.parametrize("load_as", ["float32", "float64"])
def test_the_router_of_a_bfloat16_file_comes_back_bit_for_bit_in_wider_dtypes(tmp_path, load_as):
    sae = float32_sae()
    expected = {name: getattr(sae, name).detach().clone() for name in ROUTER}
    sae.to(torch.bfloat16).save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path, dtype=load_as)
    for name, before in expected.items():
        torch.testing.assert_close(getattr(loaded, name).detach(), before.to(getattr(torch, load_as)), **exactly)


@pytest.mark.parametrize("saved_as", ["float32", "bfloat16", "float16"])
def test_the_router_comes_back_as_it_was_when_loaded_in_float16(tmp_path, saved_as):
    sae = float32_sae()
    expected = {name: getattr(sae, name).detach().clone() for name in ROUTER}
    sae.to(getattr(torch, saved_as)).save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path, dtype="float16")
    for name, before in expected.items():
        # float16 has no exponent for the last bits of a small number
        torch.testing.assert_close(getattr(loaded, name).detach(), before, rtol=0, atol=2**-24)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_training_pass_works_in_every_dtype(dtype):
    sae, x = training_sae(dtype=dtype), random_input(30, D, dtype=torch.float32) + 1
    output = sae.training_forward_pass(step_input=step_input(x, step=0))
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for n, p in sae.named_parameters() if n != "b_router")
    torch.testing.assert_close(sae.b_dec.float(), sae.b_router, rtol=1e-2, atol=1e-2)


# --- Copies


def round_trip_pickle(sae):
    return pickle.loads(pickle.dumps(sae))


def round_trip_torch_save(sae):
    file = io.BytesIO()
    torch.save(sae, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


copies = pytest.mark.parametrize("copied", [copy.deepcopy, round_trip_pickle, round_trip_torch_save])


@copies
@both_kinds
@pytest.mark.parametrize("normalize_activations", NORMALISATIONS)
def test_a_copy_computes_the_same_and_shares_nothing_with_the_original(copied, kind, normalize_activations):
    sae = make(kind, normalize_activations=normalize_activations)
    twin = copied(sae)
    x = random_input(7, D)
    assert type(twin) is type(sae)
    assert twin.cfg == sae.cfg
    assert twin.cfg is not sae.cfg
    assert same_weights(twin, sae)
    expected = sae(x)
    torch.testing.assert_close(twin(x), expected, **exactly)

    randomize(twin, seed=77)
    torch.testing.assert_close(sae(x), expected, **exactly)
    with twin.hooks([("hook_sae_acts_post", lambda acts, hook: acts * 0)]):  # noqa: ARG005
        torch.testing.assert_close(sae(x), expected, **exactly)
    assert {id(h) for h in twin.hook_dict.values()}.isdisjoint({id(h) for h in sae.hook_dict.values()})
    assert all(getattr(twin, name) is hook for name, hook in twin.hook_dict.items())


@copies
@pytest.mark.parametrize("normalize_activations", RUN_TIME_NORMALISATIONS)
def test_original_and_copy_may_be_used_between_each_others_encode_and_decode(copied, normalize_activations):
    sae = switch_sae(normalize_activations=normalize_activations)
    twin = copied(sae)
    x, y = random_input(4, D), random_input(4, D, seed=8) * 100
    expected = sae(x)
    acts = sae.encode(x)
    twin_acts = twin.encode(y)
    torch.testing.assert_close(sae.decode(acts), expected, **exactly)
    torch.testing.assert_close(twin.decode(twin_acts), sae(y), **exactly)


@copies
@pytest.mark.parametrize("used_before", [False, True])
def test_copies_of_a_hook_z_sae_reshape_on_their_own(copied, used_before):
    sae = switch_sae(reshape_activations="hook_z", metadata=hook_z_metadata())
    x, y = random_input(4, 3, D // 3), random_input(4, 2, D // 2)
    expected_x, expected_y = copy.deepcopy(sae)(x), copy.deepcopy(sae)(y)
    if used_before:
        sae(x)
    twin = copied(sae)
    torch.testing.assert_close(twin(y), expected_y, **exactly)
    torch.testing.assert_close(sae(x), expected_x, **exactly)
    sae.turn_off_forward_pass_hook_z_reshaping()
    torch.testing.assert_close(twin(y), expected_y, **exactly)
    off = copied(sae)
    assert off(y.reshape(4, D)).shape == (4, D)


def test_a_copy_of_a_trained_sae_does_not_start_over():
    sae, x = training_sae(), random_input(30, D) + 3
    sae.training_forward_pass(step_input=step_input(x, step=0))
    assert sae.b_dec.any()
    twin = round_trip_pickle(sae)
    twin.training_forward_pass(step_input=step_input(x * 10, step=0))
    assert same_weights(twin, sae)


# --- Meta device


@both_kinds
def test_an_sae_can_be_built_on_the_meta_device_without_touching_data(kind):
    cfg = (switch_config if kind == "inference" else training_config)(device="meta", d_sae=2**26, n_experts=2**10)
    sae = (SwitchSAE if kind == "inference" else SwitchTrainingSAE)(cfg)
    assert {p.device.type for p in sae.parameters()} == {"meta"}
    assert sae.W_dec.shape == (2**26, D)


# --- Files


@both_kinds
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_save_model_and_load_from_disk_give_the_same_sae(tmp_path, kind, dtype):
    sae = make(kind, dtype=dtype, metadata=SAEMetadata(hook_name=HOOK, model_name="tiny"))
    before = copy.deepcopy(sae)
    weights_path, cfg_path = sae.save_model(tmp_path / "deep" / "folder")
    assert (weights_path, cfg_path) == (
        tmp_path / "deep" / "folder" / "sae_weights.safetensors",
        tmp_path / "deep" / "folder" / "cfg.json",
    )
    assert {p.name for p in weights_path.parent.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    assert same_weights(sae, before)
    loaded = (SAE if kind == "inference" else TrainingSAE).load_from_disk(weights_path.parent)
    assert type(loaded) is type(sae)
    assert loaded.cfg == sae.cfg
    assert same_weights(loaded, sae)
    assert all(p.requires_grad for p in loaded.parameters())
    assert loaded.W_enc.stride() == sae.W_enc.stride()
    x = random_input(7, D)
    torch.testing.assert_close(loaded(x), sae(x), **exactly)
    torch.testing.assert_close(loaded.encode_sparse(x).indices, sae.encode_sparse(x).indices, **exactly)


@pytest.mark.parametrize("load", [SwitchSAE.load_from_disk, SAE.load_from_disk])
def test_our_class_loads_as_well_as_saelens_base_class(tmp_path, load):
    switch_sae().save_model(tmp_path)
    assert type(load(tmp_path)) is SwitchSAE


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
def test_save_inference_model_loads_as_the_inference_sae_with_equal_outputs(tmp_path, dtype, normalize_activations):
    train = make("training", dtype=dtype, gate="one", k=5, normalize_activations=normalize_activations)
    before = copy.deepcopy(train)
    assert [p.name for p in train.save_inference_model(tmp_path)] == ["sae_weights.safetensors", "cfg.json"]
    assert same_weights(train, before)
    sae = SAE.load_from_disk(tmp_path)
    assert type(sae) is SwitchSAE
    assert (sae.cfg.k, sae.cfg.n_experts, sae.cfg.gate, sae.cfg.dtype) == (5, E, "one", dtype)
    assert sae.cfg.metadata.training_architecture == "switch"
    x = random_input(3, 7, D)
    torch.testing.assert_close(sae.encode(x), train.encode(x), **exactly)
    torch.testing.assert_close(sae(x), train(x), **exactly)


def test_a_tied_router_bias_reaches_the_inference_sae(tmp_path):
    train = training_sae(tie_router_bias=True)
    x = random_input(60, D) + 2
    optimizer = torch.optim.Adam(train.parameters(), lr=0.1)
    for step in range(3):
        train.training_forward_pass(step_input=step_input(x, step=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    train.save_inference_model(tmp_path)
    torch.testing.assert_close(SAE.load_from_disk(tmp_path)(x), train(x), **exactly)


def test_a_training_folder_also_opens_as_an_inference_sae_and_the_other_way_round(tmp_path):
    train = make("training")
    x = random_input(7, D)
    train.save_model(tmp_path / "training")
    torch.testing.assert_close(SAE.load_from_disk(tmp_path / "training")(x), train(x), **exactly)
    train.save_inference_model(tmp_path / "inference")
    again = TrainingSAE.load_from_disk(tmp_path / "inference")
    assert type(again) is SwitchTrainingSAE
    torch.testing.assert_close(again(x), train(x), **exactly)


def test_a_loaded_training_sae_keeps_its_biases_on_its_first_batch(tmp_path):
    train = make("training", normalize_decoder=False)
    train.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    loaded.training_forward_pass(step_input=step_input(random_input(30, D) + 9, step=0))
    assert same_weights(loaded, train)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_load_weights_from_checkpoint_restores_every_parameter(tmp_path, dtype):
    train = make("training", dtype=dtype)
    train.save_model(tmp_path)
    other = training_sae(seed=5, dtype=dtype)
    parameters = dict(other.named_parameters())
    other.load_weights_from_checkpoint(tmp_path)
    assert same_weights(other, train)
    assert dict(other.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in other.named_parameters())
    other.training_forward_pass(step_input=step_input(random_input(30, D) + 9, step=0))
    torch.testing.assert_close(other.b_dec, train.b_dec, **exactly)


def test_the_file_holds_plain_contiguous_tensors_under_the_names_of_saelens(tmp_path):
    sae = switch_sae()
    weights_path, _ = sae.save_model(tmp_path)
    file = load_file(weights_path)
    assert PARAMETERS.items() <= {name: tuple(t.shape) for name, t in file.items()}.items()
    for name in PARAMETERS:
        assert torch.equal(file[name], getattr(sae, name))


def test_loading_with_fold_w_dec_norm_equals_folding_after_loading(tmp_path):
    sae = with_norms(torch.tensor([0.2, 1.0, 3.0, 50.0]).repeat_interleave(M))
    sae.save_model(tmp_path)
    folded = SAE.load_from_disk(tmp_path, fold_W_dec_norm=True)
    sae.fold_W_dec_norm()
    assert same_weights(folded, sae)


def from_disk_like_the_hub(folder):
    def load(repo_id, folder_name, device, force_download, cfg_overrides):  # noqa: ARG001
        cfg, weights = host.sae_lens_disk_loader(folder, device, cfg_overrides)
        return cfg, weights, None

    return load


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_pretrained_gives_the_saved_sae_in_the_asked_dtype(tmp_path, dtype):
    sae = float32_sae()
    sae.save_model(tmp_path)
    loaded = SAE.from_pretrained("user/repo", "folder", dtype=dtype, converter=from_disk_like_the_hub(tmp_path))
    assert type(loaded) is SwitchSAE
    assert same_weights(loaded, sae.to(getattr(torch, dtype)))


def test_from_pretrained_folds_a_known_scaling_factor_into_the_router_too(tmp_path, monkeypatch):
    sae = switch_sae(dtype="float32", normalize_activations="expected_average_only_in")
    sae.save_model(tmp_path)
    monkeypatch.setattr(host, "get_norm_scaling_factor", lambda release, sae_id: 0.25)  # noqa: ARG005
    loaded = SAE.from_pretrained("user/repo", "folder", converter=from_disk_like_the_hub(tmp_path))
    assert loaded.cfg.normalize_activations == "none"
    sae.fold_activation_norm_scaling_factor(0.25)
    assert same_weights(loaded, sae)


def test_a_save_that_fails_leaves_the_files_before_it_whole(tmp_path, monkeypatch):
    sae = switch_sae()
    sae.save_model(tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def crash(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(host.json, "dump", crash)
    with pytest.raises(OSError, match="disk full"):
        randomize(sae, seed=5).save_model(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files


# --- Broken files


def broken(tmp_path, change, kind: str = "inference"):
    """A saved SAE whose weights file went through ``change``."""
    weights_path, _ = make(kind).save_model(tmp_path)
    weights = load_file(weights_path)
    change(weights)
    save_file(weights, weights_path)
    return tmp_path


@pytest.mark.parametrize("name", PARAMETERS)
@both_kinds
def test_a_weights_file_without_a_parameter_is_refused_by_name(tmp_path, name, kind):
    folder = broken(tmp_path, lambda weights: weights.pop(name), kind)
    with pytest.raises(ValueError, match=f"must hold {name}"):
        (SAE if kind == "inference" else TrainingSAE).load_from_disk(folder)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_misshaped_parameter_is_refused_with_both_shapes(tmp_path, name):
    def transpose_or_cut(weights):
        weights[name] = weights[name].T.contiguous() if weights[name].ndim == 2 else weights[name][1:].clone()

    folder = broken(tmp_path, transpose_or_cut)
    with pytest.raises(ValueError, match=name) as error:
        SAE.load_from_disk(folder)
    assert str(PARAMETERS[name]) in str(error.value)


def test_weights_that_do_not_fit_are_refused_by_load_weights_from_checkpoint_and_change_nothing(tmp_path):
    folder = broken(tmp_path, lambda weights: weights.update(W_dec=weights["W_dec"][1:].clone()), "training")
    sae = make("training", k=5)
    before = copy.deepcopy(sae)
    with pytest.raises(ValueError, match="W_dec"):
        sae.load_weights_from_checkpoint(folder)
    assert same_weights(sae, before)


def test_weights_of_another_number_of_experts_are_refused(tmp_path):
    switch_sae().save_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"n_experts": 2 * E}))
    with pytest.raises(ValueError, match="W_router must have shape"):
        SAE.load_from_disk(tmp_path)


def test_a_parameter_too_many_is_refused_by_name(tmp_path):
    folder = broken(tmp_path, lambda weights: weights.update(b_enc=torch.zeros(F)))
    with pytest.raises(RuntimeError, match="b_enc"):
        SAE.load_from_disk(folder)


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.999])
def test_a_truncated_weights_file_is_refused(tmp_path, keep):
    weights_path, _ = switch_sae().save_model(tmp_path)
    data = weights_path.read_bytes()
    weights_path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(SafetensorError):
        SAE.load_from_disk(tmp_path)


def test_a_garbled_header_is_refused(tmp_path):
    weights_path, _ = switch_sae().save_model(tmp_path)
    data = bytearray(weights_path.read_bytes())
    data[8:40] = b"\xff" * 32
    weights_path.write_bytes(data)
    with pytest.raises(SafetensorError):
        SAE.load_from_disk(tmp_path)


def test_a_training_run_cannot_be_read_with_an_impossible_config(tmp_path):
    switch_sae().save_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"k": M + 1}))
    with pytest.raises(ValueError, match="k must be at most"):
        SAE.load_from_disk(tmp_path)


# --- The training pass, as the trainer sees it


@pytest.mark.parametrize("k", [K, M])
def test_the_training_pass_returns_what_the_trainer_needs(k):
    sae, x = make("training", k=k), random_input(30, D)
    output = sae.training_forward_pass(step_input=step_input(x))
    assert output.sae_in is x
    assert output.feature_acts.is_sparse
    assert output.feature_acts.shape == (30, F)
    assert not output.feature_acts.requires_grad
    assert not output.hidden_pre.requires_grad
    torch.testing.assert_close(output.feature_acts.to_dense(), sae.encode(x), **tightly)
    torch.testing.assert_close(output.sae_out, sae(x), **tightly)
    assert output.losses.keys() == {"mse_loss", "load_balance_loss"}
    torch.testing.assert_close(output.loss, sum(output.losses.values()), **tightly)
    torch.testing.assert_close(output.losses["mse_loss"], (sae(x) - x).square().sum(-1).mean(), **tightly)
    assert sae.get_coefficients().keys() == {"load_balance"}


def test_the_training_pass_uses_the_loss_function_a_user_swapped_in():
    sae, x = make("training"), random_input(30, D)
    sae.mse_loss_fn = lambda out, target: (out - target).abs()
    output = sae.training_forward_pass(step_input=step_input(x))
    torch.testing.assert_close(output.losses["mse_loss"], (sae(x) - x).abs().sum(-1).mean(), **tightly)


def test_calculate_aux_loss_is_the_load_balance_loss_of_the_training_pass():
    sae, x = make("training"), random_input(30, D)
    output = sae.training_forward_pass(step_input=step_input(x))
    acts, pre = sae.encode_with_hidden_pre(x)
    aux = sae.calculate_aux_loss(step_input=step_input(x), feature_acts=acts, hidden_pre=pre, sae_out=sae.decode(acts))
    assert aux.keys() == {"load_balance_loss"}
    torch.testing.assert_close(aux["load_balance_loss"], output.losses["load_balance_loss"], **tightly)


def test_log_histograms_are_numpy_arrays_of_decoder_and_router_norms():
    sae = make("training", dtype="bfloat16")
    histograms = sae.log_histograms()
    assert {name: h.shape for name, h in histograms.items()} == {
        "weights/W_dec_norms": (F,),
        "weights/W_router_norms": (E,),
    }


def test_runner_logging_names_the_architecture():
    cfg = sae_lens_switch.LanguageModelSAERunnerConfig(sae=training_config(), logger=LoggingConfig(), verbose=False)
    assert cfg.logger.run_name.startswith(f"switch-{F}-")
