"""What the configs of all transcoders have beside those of the SAEs they are like, and what no transcoder can have."""

from dataclasses import dataclass

from sae_lens.saes.sae import SAEConfig
from sae_lens.saes.transcoder import TranscoderConfig
from typing_extensions import override


@dataclass(kw_only=True)
class TranscoderFields(SAEConfig):
    """
    Fields of a transcoder, which reads activations at one hook and reconstructs those at another.

    Args:
        d_out (int | None): Width of the activations that are reconstructed. None: d_in.
        skip_connection (bool): Add W_skip x, a dense linear map of the input, to the reconstruction. It starts at 0.
        apply_b_dec_to_input (bool): Always False: b_dec belongs to the output.
    """

    d_out: int | None = None
    skip_connection: bool = False
    apply_b_dec_to_input: bool = False

    @override
    def __post_init__(self) -> None:
        self.d_out = self.output_width
        super().__post_init__()

    @property
    def output_width(self) -> int:
        return self.d_in if self.d_out is None else self.d_out

    def check_transcoder(self) -> None:
        """What a transcoder's fields must be, beside the rules of each. Raises ValueError."""
        wanted = {"apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none"}
        for name, value in wanted.items():
            if vars(self)[name] != value:
                raise ValueError(f"{name} must be {value!r} for a transcoder; got {vars(self)[name]!r}")


@dataclass(kw_only=True)
class TrainingTranscoderFields(TranscoderFields):
    """
    Fields of a transcoder in training.

    Args:
        hook_name_out (str | None): The hook whose activations are reconstructed from those at hook_name. None:
            training is on given tensors.
    """

    hook_name_out: str | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hook_name_out is not None:
            self.metadata.hook_name_out = self.hook_name_out


def output_width(cfg: SAEConfig) -> int:
    """Of the activations that an SAE reconstructs."""
    return cfg.output_width if isinstance(cfg, TranscoderFields) else cfg.d_in


def refuse_transcoders(what: str, *saes: SAEConfig) -> None:
    """Raises ValueError if one is a transcoder, of this package or of SAELens."""
    for sae in saes:
        if isinstance(sae, TranscoderFields | TranscoderConfig):
            raise ValueError(f"{what} must not be a transcoder; got {sae.architecture()}")
