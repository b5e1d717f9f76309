"""Switch SAEs with shared experts: against the token loop, a dense TopK, the Switch SAE without them, and SAELens."""

import json

import pytest
import torch
from helpers import D, activations, largest_allocation, training_sae
from helpers.resumed import make_trainer
from helpers.token_loop import compare_with_token_loop, make_batch, make_sae, step_input
from helpers.trainers import our_trainer, run
from sae_lens import SAE

from sae_lens_switch import SwitchSAEConfig, SwitchTrainingSAE, SwitchTrainingSAEConfig

GATES = pytest.mark.parametrize("gate", ["probability", "renormalized", "one"])
# E, A, s, the shared part's width, d_sae, k
SHAPES = pytest.mark.parametrize(
    ("E", "A", "s", "width", "d_sae", "k"),
    [
        (7, 1, 1, None, 64, 3),
        (5, 1, 2, None, 49, 9),
        (4, 2, 1, 11, 35, 5),
        (3, 2, 2, None, 35, 27),  # k: all latents of a token but one
        (2, 1, 1, 3, 21, 12),  # k: all of them
        (6, 1, 1, 29, 41, 1),
        (1, 1, 1, 4, 13, 6),
    ],
    ids=str,
)
# Of the SAEs in helpers: 4 experts of 8 latents beside 8 shared ones.
SHARED = {"n_shared_experts": 1, "shared_width": 8}


def shared_sae(E, A, s, width, d_sae, k, **fields) -> SwitchTrainingSAE:
    shape = {"n_experts": E, "n_active_experts": A, "n_shared_experts": s, "shared_width": width}
    return make_sae(**shape, d_sae=d_sae, k=k, **fields)


@GATES
@SHAPES
def test_outputs_loss_and_gradients_equal_the_token_loop(E, A, s, width, d_sae, k, gate):
    compare_with_token_loop(shared_sae(E, A, s, width, d_sae, k, gate=gate), make_batch(30))


@GATES
def test_experts_without_tokens_and_a_single_token(gate):
    sae = shared_sae(6, 1, 1, 7, 37, 4, gate=gate)
    with torch.no_grad():
        sae.W_router[:, 2:5] = 0
        sae.W_router[0, 2:5] = -100
    x = make_batch()
    x[:, 0] = sae.b_router[0].item() + 5
    assert sae.encode(x)[:, 7 + 10 : 7 + 25].count_nonzero() == 0
    compare_with_token_loop(sae, x)
    compare_with_token_loop(sae, x[:1])


@SHAPES
def test_the_shared_part_alone_is_a_topk_of_its_width(E, A, s, width, d_sae, k):
    sae = shared_sae(E, A, s, width, d_sae, k)
    S = sae.cfg.layout.shared_width
    with torch.no_grad():
        sae.W_enc[:, S:] = 0
    x = make_batch()
    acts = ((x - sae.b_dec) @ sae.W_enc[:, :S]).relu()
    top = acts.topk(min(k, S))
    latents = sae.encode(x)
    torch.testing.assert_close(latents[:, :S], torch.zeros_like(acts).scatter(1, top.indices, top.values))
    assert latents[:, S:].count_nonzero() == 0
    loss = sae.training_forward_pass(step_input(x)).losses["mse_loss"]
    assert torch.autograd.grad(loss, sae.W_router)[0].count_nonzero() == 0, "no router gradient through them"


@GATES
@pytest.mark.parametrize("A", [1, 3])
def test_without_the_shared_part_the_routed_experts_compute_what_they_did(gate, A):
    S, x = 5, make_batch()
    sae = shared_sae(7, A, 1, S, S + 56, 3, gate=gate)
    bare = make_sae(n_active_experts=A, gate=gate)
    with torch.no_grad():
        sae.W_enc[:, :S] = 0
        for name, p in bare.named_parameters():
            routed = {"W_enc": sae.W_enc[:, S:], "W_dec": sae.W_dec[S:]}
            p.copy_(routed.get(name, sae.get_parameter(name)))
    ours, theirs = (s.training_forward_pass(step_input(x)) for s in (sae, bare))
    torch.testing.assert_close(ours.feature_acts.to_dense()[:, S:], theirs.feature_acts.to_dense())
    torch.testing.assert_close(ours.loss, theirs.loss)
    for name in ("W_router", "b_router", "b_dec"):
        grads = (torch.autograd.grad(o.loss, s.get_parameter(name), retain_graph=True)[0]
                 for o, s in ((ours, sae), (theirs, bare)))  # fmt: skip
        torch.testing.assert_close(*grads)


