"""A parameter with ``requires_grad=False`` stays as it is, to the bit, and the others step as if it were not there."""

import copy
from typing import Any

import pytest
import torch
from helpers import D, E, F, K, activations, randomize, trainer, training_sae
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor, nn

from sae_lens_switch import (
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
)
from sae_lens_switch.training.collapse_response import reseed
from sae_lens_switch.training.optim.constrained_adam import ConstrainedAdam
from sae_lens_switch.training.optim.master_weights import MasterWeights
from sae_lens_switch.training.optim.row_sparse_adam import RowSparseAdam

LR, BETAS, EPS, MAX_NORM = 0.02, (0.8, 0.95), 1e-8, 0.7
SWITCH = {
    "nothing": (),
    "W_enc": ("W_enc",),
    "W_dec": ("W_dec",),
    "b_dec": ("b_dec",),
    "W_router": ("W_router",),
    "b_router": ("b_router",),
    "router": ("W_router", "b_router"),
    "all but W_dec": ("W_enc", "b_dec", "W_router", "b_router"),
    "all but W_enc": ("W_dec", "b_dec", "W_router", "b_router"),
    "all but b_dec": ("W_enc", "W_dec", "W_router", "b_router"),
    "all but the router": ("W_enc", "W_dec", "b_dec"),
}
TOPK = {
    "nothing": (),
    **{name: (name,) for name in ("W_enc", "b_enc", "W_dec", "b_dec")},
    "encoder": ("W_enc", "b_enc"),
    "all but b_enc": ("W_enc", "W_dec", "b_dec"),
}
TIED = {name: SWITCH[name] for name in ("nothing", "b_dec", "b_router", "router", "W_dec")}
CASES = [
    pytest.param(kind, frozen, options, id=f"{kind}{'-tied' if options else ''}-{name}")
    for kind, sets, options in (("switch", SWITCH, {}), ("sparse_topk", TOPK, {}), ("switch", TIED, {"tie": True}))
    for name, frozen in sets.items()
]
OPTIMIZERS = ["adam", "row_sparse_adam", "saelens"]


def make(tmp_path, kind: str, frozen: tuple[str, ...] = (), dtype: str = "float64", tie: bool = False) -> Any:
    """Loaded, so that it does not start from the first batch; every weight is random, and no decoder row has norm 1."""
    if kind == "switch":
        sae: Any = training_sae(dtype=dtype, tie_router_bias=tie)
    else:
        sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, dtype=dtype))
    randomize(sae).save_model(tmp_path / "sae")
    loaded: Any = TrainingSAE.load_from_disk(tmp_path / "sae")
    if kind == "sparse_topk":  # SAELens knows its files by the name of its own class
        loaded = sae
    for name in frozen:
        getattr(loaded, name).requires_grad_(False)
    return loaded


def fit(sae: Any, optimizer: str, batches: list[Tensor]) -> Any:
    options = {"lr": LR, "lr_end": LR, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1]}
    if optimizer == "saelens":  # which clips to a norm of 1
        made = trainer(sae, batches, **options)
    else:
        made = SparseSAETrainer(
            SparseSAETrainerConfig(
                total_training_samples=sum(map(len, batches)),
                train_batch_size_samples=len(batches[0]),
                optimizer=optimizer,  # type: ignore[arg-type]
                max_grad_norm=MAX_NORM,
                lr_decay_steps=0,
                **options,
            ),
            sae,
            iter(batches),
        )
    for batch in batches:
        made.step(batch)
        made.n_training_steps += 1
    return made


