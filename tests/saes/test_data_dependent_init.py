"""Where training starts: biases and router are fitted to the first step that is good, of an SAE that is fresh."""

import copy
import logging
import math

import pytest
import torch
from helpers import D, activations, random_input, randomize, trainer, training_sae
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig, SwitchTrainingSAE
from sae_lens_switch.saes.data_dependent_init import Spread, bias_from_batch

FAR = 10**6  # samples: further than any test goes
ROW = random_input(1, D, seed=5, dtype=torch.float32)
CONSTANT = {
    "zeros": torch.zeros(64, D),
    "one row": ROW,
    "equal rows": ROW.expand(64, D).clone(),
    "equal rows far out": (1e6 * ROW).expand(64, D).clone(),
    "1e-30": torch.full((64, D), 1e-30),
    "smallest": torch.full((64, D), 1e-45),
}


def fresh(**fields) -> SwitchTrainingSAE:
    return training_sae(**{"dtype": "float32", **fields})


def step_input(x: Tensor, step: int = 0) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x,
        dead_neuron_mask=None,
        coefficients={"load_balance": 0.3},
        n_training_steps=step,
        is_logging_step=False,
    )


def started(sae: SwitchTrainingSAE, x: Tensor) -> SwitchTrainingSAE:
    sae.training_forward_pass(step_input(x))
    return sae


def fit(sae, batches: list[Tensor], **fields) -> SparseSAETrainer:
    fields = {
        "total_training_samples": sum(map(len, batches)),
        "train_batch_size_samples": len(batches[-1]),
        "lr": 1e-2,
        "lr_decay_steps": 0,
        **fields,
    }
    the_trainer = SparseSAETrainer(SparseSAETrainerConfig(**fields), sae, iter(batches))
    the_trainer.fit()
    return the_trainer


def bits(sae) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Constant batches


@pytest.mark.parametrize("method", ["geometric_median", "mean"])
@pytest.mark.parametrize("x", CONSTANT.values(), ids=CONSTANT.keys())
def test_the_centre_of_equal_rows_is_that_row(x, method):
    assert torch.allclose(bias_from_batch(x, method), x[0], rtol=1e-6, atol=0)
    assert Spread.of(x).is_none


@pytest.mark.parametrize("exponent", [-120, -60, 0, 60, 120])
def test_the_centre_scales_with_the_batch(exponent):
    x = activations(1)[0]
    here, there = bias_from_batch(x, "geometric_median"), bias_from_batch(x * 2.0**exponent, "geometric_median")
    assert torch.allclose(there, here * 2.0**exponent, rtol=1e-5, atol=0)
    assert Spread.of(x * 2.0**exponent).is_none == (exponent < -64), "whose squares float32 has no numbers for"


@pytest.mark.parametrize("tie_router_bias", [False, True])
@pytest.mark.parametrize("x", CONSTANT.values(), ids=CONSTANT.keys())
def test_training_that_begins_with_equal_rows_goes_on(x, tie_router_bias, caplog):
    sae = fresh(tie_router_bias=tie_router_bias)
    W_router = sae.W_router.detach().clone()
    with caplog.at_level(logging.INFO):
        started(sae, x)
    assert torch.allclose(sae.b_dec, x[0], rtol=1e-6, atol=0)
    assert torch.allclose(sae.b_router, x[0], rtol=1e-6, atol=0)
    assert torch.equal(sae.W_router, W_router), "there is no spread to fit the router's sharpness to"
    assert "the router as initialised" in caplog.text
    assert f"{len(x)} activations" in caplog.text

    sae = fresh(tie_router_bias=tie_router_bias)
    the_trainer = fit(sae, [x, *activations(20)])
    assert the_trainer.n_skipped_steps == 0
    assert all(torch.isfinite(p).all() for p in sae.parameters())


def test_a_minute_batch_does_not_sharpen_the_router_for_those_that_follow():
    sae = fresh()
    fit(sae, [1e-38 * activations(1)[0], *activations(3, scale=1e3)])
    assert all(torch.isfinite(p).all() for p in sae.parameters())
    assert sae.W_router.abs().max() < 1


def test_nearly_equal_rows_do_not_sharpen_the_router():
    x = ROW * (1 + 1e-7 * random_input(64, 1, dtype=torch.float32))
    sae = fresh()
    before = sae.W_router.detach().clone()
    started(sae, x)
    assert torch.equal(sae.W_router, before)


def test_a_batch_with_spread_gives_the_logits_their_standard_deviation(caplog):
    x = activations(1)[0]
    sae = fresh(router_start_std=0.7)
    with caplog.at_level(logging.INFO):
        started(sae, x)
    logits = (x - sae.b_router) @ sae.W_router
    assert math.isclose(logits.std().item(), 0.7, rel_tol=1e-4)
    assert "biases start at geometric_median of 64 activations" in caplog.text


# Steps that are not good


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
@pytest.mark.parametrize("bad", [1e30, 3e38, math.inf, math.nan])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_first_step_that_is_skipped_changes_nothing(bad, optimizer, dtype):
    batches = activations(20)
    spoilt = batches[0].clone()
    spoilt[3, 2] = bad
    sae = fresh(dtype=dtype)
    before = bits(sae)
    the_trainer = SparseSAETrainer(
        SparseSAETrainerConfig(FAR, 64, lr=1e-2, optimizer=optimizer), sae, iter([spoilt, *batches])
    )
    the_trainer.step(spoilt)
    assert the_trainer.n_skipped_steps == 1
    assert same(bits(sae), before)
    assert sae.is_fresh

    the_trainer.n_training_steps += 1
    the_trainer.step(batches[0])
    assert not sae.is_fresh
    lone = fresh(dtype=dtype)
    SparseSAETrainer(
        SparseSAETrainerConfig(FAR, 64, lr=1e-2, optimizer=optimizer, lr_warm_up_steps=0), lone, iter(batches)
    ).step(batches[0])
    assert same(bits(sae), bits(lone)), "the first good step is the first"


