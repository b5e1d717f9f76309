"""Fine-tuning starts from what the trained SAE computes, for every pair of architectures that go together."""

import json

import pytest
import torch
from helpers import D, E, F, K, random_input, randomize, switch_sae, training_config
from helpers.inference_saes import ALL
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.standard_sae import StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

from sae_lens_switch import (
    SparseAbsTopKTrainingSAEConfig,
    SparseBatchTopKTrainingSAEConfig,
    SparseMatryoshkaBatchTopKTrainingSAEConfig,
    SparseTopKTrainingSAEConfig,
    SparseTopKTrainingTranscoderConfig,
    SwitchTrainingSAE,
    init_from,
)
from sae_lens_switch.saes.init_from import saved_for

tightly = {"rtol": 1e-9, "atol": 1e-10}
exactly = {"rtol": 0, "atol": 0}
TOPK_K, SHAPE = 5, {"d_in": D, "d_sae": F, "dtype": "float64"}
both_ways = pytest.mark.parametrize("applies", [True, False], ids=["b_dec subtracted", "not"])


def source(name: str, **options):
    return ALL[name](d_sae=F, **options)


def topk_config(**options):
    return SparseTopKTrainingSAEConfig(**SHAPE, k=TOPK_K, **options)


@pytest.mark.parametrize("name", ["topk", "topk, rescaling", "abstopk"])
@pytest.mark.parametrize("rescale", [True, False], ids=["rescaling", "as they are"])
@pytest.mark.parametrize("source_applies", [True, False], ids=["from b_dec subtracted", "from not"])
@both_ways
def test_topk_computes_what_the_source_does(name, rescale, source_applies, applies):
    sae = source(name, apply_b_dec_to_input=source_applies)
    if name != "topk, rescaling" and rescale:
        sae.W_dec.data = torch.nn.functional.normalize(sae.W_dec.data, dim=1) * 0.3  # else it is refused
    config = SparseAbsTopKTrainingSAEConfig if name == "abstopk" else SparseTopKTrainingSAEConfig
    options = {"rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": applies}
    made = init_from(config(**SHAPE, k=TOPK_K, **options), sae)
    x = random_input(60, D)
    torch.testing.assert_close(made(x), sae(x), **tightly)
    a, b = made.encode(x), sae.encode(x)
    assert torch.equal(a != 0, b != 0)
    assert {p.data_ptr() for p in made.parameters()}.isdisjoint({p.data_ptr() for p in sae.parameters()})
    made.train()
    loss = made(x).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in made.parameters())


@pytest.mark.parametrize("name", ["standard", "jumprelu"])
@both_ways
def test_with_all_latents_selected_it_is_the_threshold_sae_without_a_threshold(name, applies):
    sae = source(name)
    if name == "jumprelu":
        sae.threshold.data.zero_()
    made = init_from(SparseTopKTrainingSAEConfig(**SHAPE, k=F, apply_b_dec_to_input=applies), sae)
    x = random_input(30, D)
    torch.testing.assert_close(made(x), sae(x), **tightly)


def test_batchtopk_takes_over_the_threshold(tmp_path):
    trained = randomize(BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**SHAPE, k=4.5)))
    trained.topk_threshold.fill_(0.7)
    cfg = SparseBatchTopKTrainingSAEConfig(**SHAPE, k=3.5)
    x = random_input(60, D)
    made = init_from(cfg, trained)
    assert (made.topk_threshold.item(), made.cfg.k) == (0.7, 3.5)
    made.cfg.k = 4.5
    torch.testing.assert_close(made(x), trained(x), **tightly)
    trained.save_inference_model(tmp_path)
    from_saved = init_from(cfg, tmp_path)  # as jumprelu, norms folded
    assert from_saved.topk_threshold.item() == pytest.approx(0.7)
    torch.testing.assert_close(from_saved.encode(x), init_from(cfg, trained).encode(x), **tightly)
    levels = SparseMatryoshkaBatchTopKTrainingSAEConfig(**SHAPE, k=3.5, matryoshka_widths=[5, F])
    torch.testing.assert_close(init_from(levels, tmp_path).encode(x), from_saved.encode(x), **tightly)


@torch.no_grad()
def test_a_threshold_is_scaled_by_the_norms_that_the_new_sae_selects_with(tmp_path):
    trained = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**SHAPE, k=4.5, rescale_acts_by_decoder_norm=False))
    randomize(trained).W_dec.copy_(torch.nn.functional.normalize(trained.W_dec, dim=1) * 0.3)
    trained.topk_threshold.fill_(0.7)
    made = init_from(SparseBatchTopKTrainingSAEConfig(**SHAPE, k=4.5), trained)
    assert made.cfg.rescale_acts_by_decoder_norm
    assert made.topk_threshold.item() == pytest.approx(0.7 * 0.3)
    x, after = random_input(60, D), []
    for name, sae in (("made", made), ("trained", trained)):
        sae.save_inference_model(tmp_path / name)
        after.append(SAE.load_from_disk(tmp_path / name))
    assert torch.equal(after[0].encode(x) > 0, after[1].encode(x) > 0)
    torch.testing.assert_close(after[0](x), after[1](x), **tightly)


@pytest.mark.parametrize("kind", ["inference", "training"])
def test_switch_computes_what_the_source_does_and_its_biases_stay(kind, tmp_path):
    fields = {"normalize_decoder": False, "dtype": "float64"}
    sae = switch_sae() if kind == "inference" else randomize(SwitchTrainingSAE(training_config(**fields)))
    sae.save_model(tmp_path)
    x = random_input(60, D)
    for given in (sae, tmp_path, str(tmp_path)):
        made = init_from(training_config(**fields), given)
        assert type(made) is SwitchTrainingSAE
        assert not made.is_fresh
        torch.testing.assert_close(made(x), sae(x), **exactly)
        assert made.W_enc.stride() == (1, D)


