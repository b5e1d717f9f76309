"""A ``switch`` SAE after training with activation="batchtopk": thresholds in place of batches, and its files."""

import copy
import json
import pickle

import pytest
import torch
from helpers.inside_experts import (
    GATES,
    LAYOUTS,
    compare_with_reference,
    gated_pre,
    gates_of,
    inference_of,
    layouts,
    owners_of,
    sae_of,
)
from helpers.token_loop import make_batch, make_sae, step_input
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE

from sae_lens_switch import (
    SwitchSAE,
    SwitchSAEConfig,
    SwitchTrainingSAEConfig,
    SwitchTrainingTranscoder,
    SwitchTrainingTranscoderConfig,
    SwitchTranscoder,
    encode_sparse,
    grow,
    init_from,
)
from sae_lens_switch.dashboard import as_dashboard_sae


@GATES
@layouts
def test_after_training_all_above_the_threshold_of_their_expert_are_active(fields, gate, tmp_path):
    sae, x = sae_of(gate=gate, **fields), make_batch(31)
    sae.save_inference_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["activation"], cfg["k"]) == ("switch", "jumprelu", sae.cfg.k)
    assert "matryoshka_widths" not in cfg
    assert "topk_threshold_lr" not in cfg
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is SwitchSAE
    assert torch.equal(loaded.threshold, sae.topk_threshold)
    acts, _, _ = gated_pre(sae, x)
    for owner, latents in enumerate(owners_of(sae.cfg)):
        part = acts[:, latents.start : latents.stop]
        part[part <= sae.topk_threshold[owner]] = 0
    assert (acts > 0).any(1).sum() > 10
    torch.testing.assert_close(loaded.encode(x), acts.detach())
    codes = loaded.encode_sparse(x.view(1, 31, 10))
    assert codes.batch_shape == (1, 31)
    torch.testing.assert_close(codes.to_dense()[0], acts.detach())
    torch.testing.assert_close(encode_sparse(loaded, x).to_dense(), acts.detach())
    torch.testing.assert_close(loaded.decode(codes)[0], (acts @ sae.W_dec + sae.b_dec).detach())
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), (acts @ sae.W_dec + sae.b_dec).detach())
    loaded.hook_sae_acts_pre.add_hook(lambda pre, hook: None)  # noqa: ARG005
    torch.testing.assert_close(loaded.encode(x), acts.detach())


@layouts
def test_after_training_latents_are_differentiable_in_the_activations(fields):
    sae = sae_of(**fields)
    after = inference_of(sae)
    mine, theirs = (make_batch(9).requires_grad_() for _ in range(2))
    acts = after.encode(mine)
    expected = gated_pre(sae, theirs)[0] * (acts > 0)
    torch.testing.assert_close(acts, expected)
    weights = torch.rand_like(acts)
    for x, found in ((mine, acts), (theirs, expected)):
        (found * weights).sum().backward()
        assert x.grad is not None
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_saved_training_sae_is_read_back_and_files_without_thresholds_are_refused(tmp_path):
    sae = sae_of(matryoshka_widths=[3, 8])
    sae.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    assert again.cfg.matryoshka_widths == [3, 8]
    for name, value in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    compare_with_reference(again, make_batch(12), step_input)
    after = SAE.load_from_disk(tmp_path)  # as a checkpoint is read for inference
    assert type(after) is SwitchSAE
    torch.testing.assert_close(after.encode(make_batch(12)), inference_of(sae).encode(make_batch(12)))
    inference = SwitchSAE(SwitchSAEConfig(d_in=10, d_sae=56, n_experts=7, k=3, activation="jumprelu"))
    state = inference.state_dict()
    del state["threshold"]
    with pytest.raises(ValueError, match="weights of a switch SAE must hold threshold"):
        inference.process_state_dict_for_loading(state)


def test_a_pickled_or_copied_sae_is_the_same():
    sae, x = sae_of(matryoshka_widths=[2, 8]), make_batch(9)
    for made in (sae, inference_of(sae)):
        for twin in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
            assert torch.equal(twin.encode(x), made.encode(x))
    before, twin = sae.topk_threshold.clone(), copy.deepcopy(sae)
    twin.training_forward_pass(step_input(x))
    assert torch.equal(sae.topk_threshold, before)
    assert not torch.equal(twin.topk_threshold, before)


@pytest.mark.parametrize("make", [lambda sae: sae, inference_of], ids=["training", "inference"])
def test_folds_leave_reconstruction_and_selection_as_they_are(make):
    x = make_batch(25)
    scaled = make(sae_of(normalize_activations="expected_average_only_in"))
    expected = scaled.encode(x), scaled(x)
    scaled.fold_activation_norm_scaling_factor(2.5)
    torch.testing.assert_close(scaled.encode(x / 2.5), expected[0])
    torch.testing.assert_close(scaled(x / 2.5), expected[1] / 2.5)
    sae = make(sae_of(**LAYOUTS["shared"]))
    with torch.no_grad():
        sae.W_dec.copy_(3 * torch.nn.functional.normalize(sae.W_dec, dim=1))
    acts, out = sae.encode(x), sae(x)
    thresholds = [t.clone() for name, t in sae.named_buffers() if "threshold" in name]
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.encode(x), 3 * acts)
    torch.testing.assert_close(sae(x), out)
    torch.testing.assert_close(
        [t for name, t in sae.named_buffers() if "threshold" in name], [3 * t for t in thresholds]
    )


