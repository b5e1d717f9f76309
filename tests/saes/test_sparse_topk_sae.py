"""``sparse_topk`` against SAELens's TopKTrainingSAE: the same weights, the same numbers."""

import json
import pickle

import pytest
import sae_lens
import torch
from helpers import HOOK, HOOK_Z, D, random_input, run_fields
from helpers.saelens_pairs import TOPK, TOPK_K, F, assert_same_step, dead_latents, pair, rescaling, step_input, tightly
from helpers.without_us import loaded_without_us
from sae_lens import SAE, LanguageModelSAETrainingRunner
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from sae_lens.saes.topk_sae import TopKSAE, TopKTrainingSAE, TopKTrainingSAEConfig

from sae_lens_switch import (
    LanguageModelSAERunnerConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    override_topk,
)

K = TOPK_K


def differentiates_two_dtypes() -> bool:
    """Whether SAELens can train a float64 SAE on float32 activations; the versions of torch before 2.13 cannot."""
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    try:
        torch.nn.functional.mse_loss(x, torch.ones(2)).backward()
    except RuntimeError:
        return False
    return True


@rescaling
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("n_dead", [None, 0, 1, 4, 20, F])
def test_loss_and_every_gradient_equal_saelens(rescale, apply_b_dec_to_input, n_dead):
    ours, stock = pair(TOPK, rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=apply_b_dec_to_input)
    dead = None if n_dead is None else dead_latents(n_dead)
    assert_same_step(ours, stock, random_input(50, D), dead)
    if n_dead:
        x = random_input(50, D)
        assert ours.training_forward_pass(step_input(x, dead)).losses["auxiliary_reconstruction_loss"] > 0


@rescaling
def test_k_up_to_every_latent_and_one(rescale):
    for k in (1, F):
        assert_same_step(*pair(TOPK, k=k, rescale_acts_by_decoder_norm=rescale), random_input(9, D), dead_latents(7))


@pytest.mark.parametrize("normalisation", ["expected_average_only_in", "layer_norm", "constant_norm_rescale"])
def test_every_normalisation_equals_saelens(normalisation):
    ours, stock = pair(TOPK, normalize_activations=normalisation)
    assert_same_step(ours, stock, random_input(30, D))
    if normalisation != "expected_average_only_in":
        for sae in (ours, stock):
            with pytest.raises(ValueError, match=f"normalize_activations='{normalisation}'"):
                sae.training_forward_pass(step_input(random_input(30, D), dead_latents(3)))


def test_the_auxiliary_loss_trains_the_encoder_and_decoder_of_dead_latents_only():
    ours, _ = pair(TOPK)
    dead = dead_latents(8)
    output = ours.training_forward_pass(step_input(random_input(40, D), dead))
    output.losses["auxiliary_reconstruction_loss"].backward()
    for grad_FD in (ours.W_enc.grad.T, ours.W_dec.grad, ours.b_enc.grad.unsqueeze(1)):
        assert grad_FD[dead].any()
        assert not grad_FD[~dead].any()


def test_it_is_saved_as_a_plain_topk_that_loads_without_us(tmp_path):
    x, made = random_input(11, D), {}
    for rescale in (True, False):
        made[tmp_path / str(rescale)], _ = pair(
            TOPK, rescale_acts_by_decoder_norm=rescale, metadata=SAEMetadata(hook_name=HOOK)
        )
    for folder, ours in made.items():
        ours.save_inference_model(folder)
        assert json.loads((folder / "cfg.json").read_text())["architecture"] == "topk"
    for ours, found in zip(made.values(), loaded_without_us([*made], x), strict=True):
        assert (found["class"], found["k"]) == ("TopKSAE", K)
        torch.testing.assert_close(found["out"], ours(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found["acts"], ours.encode(x), rtol=1e-9, atol=1e-9)


@rescaling
def test_folding_the_norms_of_the_decoder_equals_saelens(rescale):
    ours, stock = pair(TOPK, rescale_acts_by_decoder_norm=rescale)
    x = random_input(15, D)
    if not rescale:
        for sae in (ours, stock):
            with pytest.raises(NotImplementedError):
                sae.fold_W_dec_norm()
        return
    for sae in (ours, stock):
        sae.fold_W_dec_norm()
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
    sae, stock = pair(TOPK, normalize_activations=normalize)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(stock)  # closures over the SAE
    twin = pickle.loads(pickle.dumps(sae))
    x = random_input(9, D)
    expected = sae.decode(sae.encode_sparse(x))
    codes = twin.encode_sparse(x)
    sae(3 * x + 1)  # whose statistics are not the twin's
    torch.testing.assert_close(twin.decode(codes), expected, rtol=0, atol=0)
