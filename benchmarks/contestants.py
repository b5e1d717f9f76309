"""The contestants of the benchmark: the same batch and the same weights for all."""

from __future__ import annotations

import argparse
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "0" if os.path.exists("/dev/nvidia0") else "1")

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn

from sae_lens_switch import (
    SparseBatchTopKTrainingSAE,
    SparseBatchTopKTrainingSAEConfig,
    SparseMatryoshkaBatchTopKTrainingSAE,
    SparseMatryoshkaBatchTopKTrainingSAEConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)
from sae_lens_switch.saes.decoder_constraint import AppliesConstraint
from sae_lens_switch.saes.step import SparseStepInput
from sae_lens_switch.training.optim.master_weights import MasterWeights

LR = 1e-4
BASELINE = "SAELens topk"
LOW = ", bfloat16 encoder"


def batch(args: argparse.Namespace) -> Tensor:
    return normal(args, 1, args.batch, args.d_in).to(getattr(torch, args.dtype))


def normal(args: argparse.Namespace, stream: int, *shape: int) -> Tensor:
    """float32 normals drawn on the device, the same on every call."""
    generator = torch.Generator(args.device).manual_seed(args.seed + stream)
    return torch.randn(*shape, generator=generator, device=args.device)


def weights(args: argparse.Namespace, F: int | None = None) -> tuple[Tensor, Tensor]:
    """W_enc [D, F] and its transpose W_dec [F, D], with unit-norm rows."""
    W_dec = normal(args, 0, F or args.d_sae, args.d_in).to(getattr(torch, args.dtype))
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return W_dec.T.contiguous(), W_dec


def contestants(args: argparse.Namespace) -> dict[str, Callable[[argparse.Namespace], Any]]:
    table: dict[str, Callable[[argparse.Namespace], Any]] = {
        BASELINE: lambda a: Stock(a),
        "SAELens topk, no rescaling": lambda a: Stock(a, rescale_acts_by_decoder_norm=False),
        "SAELens topk, sparse mode": lambda a: Stock(
            a, rescale_acts_by_decoder_norm=False, use_sparse_activations=True
        ),
    }
    try:
        import sparsify  # noqa: F401
    except ImportError:
        print("sparsify is not installed: pip install eai-sparsify")
    else:
        table["sparsify"] = Sparsify
    table["SAELens batchtopk"] = lambda a: Stock(a, batchtopk(a, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig))
    table["SAELens matryoshka_batchtopk"] = lambda a: Stock(
        a, matryoshka(a, MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig)
    )
    table["ours: sparse_batchtopk"] = lambda a: Ours(
        a, batchtopk(a, SparseBatchTopKTrainingSAE, SparseBatchTopKTrainingSAEConfig)
    )
    table["ours: sparse_matryoshka_batchtopk"] = lambda a: Ours(
        a, matryoshka(a, SparseMatryoshkaBatchTopKTrainingSAE, SparseMatryoshkaBatchTopKTrainingSAEConfig)
    )
    table["ours: sparse_topk"] = lambda a: Ours(a, sparse_topk(a))
    table[f"ours: sparse_topk{LOW}"] = lambda a: Ours(a, in_low_precision(sparse_topk(a)))
    E = 32 if 32 in args.experts else args.experts[0]  # its time does not depend on the number
    table[f"all experts, masked, {E} experts"] = lambda a, E=E: Masked(a, E)
    table[f"all experts, masked, 2 of {E} experts"] = lambda a, E=E: Masked(a, E, n_active=2)
    table[f"ours: switch, 2 of {E} experts"] = lambda a, E=E: Ours(a, switch_sae(a, E, n_active_experts=2))
    table[f"all experts, masked, {E} experts and 1 shared"] = lambda a, E=E: Masked(a, E, n_shared=shared_width(a, E))
    table[f"ours: switch, {E} experts and 1 shared"] = lambda a, E=E: Ours(
        a, switch_sae(a, E, n_shared_experts=1, shared_width=shared_width(a, E))
    )
    for E in args.experts:
        table[f"ours: switch, {E} experts"] = lambda a, E=E: Ours(a, switch_sae(a, E))
        table[f"ours: switch, {E} experts{LOW}"] = lambda a, E=E: Ours(a, in_low_precision(switch_sae(a, E)))
    return table


class BareAdam(AppliesConstraint, torch.optim.Adam):
    """Adam alone: no decoder constraint is applied around its steps."""


