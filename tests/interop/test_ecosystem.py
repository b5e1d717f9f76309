"""Our SAEs in what researchers use SAEs with: hooked models of both kinds, evaluations, sweeps, SAEBench."""

import copy
import dataclasses
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    CONTEXT,
    HOOK,
    HOOK_SHAPES,
    HOOK_Z,
    ROOT,
    D,
    E,
    F,
    K,
    M,
    activations,
    randomize,
    run_fields,
    switch_sae,
    tiny_tokenizer,
    training_config,
    training_sae,
)
from helpers.local_model import MODEL_NAME, write_model_and_text
from sae_lens import SAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE
from sae_lens.training import multi_sae_trainer
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import LlamaConfig, LlamaForCausalLM

from sae_lens_switch import (
    MultiSAETrainingRunner,
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    TrainerOptions,
)
from sae_lens_switch.common.substitution import constructing
from sae_lens_switch.training.runners import _MultiSAETrainer, with_options

sys.path.insert(0, str(ROOT / "examples"))
pytestmark = [
    pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]
MLP_OUT = "blocks.1.hook_mlp_out"
HOOKS = [HOOK, MLP_OUT, HOOK_Z]
KINDS = ["switch", "switch in training", "topk"]
FIRST, LAST = 4, F - 2  # latents of the first and of the last expert
closely = {"rtol": 1e-4, "atol": 1e-4}


def sae_at(hook_name: str, kind: str, path: Path, seed: int = 0) -> SAE:
    """``topk`` is what a sparse_topk SAE becomes when it is saved for inference."""
    metadata = SAEMetadata(hook_name=hook_name, context_size=CONTEXT, prepend_bos=True, model_name=MODEL_NAME)
    options = {"metadata": metadata, "dtype": "float32"}
    if hook_name == HOOK_Z:
        options["reshape_activations"] = "hook_z"
    if kind == "topk":
        sae = randomize(SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, **options)), seed)
        sae.save_inference_model(path / hook_name)
        loaded = SAE.load_from_disk(path / hook_name)
        assert type(loaded) is TopKSAE
        return loaded
    if kind == "switch":
        return switch_sae(seed, **options)
    sae = randomize(training_sae(**options), seed)
    if hook_name == HOOK_Z:  # SAELens turns it off in training, for its store gives flat activations
        sae.turn_on_forward_pass_hook_z_reshaping()
    return sae


