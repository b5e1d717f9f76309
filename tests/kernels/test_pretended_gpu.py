"""A training step on torch's meta device in place of a GPU: its tensors have no values, so whatever would synchronise
to read one back raises, and every copy from the host is seen."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from sae_lens.saes.sae import TrainStepOutput
from sae_lens_switch_kernels import RowGrads, autoencode, operators, products
from sae_lens_switch_kernels.indexing import one_group
from sae_lens_switch_kernels.inputs import EncoderInputs
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_switch.saes.sparse_codes import SparseCodes
from sae_lens_switch.saes.sparse_sae import SparseStepOutput, aux_loss
from sae_lens_switch.training.optim.row_sparse_adam import RowSparseAdam
from sae_lens_switch.training.trainer import SparseSAETrainer, _firings

B, D, F, K = 40, 16, 96, 3


class Copies(TorchDispatchMode):
    """Operators that bring a host's tensor to the device; the host waits for each, and none can be captured."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        result = func(*args, **(kwargs or {}))
        name, tensors = func.overloadpacket.__name__, [a for a in args if isinstance(a, torch.Tensor)]
        if name in ("_to_copy", "copy_") and result.is_meta and not all(t.is_meta for t in tensors):
            self.found.append(name)
        return result


class Constructions(TorchFunctionMode):
    """Tensors made of the host's numbers, which on a GPU are such copies too, and on the meta device are none."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], torch.Tensor):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def copies():
    found: list[str] = []
    with torch.no_grad(), Copies(found), Constructions(found):
        yield found


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_copy_from_the_host_is_seen(copies):
    torch.tensor([0, 3], device="meta")
    torch.as_tensor(3, device="meta")
    torch.zeros(1).to("meta")
    on_device(1).copy_(torch.zeros(1))
    assert copies == ["tensor", "as_tensor", "_to_copy", "copy_"]


@pytest.mark.parametrize("n_experts", [1, 4])
@pytest.mark.parametrize("dense_up_to", [0, 10**9], ids=["sparse", "dense within experts"])
def test_forward_and_backward_copy_nothing_and_wait_for_nothing(copies, n_experts, dense_up_to, monkeypatch):
    pytest.importorskip("triton")
    from sae_lens_switch_kernels import triton_backend
    from sae_lens_switch_kernels.triton_backend.blocks import Arch
    from sae_lens_switch_kernels.triton_backend.launch import recording

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no meta device
    for module in (operators, autoencode):
        monkeypatch.setattr(module, "primitives", lambda _: triton_backend)
    monkeypatch.setattr(products, "_DENSE_UP_TO", {"meta": dense_up_to})
    x, W_enc, W_dec = on_device(B, D), on_device(F, D), on_device(F, D)
    several = n_experts > 1
    expert = on_device(B, dtype=torch.int64) if several else None
    gates = on_device(B) if several else None
    pre_bias, bias = on_device(D), None if several else on_device(F)
    with recording(Arch(lanes=32, shared=232448)) as launches:
        out, values, indices, _, *aux, centered = autoencode.forward(
            EncoderInputs(x, W_enc, pre_bias, bias, None, expert, K, n_experts, torch.float32),
            autoencode.DecoderInputs(W_dec, gates, None, 0),
        )
        saved = x, centered, W_enc, W_dec, gates, expert, None, values, indices, *aux
        grads = autoencode.backward(
            autoencode.BackwardInputs(out, None, None, *saved, n_experts, torch.float32, True, True),
            RowGrads(active_only=False),
        )
    assert launches
    assert [tuple(g.shape) for g in grads[:3]] == [(B, D), (F, D), (F, D)]
    assert copies == []


def test_the_offsets_of_one_group_are_made_on_the_device(copies):
    assert one_group(B, torch.device("meta")).offsets_E1.device.type == "meta"
    assert copies == []


@pytest.mark.parametrize("n_tokens", [0, 1, 7])
def test_one_group_is_all_tokens(n_tokens):
    order, offsets = one_group(n_tokens, torch.device("cpu"))
    assert order is None
    assert offsets.dtype == torch.int64
    assert offsets.tolist() == [0, n_tokens]


def test_the_weight_of_aux_k_is_made_on_the_device(copies):
    sae = SimpleNamespace(
        cfg=SimpleNamespace(d_in=D, aux_k=8, aux_loss_coefficient=0.5), reshape_fn_out=lambda x, _: x, d_head=None
    )
    assert aux_loss(sae, on_device(B, D), on_device(B, D), on_device(B, D), 5).device.type == "meta"
    assert copies == []


def test_firing_is_counted_on_the_device(copies):
    trainer = SimpleNamespace(
        _pass=on_device(dtype=torch.int32),
        _last_fired_F=on_device(F, dtype=torch.int32),
        act_freq_scores=on_device(F),
    )
    x = on_device(B, D)
    fields = dict.fromkeys(TrainStepOutput.__annotations__) | {"sae_in": x}
    fields.pop("feature_acts")
    output = SparseStepOutput(codes=SparseCodes(on_device(B, K), on_device(B, K, dtype=torch.int64), F), **fields)
    SparseSAETrainer._count_fired(trainer, [_firings(output)], on_device(dtype=torch.bool))  # type: ignore[arg-type]
    assert copies == []


def test_row_sparse_adam_steps_a_parameter_that_is_no_matrix(copies):
    sae = torch.nn.Module()
    for name, shape in {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,)}.items():
        setattr(sae, name, torch.nn.Parameter(on_device(*shape)))
    sae.cfg, sae.row_grads = SimpleNamespace(normalize_decoder=True, project_decoder_grad=True), None
    optimizer = RowSparseAdam(sae, lr=0.1)
    sae.b_dec.grad = on_device(D)
    optimizer.step()
    assert copies == []
    assert optimizer.state[sae.b_dec]["moments"].device.type == "meta"