class Contestant(ABC):
    """A training step: forward, backward, clipping, Adam. ``forward`` returns the loss."""

    module: nn.Module
    forward_backward_ms: float | None = None  # of the last step
    _bare_optimizer: torch.optim.Optimizer | None = None

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.x = args, batch(args)

    def ready(self) -> None:
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=LR, fused=True)
        MasterWeights(self.optimizer, masters=False)

    @abstractmethod
    def forward(self) -> Tensor: ...

    def forward_backward(self) -> None:
        self.forward_backward_ms = timed(lambda: self.forward().backward(), self.args.device)

    def step(self) -> None:
        self.forward_backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.module.zero_grad()

    def bare_step(self) -> None:
        """Forward, backward and fused Adam, and nothing else."""
        if self._bare_optimizer is None:
            self._bare_optimizer = BareAdam(self.module.parameters(), lr=LR, fused=True)
            MasterWeights(self._bare_optimizer, masters=False)
        self.forward().backward()
        self._bare_optimizer.step()
        self.module.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """Of the squared error alone, latent-major."""
        loss = self.forward()
        loss.backward()
        found = {"loss": loss.detach(), **{n: g for n, g in self.named_gradients().items() if g is not None}}
        self.module.zero_grad()
        return found

    def named_gradients(self) -> dict[str, Tensor | None]:
        m: Any = self.module
        return {"W_enc": m.W_enc.grad.T, "W_dec": m.W_dec.grad, "b_dec": m.b_dec.grad}


class Ours(Contestant):
    """This package's SAEs in a plain loop with torch's fused Adam, dead latents and the decoder constraint included."""

    def __init__(self, args: argparse.Namespace, sae: Any) -> None:
        super().__init__(args)
        self.module = sae
        self.coefficients = {name: float(getattr(c, "value", c)) for name, c in sae.get_coefficients().items()}
        self.since_fired = torch.zeros(sae.cfg.d_sae, device=args.device)
        self.ready()

    def forward(self) -> Tensor:
        output = self.module.training_forward_pass(
            SparseStepInput(
                sae_in=self.x,
                coefficients=self.coefficients,
                dead_neuron_mask=None,
                n_training_steps=1,
                is_logging_step=False,
                refuse_non_finite=self.args.device == "cpu",  # it waits for a GPU; our trainer turns it off as well
            )
        )
        self.codes = output.codes
        return output.loss

    def step(self) -> None:
        super().step()
        values, indices = self.codes.values.flatten(), self.codes.indices.flatten()
        self.since_fired.add_(1)
        since = self.since_fired[indices].masked_fill_(values > 0, 0)  # without a wait for how many there are
        self.since_fired.scatter_reduce_(0, indices, since, "amin")


def sparse_topk(args: argparse.Namespace) -> SparseTopKTrainingSAE:
    return with_weights(SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(**fields(args))), args)


def batchtopk(args: argparse.Namespace, sae_class: Any, config_class: Any) -> Any:
    return with_weights(sae_class(config_class(**fields(args))), args)


def matryoshka(args: argparse.Namespace, sae_class: Any, config_class: Any) -> Any:
    """In five widths, each twice that before."""
    widths = [args.d_sae >> n for n in (4, 3, 2, 1, 0)]
    return with_weights(sae_class(config_class(**fields(args), matryoshka_widths=widths)), args)


