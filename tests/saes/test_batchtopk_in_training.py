"""``sparse_batchtopk`` and ``sparse_matryoshka_batchtopk`` in trainers, in files, and in SAELens's registry."""

import copy
import json
import pickle
from itertools import product

import pytest
import sae_lens
import torch
from helpers import HOOK, D, activations, random_input, run_fields, trainer
from helpers.saelens_pairs import (
    KINDS,
    F,
    K,
    assert_same_step,
    both,
    options_of,
    pair,
    step_input,
)
from helpers.trainers import assert_only_finite_steps_move_thresholds, our_trainer, run
from helpers.without_us import loaded_without_us
from sae_lens import SAE, LanguageModelSAETrainingRunner
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import SAEMetadata, TrainingSAE

from sae_lens_switch import LanguageModelSAERunnerConfig, SparseCodes, override


@both
@pytest.mark.parametrize("options", [{}, {"optimizer": "row_sparse_adam"}], ids=["adam", "row_sparse_adam"])
def test_our_trainer_takes_saelens_steps(kind, options):
    # Row-sparse Adam leaves latents that do not fire as they are: its later steps are others.
    batches = [batch.double() for batch in activations(1 if options else 12)]
    ours, stock = pair(kind, aux_loss_coefficient=0.0)
    lr = {"lr": 1e-3, "lr_end": 1e-3}
    theirs = trainer(stock, batches, **lr)
    mine = our_trainer(ours, batches, **lr, **options)
    for batch in batches:
        theirs.step(batch)
        mine.step(batch)
        for t in (theirs, mine):
            t.n_training_steps += 1
    assert torch.equal(mine.act_freq_scores, theirs.act_freq_scores)
    torch.testing.assert_close(ours.topk_threshold, stock.topk_threshold, rtol=1e-4, atol=1e-6)
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@both
def test_parts_of_a_batch_are_batches_of_their_own(kind):
    batches = [batch.double() for batch in activations(3)]
    ours, _ = pair(kind)
    t = our_trainer(ours, batches, gradient_accumulation_steps=4)
    (output,) = run(t, batches[:1])
    assert output.codes.batch_shape == (64,)
    assert output.codes.offsets[-1] == 4 * int(K * 16)
    assert torch.equal(output.codes.offsets[::16], torch.arange(5) * int(K * 16))
    assert output.feature_acts.shape == (64, F)


@both
def test_a_skipped_step_leaves_the_threshold_as_it_was(kind):
    ours, _ = pair(kind)
    assert_only_finite_steps_move_thresholds(ours, [batch.double() for batch in activations(4)])


@both
@pytest.mark.parametrize("options", [{}, {"optimizer": "row_sparse_adam"}], ids=["adam", "row_sparse_adam"])
def test_a_resumed_run_is_bit_identical(kind, options, tmp_path):
    batches = activations(10)

    def start(steps_before: int):
        torch.manual_seed(0)
        sae = kind.ours(kind.our_config(**options_of(kind, dtype="float32")))
        t = our_trainer(sae, batches, checkpoint_path=str(tmp_path), dead_feature_window=3, **options)
        run(t, batches[:steps_before])
        return t

    whole = start(10)
    start(5).save_checkpoint("half")
    resumed = start(0)
    resumed.resume(tmp_path / "half")
    run(resumed, batches[5:])
    assert whole.sae.topk_threshold > 0
    for name, value in whole.sae.state_dict().items():
        assert torch.equal(value, resumed.sae.state_dict()[name]), name
    assert torch.equal(whole.act_freq_scores, resumed.act_freq_scores)


