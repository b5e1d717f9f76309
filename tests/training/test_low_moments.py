"""Adam's moments in bfloat16: half the memory, nearly the same training, to the bit after a checkpoint."""

import pytest
import torch
from helpers.resumed import BATCH, data, make_sae, make_trainer
from sae_lens_switch_kernels import torch_adam
from torch import nn
from torch.nn import functional

from sae_lens_switch import CheckpointError, SparseSAETrainerConfig
from sae_lens_switch.training.collapse_response import reseed
from sae_lens_switch.training.optim.constrained_adam import ConstrainedAdam
from sae_lens_switch.training.optim.row_sparse_adam import RowSparseAdam

LOW = {"moments_dtype": "bfloat16"}
both_optimizers = pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])


def moments(trainer) -> dict[str, torch.dtype]:
    """By parameter: what its moments are kept in."""
    state, found = trainer.optimizer.state, {}
    for name, p in trainer.sae.named_parameters():
        dtypes = {t.dtype for key, t in state[p].items() if key in ("exp_avg", "exp_avg_sq", "moments")}
        (found[name],) = dtypes
    return found


@both_optimizers
@pytest.mark.parametrize(
    ("architecture", "fields"),
    [("switch", {}), ("switch", {"dtype": "bfloat16"}), ("sparse_topk", {}), ("standard", {})],
    ids=["switch", "switch in bfloat16", "sparse_topk", "standard"],
)
def test_training_is_nearly_that_with_moments_in_float32(architecture, fields, optimizer):
    if architecture == "standard" and optimizer == "row_sparse_adam":
        pytest.skip("row-sparse Adam is for sparse SAEs")
    losses = []
    for options in ({}, LOW):
        trainer = make_trainer(make_sae(architecture, **fields), data(), steps=60, optimizer=optimizer, **options)
        losses.append([])
        step = trainer.step
        trainer.step = lambda batch, step=step: losses[-1].append((out := step(batch)).loss.item()) or out
        trainer.fit()
    assert losses[0] != losses[1]
    # Which latents a token has may differ here and there, and with them the loss of a step.
    plain, low = (torch.tensor(of_one[-20:]).mean() for of_one in losses)
    torch.testing.assert_close(low, plain, rtol=0.01 if fields else 0.001, atol=0)
    kept = moments(trainer)
    assert {name for name, dtype in kept.items() if dtype == torch.bfloat16} == {"W_enc", "W_dec"}
    assert {dtype for name, dtype in kept.items() if not name.startswith(("W_enc", "W_dec"))} == {torch.float32}


@both_optimizers
def test_a_resumed_run_goes_on_to_the_bit(optimizer, tmp_path):
    options = {**LOW, "optimizer": optimizer}
    whole = make_trainer(make_sae(), **options, checkpoint_path=str(tmp_path), n_checkpoints=2)
    whole.fit()
    checkpoint = sorted(tmp_path.iterdir())[0]
    resumed = make_trainer(make_sae(), **options, resume=str(checkpoint))
    resumed.fit()
    assert moments(resumed) == moments(whole)
    for (name, a), b in zip(whole.sae.named_parameters(), resumed.sae.parameters(), strict=True):
        assert torch.equal(a, b), name
        for key, t in whole.optimizer.state[a].items():
            assert torch.equal(t, resumed.optimizer.state[b][key]), (name, key)
    with pytest.raises(CheckpointError, match="moments_dtype was 'bfloat16', is 'float32'"):
        make_trainer(make_sae(), optimizer=optimizer, resume=str(checkpoint)).fit()


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("copied", [True, False])
def test_dense_steps_round_as_the_reference_in_blocks_and_across_them(unit, copied):
    """More rows than a block has, and no multiple of it."""
    generator = torch.Generator().manual_seed(0)
    start = functional.normalize(torch.randn(1301, 6, generator=generator), dim=1)
    p, W = nn.Parameter(start.clone()), start.clone()
    m, v = (torch.zeros(1301, 6, dtype=torch.bfloat16) for _ in range(2))
    optimizer = ConstrainedAdam([p], 0.05, unit_rows=p if unit else None, copied=[p] if copied else (), low_moments=[p])
    for step in (1.0, 2.0, 3.0):
        grad = torch.randn(1301, 6, generator=generator)
        p.grad = grad.clone()  # which a fused step divides in place
        scale, found = torch.tensor(2.0), torch.tensor(float(step == 2.0))
        optimizer.step(grad_scale=scale, found_inf=found)
        counted = torch.tensor(step - (step > 2))
        options = {"grad_scale": scale, "found_inf": found, "unit_rows": unit, "project": unit}
        torch_adam.adam_rows(W, grad, m, v, counted, 0.05, 0.9, 0.999, 1e-8, **options)
    state = optimizer.state[p]
    for name, expected in (("exp_avg", m), ("exp_avg_sq", v)):
        assert state[name].dtype == torch.bfloat16
        # The sums before the rounding may differ in their last bit, which now and then decides.
        assert (state[name] != expected).double().mean() < 1e-3
        torch.testing.assert_close(state[name], expected, rtol=2.0**-7, atol=0)
    torch.testing.assert_close(p.detach(), W, rtol=1e-3, atol=1e-4)


