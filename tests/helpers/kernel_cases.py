"""Cases for the kernels' tests: odd shapes, codes, arguments of ``sparse_autoencode``, comparison by RMS error."""

import pytest
import torch
from torch import Tensor

# B, D, E, M, K: widths that are no power of two, one token, one latent, every latent active
SHAPES = [
    (33, 48, 4, 16, 5),
    (7, 1000, 2, 9, 1),
    (20, 576, 7, 32, 32),
    (1, 5, 3, 4, 2),
    (64, 3, 1, 1, 1),
    (50, 17, 32, 2, 2),
]

shapes = pytest.mark.parametrize(("B", "D", "E", "M", "K"), SHAPES, ids=str)


def assert_close(name: str, actual: Tensor, expected: Tensor, ratio: float = 1e-12) -> None:
    """RMS error relative to the RMS of the expected values: one number per tensor."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    error = (actual - expected).double().square().mean().sqrt()
    base = expected.double().square().mean().sqrt()
    assert error <= ratio * base + 1e-300, f"{name}: error ratio {error / base:.3g}, allowed {ratio:.3g}"


def make_codes(B: int, D: int, F: int, K: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    values = torch.randn(B, K, **options)
    indices = torch.rand(B, F, generator=generator).topk(min(K, F)).indices
    return values[:, : indices.shape[1]], indices, torch.randn(F, D, **options), torch.randn(B, D, **options)


def gradients(function, inputs: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    out = function(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out.detach(), **{f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}}


def compare(ours, truth, inputs: dict[str, Tensor], upstream: Tensor) -> None:
    actual, expected = gradients(ours, inputs, upstream), gradients(truth, inputs, upstream)
    for name in expected:
        assert_close(name, actual[name], expected[name])


OPTIONS = {
    "bare": {},
    "pre-bias": {"pre_bias_D"},
    "biases and scale": {"pre_bias_D", "bias_F", "scale_F"},
    "dead latents": {"pre_bias_D", "bias_F", "scale_F", "dead_N"},
    "dead latents alone": {"dead_N"},
    "by magnitude": {"pre_bias_D", "bias_F", "scale_F", "dead_N", "by_magnitude"},
    "by magnitude alone": {"by_magnitude"},
    "routed": {"expert_B"},
    "routed and gated": {"expert_B", "gates_B", "pre_bias_D"},
    "two experts": {"two_experts"},
    "two experts, gated": {"two_experts", "gates_B", "pre_bias_D"},
    "dead latents of two experts": {"two_experts", "gates_B", "pre_bias_D", "dead_N"},
    "dead latents by expert": {"expert_B", "gates_B", "pre_bias_D", "dead_N"},
    "shared latents": {"expert_B", "shared"},
    "shared latents beside two experts, gated": {"two_experts", "shared", "gates_B", "pre_bias_D"},
    "dead latents, shared and by expert": {"expert_B", "shared", "gates_B", "pre_bias_D", "dead_N"},
    "dead latents, shared and of two experts": {"two_experts", "shared", "gates_B", "dead_N"},
    "masked": {"pre_bias_D", "bias_F", "scale_F", "dead_N", "masked"},
    "masked, by magnitude": {"scale_F", "dead_N", "by_magnitude", "masked"},
    "masked, by expert": {"expert_B", "gates_B", "pre_bias_D", "dead_N", "masked"},
    "masked, shared and of two experts": {"two_experts", "shared", "gates_B", "dead_N", "masked"},
}


def shared_of(E: int, M: int) -> tuple[int, int]:
    """A number of shared latents, and of experts, that E * M latents can be divided into; experts are not as wide."""
    if E == 1:
        return M // 2, 1
    return (M + E - 1, E - 1) if M > 1 else (0, E)


def expert_of_latents(F: int, constants: dict) -> Tensor:
    """[F]; negative where shared."""
    n_shared = constants.get("n_shared", 0)
    return (torch.arange(F) - n_shared) // ((F - n_shared) // constants.get("n_experts", 1))


def autoencoder_inputs(B, D, E, M, K, names) -> tuple[dict[str, Tensor], dict[str, Tensor | int]]:
    """Arguments that take a gradient, and those that do not."""
    generator = torch.Generator().manual_seed(3)
    F = E * M

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = {"x_BD": normal(B, D) + 1, "W_enc_FD": normal(F, D), "W_dec_FD": normal(F, D)}
    optional = {"pre_bias_D": normal(D), "bias_F": normal(F), "gates_B": normal(B).sigmoid()}
    constants: dict = {"k": K}
    if "shared" in names:
        constants["n_shared"], E = shared_of(E, M)
    scale, experts = normal(F).exp(), torch.randint(0, E, (B,), generator=generator)
    dead = torch.randperm(F, generator=generator)[: max(1, F // 2)].sort().values
    if "by_magnitude" in names:
        constants["by_magnitude"] = True
    if "scale_F" in names:
        constants["scale_F"] = scale
    if "expert_B" in names:
        constants |= {"expert_B": experts, "n_experts": E}
    if "two_experts" in names:
        A = min(2, E)
        constants |= {"expert_B": torch.rand(B, E, generator=generator).topk(A).indices, "n_experts": E}
        optional["gates_B"] = normal(B, A).sigmoid()
    if "dead_N" in names:
        constants |= {"dead_N": dead, "aux_k": max(1, len(dead) // 2)}
    if "masked" in names:
        width = (F - constants.get("n_shared", 0)) // constants.get("n_experts", 1)
        mask = torch.zeros(F, dtype=torch.bool).index_fill(0, dead, True)
        constants |= {"dead_N": mask, "aux_k": min(constants["aux_k"], width)}
    return leaves | {n: t for n, t in optional.items() if n in names}, constants
