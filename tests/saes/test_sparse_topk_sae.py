"""``sparse_topk`` against SAELens's TopKTrainingSAE: the same weights, the same numbers."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import sae_lens
import torch
from helpers import HOOK, HOOK_Z, D, activations, largest_allocation, random_input, randomize, run_fields, trainer
from sae_lens import SAE, LanguageModelSAETrainingRunner
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata, TrainingSAE, TrainStepInput
from sae_lens.saes.topk_sae import TopKSAE, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens_switch_kernels import torch_tiles
from torch import Tensor

from sae_lens_switch import (
    LanguageModelSAERunnerConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    override_topk,
)

F, K = 42, 5
tightly = {"rtol": 1e-9, "atol": 1e-10}
rescaling = pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "as they are"])


def pair(seed: int = 0, **options) -> tuple[SparseTopKTrainingSAE, TopKTrainingSAE]:
    """Ours and SAELens's with the same random weights."""
    options = {"d_in": D, "d_sae": F, "k": K, "dtype": "float64", **options}
    ours = randomize(SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**copy.deepcopy(options))), seed)
    stock = TopKTrainingSAE(TopKTrainingSAEConfig(**options))
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def differentiates_two_dtypes() -> bool:
    """Whether SAELens can train a float64 SAE on float32 activations; the versions of torch before 2.13 cannot."""
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    try:
        torch.nn.functional.mse_loss(x, torch.ones(2)).backward()
    except RuntimeError:
        return False
    return True


def step_input(x: Tensor, dead: Tensor | None = None) -> TrainStepInput:
    return TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=3, is_logging_step=False)


def dead_latents(n: int, seed: int = 5) -> Tensor:
    mask = torch.zeros(F, dtype=torch.bool)
    mask[torch.randperm(F, generator=torch.Generator().manual_seed(seed))[:n]] = True
    return mask


def loss_and_gradients(sae, x: Tensor, dead: Tensor | None = None):
    sae.zero_grad()
    output = sae.training_forward_pass(step_input(x, dead))
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in sae.named_parameters()}


def assert_same_step(ours, stock, x: Tensor, dead: Tensor | None = None, close=tightly) -> None:
    (a, a_grads), (b, b_grads) = loss_and_gradients(ours, x, dead), loss_and_gradients(stock, x, dead)
    assert a.losses.keys() == b.losses.keys()
    for name in a.losses:
        torch.testing.assert_close(a.losses[name], b.losses[name], **close)
    torch.testing.assert_close(a.loss, b.loss, **close)
    torch.testing.assert_close(a.sae_out, b.sae_out, **close)
    torch.testing.assert_close(a.feature_acts.to_dense(), b.feature_acts.detach(), **close)
    assert a.feature_acts.is_coalesced()
    assert not a.feature_acts.requires_grad
    for name in b_grads:
        torch.testing.assert_close(a_grads[name], b_grads[name], **close, msg=lambda m, name=name: f"{name}: {m}")


@rescaling
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("n_dead", [None, 0, 1, 4, 20, F])
def test_loss_and_every_gradient_equal_saelens(rescale, apply_b_dec_to_input, n_dead):
    ours, stock = pair(rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=apply_b_dec_to_input)
    dead = None if n_dead is None else dead_latents(n_dead)
    assert_same_step(ours, stock, random_input(50, D), dead)
    if n_dead:
        x = random_input(50, D)
        assert ours.training_forward_pass(step_input(x, dead)).losses["auxiliary_reconstruction_loss"] > 0


@rescaling
def test_k_up_to_every_latent_and_one(rescale):
    for k in (1, F):
        assert_same_step(*pair(k=k, rescale_acts_by_decoder_norm=rescale), random_input(9, D), dead_latents(7))


@pytest.mark.parametrize("normalisation", ["expected_average_only_in", "layer_norm", "constant_norm_rescale"])
def test_every_normalisation_equals_saelens(normalisation):
    ours, stock = pair(normalize_activations=normalisation)
    assert_same_step(ours, stock, random_input(30, D))
    if normalisation != "expected_average_only_in":
        for sae in (ours, stock):
            with pytest.raises(ValueError, match=f"normalize_activations='{normalisation}'"):
                sae.training_forward_pass(step_input(random_input(30, D), dead_latents(3)))


def test_the_auxiliary_loss_trains_the_encoder_and_decoder_of_dead_latents_only():
    ours, _ = pair()
    dead = dead_latents(8)
    output = ours.training_forward_pass(step_input(random_input(40, D), dead))
    output.losses["auxiliary_reconstruction_loss"].backward()
    for grad_FD in (ours.W_enc.grad.T, ours.W_dec.grad, ours.b_enc.grad.unsqueeze(1)):
        assert grad_FD[dead].any()
        assert not grad_FD[~dead].any()


