"""Activations no one would train on: of any size, constant, empty, not finite, of one row, of every dtype."""

import math

import pytest
import torch

from sae_lens_switch import (
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
    TrainingDivergedError,
)

D, F, E = 6, 24, 3
ODD = (
    *(0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 1e-30, 1e-20, 1e-8, 1e8, 1e15, 1e19, 1e20, 1e30, 3.4e38),
    *(math.nan, math.inf, -math.inf, 65504.0, 65520.0, 1 + 2**-23, math.pi),
)


def odd_batch(rng, dtype: torch.dtype) -> torch.Tensor:
    rows = rng.choice((1, 1, 2, 5, 16))
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    kind = rng.randrange(6)
    x = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    if kind == 0:
        x = x * rng.choice(ODD)
    elif kind == 1:
        x = x[:1].expand(rows, D) * rng.choice(ODD[3:])
    elif kind == 2:
        x = torch.full((rows, D), rng.choice(ODD), dtype=torch.float64)
    elif kind == 3:
        x[rng.randrange(rows), rng.randrange(D)] = rng.choice(ODD)
    elif kind == 4:
        x = x + rng.choice((1e3, 1e6, 1e12))
    return x.to(dtype)


@pytest.mark.filterwarnings("ignore")
def test_training_on_odd_numbers_stays_finite_or_says_why(trials, record_property):
    trained = diverged = 0
    for name, rng in trials(2000):
        dtype = rng.choice(("float32", "float32", "bfloat16", "float64"))
        fields = {"d_in": D, "d_sae": F, "k": rng.choice((1, 2, 8)), "dtype": dtype}
        fields["aux_loss_coefficient"] = rng.choice((0.0, 0.1))
        fields["normalize_activations"] = rng.choice(("none", "none", "none", "layer_norm", "constant_norm_rescale"))
        if fields["normalize_activations"] != "none":
            fields["aux_loss_coefficient"] = 0.0
        torch.manual_seed(rng.randrange(2**32))
        if rng.random() < 0.7:
            fields |= {
                "load_balancing": rng.choice(("loss", "bias")),
                "router_z_loss_coefficient": rng.choice((0, 1e-3)),
            }
            fields |= {"bias_start": rng.choice(("geometric_median", "mean", "zeros"))}
            fields |= {"router_start_std": rng.choice((None, 1.0)), "tie_router_bias": rng.random() < 0.3}
            sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(n_experts=E, **fields))
        else:
            sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**fields))
        batches = [odd_batch(rng, torch.float64 if dtype == "float64" else torch.float32) for _ in range(6)]
        batches += [torch.randn(16, D, dtype=batches[0].dtype) for _ in range(4)]
        cfg = SparseSAETrainerConfig(
            sum(map(len, batches)),
            1,
            lr=rng.choice((1e-4, 1e-2)),
            optimizer=rng.choice(("adam", "row_sparse_adam")),
            gradient_accumulation_steps=rng.choice((1, 1, 3)),
            dead_feature_window=1,
            max_skipped_steps=rng.choice((3, 10)),
        )
        the_trainer = SparseSAETrainer(cfg, sae, iter(batches))
        try:
            the_trainer.fit()
            trained += 1
        except TrainingDivergedError:
            diverged += 1
        # SAELens's run-time normalisation divides by a row's norm, or its standard deviation.
        mild = fields["normalize_activations"] == "none"
        mild = mild and all(torch.isfinite(x).all() and x.abs().max() < 1e6 for x in batches)
        assert not mild or the_trainer.n_skipped_steps == 0, name
        bad = [n for n, p in sae.named_parameters() if not torch.isfinite(p).all()]
        assert not bad, f"{name}: {bad} are not finite"
    record_property("outcomes", f"{trained} trained to the end, {diverged} diverged with finite weights")
    assert trained > diverged