def test_it_is_saved_as_saelens_saves_it_and_loads_without_us(tmp_path):
    x, folders = random_input(11, D), []
    for kind, rescale in product(KINDS, (True, False)):
        ours, stock = pair(kind, rescale_acts_by_decoder_norm=rescale, metadata=SAEMetadata(hook_name=HOOK))
        for sae in (ours, stock):
            for seed in range(40):
                sae.training_forward_pass(step_input(random_input(64, D, seed=seed)))
        folders.append(tmp_path / f"{kind.name}, {rescale}")
        ours.save_inference_model(folders[-1])
        stock.save_inference_model(folders[-1] / "stock")
        cfg = json.loads((folders[-1] / "cfg.json").read_text())
        assert cfg["architecture"] == "jumprelu"
        assert cfg["metadata"]["training_architecture"] == f"sparse_{kind.name}"
    for folder, found in zip(folders, loaded_without_us(folders, x), strict=True):
        theirs = SAE.load_from_disk(folder / "stock")
        assert found["class"] == "JumpReLUSAE"
        assert (found["acts"] > 0).any()
        torch.testing.assert_close(found["out"], theirs(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found["acts"], theirs.encode(x), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning")
@both
def test_a_run_by_name_gives_what_the_stock_architecture_gives(kind, tmp_path, model, dataset):
    options = options_of(kind, dtype="float32")
    fields = {"dead_feature_window": 2, "lr": 1e-3}
    ours = LanguageModelSAERunnerConfig(architecture=kind.name, **options, **run_fields(tmp_path / "ours", **fields))
    assert type(ours.sae) is kind.our_config
    stock = sae_lens.LanguageModelSAERunnerConfig(
        sae=kind.stock_config(**options_of(kind, dtype="float32")), **run_fields(tmp_path / "stock", **fields)
    )
    found = []
    for cfg in (ours, stock):
        torch.manual_seed(0)
        LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model).run()
        found.append(SAE.load_from_disk(cfg.output_path))
    assert all(type(sae) is JumpReLUSAE for sae in found)
    for a, b in zip(*(sae.parameters() for sae in found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@both
def test_override_swaps_the_class_inside_stock_saelens_and_gives_it_back(kind):
    stock = SAE_TRAINING_CLASS_REGISTRY[kind.name]
    cfg = kind.stock_config(**options_of(kind, dtype="float32"))
    with override(kind.name):
        sae = TrainingSAE.from_dict(cfg.to_dict())
        assert type(sae) is kind.ours
        assert type(sae.cfg) is kind.stock_config
        assert SAE_TRAINING_CLASS_REGISTRY["topk"][0].__module__.startswith("sae_lens.")
        sae.training_forward_pass(step_input(random_input(6, D, dtype=torch.float32))).loss.backward()
        with override():
            assert SAE_TRAINING_CLASS_REGISTRY["topk"][0].__module__.startswith("sae_lens_switch.")
        assert type(TrainingSAE.from_dict(cfg.to_dict())) is kind.ours
    assert SAE_TRAINING_CLASS_REGISTRY[kind.name] == stock
    assert type(TrainingSAE.from_dict(cfg.to_dict())) is kind.stock
    names = "topk, abstopk, batchtopk, matryoshka_batchtopk"
    with pytest.raises(ValueError, match=f"architectures must be among {names}; got 'x'"):
        override("topk", "x")
    assert SAE_TRAINING_CLASS_REGISTRY["topk"][0].__module__.startswith("sae_lens.")


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": F + 1}, f"k must be at most d_sae={F}; got k={F + 1}"),
        ({"k": 0}, "k must be a positive finite number; got 0"),
        ({"k": float("nan")}, "k must be a positive finite number; got nan"),
        ({"topk_threshold_lr": 1.5}, "topk_threshold_lr must be a finite number, at least 0 and at most 1; got 1.5"),
        ({"encoder_precision": "int3"}, "encoder_precision must be"),
    ],
)
def test_configs_that_cannot_be_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind.our_config(**options_of(kind, **options))


@pytest.mark.parametrize("widths", [[], [5, 5, F], [7, 3, F], [5, F + 1], [0, F], [2.5, F]])
def test_widths_that_cannot_be_are_refused(widths):
    with pytest.raises(ValueError, match="matryoshka_widths must be"):
        KINDS[1].our_config(**options_of(KINDS[1], matryoshka_widths=widths))


def test_a_last_width_below_that_of_the_dictionary_is_completed_as_by_saelens():
    with pytest.warns(UserWarning, match="final matryoshka level"):
        ours, stock = pair(KINDS[1], matryoshka_widths=[5, 19])
    assert ours.cfg.matryoshka_widths == [5, 19, F]
    assert_same_step(ours, stock, random_input(30, D))


def test_widths_may_be_a_tuple_which_saelens_could_not_complete():
    kind, widths = KINDS[1], (5, 19)
    with pytest.warns(UserWarning, match="final matryoshka level"):
        sae = kind.ours(kind.our_config(**options_of(kind, matryoshka_widths=widths)))
    assert sae.cfg.matryoshka_widths == [5, 19, F]
    cfg = kind.our_config(**options_of(kind))
    cfg.matryoshka_widths = widths
    with pytest.warns(UserWarning, match="final matryoshka level"):
        assert kind.ours(cfg).cfg.matryoshka_widths == [5, 19, F]
    stock = kind.stock_config(**options_of(kind, matryoshka_widths=widths)).to_dict()
    with override(kind.name), pytest.warns(UserWarning, match="final matryoshka level"):
        assert TrainingSAE.from_dict(stock).cfg.matryoshka_widths == [5, 19, F]


@both
@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_a_pickled_or_copied_sae_is_the_same(kind, normalize):
    sae, _ = pair(kind, normalize_activations=normalize)
    sae.training_forward_pass(step_input(random_input(9, D)))
    x = random_input(9, D)
    for twin in (pickle.loads(pickle.dumps(sae)), copy.deepcopy(sae)):
        assert torch.equal(twin.topk_threshold, sae.topk_threshold)
        assert torch.equal(twin.decode(twin.encode_sparse(x)), sae.decode(sae.encode_sparse(x)))
        twin.training_forward_pass(step_input(x))
        assert not torch.equal(twin.topk_threshold, sae.topk_threshold)


def test_codes_of_variable_number_in_every_form():
    values, indices = random_input(7), torch.tensor([4, 1, 3, 0, 2, 4, 1])
    offsets, lead = torch.tensor([0, 2, 2, 5, 5, 6, 7]), (2, 3)
    codes = SparseCodes(values, indices, 5, offsets).view(*lead)
    dense = torch.zeros(6, 5, dtype=torch.float64)
    dense[[0, 0, 2, 2, 2, 4, 5], indices] = values
    assert torch.equal(codes.to_dense(), dense.view(2, 3, 5))
    assert torch.equal(codes.to_coo().to_dense(), dense.view(2, 3, 5))
    assert codes.to_coo().is_coalesced()
    W = random_input(5, 8)
    torch.testing.assert_close(codes.matmul(W), dense.view(2, 3, 5) @ W)
    assert codes.batch_shape == lead
    assert codes.view(6).batch_shape == (6,)
    token, latent, value = codes.active()
    assert torch.equal(dense[token, latent], value)
    assert len(token) == (values != 0).sum()
    twice = SparseCodes.cat([codes.view(6), codes.view(6)])
    assert torch.equal(twice.to_dense(), torch.cat([dense, dense]))
    v = values.clone().requires_grad_()
    SparseCodes(v, indices, 5, offsets).view(6).to_dense().square().sum().backward()
    torch.testing.assert_close(v.grad, 2 * values)