def test_a_gate_of_one_ranks_shared_and_routed_latents_by_their_pre_activations():
    sae = shared_sae(7, 1, 1, None, 64, 3, gate="one")
    x = make_batch()
    expert = sae.encode_routed(x)[1].experts_BA
    acts = ((x - sae.b_dec) @ sae.W_enc).relu()
    mine = (torch.arange(64) < 8) | ((torch.arange(64) - 8).div(8, rounding_mode="floor") == expert)
    top = (acts * mine).topk(3)
    torch.testing.assert_close(sae.encode(x), torch.zeros_like(acts).scatter(1, top.indices, top.values))


def test_among_equal_latents_the_choice_is_the_same_in_every_run():
    sae = shared_sae(4, 2, 1, 8, 40, 5, gate="one")
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_enc[:, :2].repeat(1, 20))  # every latent many times, shared and routed
    x = make_batch()
    first, second = (sae.training_forward_pass(step_input(x)) for _ in range(2))
    assert torch.equal(first.codes.indices, second.codes.indices)
    own = torch.cat([sae.W_enc[:, :8], sae.W_enc[:, :16]], dim=1)  # shared, and two experts
    best = ((x - sae.b_dec) @ own).relu().topk(5).values
    torch.testing.assert_close(first.codes.values.sort(descending=True).values, best)
    assert all(len(set(row)) == 5 for row in first.codes.indices.tolist())
    grads = (torch.autograd.grad(o.loss, list(sae.parameters()), allow_unused=True) for o in (first, second))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("A", [1, 2])
def test_under_autocast_latents_are_selected_by_products_in_bfloat16(A):
    sae = shared_sae(4, A, 1, 8, 40, 5, gate="one", dtype="float32")
    x = make_batch().float()
    with torch.autocast("cpu", torch.bfloat16):
        output = sae.training_forward_pass(step_input(x))
    output.loss.backward()
    pre = ((x - sae.b_dec).bfloat16() @ sae.W_enc.bfloat16()).float()
    experts = sae.encode_routed(x)[1].experts_BA
    mine = pre.gather(1, sae.cfg.layout.latents(experts))
    torch.testing.assert_close(
        output.codes.values.sort(descending=True).values, mine.relu().topk(5).values, rtol=2e-2, atol=2e-2
    )
    assert torch.isfinite(output.loss)
    assert sae.W_enc.grad[:, :8].norm() > 0
    full = sae.training_forward_pass(step_input(x)).loss
    torch.testing.assert_close(output.loss.detach(), full.detach(), rtol=2e-2, atol=0)


@GATES
def test_a_hook_on_dense_latents_sees_and_changes_nothing(gate):
    sae = shared_sae(4, 2, 1, 11, 35, 5, gate=gate)
    x = make_batch()
    plain = sae.training_forward_pass(step_input(x))
    seen = []
    sae.hook_sae_acts_pre.add_hook(lambda pre, hook: seen.append(pre))  # noqa: ARG005
    hooked = sae.training_forward_pass(step_input(x))
    torch.testing.assert_close(hooked.loss, plain.loss)
    torch.testing.assert_close(hooked.feature_acts, plain.feature_acts.to_dense())
    torch.testing.assert_close(seen[0][:, :11], (x - sae.b_dec) @ sae.W_enc[:, :11])
    for name, p in sae.named_parameters():
        grads = (torch.autograd.grad(o.loss, p, retain_graph=True, allow_unused=True)[0] for o in (plain, hooked))
        a, b = (torch.zeros_like(p) if g is None else g for g in grads)
        torch.testing.assert_close(a, b, msg=name)


