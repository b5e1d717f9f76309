"""A dense float64 reference for Switch SAEs whose latents are selected over a batch, by thresholds or in levels."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from helpers.token_loop import make_sae
from sae_lens_switch import SwitchSAE, SwitchSAEConfig, SwitchTrainingSAE

GATES = pytest.mark.parametrize("gate", ["probability", "renormalized", "one"])
LAYOUTS = {
    "one expert": {},
    "all of one expert's": {"k": 8},
    "one of all": {"n_experts": 1, "d_sae": 13, "k": 4},
    "two experts": {"n_active_experts": 2, "k": 5},
    "shared": {"n_shared_experts": 1, "n_experts": 6, "k": 4},
    "two and narrow shared": {"n_shared_experts": 2, "shared_width": 8, "n_experts": 6, "n_active_experts": 2, "k": 6},
    "biased": {"load_balancing": "bias", "load_balance_coefficient": 0.5},
}
layouts = pytest.mark.parametrize("fields", LAYOUTS.values(), ids=LAYOUTS.keys())


def sae_of(seed: int = 0, **fields) -> SwitchTrainingSAE:
    """In training, with thresholds of which no two are equal."""
    sae = make_sae(seed, **{"activation": "batchtopk", "topk_threshold_lr": 0.2, **fields})
    assert sae.topk_threshold is not None
    sae.topk_threshold.copy_(0.1 + torch.arange(len(sae.topk_threshold)) / 50)
    return sae


def inference_of(sae: SwitchTrainingSAE, **fields) -> SwitchSAE:
    """What it is saved as."""
    state = sae.state_dict()
    sae.process_state_dict_for_saving_inference(state)
    made = SwitchSAE(SwitchSAEConfig.from_dict({**sae.cfg.get_inference_sae_cfg_dict(), **fields}))
    made.load_state_dict(state)
    return made


class Reference(NamedTuple):
    """Latents [B, F], gate included; the reconstruction; losses by name; the least active latent of each owner."""

    acts: Tensor
    out: Tensor
    losses: dict[str, Tensor]
    least: list[float | None]

    @property
    def loss(self) -> Tensor:
        return torch.stack(list(self.losses.values())).sum()


def owners_of(cfg) -> list[range]:
    """The latents of the shared part, if there is one, and of each expert."""
    E, s, S = cfg.n_experts, cfg.n_shared_experts, cfg.shared_width
    S = s * cfg.d_sae // (E + s) if S is None else S
    M = (cfg.d_sae - S) // E
    return ([range(S)] if S else []) + [range(S + e * M, S + (e + 1) * M) for e in range(E)]


def gates_of(sae, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each latent of each token is multiplied by, [B, F], 0 where the token may not choose it; probs; chosen."""
    cfg, owners = sae.cfg, owners_of(sae.cfg)
    logits = torch.einsum("bd,de->be", x - sae.b_router, sae.W_router)
    probs = logits.exp() / logits.exp().sum(1, keepdim=True)
    scores = logits if sae.expert_bias is None else logits + sae.expert_bias
    chosen = torch.zeros_like(probs)
    for b in range(len(x)):
        best = sorted(range(cfg.n_experts), key=lambda e, b=b: scores[b, e].item(), reverse=True)
        chosen[b, best[: cfg.n_active_experts]] = 1
    gate = {
        "probability": probs * chosen,
        "renormalized": probs * chosen / (probs * chosen).sum(1, keepdim=True),
        "one": chosen,
    }[cfg.gate]
    columns = [torch.ones(len(x), len(owners[0]), dtype=x.dtype)] if len(owners) > cfg.n_experts else []
    for e in range(cfg.n_experts):
        columns.append(gate[:, e : e + 1].expand(-1, len(owners[-1])))
    return torch.cat(columns, 1), probs, chosen


