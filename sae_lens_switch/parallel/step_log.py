"""What is logged of a step whose tokens lie on several processes: SAELens's names, for the whole batch."""

import torch
from torch import Tensor

from sae_lens_switch.common.types import Metrics
from sae_lens_switch.parallel.expert_shard import ExpertShard
from sae_lens_switch.parallel.shard import Shard
from sae_lens_switch.saes.step import SparseStepOutput


def step_log(output: SparseStepOutput, shard: Shard, mean_D: Tensor, dead_F: Tensor, passes_F: Tensor) -> Metrics:
    """Metrics of the whole batch and of all latents; every process must take part.

    Args:
        output: The step of this process, with the losses of the whole batch.
        shard: Its latents.
        mean_D: Mean of the whole batch.
        dead_F: Which of its latents are dead.
        passes_F: Forward passes since each of them fired.
    """
    ranks = shard.ranks
    dtype = torch.promote_types(output.sae_in.dtype, torch.float32)
    x_BD, out_BD = output.sae_in.to(dtype), output.sae_out.to(dtype)
    error_B = (out_BD - x_BD).square().sum(dim=-1)
    variance_B = (x_BD - mean_D.to(dtype)).square().sum(dim=-1)
    explained_B = 1 - error_B / variance_B
    is_active = output.codes.values != 0
    of_tokens = [error_B, variance_B, explained_B, explained_B.square(), is_active]
    sums = torch.stack([t.double().sum() for t in (*of_tokens, passes_F, dead_F)])
    error, variance, explained, squares, l0, passes, dead = ranks.sum_(sums, "metrics").tolist()

    n = shard.n_tokens
    mean = explained / n
    std = ((squares - n * mean**2) / (n - 1)) ** 0.5 if squares > n * mean**2 else float("nan")
    log: Metrics = {
        "losses/overall_loss": output.loss.item(),
        "metrics/explained_variance_legacy": mean,
        "metrics/explained_variance_legacy_std": std,
        "metrics/explained_variance": 1 - error / variance if variance else float("nan"),
        "metrics/l0": l0 / n,
        "sparsity/mean_passes_since_fired": passes / (shard.whole.d_sae * ranks.n_rows),
        "sparsity/dead_features": round(dead / ranks.n_rows),
    }
    return log | {f"losses/{name}": float(value) for name, value in output.losses.items()}


def routing_log(output: SparseStepOutput, shard: ExpertShard) -> Metrics:
    """Metrics of all experts; every process must take part."""
    batch, routing, balance = shard.batch, output.routing, output.metrics["load_balance"]
    assert routing is not None
    assert isinstance(balance, Tensor)
    gates = shard.ranks.sum_(routing.gates_B.double().sum(), "metrics")
    dead_F = routing.dead_latents_F
    dead_F = torch.zeros(shard.cfg.d_sae, dtype=torch.bool, device=gates.device) if dead_F is None else dead_F
    dead_E = shard.gathered_latents(shard.cfg.layout.by_expert(dead_F).sum(dim=1))
    log: Metrics = {
        "routing/load_balance": float(balance),
        "routing/expert_load_max": float(batch.load_E.max()),
        "routing/expert_load_min": float(batch.load_E.min()),
        "routing/expert_load_entropy": float(routing.load_entropy),
        "routing/gate_mean": float(gates) / (batch.n_tokens * shard.whole.n_active_experts),
    }
    return log | {f"routing/dead_latents_expert_{e}": int(dead) for e, dead in enumerate(dead_E.tolist())}
