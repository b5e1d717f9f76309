"""``encoder_precision``: the same training but for a few latents at the border, and nothing of it in what is saved."""

import json

import pytest
import torch
from helpers import D, activations, largest_allocation, random_input
from helpers.trainers import our_trainer, run
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAEConfig

from sae_lens_switch import (
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)

F, K, E = 192, 3, 4


def sae_of(architecture: str, precision: str = "full", **options):
    torch.manual_seed(0)
    options = {"d_in": D, "d_sae": F, "k": K, "encoder_precision": precision, **options}
    if architecture == "switch":
        return SwitchTrainingSAE(SwitchTrainingSAEConfig(**options, n_experts=E))
    return SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**options))


architectures = pytest.mark.parametrize("architecture", ["switch", "sparse_topk"])
precisions = pytest.mark.parametrize("precision", ["bfloat16", "float8"])


@architectures
@precisions
def test_training_reaches_the_error_of_full_precision_and_reports_the_tokens_in_doubt(architecture, precision):
    batches = activations(60)

    def train(precision: str):
        outputs = run(our_trainer(sae_of(architecture, precision), batches), batches)
        losses = [o.losses["mse_loss"].item() for o in outputs]
        return sum(losses[-20:]) / (20 * losses[0]), outputs[-1].metrics

    (full, metrics), (low, low_metrics) = train("full"), train(precision)
    assert full < 0.9
    assert low == pytest.approx(full, rel=0.02)
    assert set(low_metrics) - set(metrics) == {"doubtful_tokens"}
    assert 0 <= low_metrics["doubtful_tokens"]() <= {"bfloat16": 0.5, "float8": 1}[precision]


@architectures
def test_encode_uses_it_as_well(architecture, monkeypatch):
    sae, x = sae_of(architecture, "bfloat16"), random_input(50, D, dtype=torch.float32)
    full = sae.encode(x)
    sae.cfg.encoder_precision = "full"
    assert torch.allclose(full.sum(1), sae.encode(x).sum(1), rtol=0.02)
    seen = []
    monkeypatch.setattr("sae_lens_switch_kernels.operators.select_from_candidates", lambda *a: seen.append(a) or 1 / 0)
    sae.encode(x)
    sae.cfg.encoder_precision = "bfloat16"
    with pytest.raises(ZeroDivisionError):
        sae.encode(x)
    assert len(seen) == 1


@architectures
def test_what_is_saved_for_inference_knows_nothing_of_it(architecture, tmp_path):
    sae = sae_of(architecture, "bfloat16")
    sae.save_inference_model(tmp_path)
    assert "encoder_precision" not in json.loads((tmp_path / "cfg.json").read_text())
    x = random_input(9, D, dtype=torch.float32)
    sae.cfg.encoder_precision = "full"
    torch.testing.assert_close(SAE.load_from_disk(tmp_path)(x), sae(x))


@architectures
def test_a_step_makes_no_tensor_of_batch_times_width(architecture):
    B, width = 3000, 1024
    sae, x = sae_of(architecture, "bfloat16", d_sae=width), random_input(B, D, dtype=torch.float32)
    coefficients = dict.fromkeys(sae.get_coefficients(), 1.0)
    step_input = TrainStepInput(x, coefficients, dead_neuron_mask=None, n_training_steps=3, is_logging_step=False)

    def step() -> None:
        sae.training_forward_pass(step_input).loss.backward()

    assert largest_allocation(step) < 2 * B * width


def test_saelens_own_config_means_full():
    sae = SparseTopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K))
    assert sae.encoder_precision == "full"


@pytest.mark.parametrize("config", [SwitchTrainingSAEConfig, SparseTopKTrainingSAEConfig])
def test_an_unknown_precision_is_refused(config):
    with pytest.raises(ValueError, match="encoder_precision must be one of 'full', 'bfloat16', 'float8'; got 'fp8'"):
        config(d_in=D, d_sae=F, encoder_precision="fp8")