@both_optimizers
def test_the_state_of_a_float32_optimiser_is_rounded_as_it_is_loaded(optimizer):
    trainer, low = (make_trainer(make_sae(), optimizer=optimizer, **options) for options in ({}, LOW))
    trainer.fit()
    low.optimizer.load_state_dict(trainer.optimizer.state_dict())
    assert moments(low)["W_dec"] == torch.bfloat16
    for a, b in zip(trainer.sae.parameters(), low.sae.parameters(), strict=True):
        for key, t in trainer.optimizer.state[a].items():
            torch.testing.assert_close(low.optimizer.state[b][key].float(), t, rtol=2.0**-8, atol=1e-30)
    trainer.optimizer.load_state_dict(low.optimizer.state_dict())
    assert set(moments(trainer).values()) == {torch.float32}


@both_optimizers
def test_a_reseeded_expert_has_the_moments_of_its_twin(optimizer):
    trainer = make_trainer(make_sae(), optimizer=optimizer, **LOW)
    batches = list(data(3))
    for batch in batches:
        trainer.step(batch)
    sae = trainer.sae
    ((twin, expert),) = reseed(sae, trainer.optimizer, batches[-1], [0])
    state, layout = trainer.optimizer.state[sae.W_dec], sae.cfg.layout
    (kept,) = (t for name, t in state.items() if name in ("exp_avg", "moments"))
    assert kept.dtype == torch.bfloat16
    assert kept.any()
    assert torch.equal(kept[layout.latents_of(twin)], kept[layout.latents_of(expert)])


@both_optimizers
def test_float64_weights_are_refused(optimizer):
    with pytest.raises(ValueError, match="moments_dtype must be 'float32' for weights of float64; got 'bfloat16'"):
        make_trainer(make_sae(dtype="float64"), optimizer=optimizer, **LOW)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="moments_dtype must be one of 'float32', 'bfloat16'; got 'int8'"):
        SparseSAETrainerConfig(total_training_samples=BATCH, train_batch_size_samples=BATCH, moments_dtype="int8")  # type: ignore[arg-type]


def test_a_device_without_a_fused_step_is_refused(monkeypatch):
    monkeypatch.setattr(ConstrainedAdam, "is_fused", False)
    p = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="moments_dtype must be 'float32' for a device without fused Adam, cpu"):
        ConstrainedAdam([p], 0.1, low_moments=[p])


def test_row_sparse_moments_take_half_the_memory():
    trainers = [make_trainer(make_sae("sparse_topk"), optimizer="row_sparse_adam", **o) for o in ({}, LOW)]
    sizes = []
    for trainer in trainers:
        assert isinstance(trainer.optimizer, RowSparseAdam)
        trainer.step(next(data()))
        sizes.append(trainer.optimizer.state[trainer.sae.W_enc]["moments"].nbytes)
    assert sizes[0] == 2 * sizes[1]
