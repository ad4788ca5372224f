"""A launcher gives what its function gives, call after call, on any device."""

from __future__ import annotations

import numpy as np
import pytest
from tinygrad import Device, Tensor, TinyJit, UOp
from tinygrad.helpers import DEV

from tinygpt.launch import Launcher
from tinygpt.model import read, write
from tinygpt.parallel import as_tensor


def tensor(values: list[float]) -> Tensor:
    return Tensor(np.array(values, np.float32)).realize()


def test_new_values_in_the_same_memory() -> None:
    x, weight = tensor([1, 2, 3]), tensor([10, 20, 30])
    launch = Launcher(lambda: (x * weight + 1).realize(), Device.DEFAULT)
    for values in ([1, 2, 3], [0, 1, 0], [-1, 5, 7], [4, 4, 4]):
        write(x, np.array(values, np.float32))
        expected = np.array(values) * [10, 20, 30] + 1
        np.testing.assert_array_equal(read(launch()), expected)


def test_variables_change_from_call_to_call() -> None:
    """One moves a window, the other sets its length."""
    x = tensor(list(range(32)))
    start, length = UOp.variable("start", 0, 15), UOp.variable("length", 1, 16)

    def window(start: UOp, length: UOp) -> Tensor:
        return x[start : start + length].sum().reshape(1).realize()

    launch = Launcher(window, Device.DEFAULT, (start, length))
    for a, n in ((0, 1), (3, 16), (15, 2), (7, 7), (0, 16)):
        assert read(launch(a, n)).tolist() == [sum(range(a, a + n))]


def test_state_that_is_assigned() -> None:
    state, step = tensor([0, 0]), tensor([1, 2])
    launch = Launcher(lambda: state.assign(state + step).realize(), Device.DEFAULT)
    for n in range(1, 6):
        launch()
        np.testing.assert_array_equal(read(state), [n, 2 * n])


@pytest.mark.skipif(Device.DEFAULT != "CPU", reason="other devices leave it to TinyJit")
def test_kernels_are_called_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tensor([1, 2])
    launch = Launcher(lambda: (x + 1).realize(), Device.DEFAULT)
    launch()
    assert len(launch.calls) == 1 and launch.calls[0].name
    assert launch.calls[0].operations == 2 or DEV.renderer == "X86"  # where they are not known
    monkeypatch.setattr(TinyJit, "__call__", None)  # no longer needed
    assert read(launch()).tolist() == [2, 3]


@pytest.mark.skipif(Device.DEFAULT != "CPU", reason="other devices leave it to TinyJit")
def test_the_same_kernels_over_other_memory() -> None:
    """What is moved and what is written is apart; what is only read, here `weight`, is shared."""
    here, there = (
        [np.array(x, np.float32), np.zeros(2, np.float32)]
        for x in ([[1, 2], [3, 4]], [[5, 6], [7, 8]])
    )
    x, total = (as_tensor(array) for array in here)
    weight = tensor([10, 100])

    def sums() -> None:
        product = (x * weight).contiguous()  # an intermediate result, as of layers
        total.assign(total + product.sum(axis=1)).realize()

    launch = Launcher(sums, "CPU")
    launch()
    addresses = [[array.ctypes.data for array in arrays] for arrays in (here, there)]
    other = launch.over(dict(zip(*addresses, strict=True)))
    for _ in range(3):
        other()
    assert here[1].tolist() == [210, 430] and there[1].tolist() == [3 * 650, 3 * 870]
    launch()
    assert here[1].tolist() == [420, 860] and there[1].tolist() == [3 * 650, 3 * 870]
    assert len(launch.calls) > 1
    write(weight, np.array([1, 1], np.float32))
    other()
    assert there[1].tolist() == [3 * 650 + 11, 3 * 870 + 15]


@pytest.mark.skipif(Device.DEFAULT != "CPU", reason="other devices leave it to TinyJit")
@pytest.mark.parametrize("size", [1, 3])
def test_new_memory_of_any_size(size: int) -> None:
    """Results are written anew, here 4 or 12 bytes of them; the first ones stay as they are."""
    x = tensor([2.0] * size)
    launch = Launcher(lambda: (x * x).realize(), "CPU")
    first = launch()
    other = launch.over({})
    write(x, np.full(size, 3, np.float32))
    assert other() is None
    assert read(first).tolist() == [4.0] * size and read(launch()).tolist() == [9.0] * size
