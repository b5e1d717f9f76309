"""The private operators of torch that the kernels use: that they are there, and do what they are used for."""

import re
from pathlib import Path

import pytest
import sae_lens_switch_kernels
import torch
from sae_lens_switch_kernels import torch_private

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("stored", ["by latent", "by dimension"])
def test_the_dot_products_of_an_embedding_bag_are_those_of_given_rows(dtype, index_dtype, stored):
    generator = torch.Generator().manual_seed(0)
    g, W = (torch.randn(n, 33, generator=generator, dtype=dtype) for n in (5, 700))
    W = W if stored == "by latent" else W.T.contiguous().T
    indices = torch.randint(0, 700, (41,), generator=generator).to(index_dtype)
    rows = torch.randint(0, 5, (41,), generator=generator).to(index_dtype)  # in no order, and some not at all
    found = torch_private.bag_dots(g, W, indices, rows)
    exact = torch.stack([g[r].double() @ W[i].double() for r, i in zip(rows.tolist(), indices.tolist(), strict=True)])
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_error_is_written_once_and_is_autograds():
    out, x, grad = (torch.randn(7, 33) for _ in range(3))
    leaf = out.clone().requires_grad_()
    torch.nn.functional.mse_loss(leaf, x, reduction="none").backward(grad)
    assert torch.equal(torch_private.mse_backward(grad, out, x), leaf.grad)


def test_the_assertion_on_a_device_raises_its_message_or_nothing():
    torch_private.assert_on_device(torch.tensor(True), "never said")
    torch_private.assert_on_device(torch.ones((), dtype=torch.bool, device="meta"), "nor here")
    with pytest.raises(RuntimeError, match=r"expert_B must lie in \[0, 3\)"):
        torch_private.assert_on_device(torch.tensor(False), "expert_B must lie in [0, 3)")


def test_a_tensors_version_changes_with_it_and_can_be_counted_up():
    t = torch.zeros(2)
    seen = [torch_private.version_of(t)]
    assert torch_private.version_of(t) == seen[0]
    for write in (lambda: t.add_(1), lambda: t.detach()[1:].zero_(), lambda: torch.autograd.graph.increment_version(t)):
        write()
        assert torch_private.version_of(t) not in seen
        seen.append(torch_private.version_of(t))


def test_no_other_file_of_the_kernels_calls_an_operator_by_its_private_name():
    folder = Path(sae_lens_switch_kernels.__file__).parent
    files = {file.name for file in folder.rglob("*.py") if re.search(r"torch\.(ops|_C|_\w+)\b", file.read_text())}
    assert files == {"torch_private.py"}
