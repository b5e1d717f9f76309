"""Runner configs of small runs, SAELens's own and ours."""

from dataclasses import fields

import pytest
import sae_lens
import torch
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from torch import Tensor

from helpers import HOOK, D, E, F, K, run_fields, training_config
from sae_lens_switch import LanguageModelSAERunnerConfig, SwitchTrainingSAEConfig

exactly = {"rtol": 0, "atol": 0}
SAE_FIELDS = {"d_in": D, "d_sae": F, "n_experts": E, "k": K}
OURS = {"switch", "sparse_topk", "sparse_abstopk", "sparse_batchtopk", "sparse_matryoshka_batchtopk"}
OURS |= {"switch_transcoder", "sparse_topk_transcoder", "sparse_batchtopk_transcoder"}
STOCK_ARCHITECTURES = sorted(SAE_TRAINING_CLASS_REGISTRY.keys() - OURS)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps(the_trainer, batches: list[Tensor]):
    """What SAELens's ``fit`` does with each batch."""
    for batch in batches:
        yield the_trainer.step(batch)
        the_trainer.n_training_steps += 1


def stock_config(path, **options):
    """SAELens's runner config, with our SAE config inside."""
    own = {name: options.pop(name) for name in list(options) if name in {f.name for f in fields(training_config())}}
    sae = SwitchTrainingSAEConfig(**{**SAE_FIELDS, **own})
    return sae_lens.LanguageModelSAERunnerConfig(sae=sae, **run_fields(path, **options))


def our_config(path, architecture="switch", **options):
    return LanguageModelSAERunnerConfig(architecture=architecture, **{**SAE_FIELDS, **run_fields(path, **options)})


both_configs = pytest.mark.parametrize("make_config", [stock_config, our_config], ids=["stock config", "our config"])


def stored_activations(model, dataset, hook_name: str = HOOK, rows: int = 8) -> Tensor:
    _, cache = model.run_with_cache(torch.tensor(dataset[:rows]["tokens"]))
    return cache[hook_name]
