"""Every operator of torch that is not part of its public API, each with the reason for its use.

tests/kernels/test_torch_private.py fails where a version of torch changes one of them.
"""

import torch
from torch import Tensor


def assert_on_device(condition: Tensor, message: str) -> None:
    """Raise ``message`` unless ``condition`` holds, without waiting for the device.

    On a GPU torch reports the failure at the next synchronisation.
    """
    # NOTE(private API): aten._assert_async, checked on torch 2.13. torch._assert and reading the condition back
    # synchronise with the device, once per call.
    torch.ops.aten._assert_async.msg(condition, message)


def version_of(t: Tensor) -> tuple[int, int]:
    """Changes when a tensor is given other memory, and when it or a view of it is written to.

    Not by writes through ``.data``, nor by those of torch's fused optimisers.
    """
    # NOTE(private API): Tensor._version, checked on torch 2.13: the counter by which autograd knows that a tensor it
    # has saved was written to since. torch.autograd.graph.increment_version, which is public, sets it.
    return t.data_ptr(), t._version


def mse_backward(grad_BD: Tensor, out_BD: Tensor, x_BD: Tensor) -> Tensor:
    """The gradient of ``mse_loss(out, x, reduction="none")`` in out, in one pass."""
    # NOTE(private API): aten.mse_loss_backward, checked on torch 2.13: what autograd itself calls. It fills the result
    # with zeros first unless it is given the memory. 0 is "none".
    given_BD = torch.empty_like(out_BD)
    return torch.ops.aten.mse_loss_backward.grad_input(grad_BD, out_BD, x_BD, 0, grad_input=given_BD)


def has_bag_dots(W_FD: Tensor) -> bool:
    """Whether ``bag_dots`` is the fastest route to the products with such weights."""
    return W_FD.device.type == "cpu" and W_FD.dtype in (torch.float32, torch.float64)


def bag_dots(g_QD: Tensor, W_FD: Tensor, indices_S: Tensor, rows_S: Tensor) -> Tensor:
    """<g[rows[s]], W[indices[s]]>; call it only where ``has_bag_dots``."""
    # NOTE(private API): aten._embedding_bag_per_sample_weights_backward, checked on torch 2.13: what autograd calls for
    # the weights of embedding_bag's samples, which are these products. Faster than sampled_addmm
    # (benchmarks/primitives.py), and there without MKL. The last arguments: the sum as the bag's mode, and no row of W
    # that is padding. On a CPU the offsets are not read where the row of each sample is given.
    offsets = rows_S.new_zeros(1)
    if W_FD.stride(1) != 1:  # stored as [D, F]: to read a row of it is slower than to copy all
        W_FD = W_FD.contiguous()
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(g_QD, W_FD, indices_S, offsets, rows_S, 0, -1)