def reference(sae: Any, batches: list[Tensor], max_norm: float, lazy: bool) -> None:
    """Clip, project, step, renormalise, in whole matrices, over the trainable weights: no other gradient is made."""
    trained = {name: p for name, p in sae.named_parameters() if p.requires_grad}
    of_latents = ("W_enc", "W_dec", "b_enc")
    m, v = ({name: torch.zeros_like(p) for name, p in trained.items()} for _ in range(2))
    count = {name: torch.zeros(F if name in of_latents and lazy else 1, dtype=torch.float64) for name in trained}
    constrained = getattr(sae.cfg, "normalize_decoder", False) and "W_dec" in trained
    for i, x in enumerate(batches):
        step_input = TrainStepInput(
            sae_in=x,
            dead_neuron_mask=None,
            coefficients={"load_balance": getattr(sae.cfg, "load_balance_coefficient", 0.0)},
            n_training_steps=i,
            is_logging_step=False,
        )
        output = sae.training_forward_pass(step_input)
        active_F = torch.zeros(F, dtype=torch.bool).index_fill(0, output.codes.indices.flatten(), True)
        found = torch.autograd.grad(output.loss, list(trained.values()), allow_unused=True)
        grads = {name: g for name, g in zip(trained, found, strict=True) if g is not None}
        norm = torch.stack([g.double().norm() for g in grads.values()]).norm()
        grads = {name: g.double() * min(1.0, max_norm / (norm.item() + 1e-6)) for name, g in grads.items()}
        if constrained:
            W = sae.W_dec.detach().double()
            grads["W_dec"] = grads["W_dec"] - (grads["W_dec"] * W).sum(1, keepdim=True) * W
        with torch.no_grad():
            for name, g in grads.items():
                where = active_F if len(count[name]) == F else torch.ones(1, dtype=torch.bool)
                count[name] += where
                where, t = (t.view(-1, *[1] * (g.ndim - 1)) for t in (where, count[name]))
                where, t = (where.T, t.T) if name == "W_enc" else (where, t)
                m[name] = torch.where(where, BETAS[0] * m[name] + (1 - BETAS[0]) * g, m[name])
                v[name] = torch.where(where, BETAS[1] * v[name] + (1 - BETAS[1]) * g * g, v[name])
                update = m[name] / (1 - BETAS[0] ** t) / ((v[name] / (1 - BETAS[1] ** t)).sqrt() + EPS)
                trained[name].sub_(torch.where(where, LR * update, 0).to(trained[name].dtype))
                if constrained and name == "W_dec":
                    unit = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
                    sae.W_dec.copy_(torch.where(where, unit, sae.W_dec))
            if getattr(sae.cfg, "tie_router_bias", False) and sae.b_router.requires_grad:
                sae.b_router.copy_(sae.b_dec)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("kind", "frozen", "options"), CASES)
def test_frozen_weights_keep_their_bits_and_the_others_step_as_if_they_were_not_there(
    tmp_path, kind, frozen, options, optimizer
):
    batches = [batch.double() for batch in activations(12)]
    ours = make(tmp_path, kind, frozen, **options)
    theirs = copy.deepcopy(ours)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    fit(ours, optimizer, batches)
    reference(theirs, batches, 1.0 if optimizer == "saelens" else MAX_NORM, lazy=optimizer == "row_sparse_adam")
    for name, p in ours.named_parameters():
        assert torch.equal(p, before[name]) == (name in frozen), name
        torch.testing.assert_close(p, getattr(theirs, name), rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("kind", "names"), [("switch", SWITCH["all but b_dec"]), ("sparse_topk", tuple(TOPK)[1:4])])
def test_also_where_steps_are_fused_or_have_masters(tmp_path, kind, names, optimizer, dtype):
    for name in names:
        sae = make(tmp_path / name, kind, (name,), dtype)
        before = {n: p.detach().clone() for n, p in sae.named_parameters()}
        fit(sae, optimizer, activations(10))
        assert [n for n, p in sae.named_parameters() if torch.equal(p, before[n])] == [name]


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_from_before_the_parameter_was_frozen_moves_nothing(fused):
    """Neither the matrix that is kept at unit norm nor another one; with moments that would still move them."""
    parameters = [nn.Parameter(torch.randn(5, 3)) for _ in range(3)]
    optimizer = ConstrainedAdam(parameters, 0.1, unit_rows=parameters[0])
    optimizer.param_groups[0]["fused"] = fused
    for p in parameters:
        p.grad = torch.randn(5, 3)
    optimizer.step()
    for p in parameters[:2]:
        p.requires_grad_(False)
    parameters[0].mul_(2)  # no longer of unit norm
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(parameters, before, strict=True)] == [True, True, False]


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
def test_a_left_over_gradient_of_a_frozen_parameter_is_not_in_the_norm_that_is_clipped(tmp_path, optimizer):
    batches = [batch.double() for batch in activations(3)]
    clean, left_over = (make(tmp_path / name, "switch", ("W_dec", "b_router")) for name in "ab")
    for name in ("W_dec", "b_router"):
        getattr(left_over, name).grad = torch.full_like(getattr(left_over, name), 1e9)
    for sae in (clean, left_over):
        fit(sae, optimizer, batches)
    for name, p in clean.named_parameters():
        assert torch.equal(p, getattr(left_over, name)), name


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
def test_freezing_and_melting_between_steps(tmp_path, optimizer):
    """W_dec rests while it is frozen, and goes on with the moments that it had."""
    batches = [batch.double() for batch in activations(9)]
    sae = make(tmp_path, "switch")
    made = fit(sae, optimizer, batches[:3])
    sae.W_dec.requires_grad_(False)
    frozen = sae.W_dec.detach().clone()
    moments = {n: t.clone() for n, t in made.optimizer.state[sae.W_dec].items()}
    for batch in batches[3:6]:
        made.step(batch)
        made.n_training_steps += 1
    assert torch.equal(sae.W_dec, frozen)
    for name, t in moments.items():
        assert torch.equal(made.optimizer.state[sae.W_dec][name], t), name
    sae.W_dec.requires_grad_(True)
    made.step(batches[6])
    assert not torch.equal(sae.W_dec, frozen)


