"""``switch`` with activation="batchtopk": the k B largest gated latents of a batch, and thresholds after training."""

import copy

import pytest
import torch
from helpers import activations, largest_allocation, trainer
from helpers.inside_experts import (
    GATES,
    LAYOUTS,
    compare_with_reference,
    gated_pre,
    inference_of,
    layouts,
    reference,
    sae_of,
)
from helpers.token_loop import make_batch, make_sae, step_input
from helpers.trainers import assert_only_finite_steps_move_thresholds, our_trainer, run

from sae_lens_switch import (
    SparseBatchTopKTrainingSAE,
    SparseBatchTopKTrainingSAEConfig,
    SwitchSAE,
    SwitchSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)
from sae_lens_switch.saes.expert_layout import ExpertLayout
from sae_lens_switch.training.collapse_response import reseed


@GATES
@layouts
def test_outputs_losses_gradients_and_thresholds_equal_the_dense_reference(fields, gate):
    sae = sae_of(gate=gate, **fields)
    for n in (1, 33):
        compare_with_reference(sae, make_batch(n), step_input)


def test_without_the_pre_bias_and_with_dead_latents():
    compare_with_reference(sae_of(apply_b_dec_to_input=False), make_batch(20), step_input)
    dead = torch.rand(56, generator=torch.Generator().manual_seed(3)) < 0.4
    for fields in ({}, LAYOUTS["two and narrow shared"]):
        sae = sae_of(aux_loss_coefficient=0.3, aux_k=3, **fields)
        compare_with_reference(sae, make_batch(20), step_input, dead)


def test_tokens_have_as_many_latents_as_the_batch_gives_them():
    x = make_batch(50) * torch.linspace(0.01, 3, 50).double().unsqueeze(1)
    output = sae_of().training_forward_pass(step_input(x))
    counts = output.codes.offsets.diff()
    assert counts.sum() == 3 * 50
    assert counts.min() < 3 < counts.max()


def test_experts_without_an_active_latent_keep_their_threshold():
    sae = sae_of()
    with torch.no_grad():
        sae.W_router[:, 2:5] = 0
        sae.W_router[0, 2:5] = -100
    x = make_batch()
    x[:, 0] = sae.b_router[0].item() + 5
    before = sae.topk_threshold.clone()
    expected = compare_with_reference(sae, x, step_input)
    stays = torch.tensor([least is None for least in expected.least])
    assert 3 <= stays.sum() < 7
    assert torch.equal(sae.topk_threshold == before, stays)


@pytest.mark.parametrize("widths", [None, [3, 7, 14]], ids=["batchtopk", "matryoshka"])
def test_twenty_optimiser_steps_equal_those_of_the_dense_reference(widths):
    ours = sae_of(normalize_decoder=False, project_decoder_grad=False, n_experts=4, matryoshka_widths=widths)
    theirs = copy.deepcopy(ours)
    optimizers = [torch.optim.Adam(sae.parameters(), lr=1e-2) for sae in (ours, theirs)]
    for step in range(20):
        x = make_batch(24, seed=step)
        losses = ours.training_forward_pass(step_input(x)).loss, reference(theirs, x, 0.7).loss
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


def test_with_one_expert_and_no_gate_it_is_sparse_batchtopk():
    switch = sae_of(n_experts=1, gate="one", k=5, d_sae=30, load_balance_coefficient=0, normalize_decoder=False)
    fields = {"d_in": 10, "d_sae": 30, "k": 5, "dtype": "float64", "topk_threshold_lr": 0.2}
    plain = SparseBatchTopKTrainingSAE(
        SparseBatchTopKTrainingSAEConfig(**fields, rescale_acts_by_decoder_norm=False, apply_b_dec_to_input=True)
    )
    names = ("W_enc", "W_dec", "b_dec")
    with torch.no_grad():
        for name in names:
            plain.get_parameter(name).copy_(switch.get_parameter(name))
        plain.topk_threshold.copy_(switch.topk_threshold[0])
    optimizers = [torch.optim.SGD([sae.get_parameter(n) for n in names], lr=1e-2) for sae in (switch, plain)]
    for step in range(20):
        x = make_batch(17, seed=step)
        a, b = switch.training_forward_pass(step_input(x, coefficient=0.0)), plain.training_forward_pass(step_input(x))
        torch.testing.assert_close(a.losses["mse_loss"], b.losses["mse_loss"])
        assert torch.equal(a.codes.offsets, b.codes.offsets)
        assert torch.equal(a.codes.indices, b.codes.indices)
        for output, optimizer in zip((a, b), optimizers, strict=True):
            optimizer.zero_grad()
            output.losses["mse_loss"].backward()
            optimizer.step()
    torch.testing.assert_close(switch.topk_threshold[0], plain.topk_threshold)
    for name in names:
        torch.testing.assert_close(switch.get_parameter(name), plain.get_parameter(name))


