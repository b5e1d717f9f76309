"""SAEs that can be pickled and copied, which SAELens's own cannot."""

from typing import Any

from sae_lens.saes.sae import SAE

from sae_lens_switch.common.types import StateDict

# SAELens keeps these as closures over the SAE, which cannot be pickled, and which a copy would share.
_CLOSURES = ("reshape_fn_in", "reshape_fn_out", "run_time_activation_norm_fn_in", "run_time_activation_norm_fn_out")


class PicklableSAE(SAE[Any]):
    """An SAE without SAELens's closures in its state; they are made anew for each copy."""

    def __getstate__(self) -> StateDict:
        return {name: value for name, value in self.__dict__.items() if name not in _CLOSURES}

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        if self.hook_z_reshaping_mode:
            self.turn_on_forward_pass_hook_z_reshaping()
        else:
            self.turn_off_forward_pass_hook_z_reshaping()
        self._setup_activation_normalization()
