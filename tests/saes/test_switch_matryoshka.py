"""``switch`` with ``matryoshka_widths``: the first latents of all experts reconstruct by themselves, width by width."""

import copy

import pytest
import torch
from helpers import activations, largest_allocation
from helpers.inside_experts import compare_with_reference
from helpers.token_loop import make_batch, make_sae, step_input
from helpers.trainers import our_trainer, run
from sae_lens.saes.sae import SAEMetadata

from sae_lens_switch import (
    SparseMatryoshkaBatchTopKTrainingSAE,
    SparseMatryoshkaBatchTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
    SwitchTrainingTranscoder,
    SwitchTrainingTranscoderConfig,
)
from sae_lens_switch.parallel.shard_classes import expert_shard_class
from sae_lens_switch.saes.config import check_sae

LAYOUTS = {
    "one expert": {"matryoshka_widths": [1, 3, 8]},
    "one width": {"matryoshka_widths": [8]},
    "one of all": {"n_experts": 1, "d_sae": 13, "k": 4, "matryoshka_widths": [2, 5, 13]},
    "two experts": {"n_active_experts": 2, "k": 5, "matryoshka_widths": [2, 7, 8]},
    "shared": {"n_shared_experts": 1, "n_experts": 6, "k": 4, "matryoshka_widths": [3, 8]},
    "two and narrow shared": {
        **{"n_shared_experts": 2, "shared_width": 8, "n_experts": 6, "n_active_experts": 2, "k": 6},
        "matryoshka_widths": [1, 4, 8],
    },
}
layouts = pytest.mark.parametrize("fields", LAYOUTS.values(), ids=LAYOUTS.keys())
activations_of = pytest.mark.parametrize("activation", ["topk", "batchtopk"])
FIELDS = {"d_in": 10, "d_sae": 56, "n_experts": 7, "k": 3}


@activations_of
@layouts
@pytest.mark.parametrize("gate", ["probability", "one"])
def test_outputs_losses_and_gradients_equal_the_dense_reference(fields, activation, gate):
    sae = make_sae(activation=activation, gate=gate, **fields)
    for n in (1, 33):
        expected = compare_with_reference(sae, make_batch(n), step_input)
    names = [f"inner_mse_loss_{width}" for width in fields["matryoshka_widths"][:-1]]
    assert list(expected.losses) == ["mse_loss", "load_balance_loss", *names]


@activations_of
def test_dead_latents_reconstruct_the_residual_of_the_whole(activation):
    dead = torch.rand(56, generator=torch.Generator().manual_seed(3)) < 0.4
    for layout in (LAYOUTS["one expert"], LAYOUTS["two and narrow shared"]):
        sae = make_sae(aux_loss_coefficient=0.3, aux_k=3, activation=activation, **layout)
        compare_with_reference(sae, make_batch(20), step_input, dead)


def test_topk_codes_have_k_per_token_as_ever():
    sae = make_sae(matryoshka_widths=[3, 8])
    output = sae.training_forward_pass(step_input(make_batch()))
    assert output.codes.offsets is None
    assert output.codes.values.shape == output.codes.indices.shape == (40, 3)
    torch.testing.assert_close(output.codes.to_dense(), sae.encode(make_batch()))


def test_the_other_losses_are_those_without_widths():
    sae = make_sae(matryoshka_widths=[3, 8], expert_overlap_coefficient=0.2, router_z_loss_coefficient=0.1)
    plain = make_sae(expert_overlap_coefficient=0.2, router_z_loss_coefficient=0.1)
    a, b = (s.training_forward_pass(step_input(make_batch())) for s in (sae, plain))
    for name, loss in b.losses.items():
        torch.testing.assert_close(a.losses[name], loss)
    torch.testing.assert_close(a.loss, b.loss + a.losses["inner_mse_loss_3"])


def test_with_one_expert_and_no_gate_it_is_sparse_matryoshka_batchtopk():
    widths, fields = [4, 11, 30], {"d_in": 10, "d_sae": 30, "k": 5, "dtype": "float64", "topk_threshold_lr": 0.2}
    own = {"n_experts": 1, "gate": "one", "load_balance_coefficient": 0, "normalize_decoder": False}
    switch = make_sae(activation="batchtopk", matryoshka_widths=widths, **own, **fields)
    cfg = SparseMatryoshkaBatchTopKTrainingSAEConfig(**fields, matryoshka_widths=widths)
    cfg.rescale_acts_by_decoder_norm, cfg.apply_b_dec_to_input = False, True
    plain = SparseMatryoshkaBatchTopKTrainingSAE(cfg)
    names = ("W_enc", "W_dec", "b_dec")
    with torch.no_grad():
        plain.topk_threshold.copy_(switch.topk_threshold[0])
        for name in names:
            plain.get_parameter(name).copy_(switch.get_parameter(name))
    optimizers = [torch.optim.SGD([sae.get_parameter(n) for n in names], lr=3e-3) for sae in (switch, plain)]
    for step in range(20):
        x = make_batch(17, seed=step)
        a, b = switch.training_forward_pass(step_input(x, coefficient=0.0)), plain.training_forward_pass(step_input(x))
        assert torch.equal(a.codes.indices, b.codes.indices)
        for name in ("mse_loss", "inner_mse_loss_4", "inner_mse_loss_11"):
            torch.testing.assert_close(a.losses[name], b.losses[name])
        torch.testing.assert_close(a.loss, b.loss)
        for output, optimizer in zip((a, b), optimizers, strict=True):
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
    for name in names:
        torch.testing.assert_close(switch.get_parameter(name), plain.get_parameter(name))
    torch.testing.assert_close(switch.topk_threshold[0], plain.topk_threshold)