def test_a_tied_bias_follows_b_dec_also_where_the_optimiser_was_given_no_frozen_decoder(tmp_path):
    sae = make(tmp_path, "switch", ("W_dec",), tie=True)
    optimizer = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr=0.1)
    MasterWeights(optimizer, masters=False)
    before = sae.W_dec.detach().clone()
    for i in range(2):
        x = activations(1)[0].double()
        output = sae.training_forward_pass(TrainStepInput(x, {"load_balance": 0.3}, None, i, False))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(sae.b_router, sae.b_dec)
    assert torch.equal(sae.W_dec, before)


def test_a_frozen_tied_bias_routes_as_the_inference_sae_will(tmp_path):
    """Training and the SAE that is saved use one vector: the frozen one."""
    sae = make(tmp_path, "switch", ("b_router",), tie=True)
    x = activations(1)[0].double()
    untied = copy.deepcopy(sae)
    untied.cfg.tie_router_bias = False
    assert torch.equal(sae(x), untied(x))
    assert not torch.equal(sae.b_router, sae.b_dec)


@pytest.mark.parametrize("name", ["W_router", "W_enc", "W_dec"])
@pytest.mark.parametrize("optimizer_class", [ConstrainedAdam, RowSparseAdam])
def test_no_expert_is_reseeded_where_that_would_move_frozen_weights(tmp_path, caplog, name, optimizer_class):
    sae = make(tmp_path, "switch", (name,))
    optimizer = optimizer_class(sae if optimizer_class is RowSparseAdam else sae.parameters(), LR)
    before = {n: p.detach().clone() for n, p in sae.named_parameters()}
    assert reseed(sae, optimizer, activations(1)[0].double(), range(E)) == []
    assert all(torch.equal(p, before[n]) for n, p in sae.named_parameters())
    assert f"reseed' changes nothing, because {name} have requires_grad=False" in caplog.text


def test_an_sae_that_is_frozen_as_a_whole_cannot_be_trained(tmp_path):
    sae = make(tmp_path, "switch").requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad=True; this one has none"):
        fit(sae, "adam", activations(1))


# Several optimisers, or one that holds few of the weights


def after_steps(*held: tuple[str, ...], frozen: tuple[str, ...] = (), dtype: str = "float64") -> tuple[Any, Tensor]:
    """An SAE balanced by a bias after two steps of torch's Adam for each set of weights; W_dec as it was before."""
    sae = training_sae(load_balancing="bias", load_balance_bias_rate=0.25, tie_router_bias=True, dtype=dtype)
    for name in frozen:
        getattr(sae, name).requires_grad_(False)
    optimizers = [torch.optim.Adam([getattr(sae, name) for name in names], lr=0.1) for names in held]
    before = sae.W_dec.detach().clone()
    for i in range(2):
        x = activations(1)[0].to(sae.dtype)
        sae.training_forward_pass(TrainStepInput(x, {"load_balance": 0.0}, None, i, False)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        sae.zero_grad()
    return sae, before


@pytest.mark.parametrize("frozen", [("W_dec",), ("W_dec", "b_dec"), ()], ids=str)
@pytest.mark.parametrize("held", [("W_router",), ("W_router", "b_router"), ("W_enc",)], ids=str)
def test_an_optimiser_of_any_weights_moves_the_bias_and_leaves_a_decoder_that_it_lacks(held, frozen):
    sae, before = after_steps(held, frozen=frozen)
    assert sae.expert_bias.any()
    assert torch.equal(sae.W_dec, before)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_several_optimisers_do_once_per_step_what_one_does(dtype):
    router, others = ("W_router", "b_router"), ("W_enc", "W_dec", "b_dec")
    whole, _ = after_steps((*router, *others), dtype=dtype)
    for held in ((router, others), (others, router)):
        parts, _ = after_steps(*held, dtype=dtype)
        for name, value in whole.state_dict().items():
            assert torch.equal(parts.state_dict()[name], value), name
    assert 0 < whole.expert_bias.abs().max() <= 0.5