def test_autocast_stays_near_saelens_own_under_autocast():
    ours, stock = pair(dtype="float32")
    x = random_input(60, D, dtype=torch.float32)
    results = []
    for sae in (ours, stock):
        sae.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = sae.training_forward_pass(step_input(x, dead_latents(6)))
        output.loss.backward()
        results.append([output.loss, *(p.grad for p in sae.parameters())])
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.05 * b.norm()


@rescaling
def test_encode_decode_and_forward_equal_saelens(rescale):
    ours, stock = pair(rescale_acts_by_decoder_norm=rescale)
    for shape in ((D,), (7, D), (3, 4, D), (2, 3, 2, D)):
        x = random_input(*shape)
        acts = ours.encode(x)
        torch.testing.assert_close(acts, stock.encode(x), **tightly)
        torch.testing.assert_close(ours.decode(acts), stock.decode(acts), **tightly)
        torch.testing.assert_close(ours.decode(ours.encode_sparse(x)), stock(x), **tightly)
        torch.testing.assert_close(ours(x), stock(x), **tightly)


@pytest.mark.parametrize("hook", ["hook_sae_acts_pre", "hook_sae_acts_post"])
def test_a_hook_on_dense_latents_sees_and_edits_them_in_training(hook):
    ours, stock = pair()
    seen = []

    def steer(acts, hook):  # noqa: ARG001
        seen.append(acts)
        return acts * 0.5

    for sae in (ours, stock):
        sae.add_hook(hook, steer)
    x = random_input(20, D)
    (a, a_grads), (b, b_grads) = loss_and_gradients(ours, x), loss_and_gradients(stock, x)
    assert [tuple(t.shape) for t in seen] == [(20, F)] * 2
    torch.testing.assert_close(a.loss, b.loss, **tightly)
    for name in b_grads:
        torch.testing.assert_close(a_grads[name], b_grads[name], **tightly)


@rescaling
def test_twenty_steps_of_saelens_trainer_end_in_the_same_weights_and_statistics(rescale):
    batches = [batch.double() for batch in activations(20)]  # SAELens's loss takes one dtype in older versions of torch
    ours, stock = pair(rescale_acts_by_decoder_norm=rescale, dtype="float64")
    trainers = [trainer(sae, batches, lr=1e-3, lr_end=1e-4, dead_feature_window=4) for sae in (ours, stock)]
    died = 0
    for batch in batches:
        for t in trainers:
            t.step(batch)
            t.n_training_steps += 1
        died += int(trainers[0].dead_neurons.sum())
        assert torch.equal(trainers[0].dead_neurons, trainers[1].dead_neurons)
    assert died > 0  # so that the auxiliary loss took part
    assert torch.equal(trainers[0].act_freq_scores, trainers[1].act_freq_scores)
    assert torch.equal(trainers[0].n_forward_passes_since_fired, trainers[1].n_forward_passes_since_fired)
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_training_step_makes_no_tensor_of_batch_times_width_outside_a_tile():
    B, width = 2048, 1024
    sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=D, d_sae=width, k=4))
    x = random_input(B, D, dtype=torch.float32)
    dead = torch.zeros(width, dtype=torch.bool)
    dead[:40] = True

    def step() -> None:
        sae.training_forward_pass(step_input(x, dead)).loss.backward()

    assert largest_allocation(step) == 4 * torch_tiles.TILE_ROWS["cpu"] * width < 4 * B * width
    sae.add_hook("hook_sae_acts_post", lambda acts, hook: None)  # noqa: ARG005
    assert largest_allocation(step) >= 4 * B * width, "the census can see a dense tensor"


