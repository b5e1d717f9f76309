"""SAELens's evaluation of a transcoder: against what it reconstructs, and with that replaced in the language model."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.llm_sae_training_runner import LLMSaeEvaluator
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.types import DataProvider
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint


class TranscoderEvaluator(LLMSaeEvaluator[TrainingSAE[Any]]):
    """SAELens's evaluator of a run, for its transcoder."""

    def __call__(
        self, sae: TrainingSAE[Any], data_provider: DataProvider, activation_scaler: ActivationScaler
    ) -> dict[str, Any]:
        with as_sae_of_its_output(sae, self.model) as stand_in:
            return super().__call__(stand_in, data_provider, activation_scaler)


def run_transcoder_evals(
    transcoder: SAE[Any],
    activation_store: ActivationsStore,
    model: HookedRootModule,
    eval_config: EvalConfig | None = None,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """SAELens's ``run_evals`` of a transcoder, ours or SAELens's, with the skip connection if it has one.

    What SAELens says of an SAE's input is said of the target, the activations at ``hook_name_out``: explained variance,
    mse and norms are against it; ``ce_loss_with_sae`` and KL divergence are with it replaced by the transcoder's
    output, and ``ce_loss_with_ablation`` by zeros.

    Args:
        transcoder: Its metadata names the two hooks.
        activation_store: Where tokens come from, such as ``ActivationsStore.from_sae(model, transcoder, dataset)``.
        model: The language model.
        eval_config: What to compute.
        **options: Of ``run_evals``.

    Returns:
        The metrics, and those of single latents.

    Raises:
        ValueError: If the metadata does not name both hooks, or for ``compute_featurewise_weight_based_metrics``, which
            compare each latent's encoder with its decoder.
    """
    if eval_config is not None and eval_config.compute_featurewise_weight_based_metrics:
        raise ValueError("compute_featurewise_weight_based_metrics must be False for a transcoder; got True")
    with as_sae_of_its_output(transcoder, model) as stand_in:
        return run_evals(stand_in, activation_store, model, ActivationScaler(), eval_config or EvalConfig(), **options)


@contextmanager
def as_sae_of_its_output(transcoder: SAE[Any], model: HookedRootModule) -> Iterator[Any]:
    """What SAELens's evaluation asks of an SAE, as that of the hook whose activations a transcoder reconstructs."""
    metadata = transcoder.cfg.metadata
    for name in ("hook_name", "hook_name_out"):
        if metadata[name] is None:
            raise ValueError(f"metadata.{name} must name a hook of the model; got None")
    stand_in = _AtOutput(transcoder)
    with model.hooks(fwd_hooks=[(metadata.hook_name, stand_in.capture)]):
        yield stand_in


class _AtOutput:
    """Encodes what the last forward pass had at the input hook, in place of what is at the output hook."""

    hook_z_reshaping_mode = False

    def __init__(self, transcoder: SAE[Any]) -> None:
        self.transcoder, self.device = transcoder, transcoder.device
        metadata = SimpleNamespace(hook_name=transcoder.cfg.metadata.hook_name_out, hook_head_index=None)
        self.cfg = SimpleNamespace(metadata=metadata, d_sae=transcoder.cfg.d_sae)
        self._inputs: Tensor | None = None

    def capture(self, x: Tensor, hook: HookPoint) -> None:  # noqa: ARG002, as TransformerLens calls it
        self._inputs = x.flatten(2)

    @torch.no_grad()
    def encode(self, target: Tensor) -> Tensor:  # noqa: ARG002
        assert self._inputs is not None
        return self.transcoder.encode(self._inputs.to(self.device))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:  # noqa: ARG002, with the skip connection, which needs the input
        assert self._inputs is not None
        return self.transcoder(self._inputs.to(self.device))

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Of no concern: heads are joined as they are captured."""
