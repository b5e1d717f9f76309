"""The Switch SAE (arXiv 2410.08201): a router sends each activation to one of E small TopK SAEs."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from sae_lens.saes.sae import (
    SAE,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainStepInput,
    TrainStepOutput,
)
from sae_lens_switch_kernels import Reconstruction, RowGrads, sparse_autoencode, sparse_decode, switch_encode
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from typing_extensions import override

from sae_lens_switch.common.atomic import replace_files
from sae_lens_switch.common.machine import check_sae_fits
from sae_lens_switch.common.printable import logger
from sae_lens_switch.saes.data_dependent_init import Spread, bias_from_batch
from sae_lens_switch.saes.router import (
    Assignment,
    RoutingStatistics,
    assign,
    expert_load,
    load_balance_loss,
    router_dtype,
    router_logits,
)
from sae_lens_switch.saes.serialization import digits, from_digits, latent_major
from sae_lens_switch.saes.sparse_codes import SparseCodes
from sae_lens_switch.saes.sparse_sae import (
    SparseStepOutput,
    activation_rows,
    aux_loss,
    dead_latents,
    differentiable,
    finish_decoding,
    has_hooks,
    normalized_input,
    pre_bias,
    reconstruction_error,
)
from sae_lens_switch.training.config import SwitchSAEConfig, SwitchTrainingSAEConfig, check_sae
from sae_lens_switch.training.optim.constrained_adam import constrain_optimizer_steps, normalize_rows_, remove_parallel_

_ROUTER = ("W_router", "b_router")
# In a file of weights: the SAE is as it was initialised. Only then is it there.
_FRESH = "fresh"
# SAELens keeps these as closures over the SAE, which cannot be pickled, and which a copy would share.
_CLOSURES = ("reshape_fn_in", "reshape_fn_out", "run_time_activation_norm_fn_in", "run_time_activation_norm_fn_out")


class _Switch(SAE[Any]):
    """What training and inference share.

    Router   p = softmax((x - b_router) @ W_router), e = argmax p, in float32 whatever the SAE's dtype
    Encoder  z = TopK_K(relu((x - b_dec) @ W_enc[:, block e])), f = p_e z
    Decoder  x_hat = f @ W_dec + b_dec, linear in any dense f

    W_enc [D, F] is the transpose of [F, D] storage, so that a latent's weights are contiguous.
    """

    W_router: nn.Parameter
    b_router: nn.Parameter

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        check_sae(cfg)
        check_sae_fits(cfg)
        super().__init__(cfg, use_error_term)
        self.hook_sae_router_logits = HookPoint()
        self.hook_sae_router_probs = HookPoint()
        self.setup()

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_enc = nn.Parameter(latent_major(self.W_enc.data))
        options = {"dtype": router_dtype(self.dtype), "device": self.device}
        W_router_DE = torch.empty(self.cfg.d_in, self.cfg.n_experts, **options)
        self.W_router = nn.Parameter(W_router_DE.uniform_(-1, 1) / self.cfg.d_in**0.5)
        self.b_router = nn.Parameter(torch.zeros(self.cfg.d_in, **options))

    # Encoding

    @override
    def encode(self, x: Tensor) -> Tensor:
        """Dense latents [..., F] of x [..., D]: at most k non-zeros a token, all of one expert, gate included."""
        return self._encode_dense(normalized_input(self, x))[0]

    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """The same latents as ``encode``, without a tensor of width F. Hooks on dense latents do not fire."""
        x = normalized_input(self, x)
        return self._encode_codes(x, self._assign(x))

    def _encode_dense(self, x: Tensor) -> tuple[Tensor, Tensor, Assignment]:
        assignment = self._assign(x)
        if has_hooks(self.hook_sae_acts_pre):
            acts, pre = self._encode_hooked(x, assignment)
        else:
            codes = self._encode_codes(x, assignment)
            acts, pre = codes.to_dense(), codes.values
        return self.hook_sae_acts_post(acts), pre, assignment

    @override
    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        return self._centered(normalized_input(self, sae_in))

    def _centered(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.cfg.apply_b_dec_to_input else x

    def _assign(self, x: Tensor) -> Assignment:
        logits = self.hook_sae_router_logits(router_logits(x, self.W_router, self._router_bias()))
        return assign(logits, self.hook_sae_router_probs(logits.softmax(dim=-1)))

    def _router_bias(self) -> Tensor:
        return self.b_router

    def _encode_codes(self, x: Tensor, assignment: Assignment) -> SparseCodes:
        lead = x.shape[:-1]
        values, indices = switch_encode(
            x.reshape(-1, x.shape[-1]),
            assignment.experts_BA.flatten(),
            self.W_enc.T,
            self.cfg.k,
            self.cfg.n_experts,
            pre_bias_D=pre_bias(self),
        )
        values = self._gated(values.view(*lead, self.cfg.k), assignment)
        return SparseCodes(values, indices.view(*lead, self.cfg.k), self.cfg.d_sae)

    def _encode_hooked(self, x: Tensor, assignment: Assignment) -> tuple[Tensor, Tensor]:
        """As ``_encode_codes``, with pre-activations laid out densely for ``hook_sae_acts_pre`` to see and edit.

        Only the chosen expert's block is computed; the others are zero and cannot be selected.
        """
        E, M = self.cfg.n_experts, self.cfg.d_sae // self.cfg.n_experts
        centered_BD = self._centered(x).reshape(-1, x.shape[-1])
        expert_B = assignment.experts_BA.flatten()
        pre_BF = centered_BD.new_zeros(len(centered_BD), self.cfg.d_sae)
        for e in range(E):
            rows = (expert_B == e).nonzero().flatten()
            block = slice(e * M, (e + 1) * M)
            pre_BF[rows, block] = (centered_BD[rows] @ self.W_enc[:, block]).to(pre_BF.dtype)
        pre = self.hook_sae_acts_pre(pre_BF.view(*x.shape[:-1], self.cfg.d_sae))
        block_indices = assignment.experts_BA * M + torch.arange(M, device=x.device)
        top = pre.gather(-1, block_indices).topk(self.cfg.k, dim=-1)
        values = self._gated(top.values.relu(), assignment)
        return SparseCodes(values, block_indices.gather(-1, top.indices), self.cfg.d_sae).to_dense(), pre

    def _gated(self, values: Tensor, assignment: Assignment) -> Tensor:
        if self.cfg.gate == "one":
            return values
        return values * assignment.gates_BA.to(values.dtype)

    # Decoding

    @override
    def decode(self, feature_acts: Tensor | SparseCodes) -> Tensor:
        """x_hat [..., D] of dense latents [..., F] (edited or mixed over experts, as you like) or of SparseCodes."""
        if isinstance(feature_acts, SparseCodes):
            values, indices = differentiable(feature_acts.values), differentiable(feature_acts.indices)
            K = values.shape[-1]
            out = sparse_decode(values.reshape(-1, K), indices.reshape(-1, K), self.W_dec)
            out = out.view(*values.shape[:-1], self.W_dec.shape[-1])
        else:
            out = differentiable(feature_acts) @ self.W_dec
        return finish_decoding(self, out + self.b_dec)

    # Folds: the router sees the same activations as the encoder, so whatever is folded there is folded here

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        self.W_router.data *= scaling_factor
        self.b_router.data /= scaling_factor

    @override
    @torch.no_grad()
    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)
        dtype = torch.promote_types(self.W_router.dtype, whitening_matrix.dtype)
        mean, matrix, inverse = (
            t.to(self.W_router.device, dtype) for t in (mean, whitening_matrix, unwhitening_matrix)
        )
        self.W_router.copy_(matrix @ self.W_router.to(dtype))
        self.b_router.copy_(self.b_router.to(dtype) @ inverse + mean)

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Fold decoder norms into the encoder where that is exact: when they are equal within each expert.

        Raises NotImplementedError otherwise, since rescaled pre-activations would select other latents.
        """
        norms_EM = self.W_dec.to(router_dtype(self.dtype)).norm(dim=1).view(self.cfg.n_experts, -1)
        spread_E = norms_EM.amax(1) / norms_EM.amin(1) - 1
        # Rows of equal norm differ by their rounding to the dtype, and by the rounding of the norms themselves.
        tolerance = 2 * torch.finfo(self.dtype).eps + 16 * torch.finfo(norms_EM.dtype).eps
        if spread_E.max() > tolerance:
            raise NotImplementedError(
                "fold_W_dec_norm is exact for a Switch SAE only if all decoder rows of an expert have the same norm; "
                f"here they differ by up to a factor of {1 + spread_E.max().item():.4g}"
            )
        super().fold_W_dec_norm()

    # Dtype, device, copies

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """A change of dtype leaves the router in float32, bit for bit: bf16 would reroute tokens."""
        before = {name: getattr(self, name).data for name in _ROUTER}
        super()._apply(fn, recurse)
        for name, data in before.items():
            parameter = getattr(self, name)
            wanted = router_dtype(parameter.dtype)
            if parameter.dtype != wanted:
                parameter.data = data.to(parameter.device, wanted)
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.to(wanted)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _CLOSURES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.hook_z_reshaping_mode:
            self.turn_on_forward_pass_hook_z_reshaping()
        else:
            self.turn_off_forward_pass_hook_z_reshaping()
        self._setup_activation_normalization()

    # Files

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()
        for name in _ROUTER:
            # SAELens casts every tensor of a file to the dtype it is loaded in before we see it.
            state_dict[f"{name}_digits"] = digits(state_dict[name])

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        expected = {name: tuple(p.shape) for name, p in self.named_parameters()}
        for name, shape in expected.items():
            if name not in state_dict:
                raise ValueError(
                    f"weights of a {self.cfg.architecture()} SAE must hold {name}; found {sorted(state_dict)}"
                )
            found = tuple(state_dict[name].shape)
            if found != shape:
                raise ValueError(f"{name} must have shape {shape} by the config; the weights have {found}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As torch's, which by itself would refuse what our files hold beside the parameters."""
        for name in _ROUTER:
            exact = _exact(state_dict, prefix + name)
            cast = state_dict.get(prefix + name)
            if exact is not None and cast is not None and cast.dtype in (torch.bfloat16, torch.float16):
                state_dict[prefix + name] = exact
        if prefix + "W_enc" in state_dict:
            state_dict[prefix + "W_enc"] = latent_major(state_dict[prefix + "W_enc"])
        is_fresh = state_dict.pop(prefix + _FRESH, None) is not None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._has_loaded(is_fresh)

    def _has_loaded(self, is_fresh: bool) -> None:
        pass  # of no concern after training

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """As SAELens's, but each file appears whole or not at all."""
        return replace_files(path, super().save_model)


class SwitchSAE(_Switch, SAE[SwitchSAEConfig]):
    """A trained Switch SAE. See ``encode``, ``encode_sparse`` and ``decode``."""


class SwitchTrainingSAE(_Switch, TrainingSAE[SwitchTrainingSAEConfig]):
    """A Switch SAE in training: reconstruction plus load balance, under SAELens's trainer or any loop.

    Loss: ``mean_B ||x - x_hat||^2 + c * L_balance``, ``c = load_balance_coefficient * load_balance_scale``; and AuxK
    (Gao et al. 2024, A.2) with ``aux_loss_coefficient``: the dead latents of a token's own expert, weighted by its
    gate, reconstruct what is left of the token.
    A step makes no tensor of size B x F, unless a hook on the dense latents asks for one; AuxK then waits.

    is_fresh: whether weights are as initialised. The biases and the router's sharpness are then taken from the first
        batch whose step is good. False once that is done, and once weights are loaded or written to; kept in files.
    """

    row_grads: RowGrads | None = None  # what an optimiser wants of a backward pass
    refuses_not_finite = True  # a trainer that skips such steps itself turns it off

    def __init__(self, cfg: SwitchTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self._as_initialized: list[Tensor] | None = None
        self.is_fresh = self.device.type != "meta"
        self._before_start: dict[str, Tensor] = {}

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        coefficient = self.cfg.load_balance_coefficient
        assert coefficient is not None  # the config resolves None
        return {"load_balance": TrainCoefficientConfig(coefficient, self.cfg.load_balance_warm_up_steps)}

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Dense latents [..., F], and the [..., K] pre-activations that were selected."""
        acts, pre, _ = self._encode_dense(normalized_input(self, x))
        return acts, pre

    @override
    def _router_bias(self) -> Tensor:
        return self.b_dec.to(self.W_router.dtype) if self._is_tied() else self.b_router

    def _is_tied(self) -> bool:
        """A frozen ``b_router`` follows nothing, and is the one that routes."""
        return self.cfg.tie_router_bias and self.b_router.requires_grad

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's loss and its parts.

        ``sae_in`` is [..., d_in]; what depends on the batch as a whole, such as the balance, sees all its rows as one.
        Raises ValueError if the activations are not of width d_in, or there are none, or if they or the loss are not
        finite.
        """
        given = step_input.sae_in
        x = activation_rows(given, self.cfg.d_in)
        self._start_from_batch(x)
        if self.cfg.normalize_decoder or self.cfg.tie_router_bias:
            constrain_optimizer_steps(self)

        inputs = normalized_input(self, x)
        dead_N, aux_k = None, 0
        if has_hooks(self.hook_sae_acts_pre) or has_hooks(self.hook_sae_acts_post):
            acts, hidden_pre, assignment = self._encode_dense(inputs)
            sae_out, aux_out, codes = self.decode(acts), None, None
        else:
            assignment = self._assign(inputs)
            dead_N, aux_k = dead_latents(self, step_input.dead_neuron_mask, self.cfg.n_experts)
            result = self._autoencode(inputs, assignment, dead_N, aux_k)
            sae_out, aux_out = finish_decoding(self, result.out_BD + self.b_dec), result.aux_out_BD
            values = self._gated(result.values_BK.detach(), assignment).detach()
            codes = SparseCodes(values, result.indices_BK, self.cfg.d_sae)
            acts, hidden_pre = None, values

        mse_loss = reconstruction_error(self, sae_out, x)
        load_E = expert_load(assignment)
        balance = load_balance_loss(assignment.probs_BE, load_E)
        balance_loss = step_input.coefficients["load_balance"] * self._load_balance_scale(x) * balance
        losses = {"mse_loss": mse_loss, "load_balance_loss": balance_loss}
        if self.cfg.aux_loss_coefficient:
            losses["auxiliary_reconstruction_loss"] = sae_out.new_zeros(())
        if dead_N is not None and aux_out is not None:
            dead_E = step_input.dead_neuron_mask.view(self.cfg.n_experts, -1).sum(1)  # type: ignore[union-attr]
            n_dead_B = dead_E[assignment.experts_BA.flatten()]
            losses["auxiliary_reconstruction_loss"] = aux_loss(self, x, sae_out, aux_out, n_dead_B)
        loss = sum(losses.values(), start=sae_out.new_zeros(()))
        if self.refuses_not_finite:
            good = bool(torch.isfinite(loss))
            self.settle_start(good)
            if not good:
                raise ValueError(_not_finite(x, step_input.n_training_steps))
        statistics = RoutingStatistics(load_E, assignment.gates_BA.detach().flatten(), step_input.dead_neuron_mask)
        lead = given.shape[:-1]
        fields = {
            "sae_in": given,
            "sae_out": sae_out.view(given.shape),
            "hidden_pre": hidden_pre.detach().view(*lead, hidden_pre.shape[-1]),
            "loss": loss,
            "losses": losses,
            "metrics": {"load_balance": balance.detach(), **statistics.metrics()},
        }
        if codes is not None:
            return SparseStepOutput(codes=codes.view(*lead), routing=statistics, **fields)
        assert acts is not None
        return TrainStepOutput(feature_acts=acts.detach().view(*lead, self.cfg.d_sae), **fields)

    def _autoencode(
        self, x: Tensor, assignment: Assignment, dead_N: Tensor | None = None, aux_k: int = 0
    ) -> Reconstruction:
        """``_encode_codes`` and ``decode`` at once, without b_dec; values are without the gate."""
        gated = self.cfg.gate == "probability"
        return sparse_autoencode(
            x,
            self.W_enc.T,
            self.W_dec,
            self.cfg.k,
            expert_B=assignment.experts_BA.flatten(),
            n_experts=self.cfg.n_experts,
            gates_B=assignment.gates_BA.flatten() if gated else None,
            pre_bias_D=pre_bias(self),
            dead_N=dead_N,
            aux_k=aux_k,
            row_grads=self.row_grads,
        )

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """The load-balance loss alone; ``training_forward_pass`` has it already and does not call this."""
        x = activation_rows(step_input.sae_in, self.cfg.d_in)
        assignment = self._assign(normalized_input(self, x))
        balance = load_balance_loss(assignment.probs_BE, expert_load(assignment))
        return {"load_balance_loss": step_input.coefficients["load_balance"] * self._load_balance_scale(x) * balance}

    @torch.no_grad()
    def _load_balance_scale(self, x_BD: Tensor) -> Tensor | float:
        if self.cfg.load_balance_scale == "d_in":
            return float(self.cfg.d_in)
        x_BD = x_BD.to(router_dtype(x_BD.dtype))
        return (x_BD - x_BD.mean(dim=0)).square().sum(dim=-1).mean()

    # The start, and what happens around an optimiser's step

    @override
    def _has_loaded(self, is_fresh: bool) -> None:
        self.is_fresh = is_fresh

    @property
    def is_fresh(self) -> bool:
        return self._as_initialized is not None and not self._has_been_filled(self._as_initialized)

    @is_fresh.setter
    def is_fresh(self, value: bool) -> None:
        self._as_initialized = self._sample_of_weights() if value else None

    @torch.no_grad()
    def _start_from_batch(self, x_BD: Tensor) -> None:
        """If this SAE is fresh, move its biases into the data and fit the router's sharpness to it.

        Only finite numbers come of it: another batch is waited for otherwise. Frozen parameters stay.
        """
        if not self.is_fresh:
            return
        batch_BD = self.run_time_activation_norm_fn_in(x_BD.to(self.dtype))
        if not torch.isfinite(batch_BD).all():
            return
        with torch.autocast(batch_BD.device.type, enabled=False):
            starts, says, level = self._start_of(batch_BD)
        if not all(torch.isfinite(t.to(getattr(self, name).dtype)).all() for name, t in starts.items()):
            return
        self.is_fresh, self._before_start = False, {}
        for name, t in starts.items():
            p = getattr(self, name)
            if p.requires_grad:
                self._before_start[name] = p.detach().clone()
                p.copy_(t)
        logger.log(level, says)

    def _start_of(self, batch_BD: Tensor) -> tuple[dict[str, Tensor], str, int]:
        """What parameters start at, what to say of it, and how loudly."""
        bias_D = bias_from_batch(batch_BD, self.cfg.bias_start)
        starts = {"b_dec": bias_D, "b_router": bias_D}
        spread, std = Spread.of(batch_BD), self.cfg.router_start_std
        says = f"biases start at {self.cfg.bias_start} of {spread}"
        if std is not None and not spread.is_none:
            found = router_logits(batch_BD, self.W_router, bias_D).std()
            starts["W_router"] = self.W_router * (std / found)
            says += f"; the router's logits at a standard deviation of {std:.4g}, {found:.4g} before"
        elif std is not None:
            says += "; the router as initialised, as these are all the same: router_start_std needs some that differ"
        return starts, says, logging.WARNING if spread.is_none else logging.INFO

    @torch.no_grad()
    def settle_start(self, good: Tensor | bool) -> None:
        """Tell the SAE whether the step of the forward pass before was good: if not, a start from it is taken back."""
        if self._before_start and not good:
            for name, t in self._before_start.items():
                getattr(self, name).copy_(t)
            self.is_fresh = True
        self._before_start = {}

    def _has_been_filled(self, as_initialized: list[Tensor]) -> bool:
        """Whether weights were written to in place, past ``load_state_dict``: torch keeps no trace of that."""
        pairs = zip(as_initialized, self._sample_of_weights(), strict=True)
        return not all(torch.allclose(a, b, rtol=2e-2) for a, b in pairs)  # but for a change of dtype

    def _sample_of_weights(self) -> list[Tensor]:
        matrices = [W[:: max(1, W.shape[0] // 32), :: max(1, W.shape[1] // 32)] for W in (self.W_enc, self.W_dec)]
        samples = [*matrices, self.W_router, self.b_router, self.b_dec]
        return [t.detach().to("cpu", torch.float32, copy=True) for t in samples]

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        if self.is_fresh:
            state_dict[_FRESH] = torch.ones(1)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict.pop(_FRESH, None)

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        """Called after clipping, before the step (see optim.constrain_optimizer_steps)."""
        if self.cfg.normalize_decoder and self.cfg.project_decoder_grad and self.W_dec.grad is not None:
            remove_parallel_(self.W_dec.grad, self.W_dec)

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        if self.cfg.normalize_decoder and self.W_dec.requires_grad:
            normalize_rows_(self.W_dec)
        self.follow_ties()

    @torch.no_grad()
    def follow_ties(self) -> None:
        if self._is_tied():
            self.b_router.copy_(self.b_dec)

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        return replace_files(path, super().save_inference_model)

    @override
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        norms_E = self.W_router.detach().norm(dim=0).cpu().numpy()
        histograms = {**super().log_histograms(), "weights/W_router_norms": norms_E}
        # In float64: between float32 numbers as close as the norms of unit rows numpy finds no room for bins.
        return {name: values.astype("float64") for name, values in histograms.items()}


def _not_finite(x_BD: Tensor, step: int) -> str:
    bad = ~torch.isfinite(x_BD).all(dim=-1)
    if bad.any():
        nan, inf = int(x_BD.isnan().sum()), int(x_BD.isinf().sum())
        first = int(bad.nonzero()[0, 0])
        return (
            f"activations must be finite; training step {step} got {nan} NaN and {inf} infinite values in "
            f"{int(bad.sum())} of {len(x_BD)} tokens, the first in row {first}. "
            "The weights are those of the step before."
        )
    return (
        f"the loss of training step {step} is not finite, though the activations are: the learning rate may be too "
        "high. The weights are those of the step before."
    )


def _exact(state_dict: dict[str, Any], key: str) -> Tensor | None:
    """The float32 numbers of a router's parameter, of whatever dtype its file was loaded in; taken from the dict."""
    parts = state_dict.pop(f"{key}_digits", None)
    if parts is not None:
        return from_digits(parts)
    sum_of = state_dict.pop(f"{key}_parts", None)  # as version 0.1 wrote them
    return None if sum_of is None else sum_of.float().sum(0)
