"""Our runner config beside SAELens's own."""

import copy
import json
import pickle
from dataclasses import asdict, fields, replace

import pytest
import sae_lens
import sae_lens.training.sae_trainer as host_trainer
from helpers import HOOK, D, E, F, K, activations, run_fields, small_run_warnings, training_sae
from helpers.runs import OURS, SAE_FIELDS, STOCK_ARCHITECTURES, our_config, steps

from sae_lens_switch import LanguageModelSAERunnerConfig, SwitchTrainingSAEConfig, TrainerOptions, scaling_law_lr

pytestmark = small_run_warnings


def test_fields_of_the_sae_and_of_the_runner_find_their_places(tmp_path):
    cfg = our_config(tmp_path, gate="one", load_balance_scale="d_in", training_tokens=640, seed=7, dtype="bfloat16")
    assert isinstance(cfg, sae_lens.LanguageModelSAERunnerConfig)
    assert type(cfg.sae) is SwitchTrainingSAEConfig
    assert (cfg.sae.d_in, cfg.sae.d_sae, cfg.sae.n_experts, cfg.sae.k, cfg.sae.gate) == (D, F, E, K, "one")
    assert cfg.sae.load_balance_coefficient == 3.0
    assert (cfg.training_tokens, cfg.seed, cfg.hook_name) == (640, 7, HOOK)
    assert cfg.dtype == cfg.sae.dtype == "bfloat16"
    assert cfg.to_dict()["sae"]["architecture"] == "switch"


def test_device_and_dtype_go_to_both_and_sae_kwargs_win(tmp_path):
    cfg = our_config(tmp_path, device="meta", dtype="float16", sae_kwargs={"dtype": "float64", "k": 2})
    assert (cfg.device, cfg.sae.device, cfg.dtype, cfg.sae.dtype, cfg.sae.k) == (
        "meta",
        "meta",
        "float16",
        "float64",
        2,
    )


def test_what_is_not_given_follows_the_paper():
    tokens, batch = 1_000_000, 1000
    cfg = LanguageModelSAERunnerConfig(
        architecture="switch",
        d_in=D,
        d_sae=2**16,
        n_experts=E,
        training_tokens=tokens,
        train_batch_size_tokens=batch,
        verbose=False,
    )
    assert cfg.lr == scaling_law_lr(2**16) == 1e-4
    assert cfg.lr_end == pytest.approx(1e-5)
    assert cfg.lr_decay_steps == 200
    assert (cfg.adam_beta1, cfg.adam_beta2) == (0.9, 0.999)
    sae = cfg.sae
    assert (sae.bias_start, sae.normalize_decoder, sae.project_decoder_grad, sae.decoder_init_norm) == (
        "geometric_median",
        True,
        True,
        1.0,
    )
    defaults = LanguageModelSAERunnerConfig(architecture="switch", d_in=D, d_sae=F, n_experts=E, k=K, verbose=False)
    assert defaults.lr_decay_steps == defaults.total_training_steps // 5


def test_what_is_given_wins_over_the_paper():
    cfg = LanguageModelSAERunnerConfig(
        architecture="switch",
        **SAE_FIELDS,
        lr=3e-4,
        lr_decay_steps=0,
        adam_beta1=0.0,
        bias_start="zeros",
        normalize_decoder=False,
        decoder_init_norm=0.1,
        load_balance_coefficient=0.0,
        verbose=False,
    )
    assert (cfg.lr, cfg.lr_decay_steps, cfg.adam_beta1) == (3e-4, 0, 0.0)
    assert (cfg.sae.bias_start, cfg.sae.normalize_decoder, cfg.sae.decoder_init_norm) == ("zeros", False, 0.1)
    assert cfg.sae.load_balance_coefficient == 0.0


def test_the_learning_rate_is_constant_and_then_falls_to_zero_over_the_last_fifth(tmp_path):
    cfg = our_config(tmp_path, training_tokens=20 * 64)
    batches = activations(20)
    the_trainer = host_trainer.SAETrainer(cfg.to_sae_trainer_config(), training_sae(), iter(batches))
    rates = []
    for _ in steps(the_trainer, batches):
        rates.append(the_trainer.lr_scheduler.get_last_lr()[0])
    assert rates[:15] == pytest.approx([scaling_law_lr(F)] * 15)
    assert rates[15:] == pytest.approx([scaling_law_lr(F) * (1 - i / 4) for i in range(5)])


def test_it_takes_the_type_of_its_sae_config_in_brackets_as_saelens_config_does(tmp_path):
    sae = SwitchTrainingSAEConfig(**SAE_FIELDS)
    assert LanguageModelSAERunnerConfig[SwitchTrainingSAEConfig](sae=sae, **run_fields(tmp_path)).sae is sae