@pytest.mark.parametrize("precision", ["bfloat16", "float8"])
@pytest.mark.parametrize("fields", [{}, LAYOUTS["two and narrow shared"]], ids=["one expert", "two and shared"])
def test_low_precision_selects_nearly_the_same_with_exact_values(precision, fields):
    sae = make_sae(dtype="float32", activation="batchtopk", encoder_precision=precision, d_in=48, **fields)
    x = make_batch(64, 48).float()
    output = sae.training_forward_pass(step_input(x))
    acts = output.codes.to_dense()
    expected, _, _ = gated_pre(sae, x)
    torch.testing.assert_close(acts, expected.detach() * (acts > 0), rtol=1e-4, atol=1e-5)
    n = sae.cfg.k * 64
    assert len(output.codes.values) == n
    exact = expected.flatten().topk(n).values[-1]
    assert ((acts > 0) != (expected >= exact)).sum() <= {"bfloat16": 0.02, "float8": 0.2}[precision] * n
    assert 0 <= output.metrics["doubtful_tokens"]() <= 1
    sae.encode(x)


@pytest.mark.parametrize("widths", [None, [8, 32]], ids=["batchtopk", "matryoshka"])
def test_a_training_step_makes_no_tensor_of_batch_times_width(widths):
    B, D, E, M, K = 256, 6, 16, 32, 4
    fields = {"d_in": D, "d_sae": E * M, "n_experts": E, "k": K, "activation": "batchtopk"}
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(**fields, matryoshka_widths=widths))
    x = torch.randn(B, D)

    def step() -> None:
        sae.training_forward_pass(step_input(x, step=0)).loss.backward()

    allowed = 8 * max(B * M, B * K * D, E * M * D)  # places are int64
    assert allowed < 4 * B * E * M
    assert largest_allocation(step) <= allowed
    after = inference_of(sae)
    assert largest_allocation(lambda: after.encode_sparse(x)) <= allowed
    sae.hook_sae_acts_post.add_hook(lambda _acts, hook: None)  # noqa: ARG005, SAELens passes `hook` by name
    assert largest_allocation(step) >= 4 * B * E * M, "the census can see a dense tensor"


def test_a_reseeded_expert_has_the_threshold_of_its_twin():
    sae, x = sae_of(**LAYOUTS["shared"]), make_batch(60)
    before = sae.topk_threshold.clone()
    ((twin, busiest),) = reseed(sae, torch.optim.Adam(sae.parameters()), x, [2])
    assert twin == 2
    assert sae.topk_threshold[3] == before[1 + busiest]
    before[3] = before[1 + busiest]
    assert torch.equal(sae.topk_threshold, before)


# Hooks


@pytest.mark.parametrize("hook", ["hook_sae_acts_pre", "hook_sae_acts_post"])
@layouts
def test_a_hook_on_dense_latents_sees_and_changes_nothing(hook, fields):
    sae, x = sae_of(**fields), make_batch(20)
    twin, seen = copy.deepcopy(sae), []
    plain = sae.training_forward_pass(step_input(x))
    twin.get_submodule(hook).add_hook(lambda acts, hook: seen.append(acts))  # noqa: ARG005
    hooked = twin.training_forward_pass(step_input(x))
    torch.testing.assert_close(hooked.loss, plain.loss)
    torch.testing.assert_close(hooked.feature_acts, plain.feature_acts.to_dense())
    torch.testing.assert_close(twin.topk_threshold, sae.topk_threshold)
    torch.testing.assert_close(twin.encode(x), sae.encode(x))
    assert seen[0].shape == (20, sae.cfg.d_sae)


# Trainers


