"""An independent reference for the Switch SAE: a loop over tokens in float64."""

import math

import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_lens_switch import SwitchTrainingSAE, SwitchTrainingSAEConfig


def make_sae(seed: int = 0, **fields) -> SwitchTrainingSAE:
    """A float64 training SAE whose every parameter is random, so that no data start and no symmetry hides anything."""
    fields = {"d_in": 10, "d_sae": 56, "n_experts": 7, "k": 3, "dtype": "float64"} | fields
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in sae.state_dict().values():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / math.sqrt(p.shape[0]))
    return sae


def make_batch(n: int = 40, d_in: int = 10, seed: int = 1) -> Tensor:
    return torch.randn(n, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def step_input(x: Tensor, coefficient: float = 0.7, step: int = 3, **fields) -> TrainStepInput:
    defaults = {"dead_neuron_mask": None, "n_training_steps": step, "is_logging_step": False}
    return TrainStepInput(sae_in=x, coefficients={"load_balance": coefficient}, **(defaults | fields))


def reference_loss(
    sae: SwitchTrainingSAE, x: Tensor, coefficient: float, scale: float, k: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DESIGN's formulas, token by token. Returns latents, outputs, loss and the balance loss without coefficient."""
    E, s, S = sae.cfg.n_experts, sae.cfg.n_shared_experts, sae.cfg.shared_width
    S = s * sae.cfg.d_sae // (E + s) if S is None else S
    M = (sae.cfg.d_sae - S) // E
    bias = [0.0] * E if sae.expert_bias is None else sae.expert_bias.tolist()
    latents, outputs, probs, chosen, z_losses = [], [], [], [], []
    for x_D in x:
        logits = [(x_D - sae.b_router) @ sae.W_router[:, e] for e in range(E)]
        weights = [(logit - max(logits)).exp() for logit in logits]
        p_E = torch.stack([w / sum(weights) for w in weights])
        z_losses.append(sum(logit.exp() for logit in logits).log() ** 2)
        scores = [logit.item() + b for logit, b in zip(logits, bias, strict=True)]
        experts = sorted(range(E), key=lambda e: scores[e], reverse=True)[: sae.cfg.n_active_experts]
        among = sum(p_E[e] for e in experts)
        acts = {i: torch.relu((x_D - sae.b_dec) @ sae.W_enc[:, i]) for i in range(S)}
        for e in experts:
            gate = {"probability": p_E[e], "renormalized": p_E[e] / among, "one": 1}[sae.cfg.gate]
            for i in range(S + e * M, S + (e + 1) * M):
                acts[i] = gate * torch.relu((x_D - sae.b_dec) @ sae.W_enc[:, i])
        f = [torch.zeros((), dtype=x.dtype)] * sae.cfg.d_sae
        x_hat = sae.b_dec
        for i in sorted(acts, key=lambda i: acts[i].item(), reverse=True)[: k or sae.cfg.k]:
            f[i] = acts[i]
            x_hat = x_hat + acts[i] * sae.W_dec[i]
        latents.append(torch.stack(f))
        outputs.append(x_hat)
        probs.append(p_E)
        chosen += experts
    out = torch.stack(outputs)
    load = [chosen.count(e) / len(chosen) for e in range(E)]
    balance = E * sum(load[e] * torch.stack(probs)[:, e].mean() for e in range(E))
    loss = sum(((x_hat - x_D) ** 2).sum() for x_hat, x_D in zip(outputs, x, strict=True)) / len(x)
    loss = loss + sae.cfg.router_z_loss_coefficient * scale * sum(z_losses) / len(x)
    return torch.stack(latents), out, loss + coefficient * scale * balance, balance


def variance(x: Tensor) -> float:
    mean = sum(x) / len(x)
    return float(sum(((x_D - mean) ** 2).sum() for x_D in x) / len(x))


def compare_with_token_loop(sae: SwitchTrainingSAE, x: Tensor) -> None:
    """Latents, outputs, losses and every gradient, that of x too."""
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    output = sae.training_forward_pass(step_input(mine))
    latents, out, loss, balance = reference_loss(sae, theirs, 0.7, variance(x))
    torch.testing.assert_close(output.sae_out, out)
    torch.testing.assert_close(output.feature_acts.to_dense(), latents)
    torch.testing.assert_close(sae.encode(x), latents)
    torch.testing.assert_close(sae.decode(sae.encode_sparse(x)), out)
    torch.testing.assert_close(output.metrics["load_balance"], balance)
    names, parameters = zip(*sae.named_parameters(), strict=True)
    ours = torch.autograd.grad(output.loss, (*parameters, mine), allow_unused=True)
    truth = torch.autograd.grad(loss, (*parameters, theirs), allow_unused=True)
    for name, a, b, p in zip((*names, "x"), ours, truth, (*parameters, x), strict=True):
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"gradient of {name}: {text}")
