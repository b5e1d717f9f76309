"""What may come in: batches of any shape, none at all, tensors that autograd knows, weights of any dtype."""

import pytest
import torch
from helpers import D, F, K, activations, random_input, randomize, switch_sae, training_sae
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from safetensors.torch import load_file, load_model
from torch import Tensor

from sae_lens_switch import (
    SparseCodes,
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchSAE,
    SwitchSAEConfig,
)
from sae_lens_switch.saes.serialization import digits, from_digits

ARCHITECTURES = ["switch", "sparse_topk"]


def make_sae(architecture: str, dtype: str = "float64", **fields):
    if architecture == "switch":
        return randomize(training_sae(dtype=dtype, normalize_decoder=False, **fields))
    fields = {"d_in": D, "d_sae": F, "k": K, "dtype": dtype, "rescale_acts_by_decoder_norm": False, **fields}
    return randomize(SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**fields)))


def step_input(x: Tensor, dead_mask: Tensor | None = None) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x,
        dead_neuron_mask=dead_mask,
        coefficients={"load_balance": 0.3},
        n_training_steps=0,
        is_logging_step=False,
    )


# Batches of any shape


@pytest.mark.parametrize("with_hook", [False, True])
@pytest.mark.parametrize("options", [{}, {"aux_loss_coefficient": 0.5}, {"load_balance_scale": "d_in"}], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_of_sequences_gives_the_step_of_its_rows(architecture, options, with_hook):
    if architecture == "sparse_topk":
        options = {n: v for n, v in options.items() if n != "load_balance_scale"}
    x = random_input(5, 7, D)
    dead = torch.arange(F) % 3 == 0
    steps = []
    for batch in (x, x.view(35, D)):
        sae = make_sae(architecture, **options)
        if with_hook:
            sae.hook_sae_acts_post.add_hook(lambda acts, hook: acts)  # noqa: ARG005, SAELens passes `hook` by name
        output = sae.training_forward_pass(step_input(batch, dead))
        output.loss.backward()
        steps.append((sae, output))
    (sae, output), (flat_sae, flat) = steps
    assert torch.allclose(output.loss, flat.loss, rtol=1e-12)
    assert output.losses.keys() == flat.losses.keys()
    for name, loss in flat.losses.items():
        assert torch.allclose(output.losses[name], loss, rtol=1e-12), name
    for (name, p), q in zip(sae.named_parameters(), flat_sae.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-10, atol=1e-12), name
    assert output.sae_in.shape == output.sae_out.shape == x.shape
    assert torch.allclose(output.sae_out.flatten(0, 1), flat.sae_out)
    assert output.hidden_pre.shape[:-1] == (5, 7)
    assert output.feature_acts.shape == (5, 7, F)
    dense, flat_dense = (t.to_dense() if t.is_sparse else t for t in (output.feature_acts, flat.feature_acts))
    assert torch.equal(dense.reshape(35, F), flat_dense)
    if architecture == "switch":
        assert torch.allclose(output.metrics["load_balance"], flat.metrics["load_balance"])
        assert torch.equal(output.metrics["expert_load_max"](), flat.metrics["expert_load_max"]())


def test_it_is_what_saelens_gives_for_sequences():
    x = random_input(5, 7, D)
    ours = make_sae("sparse_topk")
    theirs = {field: value for field, value in vars(ours.cfg).items() if field != "encoder_precision"}
    stock = TopKTrainingSAE(TopKTrainingSAEConfig(**theirs))
    with torch.no_grad():
        for p, q in zip(stock.parameters(), ours.parameters(), strict=True):
            p.copy_(q)
    assert torch.allclose(
        ours.training_forward_pass(step_input(x)).loss, stock.training_forward_pass(step_input(x)).loss, rtol=1e-12
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_start_sees_rows(architecture):
    x = torch.stack(activations(3)).double()
    saes = [training_sae(), training_sae()] if architecture == "switch" else [make_sae(architecture) for _ in range(2)]
    for sae, batch in zip(saes, (x, x.flatten(0, 1)), strict=True):
        sae.training_forward_pass(step_input(batch))
    for p, q in zip(saes[0].parameters(), saes[1].parameters(), strict=True):
        assert torch.equal(p, q)


# None at all


@pytest.mark.parametrize("shape", [(0, D), (0, 4, D), (3, 0, D)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_empty_batch_is_refused_by_its_shape(architecture, shape):
    sae = make_sae(architecture, dtype="float32")
    with pytest.raises(ValueError, match="activations must hold at least one token; got shape"):
        sae.training_forward_pass(step_input(torch.zeros(shape)))
    the_trainer = SparseSAETrainer(SparseSAETrainerConfig(640, 64), sae, iter([torch.zeros(shape)]))
    with pytest.raises(ValueError, match="activations must hold at least one token; got shape"):
        the_trainer.fit()


@pytest.mark.parametrize("lead", [(0,), (0, 4), (3, 0)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_tokens_are_encoded_and_decoded_to_none(architecture, lead):
    sae = make_sae(architecture)
    codes = sae.encode_sparse(torch.zeros(*lead, D, dtype=torch.float64))
    assert codes.values.shape == (*lead, K)
    assert sae.decode(codes).shape == (*lead, D)
    assert sae.decode(codes.to_dense()).shape == (*lead, D)
    empty = SparseCodes(torch.zeros(*lead, K).double(), torch.zeros(*lead, K, dtype=torch.int64), F)
    assert sae.decode(empty).shape == (*lead, D)


# Tensors that autograd knows


@pytest.mark.parametrize("make", [lambda: make_sae("switch"), lambda: make_sae("sparse_topk"), switch_sae])
def test_tensors_made_under_inference_mode(make):
    sae = make()
    with torch.inference_mode():
        x = random_input(9, D)
        codes = sae.encode_sparse(x)
        acts = sae.encode(x)
    plain = x.clone()
    for result, expected in (
        (sae.encode(x), sae.encode(plain)),
        (sae.encode_sparse(x).values, sae.encode_sparse(plain).values),
        (sae(x), sae(plain)),
        (sae.decode(acts), sae.decode(acts.clone())),
        (sae.decode(codes), sae.decode(acts.clone())),
    ):
        assert torch.allclose(result, expected)
        result.sum().backward()
    if hasattr(sae, "training_forward_pass"):
        sae.training_forward_pass(step_input(x)).loss.backward()


@pytest.mark.parametrize("kind", ["tensor", "batches"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activations_that_require_a_gradient_get_none(architecture, kind):
    leaf = torch.cat(activations(6)).requires_grad_()
    derived = leaf * 2  # a graph that a second backward pass would find freed
    source = derived if kind == "tensor" else iter(derived.split(64))
    sae = make_sae(architecture, dtype="float32")
    the_trainer = SparseSAETrainer(SparseSAETrainerConfig(5 * 64, 64), sae, source)
    the_trainer.fit()
    assert the_trainer.n_training_steps == 5
    assert leaf.grad is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_trainer_takes_batches_made_under_inference_mode(architecture):
    with torch.inference_mode():
        batches = activations(3)
    sae = make_sae(architecture, dtype="float32")
    the_trainer = SparseSAETrainer(SparseSAETrainerConfig(3 * 64, 64), sae, iter(batches))
    the_trainer.fit()
    assert the_trainer.n_training_steps == 3


# The router's precision, and torch's own loading


def numbers(n: int = 4000) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    t = torch.randn(n, generator=generator) * torch.exp(25 * torch.randn(n, generator=generator))
    return torch.cat([t, torch.tensor([0.0, 1.0, 1e-45, -1e-45, 1.2e-38, 3.4e38, -3.4e38])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_digits_are_the_numbers_in_any_dtype(dtype):
    t = numbers()
    assert torch.equal(from_digits(digits(t).to(dtype)), t)
    assert from_digits(digits(torch.tensor([torch.nan, torch.inf, -torch.inf])).to(dtype)).isfinite().sum() == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("load", [SAE.load_from_disk, TrainingSAE.load_from_disk], ids=["inference", "training"])
def test_loaded_in_half_precision_every_token_goes_where_it_went(load, dtype, scale, tmp_path):
    sae = make_sae("switch", dtype="float32")
    with torch.no_grad():
        sae.W_router.mul_(scale)
        sae.b_router.mul_(scale)
    sae.save_model(tmp_path)
    loaded = load(tmp_path, dtype=dtype)
    assert torch.equal(loaded.W_router, sae.W_router)
    assert torch.equal(loaded.b_router, sae.b_router)


@pytest.mark.parametrize("kind", ["training", "inference"])
def test_a_file_of_weights_passes_torch_s_strict_loading(kind, tmp_path):
    sae = make_sae("switch", dtype="float32")
    sae.save_model(tmp_path) if kind == "training" else sae.save_inference_model(tmp_path)
    into = (
        training_sae(seed=3, dtype="float32", normalize_decoder=False)
        if kind == "training"
        else SwitchSAE(SwitchSAEConfig(d_in=D, d_sae=F, n_experts=4, k=K))
    )
    file = tmp_path / "sae_weights.safetensors"
    into.load_state_dict(load_file(file), strict=True)
    for p, q in zip(into.parameters(), sae.parameters(), strict=True):
        assert torch.equal(p, q)
    missing, unexpected = load_model(into, file, strict=True)
    assert not missing
    assert not unexpected
    holder = torch.nn.ModuleDict({"sae": into})
    holder.load_state_dict({f"sae.{name}": t for name, t in load_file(file).items()}, strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key.*W_other"):
        into.load_state_dict({**load_file(file), "W_other": torch.zeros(1)}, strict=True)
    into.load_state_dict(load_file(file), strict=True, assign=True)
    assert into.W_enc.T.is_contiguous(), "a latent's weights stay contiguous"


def test_files_with_the_parts_of_version_0_1_load_as_ever():
    sae = make_sae("switch", dtype="float32")
    state = {name: t.detach().clone() for name, t in sae.state_dict().items()}
    for name in ("W_router", "b_router"):
        parts, rest = [], state[name]
        for _ in range(3):
            parts.append(rest.bfloat16().float())
            rest = rest - parts[-1]
        state[f"{name}_parts"] = torch.stack(parts)
    halved = {name: t.bfloat16() for name, t in state.items()}
    into = make_sae("switch", dtype="bfloat16")
    into.process_state_dict_for_loading(halved)
    into.load_state_dict(halved, strict=True)
    assert torch.equal(into.W_router, sae.W_router)
    assert torch.equal(into.b_router, sae.b_router)