@rescaling
def test_it_is_saved_as_a_plain_topk_that_loads_without_us(rescale, tmp_path):
    ours, _ = pair(rescale_acts_by_decoder_norm=rescale, metadata=SAEMetadata(hook_name=HOOK))
    ours.save_inference_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["architecture"] == "topk"
    x = random_input(11, D)
    torch.save({"x": x, "out": ours(x).detach(), "acts": ours.encode(x).detach()}, tmp_path / "expected.pt")
    program = f"""
import sys
sys.modules["sae_lens_switch"] = sys.modules["sae_lens_switch_kernels"] = None  # not importable
import torch
from sae_lens import SAE
sae = SAE.load_from_disk({str(tmp_path)!r})
expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(sae(expected["x"]), expected["out"], rtol=1e-9, atol=1e-9)
torch.testing.assert_close(sae.encode(expected["x"]), expected["acts"], rtol=1e-9, atol=1e-9)
print(type(sae).__name__, sae.cfg.k)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["TopKSAE", str(K)]


def test_its_checkpoint_comes_back_and_stock_weights_load(tmp_path):
    ours, stock = pair()
    ours.save_model(tmp_path / "ours")
    loaded = TrainingSAE.load_from_disk(tmp_path / "ours")
    assert type(loaded) is SparseTopKTrainingSAE
    assert loaded.W_enc.stride() == (1, D)
    for a, b in zip(loaded.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not list((tmp_path / "ours").glob(".saving*"))
    stock.save_model(tmp_path / "stock")
    fresh = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, dtype="float64"))
    fresh.load_weights_from_checkpoint(tmp_path / "stock")
    assert_same_step(fresh, stock, random_input(12, D))


@rescaling
@pytest.mark.parametrize("fold", ["fold_W_dec_norm", "scaling factor", "whitening"])
def test_folds_equal_saelens(rescale, fold):
    ours, stock = pair(rescale_acts_by_decoder_norm=rescale)
    x = random_input(15, D)
    if fold == "fold_W_dec_norm" and not rescale:
        for sae in (ours, stock):
            with pytest.raises(NotImplementedError):
                sae.fold_W_dec_norm()
        return
    matrix = random_input(D, D, seed=9) + 3 * torch.eye(D)
    for sae in (ours, stock):
        if fold == "fold_W_dec_norm":
            sae.fold_W_dec_norm()
        elif fold == "scaling factor":
            sae.fold_activation_norm_scaling_factor(2.5)
        else:
            sae.fold_activation_whitening(x[0], matrix, matrix.inverse())
    torch.testing.assert_close(ours(x), stock(x), **tightly)
    torch.testing.assert_close(ours.encode(x), stock.encode(x), **tightly)


@pytest.mark.skipif(not differentiates_two_dtypes(), reason="SAELens's loss takes one dtype in this version of torch")
@pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning")
@pytest.mark.parametrize("options", [{}, {"hook_name": HOOK_Z, "reshape_activations": "hook_z"}], ids=str)
def test_a_run_by_name_gives_what_the_stock_architecture_gives(options, tmp_path, model, dataset):
    common = {"d_in": D, "d_sae": F, "k": K, "dtype": "float64"}
    sae_options = {n: v for n, v in options.items() if n == "reshape_activations"}
    runner_options = {n: v for n, v in options.items() if n not in sae_options} | {"dead_feature_window": 2, "lr": 1e-3}
    ours = LanguageModelSAERunnerConfig(
        architecture="topk", **common, **sae_options, **run_fields(tmp_path / "ours", **runner_options)
    )
    assert type(ours.sae) is SparseTopKTrainingSAEConfig
    stock_sae = TopKTrainingSAEConfig(**common, **sae_options)
    stock = sae_lens.LanguageModelSAERunnerConfig(
        sae=stock_sae, **run_fields(tmp_path / "stock", dtype="float64", **runner_options)
    )
    weights = []
    for cfg in (ours, stock):
        torch.manual_seed(0)
        runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)
        runner.run()
        weights.append(SAE.load_from_disk(cfg.output_path))
    assert all(type(sae) is TopKSAE for sae in weights)
    for a, b in zip(*(sae.parameters() for sae in weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_override_topk_swaps_the_class_inside_stock_saelens_and_gives_it_back():
    stock = SAE_TRAINING_CLASS_REGISTRY["topk"]
    cfg = TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K)
    with override_topk():
        sae = TrainingSAE.from_dict(cfg.to_dict())
        assert type(sae) is SparseTopKTrainingSAE
        assert type(sae.cfg) is TopKTrainingSAEConfig
        sae.training_forward_pass(step_input(random_input(6, D, dtype=torch.float32))).loss.backward()
    assert SAE_TRAINING_CLASS_REGISTRY["topk"] == stock
    override = override_topk()
    assert SAE_TRAINING_CLASS_REGISTRY["topk"][0] is SparseTopKTrainingSAE
    override.restore()
    assert SAE_TRAINING_CLASS_REGISTRY["topk"] == stock
    assert type(TrainingSAE.from_dict(cfg.to_dict())) is TopKTrainingSAE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": F + 1}, f"k must be at most d_sae={F}; got k={F + 1}"),
        ({"k": 0}, "k must be a whole number, at least 1; got 0"),
        ({"d_sae": -3}, "d_sae must be a whole number, at least 1; got -3"),
    ],
)
def test_configs_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SparseTopKTrainingSAEConfig(**{"d_in": D, "d_sae": F, "k": K, **options})


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_a_pickled_sae_is_the_same_and_keeps_its_own_statistics(normalize):
    sae, stock = pair(normalize_activations=normalize)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(stock)  # closures over the SAE
    twin = pickle.loads(pickle.dumps(sae))
    x = random_input(9, D)
    expected = sae.decode(sae.encode_sparse(x))
    codes = twin.encode_sparse(x)
    sae(3 * x + 1)  # whose statistics are not the twin's
    torch.testing.assert_close(twin.decode(codes), expected, rtol=0, atol=0)
