"""Which form of the primitives runs, and that the Triton form, whole, computes what the plain one does."""

import subprocess
import sys

import pytest
import torch
from sae_lens_switch_kernels import backend, operators, products, reference, sparse_autoencode, torch_backend
from torch import Tensor

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def on_triton(monkeypatch):
    """Triton, in its interpreter where there is no GPU; what was proven is forgotten before and after."""
    monkeypatch.setenv("SAE_LENS_SWITCH_BACKEND", "triton")
    for remembered in (backend._proven, backend._triton_imports):
        remembered.cache_clear()
    yield
    for remembered in (backend._proven, backend._triton_imports):
        remembered.cache_clear()


def inputs(E: int, names: set[str], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict]:
    B, D, M, K = 21, 20, 12, 3
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    F = E * M
    leaves = {"x_BD": normal(B, D), "W_enc_FD": normal(F, D), "W_dec_FD": normal(F, D)}
    optional = {"pre_bias_D": normal(D), "bias_F": normal(F), "gates_B": normal(B).sigmoid()}
    constants: dict = {"k": K}
    if "expert_B" in names:
        constants |= {"expert_B": torch.randint(0, E - 1, (B,), generator=generator).to(DEVICE), "n_experts": E}
    if "scale_F" in names:
        constants["scale_F"] = normal(F).exp()
    if "dead_N" in names:
        constants |= {"dead_N": torch.arange(1, F, 3, device=DEVICE), "aux_k": 4}
    if "masked" in names:
        constants |= {"dead_N": torch.arange(F, device=DEVICE) % 3 == 1, "aux_k": 4}
    return leaves | {n: t for n, t in optional.items() if n in names}, constants


