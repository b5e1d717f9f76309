"""What a step does beside its kernels, on torch's meta device in place of a GPU."""

import pytest
import torch
from helpers import D, F, K, training_sae
from helpers.pretended_gpu import on_device
from sae_lens.saes.sae import TrainStepOutput
from sae_lens_switch_kernels import Reconstruction

from sae_lens_switch.saes.sparse_codes import SparseCodes
from sae_lens_switch.saes.step import DeadLatents, SparseStepOutput
from sae_lens_switch.training.firing import FiringCounter, firings_of
from sae_lens_switch.training.optim.row_sparse_adam import RowSparseAdam

B = 40


def test_the_weight_of_aux_k_is_made_on_the_device(copies):
    sae = training_sae(device="meta", aux_k=2, aux_loss_coefficient=0.5, dtype="float32")
    codes = on_device(B, K), on_device(B, K, dtype=torch.int64)
    result, dead = Reconstruction(on_device(B, D), *codes, on_device(B, D)), DeadLatents(None, 2)
    assert sae._aux_loss(on_device(B, D), on_device(B, D), result, dead, 5).device.type == "meta"
    assert copies == []


@pytest.mark.parametrize("is_captured", [True, False])
def test_firing_is_counted_on_the_device(copies, is_captured):
    counter = FiringCounter(F, "meta")
    counter.begin_pass(is_captured)
    x = on_device(B, D)
    fields = dict.fromkeys(TrainStepOutput.__annotations__) | {"sae_in": x}
    fields.pop("feature_acts")
    output = SparseStepOutput(codes=SparseCodes(on_device(B, K), on_device(B, K, dtype=torch.int64), F), **fields)
    counter.count([firings_of(output)], on_device(dtype=torch.bool))
    assert copies == []


def test_row_sparse_adam_steps_a_parameter_that_is_no_matrix(copies):
    sae = training_sae(device="meta", dtype="float32")
    optimizer = RowSparseAdam(sae, lr=0.1)
    sae.b_dec.grad = on_device(D)
    optimizer.step()
    assert copies == []
    assert optimizer.state[sae.b_dec]["moments"].device.type == "meta"