@activations_of
@pytest.mark.parametrize("hook", ["hook_sae_acts_pre", "hook_sae_acts_post"])
def test_a_hook_on_dense_latents_sees_and_changes_nothing(activation, hook):
    sae = make_sae(activation=activation, **LAYOUTS["two and narrow shared"])
    twin, x = copy.deepcopy(sae), make_batch(20)
    twin.get_submodule(hook).add_hook(lambda acts, hook: None)  # noqa: ARG005
    outputs = [s.training_forward_pass(step_input(x)) for s in (sae, twin)]
    assert list(outputs[0].losses) == list(outputs[1].losses)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    grads = [torch.autograd.grad(o.loss, list(s.parameters())) for o, s in zip(outputs, (sae, twin), strict=True)]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
@activations_of
def test_the_first_latents_of_all_experts_learn_to_reconstruct_by_themselves(optimizer, activation):
    fields = {"d_in": 12, "d_sae": 96, "n_experts": 4, "k": 4, "activation": activation, "gate": "one"}
    batches, inner, whole = activations(60), [], []
    for widths in ([4, 24], None):
        torch.manual_seed(0)
        sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(**fields, matryoshka_widths=widths))
        losses = [o.losses["mse_loss"].item() for o in run(our_trainer(sae, batches, optimizer=optimizer), batches)]
        whole.append(sum(losses[-10:]) / sum(losses[:10]))
        x = batches[0]
        first = sae.encode(x) * (torch.arange(96) % 24 < 4)
        inner.append((first @ sae.W_dec + sae.b_dec - x).square().sum(1).mean().item())
    assert max(whole) < 0.7
    assert inner[0] < 0.8 * inner[1]


def test_a_step_with_k_per_token_makes_no_tensor_of_batch_times_width():
    B, D, E, M, K = 256, 6, 16, 32, 4
    fields = {"d_in": D, "d_sae": E * M, "n_experts": E, "k": K, "matryoshka_widths": [8, 32]}
    sae, x = SwitchTrainingSAE(SwitchTrainingSAEConfig(**fields)), torch.randn(B, D)
    allowed = 8 * max(B * M, B * K * D, E * M * D)
    assert allowed < 4 * B * E * M
    assert largest_allocation(lambda: sae.training_forward_pass(step_input(x, step=0)).loss.backward()) <= allowed


@activations_of
def test_a_transcoder_reconstructs_its_target_at_each_width(activation):
    fields = {**FIELDS, "d_out": 6, "dtype": "float64", "activation": activation, "matryoshka_widths": [3, 8]}
    torch.manual_seed(0)
    coder = SwitchTrainingTranscoder(SwitchTrainingTranscoderConfig(**fields, metadata=SAEMetadata(hook_name="a")))
    coder.is_fresh = False
    rows = make_batch(20, 16)
    x, y = rows[:, :10], rows[:, 10:]
    output = coder.training_forward_pass(step_input(rows))
    acts = coder.encode(x)
    inner = (acts * (torch.arange(56) % 8 < 3)) @ coder.W_dec + coder.b_dec
    torch.testing.assert_close(output.losses["inner_mse_loss_3"], (inner - y).square().sum(1).mean())
    with pytest.raises(ValueError, match="skip_connection must be False with matryoshka_widths"):
        SwitchTrainingTranscoderConfig(**fields, skip_connection=True)


def test_a_last_width_below_that_of_an_expert_is_completed_with_a_warning():
    widths = [2, 5]
    with pytest.warns(
        UserWarning, match="matryoshka_widths end with 5: 8, the width of an expert, is added as the last"
    ):
        cfg = SwitchTrainingSAEConfig(**FIELDS, matryoshka_widths=widths)
    assert cfg.matryoshka_widths == [2, 5, 8]
    assert widths == [2, 5]
    check_sae(cfg)
    assert SwitchTrainingSAEConfig.from_dict(cfg.to_dict()).matryoshka_widths == [2, 5, 8]


@pytest.mark.parametrize("widths", [[], [5, 5, 8], [7, 3], [5, 9], [0, 8], [2.5, 8], 8])
def test_widths_that_cannot_be_are_refused(widths):
    with pytest.raises(ValueError, match="matryoshka_widths must be"):
        SwitchTrainingSAEConfig(**FIELDS, matryoshka_widths=widths)


def test_a_normalisation_per_token_is_refused():
    with pytest.raises(ValueError, match="normalize_activations must not be per token with matryoshka_widths"):
        SwitchTrainingSAEConfig(**FIELDS, matryoshka_widths=[8], normalize_activations="layer_norm")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "batchtopk"}, "activation must be 'topk' with experts on several processes; got 'batchtopk'"),
        (
            {"matryoshka_widths": [8], "load_balancing": "bias"},
            "matryoshka_widths must be None with experts on several processes",
        ),
    ],
)
def test_experts_on_several_processes_are_refused(fields, message):
    class OfOne:
        row_size, row_rank, device = 1, 0, "cpu"

    cfg = SwitchTrainingSAEConfig(**FIELDS, **fields)
    with pytest.raises(ValueError, match=message):
        expert_shard_class(cfg)(cfg, OfOne())  # type: ignore[arg-type]
