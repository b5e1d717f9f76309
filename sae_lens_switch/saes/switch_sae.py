"""The Switch SAE (arXiv 2410.08201): a router sends each activation to one of E small TopK SAEs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from sae_lens_switch_kernels import code_gates
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from typing_extensions import override

from sae_lens_switch.common.torch_private import has_hooks
from sae_lens_switch.common.types import StateDict
from sae_lens_switch.saes.config import SwitchSAEConfig, SwitchTrainingSAEConfig
from sae_lens_switch.saes.router import Assignment, assign, router_dtype, router_logits
from sae_lens_switch.saes.serialization import FRESH, digits, take_exact, thresholds_after_training
from sae_lens_switch.saes.sparse_codes import SparseCodes
from sae_lens_switch.saes.sparse_sae import SparseSAE
from sae_lens_switch.saes.switch_selection import SwitchSelection

_ROUTER = ("W_router", "b_router", "expert_bias")
# After training, and in it.
_THRESHOLDS = ("threshold", "topk_threshold")


class SwitchBase(SparseSAE):
    """What training and inference share.

    Router   p = softmax((x - b_router) @ W_router), e = argmax p, in float32 whatever the SAE's dtype
             with load_balancing="bias": e = argmax (logits + expert_bias)
    Encoder  z = TopK_K(relu((x - b_dec) @ W_enc[:, block e])), f = p_e z
             with A active experts: f = TopK_K(g_e relu((x - b_dec) @ W_enc)) over the blocks of all A, g_e their gates,
             and over the latents of shared experts, whose gate is 1
             with activation="batchtopk": TopK_KB of g_e relu(...) over all tokens of a batch
             with "jumprelu", after training on it: all that exceed ``threshold`` of their expert, of shared ones its
             first entry
    Decoder  x_hat = f @ W_dec + b_dec, linear in any dense f
    """

    W_router: nn.Parameter
    b_router: nn.Parameter
    expert_bias: Tensor | None
    threshold: Tensor | None

    def __init__(self, cfg: SwitchSAEConfig | SwitchTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.hook_sae_router_logits = HookPoint()
        self.hook_sae_router_probs = HookPoint()
        self.setup()

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        W_router_DE = torch.empty(self.cfg.d_in, self.cfg.n_experts, dtype=router_dtype(self.dtype), device=self.device)
        self.W_router = nn.Parameter(W_router_DE.uniform_(-1, 1) / self.cfg.d_in**0.5)
        self.b_router = nn.Parameter(W_router_DE.new_zeros(self.cfg.d_in))
        is_biased = self.cfg.load_balancing == "bias"
        self.register_buffer("expert_bias", W_router_DE.new_zeros(self.cfg.n_experts) if is_biased else None)
        has_threshold = self.cfg.activation == "jumprelu"
        threshold_O = torch.zeros(self.cfg.layout.n_owners, dtype=self.dtype, device=self.device)
        self.register_buffer("threshold", threshold_O if has_threshold else None)

    # Encoding

    @override
    def encode(self, x: Tensor) -> Tensor:
        """Dense latents [..., F] of x [..., D]: non-zeros are of a token's own experts, gate included.

        With activation="topk" at most k per token. With "batchtopk" at most k times the number of tokens, which are
        one batch.
        """
        return self._encode_dense(self.normalized_input(x))[0]

    @override
    def encode_sparse(self, x: Tensor) -> SparseCodes:
        return self.encode_routed(x)[0]

    def encode_routed(self, x: Tensor) -> tuple[SparseCodes, Assignment]:
        """``encode_sparse``, and which experts each token went to, with what probabilities."""
        x = self.normalized_input(x)
        assignment = self._route(x)
        return self._encode_codes(x, assignment), assignment

    def _encode_dense(self, inputs_BD: Tensor) -> tuple[Tensor, Tensor, Assignment]:
        assignment = self._route(inputs_BD)
        if has_hooks(self.hook_sae_acts_pre):
            acts, pre = self._encode_hooked(inputs_BD, assignment)
        else:
            codes = self._encode_codes(inputs_BD, assignment)
            acts = codes.to_dense()
            pre = codes.values if codes.offsets is None else acts
        return self.hook_sae_acts_post(acts), pre, assignment

    @override
    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        return self._centered(self.normalized_input(sae_in))

    def _centered(self, x: Tensor) -> Tensor:
        return x if self.pre_bias is None else x - self.pre_bias

    def _route(self, inputs_BD: Tensor) -> Assignment:
        logits = self._router_logits(inputs_BD)
        probs = self.hook_sae_router_probs(logits.softmax(dim=-1))
        return assign(logits, probs, self.cfg.n_active_experts, self.expert_bias)

    def _router_logits(self, inputs_BD: Tensor) -> Tensor:
        return self.hook_sae_router_logits(router_logits(inputs_BD, self.W_router, self.effective_router_bias))

    @property
    def effective_router_bias(self) -> Tensor:
        """What the router subtracts from its input."""
        return self.b_router

    def _encode_codes(self, x: Tensor, assignment: Assignment) -> SparseCodes:
        experts, gates = self._chosen(assignment)
        gates = None if gates is None else gates.detach()
        x_BD = x.reshape(-1, x.shape[-1])
        codes = self._selection.encode(x_BD, self.W_enc.T, self.pre_bias, experts, gates).view(*x.shape[:-1])
        return replace(codes, values=self._gated(codes, assignment))

    @property
    def _selection(self) -> SwitchSelection:
        return SwitchSelection(self.cfg, self.encoder_precision, self.threshold)

    def _chosen(self, assignment: Assignment) -> tuple[Tensor, Tensor | None]:
        """Experts and gates of every token, [B, A]; no gates if they are 1."""
        gates, A = self._gates(assignment), self.cfg.n_active_experts
        return assignment.experts_BA.reshape(-1, A), None if gates is None else gates.reshape(-1, A)

    def _gates(self, assignment: Assignment) -> Tensor | None:
        if self.cfg.gate == "one":
            return None
        gates = assignment.gates_BA
        return gates / gates.sum(dim=-1, keepdim=True) if self.cfg.gate == "renormalized" else gates

    def _encode_hooked(self, x: Tensor, assignment: Assignment) -> tuple[Tensor, Tensor]:
        """As ``_encode_codes``, with pre-activations laid out densely for ``hook_sae_acts_pre`` to see and edit.

        Only the shared block and those of the chosen experts are computed; the others are zero and cannot be selected.
        """
        layout = self.cfg.layout
        centered_BD = self._centered(x).reshape(-1, x.shape[-1])
        experts_BA, gates_BA = self._chosen(assignment)
        pre_BF = centered_BD.new_zeros(len(centered_BD), self.cfg.d_sae)
        shared = slice(layout.shared_width)
        pre_BF[:, shared] = (centered_BD @ self.W_enc[:, shared]).to(pre_BF.dtype)
        for e in range(layout.n_experts):
            rows, block = (experts_BA == e).any(1).nonzero().flatten(), layout.latents_of(e)
            pre_BF[rows, block] = (centered_BD[rows] @ self.W_enc[:, block]).to(pre_BF.dtype)
        pre = self.hook_sae_acts_pre(pre_BF.view(*x.shape[:-1], self.cfg.d_sae))
        latents = layout.latents(assignment.experts_BA)
        mine = ranked = pre.gather(-1, latents)
        if gates_BA is not None and (self._mixes_gates or self.cfg.activation != "topk"):
            gates = gates_BA.detach().to(pre.dtype).view(assignment.experts_BA.shape)
            ranked = mine.relu() * code_gates(gates, assignment.experts_BA, layout.experts_of(latents))
        codes = self._selection.of_dense(mine, ranked, latents)
        return replace(codes, values=self._gated(codes, assignment)).to_dense(), pre

    def _gated(self, codes: SparseCodes, assignment: Assignment) -> Tensor:
        """The values of the codes, times the gates of their experts."""
        gates, experts = self._gates(assignment), assignment.experts_BA
        if gates is None:
            return codes.values
        indices = codes.indices
        if codes.offsets is not None:  # each code is a row of its own, with the gates of its token
            gates, experts = (t.reshape(-1, t.shape[-1])[codes.tokens] for t in (gates, experts))
            indices = indices.unsqueeze(-1)
        if self._mixes_gates:
            gates = code_gates(gates, experts, self.cfg.layout.experts_of(indices))
        return codes.values * (gates if codes.offsets is None else gates.squeeze(-1)).to(codes.values.dtype)

    @property
    def _mixes_gates(self) -> bool:
        """Whether a token has latents with different gates."""
        return self.cfg.n_active_experts > 1 or self.cfg.n_shared_experts > 0

    # Folds: the router sees the same activations as the encoder, so whatever is folded there is folded here

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        self.W_router.mul_(scaling_factor)
        self.b_router.div_(scaling_factor)

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
        """Fold decoder norms into the encoder where that is exact: when those that compete are equal.

        These are the norms within each expert, or all where a token has several experts, shared ones included, or where
        a batch selects. Raises NotImplementedError otherwise: rescaled pre-activations would select other latents.
        """
        norms_F = self.W_dec.to(router_dtype(self.dtype)).norm(dim=1)
        compete = self._mixes_gates or self._selection.ranks_over_tokens
        norms_EM = norms_F.unsqueeze(0) if compete else self.cfg.layout.by_expert(norms_F)
        spread_E = norms_EM.amax(1) / norms_EM.amin(1) - 1
        # Rows of equal norm differ by their rounding to the dtype, and by the rounding of the norms themselves.
        tolerance = 2 * torch.finfo(self.dtype).eps + 16 * torch.finfo(norms_EM.dtype).eps
        if spread_E.max() > tolerance:
            raise NotImplementedError(
                "fold_W_dec_norm is exact for a Switch SAE only if all decoder rows of an expert have the same norm, "
                "and those of all experts where a token has several, or a batch selects; "
                f"here they differ by up to a factor of {1 + spread_E.max().item():.4g}"
            )
        super().fold_W_dec_norm()
        for name, threshold_O in self.named_buffers(recurse=False):
            if name in _THRESHOLDS:  # of latents, which have grown by as much
                threshold_O.mul_(self.cfg.layout.firsts(norms_F).to(threshold_O.dtype))

    # Dtype and files

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """A change of dtype leaves the router in float32, bit for bit: bf16 would reroute tokens."""
        before = {name: t.data for name, t in self._router().items()}
        super()._apply(fn, recurse)
        for name, t in self._router().items():
            wanted = router_dtype(t.dtype)
            if t.dtype != wanted:
                t.data = before[name].to(t.device, wanted)
                if t.grad is not None:
                    t.grad = t.grad.to(wanted)
        return self

    def _router(self) -> dict[str, Tensor]:
        """All that routes, by name."""
        named = {"W_router": self.W_router, "b_router": self.b_router, "expert_bias": self.expert_bias}
        return {name: t for name, t in named.items() if t is not None}

    @override
    def process_state_dict_for_saving(self, state_dict: StateDict) -> None:
        super().process_state_dict_for_saving(state_dict)
        for name in self._router():
            # SAELens casts every tensor of a file to the dtype it is loaded in before we see it.
            state_dict[f"{name}_digits"] = digits(state_dict[name])

    @override
    def process_state_dict_for_loading(self, state_dict: StateDict) -> None:
        if self.threshold is not None:
            thresholds_after_training(state_dict)  # where the file is of an SAE in training
        expected = {name: tuple(t.shape) for name, t in self.state_dict().items()}
        for name, shape in expected.items():
            if name not in state_dict:
                raise ValueError(
                    f"weights of a {self.cfg.architecture()} SAE must hold {name}; found {sorted(state_dict)}"
                )
            found = tuple(state_dict[name].shape)
            if found != shape:
                raise ValueError(f"{name} must have shape {shape} by the config; the weights have {found}")

    @override
    def _load_from_state_dict(self, state_dict: StateDict, prefix: str, *args: Any, **kwargs: Any) -> None:
        """As torch's, which would refuse what our files hold beside the parameters."""
        for name in _ROUTER:
            exact = take_exact(state_dict, prefix + name)
            cast = state_dict.get(prefix + name)
            if exact is not None and cast is not None and cast.dtype in (torch.bfloat16, torch.float16):
                state_dict[prefix + name] = exact
        is_fresh = state_dict.pop(prefix + FRESH, None) is not None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._has_loaded(is_fresh)

    def _has_loaded(self, is_fresh: bool) -> None:
        """Of no concern after training."""


class SwitchSAE(SwitchBase):
    """A trained Switch SAE. See ``encode``, ``encode_sparse`` and ``decode``."""