def shared_width(args: argparse.Namespace, n_experts: int) -> int:
    """About as many latents as an expert has, that leave all experts equally many."""
    return max(1, args.d_sae // n_experts // n_experts) * n_experts


def switch_sae(args: argparse.Namespace, n_experts: int, d_sae: int | None = None, **options: int) -> SwitchTrainingSAE:
    options = fields(args) | {"n_experts": n_experts, "d_sae": d_sae or args.d_sae} | options
    sae = SwitchTrainingSAE(SwitchTrainingSAEConfig(**options, load_balance_coefficient=0.0))
    sae.is_fresh = False  # no initialisation from the first batch: all have the same weights
    with_weights(sae, args, d_sae)
    with torch.no_grad():
        sae.W_router.copy_(router(args, n_experts))
    return sae


def in_low_precision(sae: Any) -> Any:
    sae.cfg.encoder_precision = "bfloat16"
    return sae


def router(args: argparse.Namespace, n_experts: int) -> Tensor:
    return normal(args, 2, args.d_in, n_experts) / args.d_in**0.5


def fields(args: argparse.Namespace) -> dict[str, Any]:
    return {"d_in": args.d_in, "d_sae": args.d_sae, "k": args.k, "device": args.device, "dtype": args.dtype}


def with_weights(sae: Any, args: argparse.Namespace, F: int | None = None) -> Any:
    W_enc, W_dec = weights(args, F)
    with torch.no_grad():
        sae.W_enc.copy_(W_enc)
        sae.W_dec.copy_(W_dec)
    return sae


class Stock(Contestant):
    """SAELens as it is: its TopK SAE or a given one, its trainer's step."""

    def __init__(self, args: argparse.Namespace, sae: TopKTrainingSAE | None = None, **options: Any) -> None:
        super().__init__(args)
        topk = TopKTrainingSAE(TopKTrainingSAEConfig(**fields(args), **options)) if sae is None else sae
        self.module = with_weights(topk, args)
        cfg = SAETrainerConfig(
            lr=LR,
            lr_end=LR,
            total_training_samples=10**9,
            train_batch_size_samples=args.batch,
            device=args.device,
            autocast=False,
            n_checkpoints=0,
            checkpoint_path=None,
        )
        self.trainer = SAETrainer(cfg=cfg, sae=self.module, data_provider=iter([]))

    def forward(self) -> Tensor:
        return self.module.training_forward_pass(
            TrainStepInput(
                sae_in=self.x, coefficients={}, dead_neuron_mask=None, n_training_steps=1, is_logging_step=False
            )
        ).loss

    def step(self) -> None:
        self.kept = self.trainer.step(self.x)  # as its fit() keeps the last output
        self.trainer.n_training_steps += 1


class Masked(Contestant):
    """The Switch formula as in the authors' code: all experts, then a mask, then top-k over all latents."""

    def __init__(self, args: argparse.Namespace, n_experts: int, n_active: int = 1, n_shared: int = 0) -> None:
        super().__init__(args)
        W_enc, W_dec = weights(args)
        parameters = {
            "W_enc": W_enc,
            "W_dec": W_dec,
            "b_dec": torch.zeros(args.d_in),
            "W_router": router(args, n_experts).to(W_enc.dtype),
        }
        self.module = nn.Module()
        for name, data in parameters.items():
            self.module.register_parameter(name, nn.Parameter(data.to(args.device, W_enc.dtype)))
        self.width, self.n_active, self.n_shared = (args.d_sae - n_shared) // n_experts, n_active, n_shared
        self.ready()

    def forward(self) -> Tensor:
        m: Any = self.module
        probs = (self.x @ m.W_router).softmax(-1)
        chosen = probs.topk(self.n_active, dim=-1)
        gates = torch.zeros_like(probs).scatter(-1, chosen.indices, chosen.values)
        pre = (self.x - m.b_dec) @ m.W_enc
        ones = gates.new_ones(len(gates), self.n_shared)
        acts = pre.relu() * torch.cat([ones, gates.repeat_interleave(self.width, dim=-1)], dim=-1)
        top = acts.topk(self.args.k, dim=-1, sorted=False)
        sparse = torch.zeros_like(acts).scatter(-1, top.indices, top.values)
        return (sparse @ m.W_dec + m.b_dec - self.x).square().sum(-1).mean()


class Sparsify(Contestant):
    """EleutherAI's SparseCoder, with its own projection and normalisation of the decoder, and torch's fused Adam."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        from sparsify import SparseCoder
        from sparsify.config import SparseCoderConfig

        cfg = SparseCoderConfig(num_latents=args.d_sae, k=args.k)
        self.module = SparseCoder(args.d_in, cfg, device=args.device, dtype=getattr(torch, args.dtype))
        W_dec = weights(args)[1]
        with torch.no_grad():
            self.module.encoder.weight.copy_(W_dec)
            self.module.W_dec.copy_(W_dec)
        # Its loss is a fraction of the variance; rescaled to match the others:
        self.scale = (self.x - self.x.mean(0)).square().sum() / args.batch
        self.ready()

    def forward(self) -> Tensor:
        return self.scale * self.module(self.x).fvu

    def named_gradients(self) -> dict[str, Tensor | None]:
        m: Any = self.module
        return {"W_enc": m.encoder.weight.grad, "W_dec": m.W_dec.grad, "b_dec": m.b_dec.grad}

    def step(self) -> None:
        m: Any = self.module
        m.set_decoder_norm_to_unit_norm()
        self.forward_backward()
        m.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        self.optimizer.step()
        m.zero_grad()


def timed(call: Callable[[], Any], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)
