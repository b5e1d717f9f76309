"""A transcoder's activations: at two hooks of a language model, from one forward pass."""

from collections.abc import Callable
from typing import Any

import sae_lens
import torch
from sae_lens.load_model import load_model
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor
from transformer_lens import HookedRootModule

from sae_lens_switch.saes.transcoder_fields import TrainingTranscoderFields, TranscoderFields
from sae_lens_switch.training.hooks import check_hook, check_hook_name

RunnerConfig = sae_lens.LanguageModelSAERunnerConfig[Any]


def hook_out_of(cfg: RunnerConfig, has_model: bool = False) -> str | None:
    """The hook whose activations a run's transcoder reconstructs; None: the run trains an SAE.

    Unless the model is there to say, the name is checked as far as it can be.

    Raises:
        ValueError: If a transcoder has none, or for a setting that no transcoder's run can have.
    """
    if not isinstance(cfg.sae, TranscoderFields):
        return None
    name = cfg.sae.hook_name_out if isinstance(cfg.sae, TrainingTranscoderFields) else None
    if name is None:
        raise ValueError(f"hook_name_out must name a hook to train {cfg.sae.architecture()}; got None")
    for field, wanted in {"hook_head_index": None, "use_cached_activations": False}.items():
        if vars(cfg)[field] != wanted:
            raise ValueError(f"{field} must be {wanted} to train {cfg.sae.architecture()}; got {vars(cfg)[field]!r}")
    if cfg.model_class_name == "HookedTransformer" and not has_model:
        check_hook_name(name, "hook_name_out")
    return name


def check_hook_out(model: HookedRootModule, cfg: RunnerConfig) -> None:
    """As ``check_hook``, of the output. Raises ValueError."""
    name = hook_out_of(cfg, has_model=True)
    if name is not None:
        assert isinstance(cfg.sae, TranscoderFields)
        check_hook(model, cfg, name, None, cfg.sae.output_width, ("hook_name_out", "d_out"))


def loading_also(hook_name: str) -> Callable[..., HookedRootModule]:
    """SAELens's ``load_model``, which hooks only what it is asked to; with one hook more."""

    def load(*args: Any, hook_names: list[str], **options: Any) -> HookedRootModule:
        return load_model(*args, hook_names=[*hook_names, hook_name], **options)

    return load


class PairedActivationsStore(ActivationsStore):
    """SAELens's store, whose rows hold the activations of a token at both hooks, input first.

    Whatever mixes, filters or shuffles them moves both together.
    """

    hook_name_out: str

    @classmethod
    def of(cls, store: ActivationsStore, cfg: RunnerConfig, hook_name_out: str) -> "PairedActivationsStore":
        """On the dataset of a run's store that nothing has been drawn from."""
        paired = cls.from_config(store.model, cfg, override_dataset=store.dataset)
        assert isinstance(paired, cls)
        assert isinstance(cfg.sae, TranscoderFields)
        paired.hook_name_out = hook_name_out
        paired.d_in = cfg.sae.d_in + cfg.sae.output_width
        return paired

    @torch.no_grad()
    def get_activations(self, batch_tokens: Tensor) -> Tensor:
        """Rows [batch, context, d_in + d_out], float32 as in SAELens."""
        hooks = [self.hook_name, self.hook_name_out]
        with torch.autocast(batch_tokens.device.type, torch.bfloat16, enabled=self.autocast_lm):
            _, cache = self.model.run_with_cache(
                batch_tokens,
                names_filter=hooks,
                stop_at_layer=_stop_after(hooks),
                prepend_bos=False,
                **self.model_kwargs,
            )
        parts = [cache[hook][:, slice(*self.seqpos_slice)].flatten(2) for hook in hooks]
        return torch.cat([part.to(self.device, torch.float32) for part in parts], dim=-1)


def _stop_after(hooks: list[str]) -> int | None:
    """The layer at which a forward pass may stop; None: none."""
    stops = [extract_stop_at_layer_from_tlens_hook_name(hook) for hook in hooks]
    known = [stop for stop in stops if stop is not None]
    return max(known) if len(known) == len(stops) else None