def fresh(dtype: str = "float32", **fields) -> SwitchTrainingSAE:
    torch.manual_seed(0)
    fields = {"d_in": 12, "d_sae": 40, "n_experts": 4, "k": 3, "activation": "batchtopk", "dtype": dtype} | fields
    return SwitchTrainingSAE(SwitchTrainingSAEConfig(**fields))


@pytest.mark.parametrize("options", [{}, {"optimizer": "row_sparse_adam"}, {"gradient_accumulation_steps": 4}], ids=str)
@pytest.mark.parametrize("widths", [None, [2, 10]], ids=["batchtopk", "matryoshka"])
def test_a_resumed_run_is_bit_identical(options, widths, tmp_path):
    batches = activations(10)

    def start(steps_before: int):
        sae = fresh(matryoshka_widths=widths, aux_loss_coefficient=0.1)
        t = our_trainer(sae, batches, checkpoint_path=str(tmp_path), dead_feature_window=3, **options)
        run(t, batches[:steps_before])
        return t

    whole = start(10)
    start(5).save_checkpoint("half")
    resumed = start(0)
    resumed.resume(tmp_path / "half")
    run(resumed, batches[5:])
    assert (whole.sae.topk_threshold > 0).any()
    for name, value in whole.sae.state_dict().items():
        assert torch.equal(value, resumed.sae.state_dict()[name]), name
    assert torch.equal(whole.act_freq_scores, resumed.act_freq_scores)


def test_both_trainers_take_the_same_steps_and_log_the_threshold():
    batches = [batch.double() for batch in activations(12)]
    ours, stock = fresh("float64"), fresh("float64")
    mine, theirs = our_trainer(ours, batches, lr=1e-3), trainer(stock, batches, lr=1e-3, lr_end=1e-3)
    (*_, output) = run(mine, batches)
    for batch in batches:
        theirs.step(batch)
        theirs.n_training_steps += 1
    for (name, a), b in zip(ours.state_dict().items(), stock.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    log = mine.build_train_step_log_dict(output, 64)
    assert log["metrics/topk_threshold"] == pytest.approx(ours.topk_threshold.mean().item())
    assert log["metrics/l0"] <= 3


def test_a_skipped_step_leaves_the_thresholds_as_they_were():
    assert_only_finite_steps_move_thresholds(fresh(), activations(4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "relu"}, "activation must be one of 'topk', 'batchtopk', 'jumprelu'; got 'relu'"),
        ({"activation": "jumprelu"}, "activation must be one of 'topk', 'batchtopk' in training; got 'jumprelu'"),
        ({"topk_threshold_lr": 1.5}, "topk_threshold_lr must be a finite number, at least 0 and at most 1; got 1.5"),
        ({"k": 9}, r"k must be at most d_sae / n_experts = 56 / 7 = 8"),
        (
            {"activation": "batchtopk", "expert_overlap_coefficient": 0.1},
            "expert_overlap_coefficient must be 0 with activation='batchtopk'",
        ),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SwitchTrainingSAEConfig(**{"d_in": 10, "d_sae": 56, "n_experts": 7, "k": 3, **fields})


def test_an_sae_after_training_selects_by_k_or_by_thresholds():
    fields = {"d_in": 10, "d_sae": 56, "n_experts": 7, "k": 3}
    assert SwitchSAEConfig(**fields).activation == "topk"
    assert SwitchSAEConfig(**fields, activation="batchtopk").activation == "jumprelu"
    cfg = SwitchSAEConfig(**fields)
    cfg.activation = "batchtopk"
    with pytest.raises(ValueError, match="one of 'topk', 'jumprelu' after training; got 'batchtopk'"):
        SwitchSAE(cfg)


def test_what_each_owner_has_goes_to_its_latents():
    layout = ExpertLayout(11, 3, 2)
    assert layout.n_owners == 4
    t = torch.tensor([5, 6, 7, 8])
    assert layout.per_latent(t).tolist() == [5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8]
    assert layout.firsts(layout.per_latent(t)).tolist() == t.tolist()
    assert layout.of_experts(t).tolist() == [6, 7, 8]
    assert layout.positions(torch.device("cpu")).tolist() == [0, 0, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert ExpertLayout(6, 2).owners_of(torch.arange(6)).tolist() == [0, 0, 0, 1, 1, 1]