def test_norms_that_differ_between_experts_fold_after_training_only():
    sae, x = sae_of(), make_batch(25)
    norms = torch.arange(1, 8).repeat_interleave(8).double().unsqueeze(1)
    with torch.no_grad():
        sae.W_dec.copy_(norms * torch.nn.functional.normalize(sae.W_dec, dim=1))
    after = inference_of(sae)
    acts, out = after.encode(x), after(x)
    after.fold_W_dec_norm()
    torch.testing.assert_close(after.encode(x), acts * norms.T)
    torch.testing.assert_close(after(x), out)
    with pytest.raises(NotImplementedError, match="or a batch selects"):
        sae.fold_W_dec_norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_keep_the_thresholds_with_the_weights(dtype, tmp_path):
    sae, x = sae_of(), make_batch(40)
    sae.save_inference_model(tmp_path)
    exact = SAE.load_from_disk(tmp_path)
    cast, loaded = copy.deepcopy(exact).to(dtype), SAE.load_from_disk(tmp_path, dtype=str(dtype).removeprefix("torch."))
    for made in (cast, loaded):
        assert made.threshold.dtype == dtype
        acts, codes = made.encode(x.to(dtype)), made.encode_sparse(x.to(dtype))
        assert acts.dtype == dtype
        assert torch.equal(codes.to_dense(), acts)
        assert ((acts > 0) != (exact.encode(x) > 0)).double().mean() < 0.01


def test_it_starts_from_any_switch_sae_with_the_same_experts():
    fields = {"d_in": 10, "d_sae": 56, "n_experts": 7, "k": 3, "dtype": "float64", "normalize_decoder": False}
    batch = SwitchTrainingSAEConfig(**fields, activation="batchtopk")
    sae = sae_of(normalize_decoder=False)
    for source in (sae, inference_of(sae)):
        assert torch.equal(init_from(batch, source).topk_threshold, sae.topk_threshold)
        assert init_from(SwitchTrainingSAEConfig(**fields), source).topk_threshold is None
    topk = make_sae(normalize_decoder=False)
    assert init_from(batch, topk).topk_threshold.tolist() == [0] * 7


def test_a_grown_sae_has_the_thresholds_of_the_experts_it_copied():
    sae = sae_of(**LAYOUTS["shared"])
    sae.is_fresh = False
    grown = grow(sae, 9, make_batch(500))
    assert grown.topk_threshold.shape == (10,)
    assert torch.equal(grown.topk_threshold[:7], sae.topk_threshold)
    assert set(grown.topk_threshold[7:].tolist()) <= set(sae.topk_threshold[1:].tolist())


def test_a_dashboard_shows_what_the_sae_is_after_training():
    sae, x = sae_of(**LAYOUTS["shared"]), make_batch(9)
    shown = as_dashboard_sae(sae)
    assert shown.cfg.activation == "jumprelu"
    assert sae.topk_threshold is not None
    torch.testing.assert_close(shown.encode(x), inference_of(sae).encode(x))


def test_a_transcoder_has_thresholds_after_training_too(tmp_path):
    fields = {"d_in": 10, "d_out": 6, "d_sae": 56, "n_experts": 7, "k": 3, "dtype": "float64"}
    torch.manual_seed(0)
    coder = SwitchTrainingTranscoder(SwitchTrainingTranscoderConfig(**fields, activation="batchtopk"))
    for seed in range(9):
        coder.training_forward_pass(step_input(make_batch(40, 16, seed=seed)))
    coder.save_inference_model(tmp_path)
    after, x = SAE.load_from_disk(tmp_path), make_batch(30)
    assert type(after) is SwitchTranscoder
    gates, _, _ = gates_of(coder, x)
    acts = ((x - coder.b_in) @ coder.W_enc).relu() * gates
    acts = acts * (acts > coder.topk_threshold.repeat_interleave(8))
    assert (acts > 0).any()
    torch.testing.assert_close(after.encode(x), acts.detach())
    torch.testing.assert_close(after(x), (acts @ coder.W_dec + coder.b_dec).detach())


def test_whitening_folds_into_weights_and_leaves_the_thresholds():
    sae = inference_of(sae_of(normalize_activations="covariance_whitening"))
    x, mean = make_batch(20), make_batch(1, seed=5)[0]
    matrix = make_batch(10, seed=6)
    inverse = torch.linalg.inv(matrix)
    acts, threshold = sae.encode((x - mean) @ matrix), sae.threshold.clone()
    sae.fold_activation_whitening(mean, matrix, inverse)
    torch.testing.assert_close(sae.encode(x), acts, rtol=1e-6, atol=1e-8)
    assert torch.equal(sae.threshold, threshold)
    assert (acts > 0).any()


@pytest.mark.parametrize("shape", [(10,), (0, 10), (2, 3, 10)])
def test_activations_of_any_shape(shape):
    sae = sae_of(**LAYOUTS["two and narrow shared"])
    x = make_batch(6)[: max(1, torch.Size(shape[:-1]).numel())].reshape(-1)[: torch.Size(shape).numel()].view(shape)
    for made in (sae, inference_of(sae)):
        acts = made.encode(x)
        assert acts.shape == (*shape[:-1], sae.cfg.d_sae)
        torch.testing.assert_close(made.encode_sparse(x).to_dense(), acts)
        assert made.decode(made.encode_sparse(x)).shape == shape