def gated_pre(sae, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gates, probs, chosen = gates_of(sae, x)
    centered = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
    return torch.einsum("bd,df->bf", centered, sae.W_enc).relu() * gates, probs, chosen


def reference(sae: SwitchTrainingSAE, x: Tensor, coefficient: float, dead: Tensor | None = None) -> Reference:
    cfg, owners = sae.cfg, owners_of(sae.cfg)
    acts, probs, chosen = gated_pre(sae, x)
    is_active = torch.zeros_like(acts, dtype=torch.bool)
    if cfg.activation == "batchtopk":
        border = sorted(acts.flatten().tolist(), reverse=True)[cfg.k * len(x) - 1]
        is_active = acts >= max(border, 1e-300)
    else:
        for b in range(len(x)):
            border = sorted(acts[b].tolist(), reverse=True)[cfg.k - 1]
            is_active[b] = acts[b] >= max(border, 1e-300)
    acts = acts * is_active
    routed = [i for _ in range(cfg.n_experts) for i in range(len(owners[-1]))]
    position = torch.tensor([0] * (cfg.d_sae - len(routed)) + routed)
    losses = {}
    out = torch.einsum("bf,fd->bd", acts, sae.W_dec) + sae.b_dec
    losses["mse_loss"] = (x - out).square().sum() / len(x)
    load = chosen.mean(0) / cfg.n_active_experts
    balance = cfg.n_experts * (load * probs.mean(0)).sum()
    variance = (x - x.mean(0)).square().sum() / len(x)
    losses["load_balance_loss"] = coefficient * variance.detach() * balance
    if dead is not None:
        losses["auxiliary_reconstruction_loss"] = aux_loss(sae, x, out, dead)
    for width in (cfg.matryoshka_widths or [])[:-1]:
        inner = torch.einsum("bf,fd->bd", acts * (position < width), sae.W_dec) + sae.b_dec
        losses[f"inner_mse_loss_{width}"] = (x - inner).square().sum() / len(x)
    least = []
    for latents in owners:
        positive = [v for v in acts[:, latents.start : latents.stop].flatten().tolist() if v > 0]
        least.append(min(positive) if positive else None)
    return Reference(acts, out, losses, least)


def aux_loss(sae: SwitchTrainingSAE, x: Tensor, out: Tensor, dead: Tensor) -> Tensor:
    gates, _, _ = gates_of(sae, x)
    gates = gates.detach()
    errors = []
    for b in range(len(x)):
        mine = [f for f in range(sae.cfg.d_sae) if dead[f] and gates[b, f] > 0]
        acts = {f: gates[b, f] * ((x[b] - sae.b_dec) @ sae.W_enc[:, f]) for f in mine}
        best = sorted(mine, key=lambda f: acts[f].item(), reverse=True)[: sae.cfg.aux_k]
        aux = sum((acts[f] * sae.W_dec[f] for f in best), start=torch.zeros_like(x[b]))
        errors.append(min(1, len(mine) / sae.cfg.aux_k) * (aux - (x[b] - out[b]).detach()).square().sum())
    return sae.cfg.aux_loss_coefficient * sum(errors) / len(x)


def compare_with_reference(sae: SwitchTrainingSAE, x: Tensor, step_input, dead: Tensor | None = None) -> Reference:
    """Latents, reconstruction, every loss and every gradient, that of x too; the thresholds move as they should."""
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    before = None if sae.topk_threshold is None else sae.topk_threshold.tolist()
    expected = reference(sae, theirs, 0.7, dead)
    output = sae.training_forward_pass(step_input(mine, dead_neuron_mask=dead))
    torch.testing.assert_close(output.feature_acts.to_dense(), expected.acts.detach())
    torch.testing.assert_close(output.sae_out, expected.out)
    assert list(output.losses) == list(expected.losses)
    for name, loss in expected.losses.items():
        torch.testing.assert_close(output.losses[name], loss, msg=lambda m, name=name: f"{name}: {m}")
    names, parameters = zip(*sae.named_parameters(), strict=True)
    ours = torch.autograd.grad(output.loss, (*parameters, mine), allow_unused=True)
    truth = torch.autograd.grad(expected.loss, (*parameters, theirs), allow_unused=True)
    for name, a, b, p in zip((*names, "x"), ours, truth, (*parameters, x), strict=True):
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"gradient of {name}: {m}")
    torch.testing.assert_close(sae.encode(x), expected.acts.detach())
    torch.testing.assert_close(sae.decode(sae.encode_sparse(x)), expected.out.detach())
    if before is not None:
        lr = sae.cfg.topk_threshold_lr
        moved = [t if v is None else (1 - lr) * t + lr * v for t, v in zip(before, expected.least, strict=True)]
        torch.testing.assert_close(sae.topk_threshold, torch.tensor(moved, dtype=torch.float64))
    return expected
