"""A launcher gives what its function gives, call after call, on any device."""

from __future__ import annotations

import numpy as np
import pytest
from tinygrad import Device, Tensor, TinyJit, UOp
from tinygrad.helpers import DEV

from tinygpt.launch import Launcher
from tinygpt.model import read, write


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