def test_a_tied_router_starts_from_one_that_subtracts_b_dec_alone(tmp_path):
    fields = {"normalize_decoder": False, "tie_router_bias": True}
    sae, x = switch_sae(), random_input(60, D)
    with pytest.raises(ValueError, match="tie_router_bias must be False for an SAE whose b_router differs"):
        init_from(training_config(**fields), sae)
    sae.b_router.data.copy_(sae.b_dec.data)
    torch.testing.assert_close(init_from(training_config(**fields), sae)(x), sae(x), **exactly)
    half = randomize(SwitchTrainingSAE(training_config(**fields | {"dtype": "bfloat16"})))
    half.after_own_step()
    half.fold_activation_norm_scaling_factor(1.7)  # which rounds b_dec
    half.save_inference_model(tmp_path)
    assert not torch.equal(half.b_router, half.b_dec.float())
    assert torch.equal(init_from(training_config(**fields | {"dtype": "bfloat16"}), tmp_path).b_dec, half.b_dec)


@pytest.mark.parametrize("tie", [True, False])
def test_what_a_tied_router_subtracts_is_what_its_successor_does(tie):
    fields = {"normalize_decoder": False, "dtype": "float64"}
    sae = randomize(SwitchTrainingSAE(training_config(**fields, tie_router_bias=True)))
    assert not torch.equal(sae.b_router, sae.b_dec)
    x = random_input(60, D)
    made = init_from(training_config(**fields, tie_router_bias=tie), sae)
    torch.testing.assert_close(made(x), sae(x), **exactly)


def test_it_has_the_dtype_of_its_config():
    made = init_from(SparseTopKTrainingSAEConfig(d_in=D, d_sae=F, k=2, dtype="bfloat16"), source("standard"))
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("cfg", "sae", "message"),
    [
        (SparseTopKTrainingSAEConfig(d_in=D + 1, d_sae=F, k=2), "topk", f"d_in must be {D}, as .*; got {D + 1}"),
        (
            SparseTopKTrainingSAEConfig(d_in=D, d_sae=F - 1, k=2),
            "topk",
            f"d_sae must be {F}, as .*; got {F - 1}",
        ),
        (topk_config(normalize_activations="layer_norm"), "topk", "normalize_activations must be 'none', as the SAE's"),
        (topk_config(), "topk", "rescale_acts_by_decoder_norm must be False for an SAE that selects without"),
        (topk_config(), "gated", "sparse_topk must start from a topk, .* or standard SAE; got a GatedSAE"),
        (topk_config(), "abstopk", "must start from a topk.*; got a AbsTopKSAE"),
        (SparseAbsTopKTrainingSAEConfig(**SHAPE, k=TOPK_K), "topk", "must start from a abstopk SAE; got a TopKSAE"),
        (SparseTopKTrainingTranscoderConfig(**SHAPE, k=TOPK_K), "topk", "cfg must not be a transcoder"),
        (topk_config(), "transcoder", "source must not be a transcoder; got transcoder"),
        (training_config(), "topk", "a switch SAE must start from another, or by split_topk; got a TopKSAE"),
        (
            StandardTrainingSAEConfig(d_in=D, d_sae=F),
            "topk",
            "cfg must be of sparse_topk.*; got 'standard'",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_named(cfg, sae, message):
    with pytest.raises(ValueError, match=message):
        init_from(cfg, source(sae))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_experts": 2 * E}, f"experts must be .*n_experts={E}.*; got .*n_experts={2 * E}"),
        ({"gate": "one"}, "gate must be 'probability', as the SAE's"),
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input must be True"),
        ({"normalize_decoder": True}, "normalize_decoder must be False for an SAE whose decoder rows are not"),
    ],
)
def test_a_switch_sae_of_another_kind_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        init_from(training_config(**{"normalize_decoder": False, "k": min(K, 2), **fields}), switch_sae())


def test_folders_without_an_sae_are_refused(tmp_path):
    with pytest.raises(ValueError, match="source must be a folder with an SAE; .*FileNotFoundError"):
        init_from(topk_config(), tmp_path / "none")
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "topk"}))
    with pytest.raises(ValueError, match="source must be a folder with an SAE"):
        init_from(topk_config(), tmp_path)


def test_a_run_goes_on_with_its_own_settings_and_with_the_configs_after_inference(tmp_path):
    cfg = topk_config(rescale_acts_by_decoder_norm=False)
    own = init_from(SparseTopKTrainingSAEConfig(**SHAPE, k=2, rescale_acts_by_decoder_norm=False), source("topk"))
    own.save_model(tmp_path / "training")
    source("topk").save_model(tmp_path / "inference")
    trained = TopKTrainingSAE(TopKTrainingSAEConfig(**SHAPE, k=2, rescale_acts_by_decoder_norm=False))
    trained.save_model(tmp_path / "saelens")
    found = {name: saved_for(cfg, tmp_path / name) for name in ("training", "inference", "saelens")}
    assert {name: sae.cfg.k for name, sae in found.items()} == {"training": 2, "inference": TOPK_K, "saelens": TOPK_K}
    assert {type(sae) for sae in found.values()} == {type(own)}
    with pytest.raises(ValueError, match=f"d_sae must be {F}, as the SAE's"):
        saved_for(SparseTopKTrainingSAEConfig(d_in=D, d_sae=F + 1, k=2), tmp_path / "training")
