"""SparseSAE, the base of our SAEs; and SparseTrainingSAE, all that SparseSAETrainer asks of one in training."""

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens_switch_kernels import EncoderPrecision, Reconstruction, RowGrads, to_huge_pages
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_switch.common.atomic import replace_files
from sae_lens_switch.common.machine import check_sae_fits
from sae_lens_switch.common.torch_private import has_hooks
from sae_lens_switch.common.types import Metrics, StateDict
from sae_lens_switch.saes.aux_k import AuxKTrainingSAE
from sae_lens_switch.saes.config import check_sae
from sae_lens_switch.saes.decoder_constraint import DecoderConstraint
from sae_lens_switch.saes.expert_layout import ExpertLayout
from sae_lens_switch.saes.folds import CountedFolds
from sae_lens_switch.saes.losses import Balance, is_plain, losses_of_output, losses_of_product
from sae_lens_switch.saes.pickling import PicklableSAE
from sae_lens_switch.saes.router import Assignment, RoutingStatistics
from sae_lens_switch.saes.serialization import latent_major
from sae_lens_switch.saes.sparse_codes import SparseCodes
from sae_lens_switch.saes.step import (
    DeadLatents,
    LatentParameters,
    SparseStepInput,
    SparseStepOutput,
    activation_rows,
    differentiable,
    differentiable_codes,
)


class SparseSAE(PicklableSAE, CountedFolds, ABC):
    """An SAE whose latents flow as ``SparseCodes``: encoded, decoded and differentiated only where they are non-zero.

    W_enc [D, F] is the transpose of [F, D] storage, so that a latent's weights are contiguous.
    """

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        check_sae(cfg)
        check_sae_fits(cfg)
        super().__init__(cfg, use_error_term)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_enc = nn.Parameter(latent_major(self.W_enc.data))

    # Encoding and decoding

    @abstractmethod
    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """The same latents as ``encode``, without a tensor of width F. Hooks on dense latents do not fire."""

    @override
    def decode(self, feature_acts: Tensor | SparseCodes) -> Tensor:
        """Reconstruction [..., D] of dense latents [..., F], edited or mixed in any way, or of SparseCodes."""
        if not isinstance(feature_acts, SparseCodes):
            return self._decode_dense(differentiable(feature_acts))
        codes, scale_F = differentiable_codes(feature_acts), self._selection_scale()
        if scale_F is not None:
            codes = replace(codes, values=codes.values / scale_F[codes.indices])
        return self._finish_decoding(codes.matmul(self.W_dec) + self.b_dec)

    def _decode_dense(self, feature_acts: Tensor) -> Tensor:
        return self._finish_decoding(feature_acts @ self.W_dec + self.b_dec)

    def _finish_decoding(self, out: Tensor) -> Tensor:
        """What follows ``f @ W_dec + b_dec`` in every SAE of SAELens."""
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(self.hook_sae_recons(out)), self.d_head)

    def normalized_input(self, x: Tensor) -> Tensor:
        """x in the SAE's dtype, hook_z flattened, normalised; before the pre-bias is subtracted.

        To be called once per encode: the hook fires, and run-time normalisation stores its statistics for decode.
        """
        x = self.reshape_fn_in(differentiable(x).to(self.dtype))
        return self.run_time_activation_norm_fn_in(self.hook_sae_input(x))

    @property
    def pre_bias(self) -> Tensor | None:
        """What the encoder subtracts from its input."""
        return self.b_dec if self.cfg.apply_b_dec_to_input else None

    def _selection_scale(self) -> Tensor | None:
        """[F], what latents are multiplied by before they are selected; None: nothing."""
        return None

    @property
    def encoder_precision(self) -> EncoderPrecision:
        """The precision of the product that selects latents."""
        return "full"

    @property
    def has_dense_hooks(self) -> bool:
        """Whether hooks observe the dense latents, which must then be materialised."""
        return has_hooks(self.hook_sae_acts_pre) or has_hooks(self.hook_sae_acts_post)

    # Files

    @override
    def process_state_dict_for_saving(self, state_dict: StateDict) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    def _load_from_state_dict(self, state_dict: StateDict, prefix: str, *args: Any, **kwargs: Any) -> None:
        """As torch's, with W_enc laid out by latents, also where the tensor itself is taken over."""
        if prefix + "W_enc" in state_dict:
            state_dict[prefix + "W_enc"] = latent_major(state_dict[prefix + "W_enc"])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """As SAELens's, with each file replaced atomically."""
        return replace_files(path, super().save_model)


