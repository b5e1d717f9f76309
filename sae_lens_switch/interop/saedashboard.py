"""Switch SAEs in SAEDashboard, and in what it writes for Neuronpedia.

SAEDashboard asks for older libraries than SAELens's newest, but runs beside them too:

    pip install dataclasses-json eindex-callum matplotlib
    pip install --no-deps sae-dashboard

Pictures of latents:

    data = SaeVisRunner(SaeVisConfig(hook_point=hook_name, features=[3, 14])).run(as_dashboard_sae(sae), model, tokens)
    save_feature_centric_vis(data, "latents.html")

SAEDashboard's command that writes Neuronpedia's files, for an SAE of any architecture in a folder or on the Hub:

    python -m sae_lens_switch.dashboard --from-local-sae --sae-path my-sae --sae-set res-switch \\
        --np-set-name res-switch --dataset-path monology/pile-uncopyrighted --output-dir neuronpedia
"""

from typing import Any

from sae_lens import SAE
from sae_lens.saes.topk_sae import TopK
from typing_extensions import override

from sae_lens_switch.common.substitution import constructing
from sae_lens_switch.saes.config import SwitchSAEConfig
from sae_lens_switch.saes.switch_sae import SwitchSAE
from sae_lens_switch.saes.switch_training_sae import SwitchTrainingSAE


class _DashboardSAE(SwitchSAE):
    @override
    def get_activation_fn(self) -> TopK:
        # By this SAEDashboard knows that latents compete. Other SAEs it cuts down to the latents it looks at, which
        # would leave a router nothing to choose from, and refuses architectures that it does not know.
        return TopK(self.cfg.k)

    @override
    def fold_W_dec_norm(self) -> None:
        """Nothing. SAEDashboard folds what it is given, but activations are to stay those of ``encode``."""


def as_dashboard_sae(sae: SAE[Any]) -> SAE[Any]:
    """``sae`` as SAEDashboard (0.8) takes it: the same weights in memory, the same latents, a config of its own.

    A Switch SAE, in training or not, becomes one that SAEDashboard encodes whole. What SAEDashboard then changes, the
    config and the reshaping of hook_z, stays as it was in ``sae``. Any other SAE is returned as it is.
    """
    if not isinstance(sae, SwitchSAE | SwitchTrainingSAE):
        return sae
    cfg: Any = sae.cfg
    fields = cfg.get_inference_sae_cfg_dict() if isinstance(sae, SwitchTrainingSAE) else cfg.to_dict()
    shown = _DashboardSAE(SwitchSAEConfig.from_dict({**fields, "device": "meta"}))
    shown.load_state_dict(sae.state_dict(), assign=True)
    return shown.to(device=sae.device)


def main() -> None:
    """``sae_dashboard.neuronpedia.neuronpedia_runner``, with its own flags, for Switch SAEs too."""
    try:
        from sae_dashboard.neuronpedia import neuronpedia_runner as module  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}. SAEDashboard must be installed:\n\n{__doc__}") from error

    class Runner(module.NeuronpediaRunner):
        @override
        def _load_sae_or_transcoder(self) -> None:
            super()._load_sae_or_transcoder()
            self.sae = as_dashboard_sae(self.sae)

    with constructing(module, "NeuronpediaRunner", Runner):
        module.main()
