"""What counts as equal, in one place, and how a difference is told.

The error of a tensor is max |a - b| / max |b|: the largest difference, relative to the largest
value. (Relative to each value on its own would ask the impossible: a sum of numbers near 1 that
happens to be near 0 keeps their rounding errors.) Where the reference is smaller than any normal
number of the dtype, 1 takes the place of max |b|.

The bound is a number of roundings times the unit roundoff of the dtype. A sum of n products
carries up to n roundings, about sqrt(n) as they partly cancel; a chain of operations adds those of
its links. Backends sum in different orders, fuse multiplication and addition or do not, and bring
their own exp: bounds leave room for that, not for a wrong formula. The most that any backend was
seen to need stands beside each.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from tinygrad import Tensor

Array = npt.NDArray[np.float64]

UNIT_ROUNDOFF = {"float32": 2.0**-24}

# Reason for the bound, and in brackets the most roundings that a backend was seen to need among
# CPU (clang, zig, LLVM, X86, with kernels and without), OpenCL, WebGPU and the emulator.
ROUNDINGS = {
    "exact": 0,  # rows are copied, nothing is computed
    "operation": 16,  # sums of a dozen values [3]
    "embedding": 1,  # one addition [0.5]
    "embedding gradient": 16,  # a few places add up in a row [1]
    "linear": 16,  # dot products of up to 33 values [3]
    "linear gradient": 16,  # and of up to 65 [4]
    "layer_norm": 32,  # values lie five deviations from 0: the mean's rounding counts fivefold [9]
    "layer_norm gradient": 64,  # the same, and what remains of three terms that cancel [17]
    "activation": 16,  # erf of some backends is a polynomial, good to 1.5e-7 [1]
    "activation gradient": 64,  # far right, x (1 - tanh^2) multiplies what 1 - tanh^2 lost [19]
    "attention": 16,  # dot products, exp, sums of up to 17 values [3]
    "attention gradient": 32,  # the same twice over [8]
    "cross_entropy": 16,  # logits of some hundreds, less the largest; exp, log [1]
    "cross_entropy gradient": 16,  # exp and a division [3]
    "orthogonalized": 250,  # five steps; each may triple an error, as it does small singular values
    "logits": 80,  # two blocks; layer norms over three channels magnify what comes in [25]
    "loss": 32,  # the logits' errors average out; sums over all places do not [4]
    "gradient": 256,  # forward and back again through the same layer norms [106]
    "loss of a run": 64,  # the loss, of weights that differ as below [6]
    # AdamW divides each gradient by its own running size. Where that is a thousandth of the
    # largest in its tensor, the gradient's rounding error counts a thousandfold.
    "after 1 step": 160,  # nearly only the first moments, which are gradients [44]
    "after 20 steps": 400,  # [109]
    # Newton and Schulz's steps magnify small singular values, and what rounding adds to them: the
    # reference itself, rounded once a step, strays by 410.
    "after 20 steps of Muon": 1600,  # [570]
    "after 50 steps": 400,  # only the weights [62]
}

largest: dict[str, float] = {}  # by kind, the largest error of this run


def assert_close(
    kind: str,
    actual: Mapping[str, Tensor | npt.NDArray[np.floating]],
    expected: Mapping[str, npt.NDArray[np.floating]],
) -> None:
    """Every tensor has the reference's name, shape and values, to the bound of its kind.

    Raises AssertionError with a line for each tensor that differs: its name, how many values are
    beyond the bound, and the worst of them with its index, both values and the relative error.
    """
    assert set(actual) == set(expected), "names differ: " + ", ".join(set(actual) ^ set(expected))
    complaints = []
    for name, b in expected.items():
        tensor = actual[name]
        a = tensor.numpy() if isinstance(tensor, Tensor) else np.asarray(tensor)
        assert a.shape == b.shape, f"{name} has shape {a.shape}, the reference {b.shape}"
        bound = ROUNDINGS[kind] * UNIT_ROUNDOFF[str(a.dtype)]
        error = relative_error(a, b)
        largest[kind] = max(largest.get(kind, 0.0), float(error.max()))
        if error.max() > bound:
            complaints.append(_complaint(name, a, b, error, bound))
    assert not complaints, f"{kind} differs from the reference\n" + "\n".join(complaints)


def relative_error(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> Array:
    """|a - b| / max |b| for each value; infinite where a is not a number."""
    scale = float(np.abs(b).max())
    if scale < np.finfo(a.dtype).tiny:
        scale = 1.0
    return np.nan_to_num(np.abs(a.astype(np.float64) - b) / scale, nan=np.inf)


def _complaint(
    name: str,
    a: npt.NDArray[np.floating],
    b: npt.NDArray[np.floating],
    error: Array,
    bound: float,
) -> str:
    worst = np.unravel_index(int(error.argmax()), error.shape)
    index = ", ".join(str(int(i)) for i in worst)
    return (
        f"  {name} {b.shape}: {int((error > bound).sum())} of {error.size} values beyond "
        f"{bound:.1e}; worst at [{index}]: {float(a[worst]):.9g}, reference "
        f"{float(b[worst]):.9g}, relative error {float(error[worst]):.1e}"
    )
