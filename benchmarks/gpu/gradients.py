"""The gradients of a whole SAE's step, kernels and autograd together, against autograd of a dense float64 formula."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from sae_lens_switch_kernels import sparse_autoencode
from torch import Tensor

from gpu.record import Case
from gpu.shapes import Shape
from gpu.timing import dtype_of, free, normal, use

# Wider than of one kernel: in low precision also what lies between two of them is rounded.
TOLERATED = {"fp32": 2e-5, "tf32": 4e-3, "bf16": 2e-2, "autocast": 2e-2}


def cases(label: str, s: Shape, precisions: Iterable[str], device: str) -> Iterator[Case]:
    """The gradients of both SAEs in each precision, and with the encoder's product in low precision."""
    options = [(precision, "full") for precision in precisions] + [("fp32", "bfloat16"), ("fp32", "float8")]
    for precision, encoder in options:
        for kind in ("topk", "switch"):
            low = "" if encoder == "full" else f", {encoder} encoder"
            yield f"gradients of {kind}, {label}, {precision}{low}", partial(check, kind, s, precision, device, encoder)


def check(kind: str, s: Shape, precision: str, device: str, encoder_precision: str = "full") -> dict[str, Any]:
    """Loss and all gradients, at the latents that were selected: whether these are right is checked elsewhere."""
    from gpu.correctness import judged, poisoned, relative_error

    use(precision)
    leaves, constants = inputs(kind, s, precision, device)
    constants["encoder_precision"] = encoder_precision
    upstream_BD = normal(s.B, s.D, seed=20, device=device)

    def step() -> tuple[list[Tensor], Tensor]:
        given = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
        with torch.autocast(device, torch.bfloat16, enabled=precision == "autocast"):
            result = sparse_autoencode(**given, **constants)
        loss = (result.out_BD.float() * upstream_BD).sum()
        return [result.out_BD, *torch.autograd.grad(loss, list(given.values()))], result.indices_BK

    with poisoned():
        ours, indices_BK = step()
        again, _ = step()
    truth = dense_step(leaves, indices_BK, upstream_BD)
    names = ["out_BD", *leaves]
    errors = {n: relative_error(a, b) for n, a, b in zip(names, ours, truth, strict=True)}
    differ = [n for n, a, b in zip(names, ours, again, strict=True) if not torch.equal(a, b)]
    del ours, again, truth
    free()
    return judged(errors, TOLERATED[precision], differ)


def inputs(kind: str, s: Shape, precision: str, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    dtype = dtype_of(precision)

    def draw(seed: int, *shape: int) -> Tensor:
        return normal(*shape, seed=seed, device=device, dtype=dtype)

    leaves = {"x_BD": draw(10, s.B, s.D), "pre_bias_D": draw(11, s.D)}
    leaves |= {name: draw(seed, s.F, s.D) / s.D**0.5 for seed, name in ((12, "W_enc_FD"), (13, "W_dec_FD"))}
    if kind == "topk":
        constants = {"k": s.K, "scale_F": draw(15, s.F).abs() + 0.5}
        return leaves | {"bias_F": draw(14, s.F)}, constants
    generator = torch.Generator(device).manual_seed(16)
    expert_B = torch.randint(0, s.E - 1, (s.B,), generator=generator, device=device)  # the last has no token
    expert_B[torch.rand(s.B, generator=generator, device=device) < 0.4] = 0
    leaves["gates_B"] = normal(s.B, seed=17, device=device).sigmoid()
    return leaves, {"k": s.K, "expert_B": expert_B, "n_experts": s.E}


def dense_step(leaves: dict[str, Tensor], indices_BK: Tensor, upstream_BD: Tensor) -> list[Tensor]:
    """In float64, with every pre-activation computed, and only those at ``indices_BK`` used."""
    given = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    pre_BF = (given["x_BD"] - given["pre_bias_D"]) @ given["W_enc_FD"].T
    if "bias_F" in given:
        pre_BF = pre_BF + given["bias_F"]
    acts_BK = pre_BF.gather(1, indices_BK).relu()
    if "gates_B" in given:
        acts_BK = acts_BK * given["gates_B"].unsqueeze(1)
    codes_BF = torch.zeros_like(pre_BF).scatter(1, indices_BK, acts_BK)
    out_BD = codes_BF @ given["W_dec_FD"]
    return [out_BD, *torch.autograd.grad((out_BD * upstream_BD.double()).sum(), list(given.values()))]


def nondeterministic(kind: str, device: str, tiny: bool) -> dict[str, Any]:
    """Which operators of a training step torch calls nondeterministic, of SAEs with and without AuxK."""
    from gpu.steps import trainer_of

    use("fp32")
    shape = Shape(64, 16, 64, 4, 4) if tiny else Shape(2048, 256, 4096, 16, 8)
    shape = shape if kind == "switch" else shape._replace(E=1)
    found: dict[str, list[str]] = {}
    for aux in (0.0, 1 / 32):
        trainer, batches = trainer_of(kind, shape, "fp32", device, aux_loss_coefficient=aux, window=1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for i in range(4):
                    trainer.step(batches[i % len(batches)])
                    trainer.n_training_steps += 1
        finally:
            torch.use_deterministic_algorithms(False)
        messages = {str(w.message).split("\n")[0][:160] for w in caught}
        # cuBLAS asks for a setting of the environment; it is the products' own matter.
        named = [m for m in messages if "deterministic" in m and "CuBLAS" not in m]
        found["with AuxK" if aux else "without AuxK"] = sorted(named)
    free()
    return {"nondeterministic": found}
