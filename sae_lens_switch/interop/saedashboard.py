"""Switch SAEs in SAEDashboard, and in the files that it writes for Neuronpedia.

SAEDashboard requires older libraries than the newest SAELens, but works with the newer ones too:

    pip install dataclasses-json eindex-callum matplotlib
    pip install --no-deps sae-dashboard

Dashboards of latents:

    data = SaeVisRunner(SaeVisConfig(hook_point=hook_name, features=[3, 14])).run(as_dashboard_sae(sae), model, tokens)
    save_feature_centric_vis(data, "latents.html")

SAEDashboard's command that writes Neuronpedia's files, extended to SAEs of any architecture, in a folder or on the Hub:

    python -m sae_lens_switch.dashboard --from-local-sae --sae-path my-sae --sae-set res-switch \\
        --np-set-name res-switch --dataset-path monology/pile-uncopyrighted --output-dir neuronpedia
"""

from sae_lens import SAE
from sae_lens.saes.topk_sae import TopK
from typing_extensions import override

from sae_lens_switch.common.substitution import constructing
from sae_lens_switch.saes.config import SwitchSAEConfig
from sae_lens_switch.saes.serialization import thresholds_after_training
from sae_lens_switch.saes.switch_sae import SwitchSAE
from sae_lens_switch.saes.switch_training_sae import SwitchTrainingSAE


class _DashboardSAE(SwitchSAE):
    @override
    def get_activation_fn(self) -> TopK:
        # From a TopK activation SAEDashboard concludes that latents compete. It slices other SAEs to the latents on
        # display, which would leave a router nothing to choose from, and refuses architectures that it does not know.
        return TopK(self.cfg.k)

    @override
    def fold_W_dec_norm(self) -> None:
        """Do nothing: SAEDashboard folds every SAE it gets, but activations should stay those of ``encode``."""


def as_dashboard_sae(sae: SAE) -> SAE:
    """Convert an SAE to a form that SAEDashboard (0.8) accepts, sharing its weights in memory.

    A Switch SAE, for training or inference, becomes one that SAEDashboard does not slice. It has a config of its own,
    so that what SAEDashboard changes, the config and the reshaping of hook_z, leaves ``sae`` alone. Any other SAE is
    returned as is.
    """
    if not isinstance(sae, SwitchSAE | SwitchTrainingSAE):
        return sae
    fields = sae.cfg.get_inference_sae_cfg_dict() if isinstance(sae, SwitchTrainingSAE) else sae.cfg.to_dict()
    shown = _DashboardSAE(SwitchSAEConfig.from_dict({**fields, "device": "meta"}))
    shown.load_state_dict(thresholds_after_training(sae.state_dict()), assign=True)
    return shown.to(device=sae.device)


def main() -> None:
    """Run ``sae_dashboard.neuronpedia.neuronpedia_runner``, with its own flags, for Switch SAEs too."""
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
