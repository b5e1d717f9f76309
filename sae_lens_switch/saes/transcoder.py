"""What transcoders have in common: they read activations at one hook of a model and reconstruct those at another."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_switch.saes.sparse_sae import SparseSAE, SparseTrainingSAE
from sae_lens_switch.saes.step import activation_rows
from sae_lens_switch.saes.transcoder_fields import TranscoderFields


class Transcoder(SparseSAE):
    """y_hat = encode(x) @ W_dec + b_dec, and W_skip x with a skip connection; W_dec is [F, d_out].

    As in SAELens's skip transcoders, W_skip is [d_out, d_in] and takes part in ``forward``, not in ``decode``.
    """

    W_skip: nn.Parameter | None

    @override
    def initialize_weights(self) -> None:
        """Encoder rows as in an SAE; decoder rows of the same norm, in directions of their own."""
        super().initialize_weights()
        cfg = self.cfg
        assert isinstance(cfg, TranscoderFields)
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        del self.W_dec  # its memory, before there is another
        W_dec_FD = nn.init.kaiming_uniform_(torch.empty(cfg.d_sae, cfg.output_width, **options))
        norm = vars(cfg).get("decoder_init_norm")  # in training
        if norm is not None:
            W_dec_FD.mul_(norm / W_dec_FD.norm(dim=1, keepdim=True))
        self.W_dec = nn.Parameter(W_dec_FD)
        self.b_dec = nn.Parameter(torch.zeros(cfg.output_width, **options))
        skip = nn.Parameter(torch.zeros(cfg.output_width, cfg.d_in, **options)) if cfg.skip_connection else None
        self.register_parameter("W_skip", skip)

    @property
    @override
    def pre_bias(self) -> Tensor | None:
        return None

    @override
    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        x = self.normalized_input(sae_in)
        return x if self.pre_bias is None else x - self.pre_bias

    @override
    def forward(self, x: Tensor) -> Tensor:
        """y_hat [..., d_out] of x [..., d_in].

        Raises:
            ValueError: With ``use_error_term``: the error is that of activations which only the model has.
        """
        if self.use_error_term:
            raise ValueError(
                "use_error_term must be False for a transcoder, which is not given what it reconstructs; got True. "
                "HookedSAETransformer.add_sae(transcoder, use_error_term=True) knows it"
            )
        return self.hook_sae_output(self.with_skip(self.decode(self.encode(x)), x))

    def with_skip(self, out: Tensor, x: Tensor) -> Tensor:
        """``out`` and what the skip connection, if there is one, adds for inputs x."""
        return out if self.W_skip is None else out + x.to(self.dtype) @ self.W_skip.T

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> NoReturn:  # noqa: ARG002
        raise NotImplementedError("a transcoder's input and output have no common scale that could be folded")

    @override
    def fold_activation_whitening(
        self,
        mean: Tensor,  # noqa: ARG002
        whitening_matrix: Tensor,  # noqa: ARG002
        unwhitening_matrix: Tensor,  # noqa: ARG002
    ) -> NoReturn:
        raise NotImplementedError("a transcoder's input and output have no common mean that could be folded")


class TrainingTranscoder(Transcoder, SparseTrainingSAE):
    """A transcoder in training, on rows of d_in + d_out numbers: each token's input, and then its target.

    Losses, AuxK and statistics are of the target, which is also the ``sae_in`` of a step's output.
    """

    @property
    @override
    def batch_width(self) -> int:
        return self.cfg.d_in + self.cfg.output_width

    @override
    def _inputs_and_targets(self, given: Tensor) -> tuple[Tensor, Tensor]:
        rows = activation_rows(given, self.batch_width, "d_in + d_out")
        return rows[:, : self.cfg.d_in].contiguous(), rows[:, self.cfg.d_in :].contiguous()

    @override
    def _plus_skip(self, out_BD: Tensor, x_BD: Tensor) -> Tensor:
        return self.with_skip(out_BD, x_BD)
