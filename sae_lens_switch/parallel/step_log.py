"""What is logged of a step whose tokens lie on several processes: SAELens's names, for the whole batch."""

import torch
from torch import Tensor

from sae_lens_switch.common.types import Metrics
from sae_lens_switch.parallel.expert_shard import ExpertShard
from sae_lens_switch.saes.step import SparseStepOutput


def step_log(output: SparseStepOutput, shard: ExpertShard, dead_F: Tensor, passes_F: Tensor) -> Metrics:
    """Metrics of the whole batch and of all latents; every process must take part.

    Args:
        output: The step of this process's experts, with the losses of the whole batch.
        shard: Its experts.
        dead_F: Which of their latents are dead.
        passes_F: Forward passes since each of them fired.
    """
    ranks, batch = shard.ranks, shard.received
    dtype = torch.promote_types(output.sae_in.dtype, torch.float32)
    x_BD, out_BD = output.sae_in.to(dtype), output.sae_out.to(dtype)
    error_B = (out_BD - x_BD).square().sum(dim=-1)
    variance_B = (x_BD - batch.mean_D).square().sum(dim=-1)
    explained_B = 1 - error_B / variance_B
    routing, balance = output.routing, output.metrics["load_balance"]
    assert routing is not None
    assert isinstance(balance, Tensor)
    n_active_B = output.codes.values != 0
    of_tokens = [error_B, variance_B, explained_B, explained_B.square(), n_active_B, routing.gates_B]
    sums = torch.stack([t.double().sum() for t in (*of_tokens, passes_F, dead_F)])
    error, variance, explained, squares, l0, gates, passes, dead = ranks.sum_(sums, "metrics").tolist()

    n, F = batch.n_tokens, shard.whole.d_sae
    mean = explained / n
    std = ((squares - n * mean**2) / (n - 1)) ** 0.5 if squares > n * mean**2 else float("nan")
    dead_before_F = torch.zeros_like(dead_F) if routing.dead_latents_F is None else routing.dead_latents_F
    dead_E = shard.gathered_latents(shard.cfg.layout.by_expert(dead_before_F).sum(dim=1))
    log: Metrics = {
        "losses/overall_loss": output.loss.item(),
        "metrics/explained_variance_legacy": mean,
        "metrics/explained_variance_legacy_std": std,
        "metrics/explained_variance": 1 - error / variance if variance else float("nan"),
        "metrics/l0": l0 / n,
        "sparsity/mean_passes_since_fired": passes / (F * ranks.n_rows),
        "sparsity/dead_features": round(dead / ranks.n_rows),
        "routing/load_balance": float(balance),
        "routing/expert_load_max": float(batch.load_E.max()),
        "routing/expert_load_min": float(batch.load_E.min()),
        "routing/expert_load_entropy": float(routing.load_entropy),
        "routing/gate_mean": gates / n,
    }
    log |= {f"losses/{name}": float(value) for name, value in output.losses.items()}
    return log | {f"routing/dead_latents_expert_{e}": int(dead) for e, dead in enumerate(dead_E.tolist())}
