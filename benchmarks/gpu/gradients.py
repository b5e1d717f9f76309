"""The gradients of a whole SAE's step, kernels and autograd together, against autograd of a dense float64 formula."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from sae_lens_switch_kernels import Reconstruction, sparse_autoencode
from torch import Tensor

from gpu.record import Case
from gpu.shapes import Shape
from gpu.timing import dtype_of, free, normal, use

# Wider than of one kernel: in low precision also what lies between two of them is rounded.
TOLERATED = {"fp32": 2e-5, "tf32": 4e-3, "bf16": 2e-2, "autocast": 2e-2}


# Each kind of SAE, by what its codes are and what its output is.
KINDS = ("topk", "switch", "abstopk", "batchtopk", "matryoshka", "transcoder")


def cases(label: str, s: Shape, precisions: Iterable[str], device: str) -> Iterator[Case]:
    """The gradients of every kind of SAE in each precision, and with the encoder's product in low precision."""
    options = [(precision, "full") for precision in precisions] + [("fp32", "bfloat16"), ("fp32", "float8")]
    for precision, encoder in options:
        for kind in KINDS:
            low = "" if encoder == "full" else f", {encoder} encoder"
            yield f"gradients of {kind}, {label}, {precision}{low}", partial(check, kind, s, precision, device, encoder)


def check(kind: str, s: Shape, precision: str, device: str, encoder_precision: str = "full") -> dict[str, Any]:
    """Loss and all gradients, at the latents that were selected: whether these are right is checked elsewhere."""
    from gpu.correctness import judged, poisoned, relative_error

    use(precision)
    leaves, constants = inputs(kind, s, precision, device)
    constants["encoder_precision"] = encoder_precision
    upstream = normal(*_output_shape(leaves, constants), seed=20, device=device)

    def step() -> tuple[list[Tensor], Reconstruction]:
        given = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
        with torch.autocast(device, torch.bfloat16, enabled=precision == "autocast"):
            result = sparse_autoencode(**given, **constants)
        loss = (result.out_BD.float() * upstream).sum()
        return [result.out_BD, *torch.autograd.grad(loss, list(given.values()))], result

    with poisoned():
        ours, result = step()
        again, _ = step()
    truth = dense_step(leaves, constants, is_selected(result, s), upstream)
    names = ["out_BD", *leaves]
    errors = {n: relative_error(a, b) for n, a, b in zip(names, ours, truth, strict=True)}
    differ = [n for n, a, b in zip(names, ours, again, strict=True) if not torch.equal(a, b)]
    del ours, again, truth, result
    free()
    return judged(errors, TOLERATED[precision], differ)


def inputs(kind: str, s: Shape, precision: str, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What has gradients, and the other arguments of ``sparse_autoencode``."""
    dtype = dtype_of(precision)

    def draw(seed: int, *shape: int) -> Tensor:
        return normal(*shape, seed=seed, device=device, dtype=dtype)

    width = s.D // 2 + 3 if kind == "transcoder" else s.D
    leaves = {"x_BD": draw(10, s.B, s.D), "pre_bias_D": draw(11, s.D)}
    leaves |= {"W_enc_FD": draw(12, s.F, s.D) / s.D**0.5, "W_dec_FD": draw(13, s.F, width) / s.D**0.5}
    if kind != "switch":
        constants: dict[str, Any] = {"k": s.K, "scale_F": draw(15, s.F).abs() + 0.5}
        if kind == "abstopk":
            constants["by_magnitude"] = True
        if kind in ("batchtopk", "matryoshka"):
            constants |= {"k": s.K * s.B, "over_batch": True}
        if kind == "matryoshka":  # one level without an active latent, most likely
            constants["ends_L"] = torch.tensor([1, s.F // 3, s.F], device=device)
        return leaves | {"bias_F": draw(14, s.F)}, constants
    generator = torch.Generator(device).manual_seed(16)
    expert_B = torch.randint(0, s.E - 1, (s.B,), generator=generator, device=device)  # the last has no token
    expert_B[torch.rand(s.B, generator=generator, device=device) < 0.4] = 0
    leaves["gates_B"] = normal(s.B, seed=17, device=device).sigmoid()
    return leaves, {"k": s.K, "expert_B": expert_B, "n_experts": s.E}


def _output_shape(leaves: dict[str, Tensor], constants: dict[str, Any]) -> tuple[int, ...]:
    levels = (len(constants["ends_L"]),) if "ends_L" in constants else ()
    return len(leaves["x_BD"]), *levels, leaves["W_dec_FD"].shape[1]


def is_selected(result: Reconstruction, s: Shape) -> Tensor:
    """[B, F]: which latents the codes name."""
    rows_B1 = result.indices_BK.new_tensor(range(s.B)).unsqueeze(1)
    if result.offsets_B1 is None:
        rows = rows_B1.expand_as(result.indices_BK)
    else:
        rows = rows_B1.flatten().repeat_interleave(result.offsets_B1.diff())
    selected_BF = torch.zeros(s.B, s.F, dtype=torch.bool, device=result.indices_BK.device)
    selected_BF[rows, result.indices_BK.long()] = True
    return selected_BF


def dense_step(
    leaves: dict[str, Tensor], constants: dict[str, Any], selected_BF: Tensor, upstream: Tensor
) -> list[Tensor]:
    """In float64, with every pre-activation computed, and only the selected ones used."""
    given = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    codes_BF = (given["x_BD"] - given["pre_bias_D"]) @ given["W_enc_FD"].T
    if "bias_F" in given:
        codes_BF = codes_BF + given["bias_F"]
    if not constants.get("by_magnitude"):
        codes_BF = codes_BF.relu()
    if "gates_B" in given:
        codes_BF = codes_BF * given["gates_B"].unsqueeze(1)
    codes_BF = codes_BF * selected_BF
    if "ends_L" in constants:
        ends = [0, *constants["ends_L"].tolist()]
        out = torch.stack([codes_BF[:, a:b] @ given["W_dec_FD"][a:b] for a, b in pairwise(ends)], dim=1)
    else:
        out = codes_BF @ given["W_dec_FD"]
    return [out, *torch.autograd.grad((out * upstream.double()).sum(), list(given.values()))]


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
