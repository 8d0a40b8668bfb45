"""Memory that is written again, or given back, changes no result."""

import mmap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ekfac_func import Contractions, Order, ekfac, second_moments
from ekfac_func.memory import Rooms, empty, scratch, writable
from ekfac_func.products import outer, rotate

from .cases import N, make
from .oracles import close, same_bits

CASES = ["mlp", "reused", "conv padding", "conv groups", "conv valid", "pairs of pixels"]
FORMED = [Order.PROJECT_BOTH, Order.PROJECT_INPUTS, Order.PROJECT_OUTPUTS, Order.FORM_FIRST]


@pytest.mark.parametrize("order", FORMED, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_steps(monkeypatch: pytest.MonkeyPatch, name: str, order: Order) -> None:
    """With an example a block, so that rooms are written again."""
    case = make(name)
    batches = [case.batch(N) for _ in range(2)]
    how = Contractions(max_bytes=1, orders={"*weight": order})

    def run() -> object:
        step = ekfac(case.loss_fn, damping=1e-2, contractions=how)
        state, found = step.init(case.params, batches[0]), []
        for batch in batches:
            natural, state, _ = step.precondition(case.params, batch, state)
            found.append((natural, second_moments(case.loss_fn, case.params, batch, state.bases, contractions=how)))
        return found

    expected = run()
    for limit in ("memory.SCRATCH_BYTES", "memory.LARGE_BYTES", "products.LARGE_BYTES"):
        monkeypatch.setattr(f"ekfac_func.{limit}", 1)
    same_bits(run(), expected)
    for advice in (None, 9999):  # where the system has none, or its kernel
        monkeypatch.setattr("ekfac_func.memory.HUGE_PAGES", advice)
        same_bits(run(), expected)


def test_rooms_take_turns() -> None:
    rooms, like = Rooms(), torch.zeros(1)
    first, second, third, smaller = (rooms.take(shape, like) for shape in ((3, 4), (3, 4), (4, 3), (2,)))
    assert third.data_ptr() == first.data_ptr() != second.data_ptr() == smaller.data_ptr()
    assert rooms.take((5, 5), like).shape == (5, 5)
    assert rooms.take((2,), like.float()).dtype == torch.float32


def test_products_in_rooms() -> None:
    rooms = Rooms()
    x, y, Q = torch.randn(3, 6, 4), torch.randn(3, 6, 5), torch.randn(4, 7)
    one, other = outer(x, y, rooms), rotate(x, Q, rooms)
    close(one, x.mT @ y)
    close(other, x @ Q)
    assert outer(x, y, rooms).data_ptr() == one.data_ptr()
    asked = torch.func.grad(lambda x: outer(x, y, rooms).sin().sum())(x)  # its product is kept, so it has no room
    close(asked, torch.func.grad(lambda x: (x.mT @ y).sin().sum())(x))


def test_what_may_be_written() -> None:
    x = torch.ones(2)
    assert writable(x)
    assert not writable(x.clone().requires_grad_())
    assert not writable(torch.nn.Parameter(x))
    assert not writable(torch.ones(2, device="meta"))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert not writable(fake)
    assert not writable(fake)
    torch.func.vmap(lambda t: [t, None][writable(t)])(x[None])


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="only Linux has them")
def test_large_ones() -> None:
    """Their first and last entries can be written, and they live as long as a view of them."""
    like = torch.zeros((), dtype=torch.float32)
    for make_one in (empty, scratch):
        large = make_one((2**23 + 5,), like)
        large[0], large[-1] = 1.0, 2.0
        view = large[-5:]
        del large
        assert view[-1] == 2
