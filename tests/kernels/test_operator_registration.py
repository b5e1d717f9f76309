"""The operators as torch's compiler, exporter and function transforms see them."""

import pytest
import torch
from helpers.kernel_cases import autoencoder_inputs, make_codes
from sae_lens_switch_kernels import autoencode, operators, products, reference, sparse_autoencode, sparse_decode
from torch import Tensor

OPERATORS = {
    "sparse_decode": lambda t: (t["values"], t["indices"], t["W"], None),
    "matmul_at_indices": lambda t: (t["g"], t["W"], t["indices"], None),
    "latent_weight_grad": lambda t: (t["values"], t["indices"], t["g"], 8, None),
    "sparse_decode of variable codes": lambda t: (t["values_S"], t["indices_S"], t["W"], t["offsets"]),
    "matmul_at_indices of variable codes": lambda t: (t["g"], t["W"], t["indices_S"], t["offsets"]),
    "latent_weight_grad of variable codes": lambda t: (t["values_S"], t["indices_S"], t["g"], 8, t["offsets"]),
    "encode": lambda t: (
        *(t["x"], t["W"], t["bias"], t["scale"], None, None, None, 3, 1, torch.float64),
        *(None, 0, 0, False, False, None, None),
    ),
    "encode in low precision": lambda t: (
        *(t["x"], t["W"], t["bias"], t["scale"], None, None, None, 3, 1, torch.float64),
        *(torch.bfloat16, 7, 0, False, False, None, None),
    ),
    "encode over the batch": lambda t: (
        *(t["x"], t["W"], t["bias"], t["scale"], None, None, None, 17, 1, torch.float64),
        *(None, 0, 0, False, True, None, None),
    ),
    "encode by magnitude": lambda t: (
        *(t["x"], t["W"], t["bias"], t["scale"], None, None, None, 3, 1, torch.float64),
        *(None, 0, 0, True, False, None, None),
    ),
    "autoencode": lambda t: (
        *(
            t["x"],
            t["W"],
            t["bias"],
            None,
            None,
            t["experts"],
            t["gates"],
            3,
            2,
            torch.float64,
            None,
            0,
            0,
            False,
            False,
        ),
        *(None, None, t["W_dec"], torch.arange(4), 2, [], None),
    ),
    "autoencode without a bias": lambda t: (
        *(t["x"], t["W"], None, None, None, None, None, 3, 1, torch.float64, None, 0, 0, False, False, None, None),
        *(t["W_dec"], torch.arange(4), 2, [], None),
    ),
    "encode shared latents": lambda t: (
        *(t["x"], t["W"], t["bias"], None, None, t["experts"][:, None], t["gates"][:, None], 3, 2, torch.float64),
        *(None, 0, 2, False, False, None, None),
    ),
    "autoencode shared latents": lambda t: (
        *(t["x"], t["W"], t["bias"], None, None, t["experts"][:, None], t["gates"][:, None], 3, 2, torch.float64),
        *(None, 0, 2, False, False, None, None, t["W_dec"], torch.arange(4), 2, [], None),
    ),
    "autoencode in low precision": lambda t: (
        *(t["x"], t["W"], t["bias"], None, None, t["experts"], t["gates"], 2, 2, torch.float64, torch.bfloat16, 3),
        *(0, False, False, None, None, t["W_dec"], torch.arange(4), 2, [], None),
    ),
    "autoencode what is sorted": lambda t: (
        *(
            t["x"],
            t["W"],
            t["bias"],
            None,
            None,
            t["experts"],
            t["gates"],
            3,
            2,
            torch.float64,
            None,
            0,
            0,
            False,
            False,
        ),
        *(t["experts"].argsort(stable=True), torch.tensor([0, 3, 6]), t["W_dec"], None, 0, [], None),
    ),
    "autoencode shared latents of what is sorted": lambda t: (
        *(t["x"], t["W"], t["bias"], None, None, t["experts"][:, None], t["gates"][:, None], 3, 2, torch.float64),
        *(None, 0, 2, False, False, t["experts"].argsort(stable=True), torch.tensor([0, 3, 6])),
        *(t["W_dec"], torch.arange(4), 2, [], None),
    ),
    "autoencode over the batch": lambda t: (
        *(t["x"], t["W"], t["bias"], None, t["scale"], None, None, 17, 1, torch.float64, None, 0, 0, False, True),
        *(None, None, t["W_dec"], torch.arange(4), 2, [], None),
    ),
    "autoencode over the batch in levels": lambda t: (
        *(t["x"], t["W"], t["bias"], None, t["scale"], None, None, 17, 1, torch.float64, torch.bfloat16, 20),
        *(0, False, True, None, None, t["W_dec"], torch.arange(4), 2, [1, 3], torch.tensor([3, 8])),
    ),
    "encode over the batch with experts": lambda t: (
        *(t["x"], t["W"], t["bias"], None, None, t["experts"][:, None], t["gates"][:, None], 13, 2, torch.float64),
        *(None, 0, 2, False, True, None, None),
    ),
    "autoencode over the batch with experts in levels": lambda t: (
        *(t["x"], t["W"], t["bias"], None, None, t["experts"][:, None], t["gates"][:, None], 13, 2, torch.float64),
        *(torch.bfloat16, 15, 2, False, True, t["experts"].argsort(stable=True), torch.tensor([0, 3, 6])),
        *(t["W_dec"], torch.arange(4), 2, [], torch.tensor([1, 3])),
    ),
    "autoencode with experts in levels": lambda t: (
        *(t["x"], t["W"], t["bias"], None, None, t["experts"][:, None], t["gates"][:, None], 3, 2, torch.float64),
        *(None, 0, 0, False, False, None, None, t["W_dec"], torch.arange(4), 2, [], torch.tensor([1, 2, 4])),
    ),
}


