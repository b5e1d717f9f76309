"""Working copies: never another number than the weight's own, rounded."""

import pytest
import torch
from sae_lens_switch_kernels import WorkingCopies, working_copy
from torch import Tensor, nn

F, D = 40, 12
LOW = torch.bfloat16


def weight(transposed: bool = False) -> nn.Parameter:
    W_FD = torch.randn(F, D, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(W_FD.T if transposed else W_FD)


def is_copy(copies: WorkingCopies, low: Tensor) -> bool:
    """Whether it is no cast of its own."""
    numbers = [copy.numbers for copy in copies._copies if copy.numbers is not None]
    return low.untyped_storage().data_ptr() in [t.untyped_storage().data_ptr() for t in numbers]


def test_without_an_offer_every_call_is_a_cast():
    W = weight()
    copies = WorkingCopies([W])
    for _ in range(2):
        low = working_copy(W, LOW)
        assert torch.equal(low, W.to(LOW))
        assert not is_copy(copies, low)
    with copies.offered():
        working_copy(W, LOW)
    low = working_copy(W, LOW)
    assert not is_copy(copies, low)


@pytest.mark.parametrize("transposed", [False, True])
def test_inside_an_offer_it_is_one_memory_whatever_view_is_asked_for(transposed):
    W = weight(transposed)
    copies = WorkingCopies([W])
    addresses = set()
    for step in range(3):
        with copies.offered(), torch.no_grad():
            for view in (W, W.T, W[3:7], W.T[2:3], W[:, 1:5], W.detach().view_as(W), W.data, W[1]):
                low = working_copy(view, LOW)
                assert torch.equal(low, view.to(LOW))
                assert low.stride() == view.stride()
                assert is_copy(copies, low)
            addresses.add(working_copy(W, LOW).data_ptr())
            W.add_(step + 1)
    assert len(addresses) == 1


def test_what_has_no_copy_is_cast():
    W, other = weight(), weight()
    vector, gaps = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(8, 6)[:, ::2])
    copies = WorkingCopies([W, vector, gaps])
    with copies.offered():
        for t in (other, vector, gaps, W[:0], W[2:2].T, W * 1):
            low = working_copy(t, LOW)
            assert torch.equal(low, t.to(LOW))
            assert not is_copy(copies, low)
        assert is_copy(copies, working_copy(W, LOW))
        half = working_copy(W, torch.float16)  # the copy is in bfloat16
        assert torch.equal(half, W.to(torch.float16))
        assert working_copy(W, torch.float32) is W


WRITES = {
    "in place": lambda W: W.add_(1),
    "through detach": lambda W: W.detach().mul_(2),
    "to a view": lambda W: W.T[3].zero_(),
    "to a row of a detached view": lambda W: W.detach()[1:2].fill_(7),
    "new data": lambda W: setattr(W, "data", torch.randn(F, D)),
    "new data in other order": lambda W: setattr(W, "data", torch.randn(D, F).T),
    "a state dict": lambda W: _load(W, torch.randn(F, D)),
    "through .data, and counted": lambda W: (W.data.mul_(3), torch.autograd.graph.increment_version(W)),
    "an optimiser of torch": lambda W: _step(W),
}


def _load(W: nn.Parameter, numbers: Tensor) -> None:
    module = nn.Module()
    module.W = W
    module.load_state_dict({"W": numbers})


def _step(W: nn.Parameter) -> None:
    W.grad = torch.ones_like(W)
    torch.optim.SGD([W], lr=0.5).step()
    W.grad = None