def test_decode_is_linear_in_latents_edited_and_mixed_over_shared_and_routed_ones():
    sae = shared_sae(4, 1, 1, 11, 35, 5)
    f, g = (torch.randn(6, 35, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(
        sae.decode(2 * f - 3 * g), 2 * sae.decode(f) - 3 * sae.decode(g) + 2 * sae.b_dec, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("A", [1, 2])
def test_dead_latents_are_the_shared_ones_and_those_of_a_tokens_experts(A):
    S, M, aux_k = 9, 8, 5
    sae = shared_sae(7, A, 1, S, S + 7 * M, 3, aux_loss_coefficient=1.0, aux_k=aux_k)
    x = make_batch()
    dead = torch.zeros(S + 7 * M, dtype=torch.bool)
    dead[torch.randperm(len(dead), generator=torch.Generator().manual_seed(0))[:21]] = True
    dead[: S + M] = torch.arange(S + M) % 4 == 0
    output = sae.training_forward_pass(step_input(x, dead_neuron_mask=dead))
    probs = ((x - sae.b_router) @ sae.W_router).softmax(1)
    error = []
    for x_D, out_D, p_E in zip(x, output.sae_out, probs, strict=True):
        experts = p_E.topk(A).indices.tolist()
        gates = {i: 1 if i < S else p_E[(i - S) // M] for i in range(len(dead)) if i < S or (i - S) // M in experts}
        acts = {i: g * ((x_D - sae.b_dec) @ sae.W_enc[:, i]) for i, g in gates.items() if dead[i]}
        chosen = sorted(acts, key=lambda i: acts[i].item(), reverse=True)[:aux_k]
        aux = sum((acts[i] * sae.W_dec[i] for i in chosen), start=torch.zeros(10, dtype=torch.float64))
        error.append(min(1, len(acts) / aux_k) * (aux - (x_D - out_D)).square().sum())
    torch.testing.assert_close(output.losses["auxiliary_reconstruction_loss"], torch.stack(error).mean())
    assert output.metrics["dead_latents_shared"]() == dead[:S].sum()
    assert output.metrics["dead_latents_expert_0"]() == dead[S : S + M].sum()


def test_only_shared_latents_dead_or_none_of_them():
    sae = shared_sae(4, 1, 1, 8, 40, 3, aux_loss_coefficient=1.0, aux_k=5)
    x = make_batch()
    for dead in (torch.arange(40) < 2, torch.arange(40) >= 38, torch.arange(40) < 0):
        output = sae.training_forward_pass(step_input(x, dead_neuron_mask=dead))
        loss = output.losses["auxiliary_reconstruction_loss"]
        assert torch.isfinite(loss)
        assert (loss > 0) == dead.any()


@pytest.mark.parametrize("A", [1, 2])
def test_a_training_step_makes_no_tensor_of_batch_times_width(A):
    B, D_, M, E = 256, 6, 32, 16
    sae = shared_sae(E, A, 1, M, (E + 1) * M, 4, d_in=D_, dtype="float32")
    x = torch.randn(B, D_)

    def step() -> None:
        sae.training_forward_pass(step_input(x)).loss.backward()

    allowed = 4 * max(A * B * M, B * 4 * D_, (E + 1) * M * D_)
    assert allowed < 4 * B * (E + 1) * M
    assert largest_allocation(step) <= allowed


@pytest.mark.parametrize("precision", ["bfloat16", "float8"])
@pytest.mark.parametrize("width", [8, 64])
def test_candidates_in_low_precision_hold_nearly_all_latents_and_their_values_are_exact(precision, width):
    d_sae = width + 4 * 64
    sae = shared_sae(4, 1, 1, width, d_sae, 5, dtype="float32", encoder_precision=precision, gate="one")
    x = make_batch().float()
    output = sae.training_forward_pass(step_input(x))
    exact = ((x - sae.b_dec) @ sae.W_enc).relu().gather(1, output.codes.indices)
    torch.testing.assert_close(output.codes.values, exact.detach())
    sae.cfg.encoder_precision = "full"
    best = sae.encode_sparse(x).values
    assert output.codes.values.sum() > 0.99 * best.sum()
    assert 0 <= output.metrics["doubtful_tokens"]() <= 1


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
@pytest.mark.parametrize(("s", "A"), [(1, 1), (2, 2)])
def test_it_trains_and_is_saved(optimizer, s, A, tmp_path):
    torch.manual_seed(0)
    fields = {"d_in": D, "d_sae": 90, "n_experts": 4, "n_active_experts": A, "k": 4, "gate": "renormalized"}
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(**fields, n_shared_experts=s))
    batches = activations(60)
    outputs = run(our_trainer(sae, batches, optimizer=optimizer), batches)
    losses = [o.losses["mse_loss"].item() for o in outputs]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert outputs[-1].routing.load_E.sum().item() == pytest.approx(1)
    assert outputs[-1].routing.load_E.shape == (4,)
    latents = sae.encode(batches[0])
    assert latents[:, : sae.cfg.layout.shared_width].any()
    assert latents[:, sae.cfg.layout.shared_width :].any()
    sae.save_inference_model(tmp_path)
    saved = json.loads((tmp_path / "cfg.json").read_text())
    assert (saved["n_shared_experts"], saved["shared_width"]) == (s, None)
    assert torch.equal(SAE.load_from_disk(tmp_path).encode(batches[0]), latents)


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
def test_a_resumed_run_and_a_second_one_end_at_the_same_bits(optimizer, tmp_path):
    options = {"optimizer": optimizer, "n_checkpoints": 1}

    def sae() -> SwitchTrainingSAE:
        return training_sae(dtype="float32", aux_loss_coefficient=0.25, **SHARED)

    whole = make_trainer(sae(), checkpoint_path=str(tmp_path), dead_feature_window=2, **options)
    whole.fit()
    (checkpoint,) = tmp_path.iterdir()
    again = make_trainer(sae(), dead_feature_window=2, **options)
    resumed = make_trainer(sae(), resume=str(checkpoint), dead_feature_window=2, **options)
    for other in (again, resumed):
        other.fit()
        for p, q in zip(other.sae.parameters(), whole.sae.parameters(), strict=True):
            assert torch.equal(p, q)


def test_folding_decoder_norms_needs_them_equal_over_all_latents():
    sae = shared_sae(4, 1, 1, 8, 40, 3)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=1) * (1 + (torch.arange(40) < 8))[:, None])
    with pytest.raises(NotImplementedError, match="those of all experts"):
        sae.fold_W_dec_norm()
    with torch.no_grad():
        sae.W_dec.copy_(3 * torch.nn.functional.normalize(sae.W_dec, dim=1))
    before = sae(make_batch())
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae(make_batch()), before)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40, dtype=torch.float64))


