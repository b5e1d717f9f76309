"""What activations an upgrade is made on."""

import datasets
import pytest
import torch
from helpers import HOOK, D, E, F, K
from helpers.trainers import topk

from sae_lens_switch import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
from sae_lens_switch.upgrade import split
from sae_lens_switch.upgrade.sources import sampled_inputs


@pytest.mark.parametrize(("n", "used"), [(3, 36), (40, 480), (400, 4096)])
def test_a_folder_is_read_at_most_once(n, used, tmp_path):
    """Contexts of 12 tokens: fewer than a batch, and more, of which the part that fills batches is read."""
    contexts = torch.randn(n, 12, D, generator=torch.Generator().manual_seed(0))
    features = datasets.Features({HOOK: datasets.Array2D((12, D), "float32")})
    datasets.Dataset.from_dict({HOOK: contexts.numpy()}, features=features).save_to_disk(tmp_path)
    sae = topk(SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig)
    sae.cfg.metadata.hook_name = HOOK
    x_ND = sampled_inputs(sae, tmp_path, 100_000, seed=0)
    assert len(x_ND) == len(x_ND.unique(dim=0)) == used
    made = split(sae, E, tmp_path)
    assert made.report.n_tokens == used
    assert (made.sae.cfg.n_experts, made.sae.cfg.d_sae, made.sae.cfg.k) == (E, F, K)