LAYOUTS = {"contiguous": lambda t: t, "transposed": lambda t: t.mT.contiguous().mT if t.ndim == 2 else t}
layouts = pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS.keys())


def tensors_of(lay_out) -> dict[str, Tensor]:
    values, indices, W, g = make_codes(6, 5, 8, 3)
    leaves = {"values": values, "W": W, "g": g, "W_dec": W + 1, "x": g - 1, "bias": g[0].clone()}
    leaves["values_S"] = values.flatten()[:16]
    leaves = {name: lay_out(t.detach()).requires_grad_() for name, t in leaves.items()}
    others = {"indices": lay_out(indices), "scale": W.exp()[:, 0], "gates": values[:, 0]}
    others |= {"experts": torch.arange(6) % 2, "indices_S": indices.flatten()[:16]}
    others["offsets"] = torch.tensor([0, 2, 2, 9, 10, 15, 16])
    return leaves | others


@pytest.mark.filterwarnings("ignore")
@layouts
@pytest.mark.parametrize("name", OPERATORS)
def test_the_operators_are_torchs_own_citizens(name, lay_out):
    """Schema, fake implementation, autograd registration and tracing, by torch's own checks."""
    arguments = OPERATORS[name](tensors_of(lay_out))
    operator = name.split()[0]
    torch.library.opcheck(getattr(autoencode if operator == "autoencode" else operators, operator), arguments)


@layouts
@pytest.mark.parametrize("name", [n for n in OPERATORS if n.startswith("autoencode") and "is sorted" not in n])
@pytest.mark.parametrize("dense_up_to", [0, 10**9], ids=["sparse", "dense within experts"])
def test_the_joint_operators_gradients_have_the_strides_that_the_compiler_expects(
    name, dense_up_to, lay_out, monkeypatch
):
    monkeypatch.setitem(products._DENSE_UP_TO, "cpu", dense_up_to)
    with torch.no_grad():
        arguments = OPERATORS[name](tensors_of(lay_out))
        outputs = autoencode.Outputs(*autoencode.autoencode(*arguments))
    known = dict(zip(autoencode._ARGUMENTS, arguments, strict=True)) | outputs._asdict()
    given = {name: known.get(name) for name in autoencode.BackwardInputs._fields}
    given |= {"grad_out_BD": lay_out(torch.ones_like(outputs.out_BD))}
    given |= {"grad_values_BK": lay_out(torch.ones_like(outputs.values_BK))}
    if known["dead_N"] is not None:
        given["grad_aux_BD"] = lay_out(torch.ones_like(outputs.aux_out_BD))
    given |= {"needs_x": True, "needs_pre_bias": known["pre_bias_D"] is not None}
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(autoencode.autoencode_backward, tuple(given.values()), test_utils=checks)


@pytest.mark.parametrize("more", [set(), {"shared"}], ids=["routed", "shared"])
def test_torch_export_and_compile_trace_through(more):
    leaves, constants = autoencoder_inputs(20, 6, 4, 5, 2, {"expert_B", "gates_B", "pre_bias_D"} | more)

    class Module(torch.nn.Module):
        def forward(self, x_BD):
            return sparse_autoencode(**{**leaves, "x_BD": x_BD}, **constants).out_BD

    expected = Module()(leaves["x_BD"])
    exported = torch.export.export(Module(), (leaves["x_BD"],), strict=False)  # as by default since torch 2.7
    assert any("sae_lens_switch.autoencode" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(leaves["x_BD"]), expected, rtol=0, atol=0)

    W = leaves["W_enc_FD"].requires_grad_()
    grads = []
    for function in (Module(), torch.compile(Module(), backend="aot_eager", fullgraph=True)):
        grads.append(torch.autograd.grad(function(leaves["x_BD"]).square().sum(), W)[0])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_vmap_gives_right_numbers_and_functional_gradients_a_clear_error():
    values, indices, W, _ = make_codes(6, 5, 8, 3)
    stacked = torch.stack([values, 2 * values])
    batched = torch.vmap(lambda v: operators.sparse_decode(v, indices, W, None))(stacked)
    torch.testing.assert_close(batched, torch.stack([reference.sparse_decode(v, indices, W) for v in stacked]))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda W: sparse_decode(values, indices, W).square().sum())(W)
