"""Language models of both kinds that SAELens hooks, and SAEs at their hooks."""

import functools
from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import (
    CONTEXT,
    HOOK,
    HOOK_Z,
    D,
    F,
    K,
    randomize,
    switch_sae,
    training_sae,
)
from helpers.local_model import MODEL_NAME
from sae_lens_switch import (
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
)

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