# The config


def test_the_shared_part_is_as_wide_as_said_or_as_its_experts():
    def layout(**fields):
        return SwitchSAEConfig(**{"d_in": 6, "d_sae": 60, "n_experts": 4, "k": 2, **fields}).layout

    assert (layout().shared_width, layout().expert_width) == (0, 15)
    assert (layout(n_shared_experts=1).shared_width, layout(n_shared_experts=1).expert_width) == (12, 12)
    assert (layout(n_shared_experts=2).shared_width, layout(n_shared_experts=2).expert_width) == (20, 10)
    wide = layout(n_shared_experts=1, shared_width=40)
    assert (wide.shared_width, wide.expert_width) == (40, 5)
    assert [wide.latents_of(e) for e in (0, 3)] == [slice(40, 45), slice(55, 60)]
    assert wide.experts_of(torch.tensor([0, 39, 40, 59])).tolist() == [-1, -1, 0, 3]
    assert [wide.expert_of(f) for f in (0, 39, 40, 59)] == [-1, -1, 0, 3]
    assert [wide.owner_of(f) for f in (39, 59)] == ["shared", "expert 3"]
    assert wide.latents(torch.tensor([[1]])).tolist() == [[*range(40), *range(45, 50)]]
    assert wide.by_expert(torch.arange(60))[1].tolist() == list(range(45, 50))
    assert len(wide.shared(torch.arange(60))) == 40


def test_a_file_without_the_fields_has_no_shared_experts():
    fields = SwitchSAEConfig(d_in=6, d_sae=20, n_experts=2, k=2).to_dict()
    del fields["n_shared_experts"], fields["shared_width"]
    assert SwitchSAEConfig.from_dict(fields).layout.shared_width == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_shared_experts": -1}, "n_shared_experts must be a whole number, at least 0; got -1"),
        ({"shared_width": 0, "n_shared_experts": 1}, "shared_width must be a whole number, at least 1 or None; got 0"),
        ({"shared_width": 7}, "shared_width must be None without shared experts, n_shared_experts=0; got 7"),
        (
            {"n_shared_experts": 2},
            r"d_sae must be a multiple of n_experts \+ n_shared_experts = 9 unless shared_width is given; got d_sae=56",
        ),
        (
            {"n_shared_experts": 1, "shared_width": 8},
            "shared_width must leave a multiple of n_experts=7 of the d_sae=56 latents; got shared_width=8",
        ),
        ({"n_shared_experts": 1, "shared_width": 56}, "shared_width must leave a multiple of n_experts=7"),
        ({"n_shared_experts": 1, "shared_width": 63}, "shared_width must leave a multiple of n_experts=7"),
        (
            {"n_shared_experts": 1, "shared_width": 14, "k": 21},
            r"k must be at most shared_width \+ \(d_sae - shared_width\) / n_experts = 14 \+ 6 = 20, the latents of "
            "one expert and the shared ones; got k=21",
        ),
        (
            {"n_shared_experts": 1, "n_active_experts": 2, "k": 22},
            r"n_active_experts \* \(d_sae - shared_width\) / n_experts = 7 \+ 2 \* 7 = 21, the latents of 2 experts",
        ),
    ],
)
@pytest.mark.parametrize("config", [SwitchSAEConfig, SwitchTrainingSAEConfig])
def test_bad_configs_are_refused(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**{"d_in": 10, "d_sae": 56, "n_experts": 7, "k": 3, **fields})
