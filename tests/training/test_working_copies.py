"""Under autocast a step reads working copies of the weights: no matrix is cast, no number is stale, no loss changes."""

import copy
from contextlib import nullcontext

import pytest
import torch
from helpers import D, E, activations, randomize, training_sae
from helpers.copies import watch_copies
from helpers.trainers import our_trainer, run, topk
from sae_lens import LoggingConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens_switch_kernels import WorkingCopies, products
from torch.profiler import ProfilerActivity, profile

from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig, SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
from sae_lens_switch.saes.serialization import fold_activation_scaler
from sae_lens_switch.training.collapse_response import reseed

BATCHES = activations(20, batch=16)


def make_sae(architecture: str, **fields):
    if architecture == "shared":
        fields = {"n_shared_experts": 1, "shared_width": 16 if "d_sae" not in fields else 160, **fields}
    if architecture != "sparse_topk":
        return training_sae(**{"dtype": "float32", **fields})
    return topk(SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig, **{"aux_loss_coefficient": 0.0, **fields})


def make_trainer(architecture: str, sae_fields: dict | None = None, **fields) -> SparseSAETrainer:
    fields = {"autocast": True, "logger": LoggingConfig(log_to_wandb=False), **fields}
    return our_trainer(make_sae(architecture, **(sae_fields or {})), BATCHES, **fields)


@pytest.fixture
def calls(monkeypatch):
    """What the products asked for; each answer is compared with a fresh cast, bit by bit."""
    return watch_copies(monkeypatch)


both_architectures = pytest.mark.parametrize("architecture", ["switch", "sparse_topk"])
and_shared_experts = pytest.mark.parametrize("architecture", ["switch", "sparse_topk", "shared"])
both_optimizers = pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])


@pytest.fixture(params=["sparse", "dense within experts"])
def dense(request, monkeypatch):
    monkeypatch.setattr(products, "_DENSE_UP_TO", {"cpu": 0 if request.param == "sparse" else 10**9})


@and_shared_experts
@both_optimizers
@pytest.mark.usefixtures("dense")
def test_losses_and_weights_are_those_of_casts(architecture, optimizer, monkeypatch):
    ours, plain = (make_trainer(architecture, optimizer=optimizer) for _ in range(2))
    losses = [o.loss for o in run(ours, BATCHES)]
    assert any(c.numbers is not None for c in ours.optimizer.copies._copies)
    monkeypatch.setattr(WorkingCopies, "offered", lambda _: nullcontext())
    assert losses == [o.loss for o in run(plain, BATCHES)]
    assert all(c.numbers is None for c in plain.optimizer.copies._copies)
    for p, q in zip(ours.sae.parameters(), plain.sae.parameters(), strict=True):
        assert torch.equal(p, q)