@functools.cache
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    cfg = LlamaConfig(
        vocab_size=32,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(cfg).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def bridge():
    return SAETransformerBridge.boot_transformers(
        "meta-llama/Llama-2-7b-hf", hf_model=copy.deepcopy(llama()), tokenizer=tiny_tokenizer()
    )


@pytest.fixture(params=["HookedSAETransformer", "SAETransformerBridge"])
def hooked(request, model):
    return model if request.param == "HookedSAETransformer" else request.getfixturevalue("bridge")


@pytest.fixture
def tokens(dataset) -> Tensor:
    return torch.tensor(dataset[:3]["tokens"])


def inside(hooked, sae: SAE, internal: str) -> str:
    """The name that a hook of the attached SAE has in the model."""
    if isinstance(hooked, SAETransformerBridge):
        return hooked.get_sae_hook_name(sae, internal)
    return f"{sae.cfg.metadata.hook_name}.{internal}"


def with_activations(hooked, hook_name: str, tokens: Tensor, change) -> Tensor:
    """The model's logits with the activations at a hook replaced by a function of them, without any SAE attached."""
    if not isinstance(hooked, SAETransformerBridge):
        with torch.no_grad():
            return hooked.run_with_hooks(tokens, fwd_hooks=[(hook_name, lambda x, hook: change(x))])  # noqa: ARG005
    # The bridge is not asked: its own hook fires no more where SAELens has had any SAE.
    layers = llama().model.layers
    if hook_name == MLP_OUT:
        handle = layers[1].mlp.register_forward_hook(lambda _module, _args, out: change(out))
    else:
        module = {HOOK: layers[1], HOOK_Z: layers[0].self_attn.o_proj}[hook_name]
        handle = module.register_forward_pre_hook(lambda _module, args: (change(args[0]), *args[1:]))
    try:
        with torch.no_grad():
            return llama()(tokens).logits
    finally:
        handle.remove()


# --- Hooked models


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hook_name", HOOKS)
def test_an_attached_sae_stands_for_the_activations_and_shows_its_hooks(hook_name, kind, hooked, tokens, tmp_path):
    sae = sae_at(hook_name, kind, tmp_path)
    reshaping = sae.hook_z_reshaping_mode
    with torch.no_grad():
        plain = hooked(tokens)
        _, cache = hooked.run_with_cache_with_saes(tokens, saes=[sae])
        replaced = hooked.run_with_saes(tokens, saes=[sae])
        with_error = hooked.run_with_saes(tokens, saes=[sae], use_error_term=True)
    assert sae.hook_z_reshaping_mode == reshaping
    torch.testing.assert_close(with_error, plain, **closely)
    torch.testing.assert_close(hooked(tokens), plain, rtol=0, atol=0)

    sae.turn_off_forward_pass_hook_z_reshaping()
    expected = with_activations(hooked, hook_name, tokens, lambda x: sae(x.reshape(3, CONTEXT, D)).view(x.shape))
    torch.testing.assert_close(replaced, expected, **closely)
    assert not torch.allclose(replaced, plain, **closely)

    x_BD = cache[inside(hooked, sae, "hook_sae_input")].reshape(3, CONTEXT, D)
    latents = cache[inside(hooked, sae, "hook_sae_acts_post")]
    assert latents.shape == (3, CONTEXT, F)
    torch.testing.assert_close(latents, sae.encode(x_BD), **closely)
    assert 0 < (latents != 0).sum(-1).max() <= K
    recons = cache[inside(hooked, sae, "hook_sae_recons")]
    torch.testing.assert_close(recons.reshape(3, CONTEXT, D), sae(x_BD), **closely)
    if kind != "topk":
        for name, width in HOOK_SHAPES.items():
            assert cache[inside(hooked, sae, name)].reshape(3, CONTEXT, -1).shape[-1] == width
        probs = cache[inside(hooked, sae, "hook_sae_router_probs")]
        torch.testing.assert_close(
            probs, ((x_BD - sae.b_router) @ sae.W_router).softmax(-1), check_dtype=False, **closely
        )
        used = (latents != 0).view(3, CONTEXT, E, M).any(-1)
        assert (used.sum(-1) <= 1).all()
        assert used[probs.argmax(-1, keepdim=True) == torch.arange(E)].any()
        assert not used[probs.argmax(-1, keepdim=True) != torch.arange(E)].any()


@pytest.mark.parametrize("hook_name", HOOKS)
def test_steering_with_latents_of_two_experts_at_once_adds_their_decoder_rows(hook_name, hooked, tokens, tmp_path):
    sae = sae_at(hook_name, "switch", tmp_path)

    def steer(latents, hook):  # noqa: ARG001
        latents[..., FIRST] += 2.0
        latents[:, -3:, LAST] -= 1.5
        return latents

    with torch.no_grad(), hooked.saes(saes=[sae], use_error_term=True):
        steered = hooked.run_with_hooks(tokens, fwd_hooks=[(inside(hooked, sae, "hook_sae_acts_post"), steer)])
    pushed = torch.zeros(3, CONTEXT, D) + 2.0 * sae.W_dec[FIRST].detach()
    pushed[:, -3:] -= 1.5 * sae.W_dec[LAST].detach()
    expected = with_activations(hooked, hook_name, tokens, lambda x: x + pushed.view(x.shape))
    torch.testing.assert_close(steered, expected, **closely)
    assert not torch.allclose(steered, hooked(tokens), atol=1e-2)


@pytest.mark.parametrize("what", ["latent", "expert"])
@pytest.mark.parametrize("hook_name", HOOKS)
def test_ablation_takes_away_what_the_latents_wrote_and_nothing_else(hook_name, what, hooked, tokens, tmp_path):
    sae = sae_at(hook_name, "switch", tmp_path)
    with torch.no_grad():
        _, cache = hooked.run_with_cache_with_saes(tokens, saes=[sae])
    latents = cache[inside(hooked, sae, "hook_sae_acts_post")]
    busiest = int((latents != 0).sum((0, 1)).argmax())
    gone = slice(busiest, busiest + 1) if what == "latent" else slice(busiest // M * M, busiest // M * M + M)

    def ablate(latents, hook):  # noqa: ARG001
        latents[..., gone] = 0
        return latents

    with torch.no_grad(), hooked.saes(saes=[sae], use_error_term=True):
        ablated = hooked.run_with_hooks(tokens, fwd_hooks=[(inside(hooked, sae, "hook_sae_acts_post"), ablate)])
    written = (latents[..., gone] @ sae.W_dec[gone]).detach()
    expected = with_activations(hooked, hook_name, tokens, lambda x: x - written.view(x.shape))
    torch.testing.assert_close(ablated, expected, **closely)
    assert not torch.allclose(ablated, hooked(tokens), atol=1e-3)


def test_latents_patched_in_from_another_prompt_may_be_of_another_expert(hooked, tokens, tmp_path):
    sae = sae_at(HOOK, "switch", tmp_path)
    with torch.no_grad():
        _, cache = hooked.run_with_cache_with_saes(tokens, saes=[sae])
        patched = hooked.run_with_hooks_with_saes(
            tokens,
            saes=[sae],
            fwd_hooks=[(inside(hooked, sae, "hook_sae_acts_post"), lambda f, hook: (f + f.flip(0)) / 2)],  # noqa: ARG005
        )
    latents = cache[inside(hooked, sae, "hook_sae_acts_post")]
    used = ((latents + latents.flip(0)) != 0).view(3, CONTEXT, E, M).any(-1).sum(-1)
    assert used.max() == 2
    x_hat = (sae.decode(latents) + sae.decode(latents.flip(0))).detach() / 2
    torch.testing.assert_close(patched, with_activations(hooked, HOOK, tokens, lambda _: x_hat), **closely)


def test_saes_of_several_kinds_at_several_hooks_and_gradients_through_them(hooked, tokens, tmp_path):
    saes = [
        sae_at(HOOK_Z, "topk", tmp_path),
        sae_at(HOOK, "switch", tmp_path, seed=1),
        sae_at(MLP_OUT, "switch in training", tmp_path, seed=2),
    ]
    seen = {}

    def keep(name):
        def hook_fn(value, hook):  # noqa: ARG001
            value.retain_grad()
            seen[name] = value

        return hook_fn

    hooks = [
        (inside(hooked, sae, internal), keep((i, internal)))
        for i, sae in enumerate(saes)
        for internal in ("hook_sae_acts_post", "hook_sae_recons")
    ]
    hooked.run_with_hooks_with_saes(tokens, saes=saes, fwd_hooks=hooks).square().mean().backward()
    for i, sae in enumerate(saes):
        latents, recons = seen[i, "hook_sae_acts_post"], seen[i, "hook_sae_recons"]
        assert recons.grad.any()
        torch.testing.assert_close(latents.grad, recons.grad.reshape(3, CONTEXT, D) @ sae.W_dec.T, rtol=1e-4, atol=1e-7)
        assert all(p.grad is not None and p.grad.any() for p in sae.parameters()), sae.get_name()


# --- SAELens's evaluations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hook_name", HOOKS)
def test_run_evals_gives_what_is_written_out_here(hook_name, kind, model, dataset, tmp_path):
    sae = sae_at(hook_name, kind, tmp_path)
    sae.turn_off_forward_pass_hook_z_reshaping()
    store = ActivationsStore.from_sae(
        model, sae, dataset, streaming=False, store_batch_size_prompts=4, n_batches_in_buffer=4, total_tokens=1024
    )
    drawn, draw = [], store.get_batch_tokens

    def drawing(*args, **kwargs):
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    store.get_batch_tokens = drawing
    metrics, featurewise = run_evals(sae, store, model, ActivationScaler(), get_eval_everything_config(4, 1, 2))
    reconstructed, measured = drawn[0], torch.cat(drawn[1:])
    assert measured.shape == (8, CONTEXT)

    def kept(tokens: Tensor) -> Tensor:
        """SAELens leaves special tokens out: here the first of every context."""
        return tokens != 0

    with torch.no_grad():
        x_ND = model.run_with_cache(measured)[1][hook_name].reshape(*measured.shape, D)[kept(measured)]
        latents_NF = sae.encode(x_ND)
        x_hat_ND = sae(x_ND)
        error = (x_ND - x_hat_ND).square().sum()
        explained = 1 - error / (x_ND - x_ND.mean(0)).square().sum()

        def loss(change):
            logits = with_activations(model, hook_name, reconstructed, change)
            logprobs = logits[:, :-1].log_softmax(-1).gather(-1, reconstructed[:, 1:, None])[..., 0]
            return -logprobs[kept(reconstructed)[:, :-1]].mean().item()

        def through_sae(x):
            keep = kept(reconstructed).view(4, CONTEXT, *[1] * (x.ndim - 2))
            return torch.where(keep, sae(x.reshape(4, CONTEXT, D)).view(x.shape), x)

        plain, zero, with_sae = loss(lambda x: x), loss(torch.zeros_like), loss(through_sae)
    approx = {"rel": 1e-3, "abs": 1e-5}
    quality, performance = metrics["reconstruction_quality"], metrics["model_performance_preservation"]
    assert quality["mse"] == pytest.approx(error.item() / len(x_ND), **approx)
    assert quality["explained_variance"] == pytest.approx(explained.item(), **approx)
    assert quality["cossim"] == pytest.approx(torch.cosine_similarity(x_ND, x_hat_ND).mean().item(), **approx)
    assert metrics["sparsity"]["l0"] == pytest.approx((latents_NF != 0).sum(-1).float().mean().item())
    assert metrics["sparsity"]["l1"] == pytest.approx(latents_NF.sum(-1).mean().item(), **approx)
    assert featurewise["feature_density"] == pytest.approx((latents_NF != 0).float().mean(0).tolist())
    assert performance["ce_loss_without_sae"] == pytest.approx(plain, **approx)
    assert performance["ce_loss_with_ablation"] == pytest.approx(zero, **approx)
    assert performance["ce_loss_with_sae"] == pytest.approx(with_sae, **approx)
    fewest = K if kind == "topk" else K / 2  # few latents of a small expert are positive for some tokens
    assert fewest <= metrics["sparsity"]["l0"] <= K


# --- Sweeps


def test_a_sweep_over_experts_and_k_on_one_stream_trains_each_as_if_alone(tmp_path, model, dataset):
    grid = {f"E{E}_k{k}": training_config(n_experts=E, k=k, dtype="float32") for E in (1, 2, 5) for k in (2, 4)}
    grid["topk"] = SparseTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K)
    known = {f.name for f in dataclasses.fields(MultiSAETrainingRunnerConfig)}

    def run(*names: str):
        saes = {}
        for name in names:
            torch.manual_seed(0)
            saes[name] = get_sae_training_class(grid[name].architecture())[0](copy.deepcopy(grid[name]))
        torch.manual_seed(1)  # SAELens's store mixes tokens by torch's own generator
        cfg = MultiSAETrainingRunnerConfig(
            saes={name: saes[name].cfg for name in names},
            hook_names=dict.fromkeys(names, HOOK),
            **{n: v for n, v in run_fields(tmp_path / "-".join(names), lr=1e-3).items() if n in known},
        )
        return MultiSAETrainingRunner(cfg, override_dataset=dataset, override_model=model, override_saes=saes).run()

    together = run(*grid)
    assert set(together) == set(grid)
    for name in grid:
        alone = run(name)[name].state_dict()
        for key, weight in together[name].state_dict().items():
            torch.testing.assert_close(weight, alone[key], rtol=0, atol=0, msg=f"{name} {key}")
    weights = {name: sae.state_dict()["W_dec"] for name, sae in together.items()}
    assert not any(torch.equal(weights["topk"], weights[name]) for name in grid if name != "topk")
    loaded = SAE.load_from_disk(tmp_path / "-".join(grid) / "output" / "E5_k4")
    assert (loaded.cfg.n_experts, loaded.cfg.k) == (5, 4)
    loaded = SAE.load_from_disk(tmp_path / "-".join(grid) / "output" / "topk")
    assert type(loaded) is TopKSAE


def test_our_trainers_in_a_sweep_equal_each_alone_bit_for_bit():
    batches = activations(8)
    cfg = SparseSAETrainerConfig(total_training_samples=8 * 64, train_batch_size_samples=64, lr=1e-2)
    options = {"few": {"n_experts": 2, "k": 5}, "many": {"n_experts": 8, "k": 2, "aux_loss_coefficient": 0.1}}
    options = {name: {"dtype": "float32", **fields} for name, fields in options.items()}
    saes = {name: training_sae(**fields) for name, fields in options.items()}
    with constructing(multi_sae_trainer, "SAETrainer", with_options(TrainerOptions())):
        hooks = dict.fromkeys(saes, HOOK)
        _MultiSAETrainer(cfg, saes, hooks, iter([{HOOK: batch} for batch in batches])).fit()
    for name, fields in options.items():
        alone = training_sae(**fields)
        SparseSAETrainer(cfg, alone, iter(batches)).fit()
        for key, weight in alone.state_dict().items():
            torch.testing.assert_close(saes[name].state_dict()[key], weight, rtol=0, atol=0, msg=f"{name} {key}")


# --- SAEBench


@pytest.fixture
def working_directory(tmp_path, monkeypatch):
    """With a model that SAEBench finds by name, and text."""
    write_model_and_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hook_name", [HOOK, HOOK_Z])
def test_saebenchs_core_evaluation_of_a_saved_sae(hook_name, dtype, working_directory, monkeypatch, capsys):
    pytest.importorskip("sae_bench", reason="SAEBench is not installed: see examples/saebench.py")
    import saebench

    sae = sae_at(hook_name, "switch", working_directory)
    sae.save_model("sae")
    drawn, draw = [], ActivationsStore.get_batch_tokens
    monkeypatch.setattr(
        ActivationsStore, "get_batch_tokens", lambda *args, **kwargs: drawn.append(draw(*args, **kwargs)) or drawn[-1]
    )
    arguments = f"sae --dataset text --output out --batches 2 --batch-size 4 --context-size {CONTEXT} --dtype {dtype}"
    metrics = saebench.main(arguments.split())
    (written,) = Path("out").glob("*.json")
    assert str(written) in capsys.readouterr().out
    saved = json.loads(written.read_text())
    assert saved["sae_cfg_dict"]["architecture"] == "switch"
    assert saved["eval_result_metrics"]["sparsity"]["l0"] == pytest.approx(metrics["l0"])
    assert len(saved["eval_result_details"]) == F

    reference = HookedTransformer.from_pretrained_no_processing(MODEL_NAME, dtype=dtype)
    sae = sae.to(dtype=getattr(torch, dtype))
    sae.turn_off_forward_pass_hook_z_reshaping()
    tokens = torch.cat(drawn[-2:])
    x_ND = reference.run_with_cache(tokens)[1][hook_name].reshape(*tokens.shape, D)[tokens > 2]
    with torch.no_grad():
        latents_NF, x_hat_ND = sae.encode(x_ND), sae(x_ND)
    close = {"rel": 1e-4 if dtype == "float32" else 2e-2, "abs": 1e-2}
    assert metrics["l0"] == pytest.approx((latents_NF != 0).sum(-1).float().mean().item(), **close)
    assert metrics["l2_ratio"] == pytest.approx((x_hat_ND.norm(dim=-1) / x_ND.norm(dim=-1)).mean().item(), **close)
    cosines = torch.cosine_similarity(x_ND.float(), x_hat_ND.float())
    assert metrics["cossim"] == pytest.approx(cosines.mean().item(), **close)
    if dtype == "float32":
        density = (latents_NF != 0).float().mean(0) * len(x_ND) / (tokens > 2).sum()
        assert [f["feature_density"] for f in saved["eval_result_details"]] == pytest.approx(density.tolist())


def test_an_sae_that_saebench_cannot_evaluate_ends_in_an_error(working_directory):
    pytest.importorskip("sae_bench", reason="SAEBench is not installed: see examples/saebench.py")
    import saebench

    sae_at(HOOK, "switch", working_directory).save_model("sae")
    with pytest.raises(SystemExit, match="could not evaluate sae"):
        saebench.main(["sae", "--dataset", "text", "--output", "out", "--dtype", "float32", "--context-size", "64"])


def test_what_saebenchs_other_evaluations_do_with_an_sae(model, tokens, tmp_path):
    """Latents by token, their means and densities, from which probing, absorption, SCR and RAVEL start."""
    pytest.importorskip("sae_bench", reason="SAEBench is not installed: see examples/saebench.py")
    from sae_bench.sae_bench_utils import activation_collection

    sae = sae_at(HOOK, "switch", tmp_path)
    where = {"batch_size": 2, "layer": 1, "hook_name": HOOK, "mask_bos_pad_eos_tokens": True}
    x = model.run_with_cache(tokens)[1][HOOK] * (tokens > 2)[..., None]
    expected = sae.encode(x).detach() * (tokens > 2)[..., None]
    latents = activation_collection.collect_sae_activations(tokens, model, sae, selected_latents=[3, LAST], **where)
    torch.testing.assert_close(latents, expected[..., [3, LAST]], **closely)
    means = activation_collection.get_sae_meaned_activations({"a": x}, sae, 2)["a"]
    torch.testing.assert_close(means, expected.sum(1) / (tokens > 2).sum(1)[:, None], **closely)
    density = activation_collection.get_feature_activation_sparsity(tokens, model, sae, **where)
    torch.testing.assert_close(density, (expected != 0).float().sum((0, 1)) / (tokens > 2).sum(), **closely)


def test_saebenchs_ablation_of_latents_of_two_experts(model, tokens, tmp_path):
    pytest.importorskip("sklearn", reason="of SAEBench's own environment: see examples/saebench.py")
    from sae_bench.evals.scr_and_tpp.main import ablated_precomputed_activations

    sae = sae_at(HOOK, "switch", tmp_path)
    x = model.run_with_cache(tokens)[1][HOOK]
    gone = torch.zeros(F, dtype=torch.bool)
    gone[[FIRST, LAST]] = True
    ablated = ablated_precomputed_activations(x, sae, gone, 2)
    expected = (x - (sae.encode(x) * gone) @ sae.W_dec).mean(1)
    torch.testing.assert_close(ablated, expected, **closely)
    assert not torch.allclose(ablated, x.mean(1), **closely)