@pytest.mark.parametrize("inside", [False, True], ids=["between steps", "within a step"])
@pytest.mark.parametrize("how", WRITES)
def test_after_any_write_it_is_written_anew(how, inside):
    W = weight()
    copies = WorkingCopies([W])
    with torch.no_grad():
        with copies.offered():
            low = working_copy(W, LOW)
            before = low.clone()
            if inside:
                WRITES[how](W)
                assert torch.equal(working_copy(W, LOW), W.to(LOW))
        if not inside:
            WRITES[how](W)
        with copies.offered():
            captured = copies._copies[0].numbers.clone()  # what a captured step would read, without asking
            assert torch.equal(working_copy(W, LOW), W.to(LOW))
            assert is_copy(copies, working_copy(W, LOW))
    assert not torch.equal(before, W.to(LOW))
    if how != "new data in other order":
        assert torch.equal(captured.view(F, D), W.to(LOW))


def test_memory_that_another_weight_had_before_is_no_proof():
    """Neither of a weight that moved away and back, nor of a tensor whose memory it had."""
    W = weight()
    copies = WorkingCopies([W])
    with copies.offered():
        working_copy(W, LOW)
    first = W.data
    W.data = torch.empty(0)
    first.mul_(5)  # not counted
    second = first.clone()
    del first
    W.data = second
    with copies.offered():
        assert torch.equal(working_copy(W, LOW), W.to(LOW))
        old = W.data
        W.data = torch.randn(F, D)
        assert torch.equal(working_copy(old, LOW), old.to(LOW))
        assert torch.equal(working_copy(W, LOW), W.to(LOW))


def test_a_weight_that_changes_its_dtype_or_layout_gets_a_new_copy_or_none():
    W = weight()
    copies = WorkingCopies([W])
    with copies.offered():
        working_copy(W, LOW)
    W.data = W.data.double()
    with copies.offered():
        assert torch.equal(working_copy(W, LOW), W.to(LOW))
    W.data = W.data.to(LOW)
    with copies.offered():
        assert working_copy(W, LOW) is W


def test_what_is_written_with_its_weight_stays_current_without_a_cast():
    W = weight(transposed=True)
    copies = WorkingCopies([W])
    with copies.written(W) as copy:
        assert copy is None
    with copies.offered():
        address = working_copy(W, LOW).data_ptr()
    W.data = W.data.T  # as an optimiser swaps it
    version = W._version
    with copies.written(W) as copy:
        assert copy.shape == W.shape == (F, D)
        new = torch.randn(F, D)
        W.data.copy_(new)  # as a kernel writes: not counted
        copy.copy_(new)
    assert W._version == version + 1
    W.data = W.data.T
    assert copies._copies[0].is_current
    with copies.offered():
        low = working_copy(W, LOW)
        assert low.data_ptr() == address
        assert torch.equal(low, new.T.to(LOW))


def test_a_copy_that_was_stale_is_not_handed_out_to_be_written_in_part():
    W = weight()
    copies = WorkingCopies([W])
    with copies.offered():
        working_copy(W, LOW)
    with torch.no_grad():
        W.add_(1)
    with copies.written(W) as copy:
        assert copy is None
    with copies.offered():
        assert torch.equal(working_copy(W, LOW), W.to(LOW))


def test_a_write_that_fails_leaves_it_stale():
    W = weight()
    copies = WorkingCopies([W])
    with copies.offered():
        working_copy(W, LOW)

    def half_a_step() -> None:
        with copies.written(W):
            W.data.mul_(2)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        half_a_step()
    with copies.offered():
        assert torch.equal(working_copy(W, LOW), W.to(LOW))


def test_two_offers_of_one_weight_end_one_by_one():
    W = weight()
    first, second = WorkingCopies([W]), WorkingCopies([W])
    with first.offered():
        with second.offered():
            assert is_copy(second, working_copy(W, LOW))
        low = working_copy(W, LOW)
        assert torch.equal(low, W.to(LOW))
        assert not is_copy(second, low)
    assert not is_copy(first, working_copy(W, LOW))


def test_a_backward_pass_in_another_thread_finds_it():
    from threading import Thread

    W, found = weight(), []
    copies = WorkingCopies([W])
    with copies.offered():
        thread = Thread(target=lambda: found.append(is_copy(copies, working_copy(W.T, LOW))))
        thread.start()
        thread.join()
    assert found == [True]