def test_without_an_architecture_it_is_saelens_own_config(tmp_path):
    sae = SwitchTrainingSAEConfig(**SAE_FIELDS)
    ours = LanguageModelSAERunnerConfig(sae=sae, **run_fields(tmp_path))
    positional = LanguageModelSAERunnerConfig(sae, **run_fields(tmp_path))
    stock = sae_lens.LanguageModelSAERunnerConfig(sae=sae, **run_fields(tmp_path))
    for cfg in (ours, positional):
        assert cfg.sae is sae
        differing = {n for n, v in asdict(stock).items() if asdict(cfg)[n] != v}
        assert differing == {"checkpoint_path"}


@pytest.mark.parametrize("architecture", [*sorted(OURS), *STOCK_ARCHITECTURES])
@pytest.mark.parametrize("reader", [LanguageModelSAERunnerConfig, sae_lens.LanguageModelSAERunnerConfig])
def test_to_dict_json_from_dict_round_trip_through_our_class_and_stocks(architecture, reader, tmp_path):
    options = {
        "switch": {"n_experts": E, "k": K},
        "topk": {"k": K},
        "abstopk": {"k": K},
        "batchtopk": {"k": K + 0.5},
        "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [F // 2, F]},
    }
    own = options.get(architecture.removeprefix("sparse_").removesuffix("_transcoder"), {})
    cfg = LanguageModelSAERunnerConfig(
        architecture=architecture, d_in=D, d_sae=F, **own, **run_fields(tmp_path, seed=5)
    )
    written = json.loads(json.dumps(cfg.to_dict()))
    read = reader.from_dict(written)
    assert type(read) is reader
    assert read.sae == cfg.sae
    assert json.loads(json.dumps(read.to_dict())) == written


def test_our_runner_config_can_be_replaced_pickled_copied_compared_and_printed(tmp_path):
    cfg = our_config(tmp_path, lr=0.5)
    changed = replace(cfg, seed=9)
    assert type(changed) is LanguageModelSAERunnerConfig
    assert (changed.seed, changed.lr, changed.sae) == (9, 0.5, cfg.sae)
    for twin in (pickle.loads(pickle.dumps(cfg)), copy.deepcopy(cfg)):
        assert type(twin) is LanguageModelSAERunnerConfig
        assert twin == cfg
        assert twin.to_dict() == cfg.to_dict()
        assert twin.sae is not cfg.sae
        assert twin.tokens_per_buffer == cfg.tokens_per_buffer
    assert cfg != changed
    assert repr(cfg).startswith("LanguageModelSAERunnerConfig(sae=SwitchTrainingSAEConfig(d_in=12, d_sae=40")
    stock, options = fields(sae_lens.LanguageModelSAERunnerConfig), fields(TrainerOptions)
    assert [f.name for f in fields(cfg)] == [f.name for f in (*stock, *options)]


@pytest.mark.parametrize(
    ("given", "meant"),
    [("swich", "'switch'"), ("Switch", "'switch'"), ("top_k", "'topk'"), ("batchtop", "'batchtopk'")],
)
def test_an_unknown_architecture_is_refused_with_the_nearest_name(given, meant):
    with pytest.raises(ValueError, match=f"got '{given}'; did you mean {meant}"):
        LanguageModelSAERunnerConfig(architecture=given, d_in=D, d_sae=F)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("n_expert", "n_experts"), ("train_batch_size", "train_batch_size_tokens"), ("hook_nam", "hook_name")],
)
def test_an_unknown_field_is_refused_with_the_nearest_name(given, meant):
    for error in (ValueError, TypeError):
        with pytest.raises(error, match=f"'{given}'; did you mean '{meant}'"):
            LanguageModelSAERunnerConfig(architecture="switch", **SAE_FIELDS, **{given: 1})


def test_a_field_of_another_architecture_is_refused():
    with pytest.raises(ValueError, match="n_experts"):
        LanguageModelSAERunnerConfig(architecture="topk", d_in=D, d_sae=F, n_experts=E)
    with pytest.raises(ValueError, match="n_exprts.*n_experts"):
        LanguageModelSAERunnerConfig(architecture="switch", d_in=D, d_sae=F, sae_kwargs={"n_exprts": E})
    with pytest.raises(ValueError, match="k"):
        LanguageModelSAERunnerConfig(sae=SwitchTrainingSAEConfig(**SAE_FIELDS), k=3)


def test_architecture_and_sae_exclude_each_other_and_sizes_are_needed():
    sae = SwitchTrainingSAEConfig(**SAE_FIELDS)
    for bad in ({"sae": sae, "architecture": "switch"}, {}):
        with pytest.raises(ValueError, match="exactly one"):
            LanguageModelSAERunnerConfig(**bad)
    with pytest.raises(ValueError, match="needs d_in and d_sae"):
        LanguageModelSAERunnerConfig(architecture="switch", n_experts=E)
    with pytest.raises(ValueError, match="sae_kwargs"):
        LanguageModelSAERunnerConfig(sae=sae, sae_kwargs={"k": 2})