@pytest.mark.parametrize("bad", [1e30, math.nan])
def test_saelens_s_own_trainer_is_stopped_with_the_sae_as_it_was(bad):
    batches = activations(3)
    batches[0][0, 0] = bad
    sae = fresh()
    before = bits(sae)
    with pytest.raises(ValueError, match="The weights are those of the step before"):
        trainer(sae, batches).fit()
    assert same(bits(sae), before)
    assert sae.is_fresh


def test_a_start_that_does_not_fit_the_dtype_waits_for_a_batch_that_does():
    x = activations(1)[0]
    sae = fresh(dtype="float16")
    before = sae.b_dec.detach().clone()
    started_by = 1e6 * x.double()  # finite, and infinite in float16
    with pytest.raises(ValueError, match="not finite"):
        started(sae, started_by)
    assert torch.equal(sae.b_dec, before)
    started(sae, x)
    assert sae.b_dec.count_nonzero() > 0


# Who is fresh


def fill_by_loading(sae, other):
    sae.load_state_dict(other.state_dict())


@torch.no_grad()
def fill_by_copying(sae, other):
    for p, q in zip(sae.parameters(), other.parameters(), strict=True):
        p.copy_(q)


def fill_data(sae, other):
    for p, q in zip(sae.parameters(), other.parameters(), strict=True):
        p.data.copy_(q.data)


def replace_data(sae, other):
    for p, q in zip(sae.parameters(), other.parameters(), strict=True):
        p.data = q.data.clone()


@torch.no_grad()
def fill_the_decoder_alone(sae, other):
    sae.W_dec.copy_(other.W_dec)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(
    "fill",
    [fill_by_loading, fill_by_copying, fill_data, replace_data, fill_the_decoder_alone],
    ids=lambda f: f.__name__,
)
def test_an_sae_that_was_filled_keeps_its_weights(fill, dtype):
    sae = fresh(dtype=dtype)
    fill(sae, randomize(fresh(dtype=dtype), seed=8))
    assert not sae.is_fresh
    before = bits(sae)
    started(sae, activations(1)[0].to(sae.dtype))
    assert same(bits(sae), before)


def test_whether_an_sae_was_filled_is_looked_at_once(monkeypatch):
    sae = fresh()
    fill_by_copying(sae, randomize(fresh(), seed=8))
    assert not sae.is_fresh
    monkeypatch.setattr("sae_lens_switch.saes.data_dependent_init._sample", lambda _: pytest.fail("a copy to the host"))
    started(sae, activations(1)[0])
    assert not sae.is_fresh


def test_weights_of_a_checkpoint_are_kept(tmp_path):
    other = randomize(fresh(), seed=8)
    other.save_model(tmp_path)
    sae = fresh()
    sae.load_weights_from_checkpoint(tmp_path)
    before = bits(sae)
    started(sae, activations(1)[0])
    assert same(bits(sae), before)


def test_to_another_dtype_or_as_a_copy_it_is_as_fresh_as_before():
    assert fresh().to(torch.bfloat16).is_fresh
    assert copy.deepcopy(fresh()).is_fresh
    assert not copy.deepcopy(started(fresh(), activations(1)[0])).is_fresh
    assert not SwitchTrainingSAE(training_sae(device="meta").cfg).is_fresh


def test_a_fresh_sae_is_fresh_when_it_is_loaded(tmp_path):
    fresh().save_model(tmp_path / "fresh")
    started(fresh(), activations(1)[0]).save_model(tmp_path / "started")
    assert TrainingSAE.load_from_disk(tmp_path / "fresh").is_fresh
    assert not TrainingSAE.load_from_disk(tmp_path / "started").is_fresh
    sae = fresh()
    sae.load_weights_from_checkpoint(tmp_path / "fresh")
    assert sae.is_fresh
    started(sae, activations(1)[0])
    assert sae.b_dec.count_nonzero() > 0


def test_a_file_for_inference_says_nothing_of_it(tmp_path):
    fresh().save_inference_model(tmp_path)
    assert "fresh" not in load_file(tmp_path / "sae_weights.safetensors")


def test_a_run_resumed_before_its_first_good_step_starts_with_it(tmp_path):
    batches = activations(8)
    spoilt = [torch.full_like(b, math.nan) for b in batches[:3]]
    options = {"total_training_samples": 11 * 64, "max_skipped_steps": 100, "checkpoint_path": str(tmp_path)}
    whole = fit(fresh(), [*spoilt, *batches], **{**options, "checkpoint_path": None})

    first = SparseSAETrainer(
        SparseSAETrainerConfig(train_batch_size_samples=64, lr=1e-2, lr_decay_steps=0, **options),
        fresh(),
        iter([*spoilt, *batches]),
    )
    for batch in spoilt[:2]:
        first.step(batch)
        first.n_training_steps += 1
    first.save_checkpoint("early")
    resumed = fit(fresh(seed=3), [*spoilt, *batches], **options, resume=str(tmp_path / "early"))
    assert same(bits(resumed.sae), bits(whole.sae))


def test_frozen_parameters_are_not_started():
    sae = fresh()
    sae.b_dec.requires_grad_(False)
    sae.W_router.requires_grad_(False)
    before = bits(sae)
    started(sae, activations(1)[0])
    assert torch.equal(sae.b_dec, before["b_dec"])
    assert torch.equal(sae.W_router, before["W_router"])
    assert not torch.equal(sae.b_router, before["b_router"])