def casts_in(function) -> list[list[int]]:
    """Shapes that are cast while the function runs, inside operators and backward passes too."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        function()
    return [e.input_shapes[0] for e in profiler.events() if e.name == "aten::_to_copy"]


WIDE = {"d_sae": 400}
SMALL = [batch[:9] for batch in BATCHES]  # no more than 27 latents are active


def of_weight_size(shapes: list[list[int]]) -> list[list[int]]:
    """Matrices of the weights' width, as large as those of one expert or more."""
    return [s for s in shapes if D in s and torch.Size(s).numel() >= WIDE["d_sae"] // E * D]


@and_shared_experts
@both_optimizers
@pytest.mark.usefixtures("dense")
def test_a_step_under_autocast_casts_no_weight(architecture, optimizer, monkeypatch):
    trainer_ = make_trainer(architecture, WIDE, optimizer=optimizer)
    run(trainer_, SMALL[:2])
    assert of_weight_size(casts_in(lambda: run(trainer_, SMALL[2:4]))) == []
    monkeypatch.setattr(WorkingCopies, "offered", lambda _: nullcontext())
    assert of_weight_size(casts_in(lambda: run(trainer_, SMALL[4:5])))


def test_without_autocast_there_is_no_copy():
    trainer_ = make_trainer("switch", autocast=False)
    run(trainer_, BATCHES[:3])
    assert all(c.numbers is None for c in trainer_.optimizer.copies._copies)


@torch.no_grad()
def _nothing(trainer_) -> None:
    pass


@torch.no_grad()
def _reseed(trainer_) -> None:
    assert reseed(trainer_.sae, trainer_.optimizer, BATCHES[0], [0, 1, 2, 3])


@torch.no_grad()
def _new_numbers(trainer_) -> None:
    randomize(trainer_.sae, seed=3)


def _load(trainer_) -> None:
    trainer_.sae.load_state_dict(randomize(copy.deepcopy(trainer_.sae), seed=4).state_dict())


def _fold(trainer_) -> None:
    """As at the end of ``fit``."""
    scaler = ActivationScaler()
    scaler.scaling_factor = 1.7
    fold_activation_scaler(trainer_.sae, scaler)


def _whiten(trainer_) -> None:
    matrix = torch.eye(D) * 2 + 0.1
    trainer_.sae.fold_activation_whitening(torch.ones(D), matrix, matrix.inverse())


def _fold_norms(trainer_) -> None:
    with torch.no_grad():
        trainer_.sae.W_dec.mul_(2)  # of all rows alike
    copies = trainer_.optimizer.copies
    with copies.offered():
        assert all(c.is_current for c in copies._copies if c.numbers is not None)
    trainer_.sae.fold_W_dec_norm()


def _skip(trainer_) -> None:
    before = trainer_.sae.W_enc.detach().clone()
    run(trainer_, [BATCHES[0] * torch.nan])
    assert trainer_.n_skipped_steps == 1
    assert torch.equal(trainer_.sae.W_enc, before)


def _torchs_optimizer(trainer_) -> None:
    sae = trainer_.sae
    sae.W_enc.grad, sae.W_dec.grad = torch.ones_like(sae.W_enc), torch.ones_like(sae.W_dec)
    torch.optim.SGD([sae.W_enc, sae.W_dec], lr=0.1).step()
    trainer_.optimizer.zero_grad()


def _evaluate(trainer_) -> None:
    with torch.no_grad():
        trainer_.sae(BATCHES[0])


def _to_double_and_back(trainer_) -> None:
    trainer_.sae.double()
    with torch.no_grad():
        trainer_.sae.W_dec.mul_(1.5)
    trainer_.sae.float()


BETWEEN = {
    "nothing": _nothing,
    "reseeded experts": _reseed,
    "weights of the user": _new_numbers,
    "a state dict": _load,
    "a folded scale": _fold,
    "a folded whitening": _whiten,
    "folded norms": _fold_norms,
    "a skipped step": _skip,
    "another optimiser": _torchs_optimizer,
    "an evaluation": _evaluate,
    "another dtype for a while": _to_double_and_back,
}


@both_optimizers
@pytest.mark.parametrize("how", BETWEEN)
@pytest.mark.usefixtures("dense")
def test_no_copy_is_stale_whatever_happens_between_steps(how, optimizer, calls):
    trainer_ = make_trainer("switch", optimizer=optimizer, gradient_accumulation_steps=2)
    run(trainer_, BATCHES[:2])
    BETWEEN[how](trainer_)
    calls.clear()
    run(trainer_, BATCHES[2:4])
    assert len(calls) >= 4


@both_architectures
@pytest.mark.parametrize(
    ("sae_fields", "fields"),
    [
        ({"dtype": "bfloat16"}, {}),  # nothing to cast
        ({"aux_loss_coefficient": 0.5}, {"dead_feature_window": 1}),
        ({"apply_b_dec_to_input": False}, {}),
        ({}, {"cuda_graph": True}),
        ({}, {"max_grad_norm": None, "gradient_accumulation_steps": 3}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("dense")
def test_no_copy_is_stale_with_any_option(architecture, sae_fields, fields, calls):
    trainer_ = make_trainer(architecture, sae_fields, **fields)
    run(trainer_, BATCHES[:6])
    assert bool(calls) == ("dtype" not in sae_fields)


@pytest.mark.parametrize("frozen", ["W_enc", "W_dec"])
@both_optimizers
@pytest.mark.usefixtures("dense")
def test_a_frozen_weight_is_cast_once(frozen, optimizer):
    trainer_ = make_trainer("switch", WIDE, optimizer=optimizer)
    W = getattr(trainer_.sae, frozen).requires_grad_(False)
    before = W.detach().clone()
    run(trainer_, SMALL[:2])
    assert of_weight_size(casts_in(lambda: run(trainer_, SMALL[2:4]))) == []
    assert torch.equal(W, before)


@both_optimizers
def test_two_saes_in_turn_have_their_own(optimizer, calls):
    trainers = [make_trainer("switch", optimizer=optimizer) for _ in range(2)]
    randomize(trainers[1].sae)
    for i in range(6):
        run(trainers[i % 2], BATCHES[i : i + 1])
    assert calls


@both_optimizers
def test_a_resumed_run_is_the_same_run(optimizer, calls, tmp_path):
    def trainer_of(**fields) -> SparseSAETrainer:
        options = {"checkpoint_path": str(tmp_path), "autocast": True, "optimizer": optimizer, **fields}
        options |= {"logger": LoggingConfig(log_to_wandb=False)}
        cfg = SparseSAETrainerConfig(320, 16, lr=1e-2, **options)
        return SparseSAETrainer(cfg, make_sae("switch"), torch.cat(BATCHES))

    whole = trainer_of(n_checkpoints=1)
    whole.fit()
    resumed = trainer_of(resume="latest")
    resumed.fit()
    assert resumed.n_batches_drawn > 0
    for p, q in zip(whole.sae.parameters(), resumed.sae.parameters(), strict=True):
        assert torch.equal(p, q)
    assert calls


def test_low_precision_weights_are_written_by_the_step_of_their_masters():
    trainer_ = make_trainer("switch", {"dtype": "bfloat16"}, autocast=False)
    run(trainer_, BATCHES[:3])
    masters = trainer_.optimizer._masters
    for p, master in masters.masters.items():
        assert torch.equal(p, master.to(p.dtype))
    assert masters.low_precision == {}
    assert masters.has_written == set()