class SparseTrainingSAE(SparseSAE, AuxKTrainingSAE, ABC):
    """A sparse SAE in training: its step, and what SparseSAETrainer asks of an SAE beyond SAELens's ``TrainingSAE``.

    The trainer hands a ``SparseStepInput`` to ``training_forward_pass`` and gets a ``SparseStepOutput`` with the codes.
    Under SAELens's own trainer, or in any loop, the same SAE trains as well.
    """

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        for p in self.parameters():
            p.data = to_huge_pages(p.data)  # whatever trains it goes through all of it at every step

    # What the trainer asks

    @property
    @override
    def expert_layout(self) -> ExpertLayout | None:
        """None without a router."""
        return None

    @property
    def needs_dead_mask(self) -> bool:
        """Whether a step reads ``dead_neuron_mask``, a tensor as long as the dictionary."""
        return self.cfg.aux_loss_coefficient != 0

    @property
    def decoder_constraint(self) -> DecoderConstraint | None:
        """What the optimiser keeps true of the decoder in every step."""
        return None

    @property
    def is_fresh(self) -> bool:
        """Whether the next step initialises parameters from its batch."""
        return False

    @property
    def batch_width(self) -> int:
        """Numbers per token in a batch: those of the activation that is both encoded and reconstructed."""
        return self.cfg.d_in

    @abstractmethod
    def latent_parameters(self) -> LatentParameters:
        """The parameters whose rows a row-sparse optimiser may step one by one."""

    def settle_step(self, is_finite: Tensor) -> None:
        """Called with the step's outcome: what it began is kept, or reverted if loss or gradient were non-finite."""

    def after_own_step(self) -> None:
        """Called at the end of a step of an optimiser that applies the decoder's constraint itself."""

    # The step

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's loss and its parts.

        Args:
            step_input: ``sae_in`` is [..., batch_width]; what depends on the batch as a whole, such as the load
                balance, sees all its rows as one batch.

        Raises:
            ValueError: If the activations are not of width batch_width, or if there are none.
        """
        lead = step_input.sae_in.shape[:-1]
        x_BD, target_BD = self._inputs_and_targets(step_input.sae_in)
        options = step_input if isinstance(step_input, SparseStepInput) else None
        self._before_forward(x_BD, target_BD)
        inputs_BD = self.normalized_input(x_BD)
        acts, codes, result, dead = None, None, None, DeadLatents(None, 0)
        metrics: Metrics = {}
        inner: dict[str, Tensor] = {}
        share = self._batch_share(x_BD)
        if self.has_dense_hooks:
            acts, hidden_pre, assignment = self._encode_dense(inputs_BD)
            sae_out, product = self._plus_skip(self.decode(acts), x_BD), None
        else:
            assignment = self._route_batch(inputs_BD)
            row_grads = None if options is None else options.row_grads
            if options is not None and options.is_captured:
                dead = self._masked_dead(step_input.dead_neuron_mask)
            else:
                dead = self._dead_latents(step_input.dead_neuron_mask)
            result, hidden_pre = self._autoencode(inputs_BD, assignment, dead, row_grads)
            plain = share is None and is_plain(self)
            product, inner = self._decoded(result, target_BD)
            product = self._plus_skip(product, x_BD) if plain else product
            sae_out = None if plain else self._plus_skip(self._finish_decoding(product + self.b_dec), x_BD)
            codes = SparseCodes(hidden_pre, result.indices_BK, self.cfg.d_sae, result.offsets_B1)
            codes = codes.view(*lead)
            if result.doubtful_B is not None:
                doubtful_B = result.doubtful_B
                metrics["doubtful_tokens"] = lambda: doubtful_B.float().mean()

        balance, routing = self._balance(step_input, metrics, assignment)
        if sae_out is None:
            assert product is not None
            sae_out, loss, losses = losses_of_product(product, self.b_dec, target_BD, balance)
        else:
            _, loss, losses = losses_of_output(self, sae_out, target_BD, balance, share)
        if self._reports_aux_loss:
            losses["auxiliary_reconstruction_loss"] = sae_out.new_zeros(())
        if result is not None:
            if dead.indices_N is not None:
                n_dead = self._n_dead(dead.indices_N, step_input.dead_neuron_mask, assignment)
                losses["auxiliary_reconstruction_loss"] = self._aux_loss(target_BD, sae_out, result, dead, n_dead)
                loss = loss + losses["auxiliary_reconstruction_loss"]
            losses |= inner
            loss = sum(inner.values(), start=loss)
        if options is None or options.refuse_non_finite:
            self._check_loss(loss, step_input)

        fields = {
            "sae_in": step_input.sae_in if target_BD is x_BD else target_BD.view(*lead, target_BD.shape[-1]),
            "sae_out": sae_out.view(*lead, sae_out.shape[-1]),
            "hidden_pre": hidden_pre.detach().view(*lead, hidden_pre.shape[-1]) if codes is None else codes.values,
            "loss": loss,
            "losses": losses,
            "metrics": metrics,
        }
        if codes is not None:
            return SparseStepOutput(codes=codes, routing=routing, **fields)
        assert acts is not None
        return TrainStepOutput(feature_acts=acts.detach().view(*lead, self.cfg.d_sae), **fields)

    def _inputs_and_targets(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Of a batch, the rows to encode and the rows to reconstruct. Raises ValueError unless it has some."""
        x_BD = activation_rows(given, self.batch_width)
        return x_BD, x_BD

    def _before_forward(self, x_BD: Tensor, target_BD: Tensor) -> None:
        pass

    def _encode_dense(self, inputs_BD: Tensor) -> tuple[Tensor, Tensor, Assignment | None]:
        """For hooks on dense latents, unless SAELens takes the step: latents [B, F], those selected [B, K], routing."""
        raise NotImplementedError

    def _route(self, inputs_BD: Tensor) -> Assignment | None:  # noqa: ARG002, there is one expert
        return None

    def _route_batch(self, inputs_BD: Tensor) -> Assignment | None:
        """``_route`` of a training step, whose batch is differentiated once."""
        return self._route(inputs_BD)

    @abstractmethod
    def _autoencode(
        self, inputs_BD: Tensor, assignment: Assignment | None, dead: DeadLatents, row_grads: RowGrads | None
    ) -> tuple[Reconstruction, Tensor]:
        """The fused encoder and decoder, without b_dec; and the latents as seen from outside, [B, K], detached."""

    def _decoded(self, result: Reconstruction, target_BD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        """The product of codes and decoder, without b_dec; losses of parts of the dictionary, to add to the whole's."""
        return result.out_BD, {}

    def _plus_skip(self, out_BD: Tensor, x_BD: Tensor) -> Tensor:  # noqa: ARG002, an SAE has no skip connection
        return out_BD

    def _balance(
        self,
        step_input: TrainStepInput,  # noqa: ARG002
        metrics: Metrics,  # noqa: ARG002
        assignment: Assignment | None,  # noqa: ARG002
    ) -> tuple[Balance | None, RoutingStatistics | None]:
        """How even the load of the experts is, and statistics of the routing; adds the router's metrics."""
        return None, None

    def _batch_share(self, x_BD: Tensor) -> float | None:  # noqa: ARG002
        """What part of the batch these tokens are, where processes divide it; None: they are all of it."""
        return None

    def _check_loss(self, loss: Tensor, step_input: TrainStepInput) -> None:
        """May raise ValueError for a non-finite loss."""

    # Files

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        return replace_files(path, super().save_inference_model)
