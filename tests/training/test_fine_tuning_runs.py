"""Runs that start from a saved SAE, in training or not."""

import pytest
from helpers import D, F, randomize, run_fields, small_run_warnings
from helpers.runs import same_tensors
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from sae_lens_switch import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    init_from,
)

pytestmark = small_run_warnings
STANDING_STILL = {"lr": 1e-30, "lr_end": 0.0, "lr_decay_steps": 0}


@pytest.mark.parametrize("given", ["folder", "object"])
def test_a_run_starts_from_an_inference_sae_with_the_settings_of_its_config(given, tmp_path, model, dataset):
    saved = randomize(TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=2, rescale_acts_by_decoder_norm=True)))
    saved.save_model(tmp_path / "saved")
    fields = {"sae": SparseTopKTrainingSAEConfig(d_in=D, d_sae=F, k=3), **STANDING_STILL}
    path = str(tmp_path / "saved") if given == "folder" else None
    cfg = LanguageModelSAERunnerConfig(**run_fields(tmp_path, from_pretrained_path=path, **fields))
    start = None if given == "folder" else init_from(cfg.sae, saved)
    sae = LanguageModelSAETrainingRunner(cfg, dataset, model, start).run()
    assert (type(sae), sae.cfg.k) == (SparseTopKTrainingSAE, 3)
    assert same_tensors(sae.state_dict(), saved.state_dict())


def test_a_run_with_another_shape_is_refused_before_it_begins(tmp_path, model, dataset):
    randomize(TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=2))).save_model(tmp_path / "saved")
    wider = SparseTopKTrainingSAEConfig(d_in=D, d_sae=F + 1, k=3)
    cfg = LanguageModelSAERunnerConfig(**run_fields(tmp_path, sae=wider, from_pretrained_path=str(tmp_path / "saved")))
    with pytest.raises(ValueError, match=f"d_sae must be {F}, as the SAE's that training starts from; got {F + 1}"):
        LanguageModelSAETrainingRunner(cfg, dataset, model)