@pytest.mark.parametrize("dense_up_to", [0, 10**9], ids=["sparse", "dense within experts"])
@pytest.mark.parametrize(
    ("E", "names"),
    [
        (1, {"pre_bias_D", "bias_F", "scale_F", "dead_N"}),
        (3, {"expert_B", "gates_B", "pre_bias_D"}),
        (1, {"masked"}),
        (3, {"expert_B", "gates_B", "masked"}),
    ],
    ids=["topk", "switch", "topk, dead latents as a mask", "switch, dead latents as a mask"],
)
def test_sparse_autoencode_on_triton_equals_the_reference(E, names, dense_up_to, monkeypatch):
    monkeypatch.setenv("SAE_LENS_SWITCH_BACKEND", "triton")
    monkeypatch.setattr(backend, "_proven", lambda *_: True)  # no kernel gives way to its plain form
    monkeypatch.setattr(products, "_DENSE_UP_TO", {DEVICE.type: dense_up_to})
    leaves, constants = inputs(E, names, torch.float32)
    upstream = torch.randn(21, 20, generator=torch.Generator().manual_seed(2)).to(DEVICE)

    def run(function, dtype):
        given = {n: t.detach().to(dtype).requires_grad_() for n, t in leaves.items()}
        others = {
            n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in constants.items()
        }
        out, values, indices, aux_out, *_ = function(**given, **others)
        total = (out * upstream).sum() + (0 if aux_out is None else (aux_out * upstream).sum())
        return [out, values.sort(1).values, *torch.autograd.grad(total, list(given.values()))]

    ours = run(sparse_autoencode, torch.float32)
    for a, b in zip(ours, run(reference.sparse_autoencode, torch.float64), strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("fault", ["wrong numbers", "not a number", "an exception"])
def test_a_kernel_that_fails_its_check_gives_way_to_plain_torch_with_one_warning(fault, monkeypatch):
    def broken(values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor, _: None = None) -> Tensor:
        if fault == "an exception":
            raise RuntimeError("PassManager::run failed")
        return torch_backend.sparse_decode(values_BK, indices_BK, W_FD) * (
            1.5 if fault == "wrong numbers" else torch.nan
        )

    monkeypatch.setattr(backend._triton_ops(), "sparse_decode", broken)
    values, indices, W = torch.ones(2, 1), torch.tensor([[0], [3]]), torch.arange(20.0).view(5, 4)
    values, indices, W = (t.to(DEVICE) for t in (values, indices, W))
    with pytest.warns(RuntimeWarning, match="Triton kernel of sparse_decode") as caught:
        outs = [operators.sparse_decode(values, indices, W, None) for _ in range(3)]
    assert all(torch.equal(out, W[[0, 3]]) for out in outs)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1


@pytest.mark.usefixtures("on_triton")
def test_a_kernel_that_is_wrong_only_in_the_tiles_of_real_shapes_gives_way_on_a_gpu(monkeypatch):
    def wrong_when_wide(values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor, _: None = None) -> Tensor:
        return torch_backend.sparse_decode(values_BK, indices_BK, W_FD) * (1.5 if W_FD.shape[1] >= 256 else 1)

    monkeypatch.setattr(backend._triton_ops(), "sparse_decode", wrong_when_wide)
    if DEVICE.type == "cpu":
        assert backend._proven("sparse_decode", DEVICE, torch.float32)
        backend._proven.cache_clear()
        shapes = backend._shapes(torch.device("cuda"))
        monkeypatch.setattr(backend, "_shapes", lambda _: shapes)
    with pytest.warns(RuntimeWarning, match=r"is off by .* \(B 768, D 256, M 256, E 3, K 5\)"):
        assert not backend._proven("sparse_decode", DEVICE, torch.float32)


@pytest.mark.parametrize("dtype", list(backend._TOLERATED), ids=str)
@pytest.mark.parametrize("tf32", [False, True], ids=["", "TF32"])
def test_the_self_check_on_a_gpu_runs_the_tiles_and_the_path_that_real_shapes_take(dtype, tf32):
    from sae_lens_switch_kernels.triton_backend.blocks import Arch, candidate_block, cdiv, gemm_blocks

    hopper = Arch(lanes=32, shared=232448)
    shapes = backend._shapes(torch.device("cuda"))
    real = backend.Shape(B=8192, D=768, M=768, E=32, K=32)
    for columns in ("M", "D"):  # of an encoder's product, and of a decoder's

        def tiles(shape, columns=columns):
            rows, columns = cdiv(shape.B, 2 * shape.E), getattr(shape, columns)
            return gemm_blocks(rows, columns, dtype, hopper, tf32=tf32, inner_contiguous=True)

        assert tiles(real) in [tiles(shape) for shape in shapes]
    for wide in shapes[1:]:
        block = candidate_block(wide.M, wide.K)
        assert cdiv(wide.M, block) + wide.K * block <= wide.M // 2  # block maxima, no direct top-k


@pytest.mark.usefixtures("on_triton")
def test_a_missing_triton_is_one_warning_and_never_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens_switch_kernels.triton_backend", None)
    leaves, constants = inputs(3, {"expert_B"}, torch.float32)
    leaves["W_dec_FD"].requires_grad_()
    with pytest.warns(RuntimeWarning, match="no Triton kernels") as caught:
        sparse_autoencode(**leaves, **constants).out_BD.sum().backward()
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert leaves["W_dec_FD"].grad is not None


def test_the_choice_follows_device_dtype_and_environment(monkeypatch):
    low, high = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    monkeypatch.delenv("SAE_LENS_SWITCH_BACKEND", raising=False)
    assert backend.primitives(low) is torch_backend
    monkeypatch.setenv("SAE_LENS_SWITCH_BACKEND", "triton")
    assert isinstance(backend.primitives(low), backend.SelfChecked)
    assert backend.primitives(high) is torch_backend
    monkeypatch.setenv("SAE_LENS_SWITCH_BACKEND", "torch")
    assert backend.primitives(low) is torch_backend
    monkeypatch.setenv("SAE_LENS_SWITCH_BACKEND", "cuda")
    with pytest.raises(ValueError, match="SAE_LENS_SWITCH_BACKEND must be 'torch' or 'triton' if set; got 'cuda'"):
        backend.primitives(low)


def test_on_a_cpu_triton_is_never_imported():
    program = """
import sys, torch
from sae_lens_switch_kernels import sparse_autoencode
x, W = torch.randn(9, 4), torch.randn(8, 4, requires_grad=True)
sparse_autoencode(x, W, W, 2).out_BD.sum().backward()
print("sae_lens_switch_kernels.triton_backend" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False"]
