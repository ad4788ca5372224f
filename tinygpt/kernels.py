"""The operations of a GPT as kernels for a CPU: what `model.py` hands over to where that is faster.

tinygrad's own CPU kernels unroll a product into scalars, which clang vectorizes badly, and its
scheduler fuses cheap work into products and computes it again for every output. Here an operation
is one kernel, written in tinygrad's UOps as plain nested loops, which clang vectorizes well. Every
operation has a twin in plain Tensor code, which defines it and against which it is tested.

`usable` says when an operation may be handed over; `off()` and TINYGPT_KERNELS=0 keep it from that.
The operations work under TinyJit, and tinygrad's autograd calls their gradients.

First comes a small vocabulary for writing kernels, then the kernels, each with the operation that
calls it. Times are of one training step of the `micro` preset on one core of a Xeon with AVX-512,
which multiplies and adds 165 GFLOP/s at the most: the step's products alone would take 22 ms.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.dtype import AddrSpace, DType
from tinygrad.renderer import Estimates
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.uop.ops import KernelInfo

from tinygpt.config import Activation

Value = UOp | float
Index = UOp | int
Indices = Index | tuple[Index, ...]

# The switch ---------------------------------------------------------------------------------------

_allowed = ContextVar("tinygpt_kernels", default=True)


@contextmanager
def off() -> Iterator[None]:
    """Inside, `usable` is False and the plain code runs, in this thread."""
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def usable(x: Tensor) -> bool:
    """Whether kernels may compute with x: float32, on one CPU device, compiled by clang."""
    if os.environ.get("TINYGPT_KERNELS") == "0" or not _allowed.get():
        return False
    on_cpu = isinstance(x.device, str) and x.device.split(":")[0] == "CPU"
    known = x.dtype == dtypes.float and all(isinstance(n, int) and n > 0 for n in x.shape)
    return on_cpu and known and type(Device[x.device].renderer) is ClangRenderer


# Vocabulary ---------------------------------------------------------------------------------------


class Array:
    """Memory that a kernel reads and writes: an argument, or an array on the stack.

    `a[i, j]` is the value at that point of the program. Use it before the next store to it.
    """

    def __init__(self, kernel: Kernel, memory: UOp, shape: tuple[int, ...], constant: bool = False):
        self.kernel, self.memory, self.shape, self.constant = kernel, memory, shape, constant

    def __getitem__(self, index: Indices) -> UOp:
        offset = UOp.const(0)
        indices = index if isinstance(index, tuple) else (index,)
        for size, i in zip(self.shape, indices, strict=True):
            offset = offset * size + i
        return (self.memory if self.constant else self.kernel.now(self.memory))[offset]

    def __setitem__(self, index: Indices, value: Value) -> None:
        self.kernel.then(self[index].store(value))

    def view(self, *shape: int) -> Array:
        return Array(self.kernel, self.memory, shape)


class Program(NamedTuple):
    kernel: UOp
    outputs: list[tuple[int, ...]]


class Kernel:
    """A kernel in the making; its loops, loads and stores are written in the order they run in.

    tinygrad's UOps are a graph, without order but for what a node names as its sources. So each
    load and store names the store before it, `last`, and the loops entered since.
    """

    def __init__(self, name: str, *sizes: int):
        self.name = "_".join([name, *map(str, map(int, sizes))])
        self.last: UOp | None = None
        self.entered: list[UOp] = []
        self.outputs: list[tuple[int, ...]] = []
        self.arguments = self.ids = 0

    def now(self, memory: UOp) -> UOp:
        return memory.after(*([] if self.last is None else [self.last]), *self.entered)

    def then(self, effect: UOp) -> None:
        self.last, self.entered = effect, []

    def output(self, *shape: int) -> Array:
        """The next argument, float32. Outputs come first; scratch memory is an output too."""
        self.outputs.append(shape)
        return self._argument(shape, dtypes.float, constant=False)

    def input(self, *shape: int, dtype: DType = dtypes.float) -> Array:
        """The next argument, which is never written."""
        return self._argument(shape, dtype, constant=True)

    def _argument(self, shape: tuple[int, ...], dtype: DType, constant: bool) -> Array:
        self.arguments += 1
        memory = UOp.placeholder((math.prod(shape),), dtype, self.arguments - 1)
        return Array(self, memory, shape, constant)

    def array(self, *shape: int, dtype: DType = dtypes.float) -> Array:
        """On the C stack, which is small in threads; what is small enough ends up in registers."""
        memory = UOp.placeholder((math.prod(shape),), dtype, self._id(), addrspace=AddrSpace.REG)
        return Array(self, memory, shape)

    @contextmanager
    def loop(self, count: Index) -> Iterator[UOp]:
        """Runs its body for 0 to count - 1. A count that is computed must be below 65536."""
        if isinstance(count, UOp):
            # tinygrad cannot end a loop whose bound depends on an outer loop. So the bound passes
            # through memory, by a load that names no store: as long as it is loaded nowhere else,
            # tinygrad writes the load where it is used, into the loop's head.
            bound = self.array(1, dtype=dtypes.uint16)
            bound[0] = count.cast(dtypes.uint16)
            count = bound.memory[UOp.const(0)].cast(dtypes.weakint)
        index = UOp.range(count, self._id())
        self.entered.append(index)
        yield index
        assert self.last is not None
        self.then(self.last.end(index))

    def sum(self, count: Index, value: Callable[[UOp], UOp]) -> UOp:
        """value(0) + ... + value(count - 1); see `_fold` for a count that is computed."""
        return self._fold(count, value, lambda a, b: a + b, 0.0)

    def max(self, count: Index, value: Callable[[UOp], UOp]) -> UOp:
        return self._fold(count, value, UOp.maximum, -math.inf)

    def _fold(
        self,
        count: Index,
        value: Callable[[UOp], UOp],
        combine: Callable[[UOp, UOp], UOp],
        start: float,
    ) -> UOp:
        """In as many lanes as a tile has columns; a computed count must be a multiple of them.

        Clang may not change the order of a float sum by itself, and so would not vectorize it.
        """
        width = register_tile().columns
        lanes = self.array(width)
        with self.loop(width) as lane:
            lanes[lane] = start
        full, rest = (count // width, 0) if isinstance(count, UOp) else divmod(count, width)
        if isinstance(full, UOp) or full:
            with self.loop(full) as chunk, self.loop(width) as lane:
                lanes[lane] = combine(lanes[lane], value(chunk * width + lane))
        if rest:
            with self.loop(rest) as lane:
                lanes[lane] = combine(lanes[lane], value(count - rest + lane))
        while width > 1:
            width //= 2
            with self.loop(width) as lane:
                lanes[lane] = combine(lanes[lane], lanes[lane + width])
        return lanes[0]

    def product(
        self,
        tile: Tile,
        depth: Index,
        left: Callable[[UOp, UOp], UOp],
        right: Callable[[UOp, UOp], UOp],
        start: Callable[[UOp, UOp], UOp] | None = None,
    ) -> Array:
        """A tile of a matrix product: start(m, n) + the sum over d of left(m, d) right(d, n).

        The one loop that everything is about: the tile stays in vector registers.
        """
        sums, zero = self.array(*tile), UOp.const(0)
        with self.loop(tile.rows) as m, self.loop(tile.columns) as n:
            first = left(m, zero) * right(zero, n)  # starting from 0 is slower: memset, then loads
            sums[m, n] = first if start is None else start(m, n) + first
        if isinstance(depth, UOp) or depth > 1:
            with self.loop(depth - 1) as d, self.loop(tile.rows) as m, self.loop(tile.columns) as n:
                sums[m, n] += left(m, d + 1) * right(d + 1, n)
        return sums

    def finish(self, operations: int) -> Program:
        """operations: how many floating-point operations, for profiles."""
        assert self.last is not None
        # opts_to_apply=() and the tag keep tinygrad's optimizer, which breaks such loops, away.
        info = KernelInfo(self.name, opts_to_apply=(), estimates=Estimates(operations))
        return Program(self.last.sink(arg=info, tag=1), self.outputs)

    def _id(self) -> int:
        self.ids += 1
        return self.ids - 1


class Tile(NamedTuple):
    """What a product keeps in registers."""

    rows: int
    columns: int


@functools.cache
def register_tile() -> Tile:
    """The largest tile that clang keeps in registers; TINYGPT_TILE=4x16 sets another, for tests.

    AVX-512 has 32 registers of 16 floats. Compilers use half of each on Intel's CPUs unless told
    `prefer-vector-width=512`. 6 x 16 suits the 16 registers of 8 of AVX2 and the 32 of 4 of NEON.
    """
    if wanted := os.environ.get("TINYGPT_TILE"):
        rows, columns = map(int, wanted.split("x"))
        return Tile(rows, columns)
    cpu = Device["CPU"]
    if b"has_avx512" not in cpu.compiler.compile_cached(AVX512_PROBE):
        return Tile(6, 16)
    return Tile(8 if "prefer-vector-width=512" in cpu.renderer.target.arch else 6, 32)


AVX512_PROBE = "#ifdef __AVX512F__\nint has_avx512;\n#else\nint has_less;\n#endif\n"


def call(
    program: Program,
    inputs: Sequence[Tensor],
    backward: Callable[[Tensor, list[Tensor], list[Tensor]], list[Tensor | None]] | None = None,
    into: list[Tensor] | None = None,
) -> list[Tensor]:
    """Runs a kernel; its outputs are new tensors, or `into`, which it then changes in place.

    backward(gradient of the first output, outputs, inputs) -> the gradients of the inputs.
    """
    device, count = inputs[0].device, len(program.outputs)
    outputs = into or [Tensor.empty(*shape, device=device) for shape in program.outputs]

    def gradients(gradient: UOp, call: UOp) -> tuple[UOp | None, ...]:
        assert backward is not None
        arguments = [Tensor(u) for u in call.src[1:]]
        written = [Tensor(t.uop.after(call)) for t in arguments[:count]]
        wanted = backward(Tensor(gradient), written, arguments[count:])
        return (None,) * count + tuple(None if t is None else t.uop for t in wanted)

    return Tensor.custom_kernel(
        *outputs,
        *inputs,
        fxn=lambda *_: program.kernel,
        grad_fxn=None if backward is None else gradients,
    )[:count]


def segments(n: int, width: int) -> list[tuple[int, int, int]]:
    """Cuts n into equal pieces and a rest: (where they begin, how many, how wide)."""
    pieces, rest = divmod(n, width)
    return [(0, pieces, width)] * (pieces > 0) + [(n - rest, 1, rest)] * (rest > 0)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


LOG2_E = math.log2(math.e)
# 2^x between -1 and 0, highest power first: least squares of the relative error.
POWERS_OF_2 = (
    0.00010845304495887831,
    0.0012728723231703043,
    0.009576802141964436,
    0.05548930913209915,
    0.2402239441871643,
    0.6931470036506653,
    1.0,
)


def exp2(x: UOp) -> UOp:
    """2^x for x <= 0, in steps that clang vectorizes; 0 below 2^-80, far from denormal numbers."""
    clipped = x.maximum(-80.0)
    whole = clipped.cast(dtypes.int)
    fraction = clipped - whole.cast(dtypes.float)
    power: Value = POWERS_OF_2[0]
    for coefficient in POWERS_OF_2[1:]:
        power = power * fraction + coefficient
    return (x < -80.0).where(0.0, power * ((whole + 127) << 23).bitcast(dtypes.float))


def gelu(x: UOp) -> tuple[UOp, UOp]:
    """x Phi(x) and its slope. Phi by Abramowitz & Stegun 7.1.26, at most 1e-7 off."""
    bell = exp2(x * x * (-0.5 * LOG2_E))
    # Their series is in 1 / q; taken over q^5 it needs one division. It is 0 beyond 12.
    q = 1.0 + (0.3275911 * math.sqrt(0.5)) * (x < 0).where(-x, x).minimum(12.0)
    series = 0.254829592 * q - 0.284496736
    for coefficient in (1.421413741, -1.453152027, 1.061405429):
        series = series * q + coefficient
    tail = 0.5 * bell * (series / (q * q * (q * q) * q))
    cdf = (x < 0).where(tail, 1.0 - tail)
    return x * cdf, cdf + x * bell * (1 / math.sqrt(2 * math.pi))


def gelu_tanh(x: UOp) -> tuple[UOp, UOp]:
    """x (1 + tanh u) / 2 with u = a (x + b x^3), and its slope."""
    a, b = math.sqrt(2 / math.pi), 0.044715
    u = x * (a + a * b * x * x)
    e = 2.0 * exp2((u < 0).where(u, -u) * (2 * LOG2_E))
    # In halves, because tinygrad turns e / (1 + e) into 1 - 1 / (1 + e), which loses digits.
    large, small = 2.0 / (2.0 + e), e / (2.0 + e)  # (1 + tanh |u|) / 2, (1 - tanh |u|) / 2
    half = (u < 0).where(small, large)
    return x * half, half + 2.0 * x * small * large * (a + 3 * a * b * x * x)


def relu(x: UOp) -> tuple[UOp, UOp]:
    return x.maximum(0.0), (x > 0).where(UOp.const(1.0), UOp.const(0.0))


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}


Numbers = TypeVar("Numbers", UOp, Tensor)


class Dropout(NamedTuple):
    """Zeroes with probability p, and scales what it keeps by 1 / (1 - p).

    What is kept follows from the seed, (1,) uint32, and the place in the array. So kernels find it
    where they need it, forward and backward, and store no masks. Every use of dropout and every
    iteration wants a seed of its own.
    """

    seed: Tensor
    p: float

    def mask(self, *shape: int) -> Tensor:
        """The factors, 0 or 1 / (1 - p), in plain Tensor code."""
        place = Tensor.arange(math.prod(shape), dtype=dtypes.uint32)
        return mask_at(place.reshape(shape), self.seed, self.p)


def mask_at(place: Numbers, seed: Numbers, p: float) -> Numbers:
    """A hash of uint32 numbers with good bits (Wellons 2018, lowbias32), against a threshold."""
    x = (place * 0x9E3779B9) ^ seed
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    return (x < int(p * 2**32)).where(0.0, 1 / (1 - p))


# Linear layers ------------------------------------------------------------------------------------
# 28 of the 34 ms of a step; with tinygrad's products and no more than that changed, TODO.

ROW_BLOCK = 128  # rows of the left matrix, which stay in the second-level cache
COLUMN_BLOCK = 2048
DEPTH = 256  # a panel of this depth stays in the first-level cache


class Matrix(NamedTuple):
    """A side of a product, whose rows or columns are its `lines`: at(line, d) is a value."""

    at: Callable[[Index, Index], UOp]
    along_depth: bool  # whether neighbours in memory are neighbours in depth

    @contextmanager
    def loops(self, k: Kernel, lines: int, depth: int) -> Iterator[tuple[UOp, UOp]]:
        """Loops over lines and depth, in the order of the memory."""
        outer, inner = (lines, depth) if self.along_depth else (depth, lines)
        with k.loop(outer) as x, k.loop(inner) as y:
            yield (x, y) if self.along_depth else (y, x)


def depth_step(depth: int) -> int:
    """At most DEPTH; a divisor of depth, if there is one not far below."""
    steps = -(-depth // DEPTH)
    divisors = (depth // n for n in range(steps, 2 * steps) if depth % n == 0)
    return next(divisors, -(-depth // steps))


def matmul(
    k: Kernel,
    size: tuple[int, int, int],
    left: Matrix,
    right: Matrix,
    panels: Array,
    out: Array,
    finish: Callable[[UOp, UOp, UOp], UOp] | None = None,
    copy_left: bool = False,
) -> None:
    """Writes out[m, n] = finish(m, n, the sum over d of left(m, d) right(n, d)).

    In blocks that stay in the caches (Goto & van de Geijn 2008). One step of the depth after the
    other, `right` is copied into panels as wide as a tile, and tile after tile is added to out.
    """
    tile = register_tile()
    rows, columns, depth = size
    tiles = -(-rows // tile.rows)
    tiles_per_block = min(tiles, ROW_BLOCK // tile.rows)
    block = tiles_per_block * tile.rows

    def row(m: UOp) -> UOp:  # what a last tile has too much repeats the last row
        return m if rows % block == 0 else m.minimum(rows - 1)

    def each_panel(n0: UOp, width: int) -> Iterator[tuple[UOp, Callable[[UOp], UOp], int]]:
        """Loops over the panels of the columns from n0: its number, its columns, how many."""
        for first, count, own in segments(width, tile.columns):
            with k.loop(count) as p:
                number = p + first // tile.columns

                def column(n: UOp, number: UOp = number, own: int = own) -> UOp:
                    n = n0 + number * tile.columns + n
                    return n if own == tile.columns else n.minimum(columns - 1)

                yield number, column, own

    def block_of_left(m0: UOp, d0: Index, step: int) -> Callable[[UOp, UOp], UOp]:
        def at(m: UOp, d: UOp) -> UOp:
            return left.at(row(m0 + m), d0 + d)

        if left.along_depth and not copy_left:
            return at
        copy = k.array(*((block, step) if left.along_depth else (step, block)))
        with left.loops(k, block, step) as (m, d):
            copy[(m, d) if left.along_depth else (d, m)] = at(m, d)
        return lambda m, d: copy[(m, d) if left.along_depth else (d, m)]

    def add(n0: UOp, width: int, d0: Index, step: int, is_first: UOp, is_last: UOp) -> None:
        panel = panels.view(-1, step, tile.columns)
        for p, column, _ in each_panel(n0, width):
            with right.loops(k, tile.columns, step) as (n, d):
                panel[p, d, n] = right.at(column(n), d0 + d)
        with k.loop(-(-tiles // tiles_per_block)) as b:
            left_at = block_of_left(b * block, d0, step)
            tiles_here: Index = tiles_per_block
            if tiles % tiles_per_block:
                tiles_here = (tiles - b * tiles_per_block).minimum(tiles_per_block)
            for p, column, own in each_panel(n0, width):
                with k.loop(tiles_here) as t:
                    m0 = t * tile.rows
                    sums = k.product(
                        tile,
                        step,
                        lambda m, d: left_at(m0 + m, d),
                        lambda d, n: panel[p, d, n],
                        lambda m, n: is_first.where(0.0, out[row(b * block + m0 + m), column(n)]),
                    )
                    with k.loop(tile.rows) as m, k.loop(own) as n:
                        place, value = (row(b * block + m0 + m), column(n)), sums[m, n]
                        if finish:
                            value = is_last.where(finish(*place, value), value)
                        out[place] = value

    step = depth_step(depth)
    steps, rest = divmod(depth, step)
    for first, count, width in segments(columns, COLUMN_BLOCK):
        with k.loop(count) as c:
            n0 = c * width + first
            with k.loop(steps) as s:
                is_last = UOp.const(False) if rest else s.eq(steps - 1)
                add(n0, width, s * step, step, s.eq(0), is_last)
            if rest:
                add(n0, width, steps * step, rest, UOp.const(False), UOp.const(True))


def panels_size(columns: int, depth: int) -> int:
    """How many floats `matmul` needs for its panels."""
    return round_up(min(columns, COLUMN_BLOCK), register_tile().columns) * depth_step(depth)


@functools.cache
def linear_kernel(
    rows: int,
    outs: int,
    ins: int,
    bias: bool,
    activation: Activation | None,
    residual: bool,
    dropout: float,
) -> Program:
    k = Kernel(f"linear_{activation}", rows, outs, ins, bias, residual, dropout > 0)
    y, panels = k.output(rows, outs), k.output(panels_size(outs, ins))
    slopes = k.output(rows, outs) if activation else None
    x, weight = k.input(rows, ins), k.input(outs, ins)
    biases = k.input(outs) if bias else None
    residuals = k.input(rows, outs) if residual else None
    seed = k.input(1, dtype=dtypes.uint32) if dropout else None

    def finish(m: UOp, n: UOp, value: UOp) -> UOp:
        if biases:
            value = value + biases[n]
        if activation and slopes:
            value, slopes[m, n] = ACTIVATIONS[activation](value)
        if seed:
            value = value * mask_at((m * outs + n).cast(dtypes.uint32), seed[0], dropout)
        return value + residuals[m, n] if residuals else value

    if rows < 4:  # a token at a time, as in generation: copying weights would take longest
        with k.loop(rows) as m, k.loop(outs) as n:
            y[m, n] = finish(m, n, k.sum(ins, lambda d: x[m, d] * weight[n, d]))
    else:
        left = Matrix(lambda m, d: x[m, d], along_depth=True)
        right = Matrix(lambda n, d: weight[n, d], along_depth=True)
        matmul(k, (rows, outs, ins), left, right, panels, y, finish)
    return k.finish(2 * rows * outs * ins)


@functools.cache
def linear_gradient_kernel(
    rows: int, outs: int, ins: int, of_weight: bool, slope: bool, dropout: float
) -> Program:
    """dx (rows, ins) = dz weight, or dweight (outs, ins) = dz^T x; dz is dy behind the activation.

    dz is made while it is copied, and never stored as a whole.
    """
    k = Kernel("linear_dw" if of_weight else "linear_dx", rows, outs, ins, slope, dropout > 0)
    size = (outs, ins, rows) if of_weight else (rows, ins, outs)
    out, panels = k.output(*size[:2]), k.output(panels_size(*size[1:]))
    dy = k.input(rows, outs)
    other = k.input(rows, ins) if of_weight else k.input(outs, ins)
    slopes = k.input(rows, outs) if slope else None
    seed = k.input(1, dtype=dtypes.uint32) if dropout else None

    def dz(m: Index, n: Index) -> UOp:
        value = dy[m, n]
        if slopes:
            value = value * slopes[m, n]
        if seed:
            place = UOp.const(0) + m * outs + n
            value = value * mask_at(place.cast(dtypes.uint32), seed[0], dropout)
        return value

    right = Matrix(lambda n, d: other[d, n], along_depth=False)
    if of_weight:
        left = Matrix(lambda n, m: dz(m, n), along_depth=False)
    else:
        left = Matrix(dz, along_depth=True)
    matmul(k, size, left, right, panels, out, copy_left=slope or dropout > 0)
    return k.finish(2 * rows * outs * ins)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """residual + dropout(activation(x weight^T + bias)), without those that are not given.

    x (..., in), weight (out, in), bias (out,), residual (..., out) -> (..., out).
    """
    outs, ins = weight.shape
    rows, p = x.numel() // ins, dropout.p if dropout else 0.0
    seed = [dropout.seed] if dropout else []

    def backward(dy: Tensor, outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
        slopes = outputs[2:]
        extra = [*slopes, *seed]
        dx = linear_gradient_kernel(rows, outs, ins, False, bool(slopes), p)
        dw = linear_gradient_kernel(rows, outs, ins, True, bool(slopes), p)
        gradients = [*call(dx, [dy, inputs[1], *extra])[:1], *call(dw, [dy, inputs[0], *extra])[:1]]
        if bias is not None:
            dz = dy * slopes[0] if slopes else dy
            gradients.append((dz * dropout.mask(rows, outs) if dropout else dz).sum(axis=0))
        if residual is not None:
            gradients.append(dy)
        return [*gradients, *[None] * len(seed)]

    program = linear_kernel(rows, outs, ins, bias is not None, activation, residual is not None, p)
    optional = [
        t
        for t in (bias, None if residual is None else residual.reshape(rows, outs))
        if t is not None
    ]
    inputs = [x.reshape(rows, ins), weight, *optional, *seed]
    return call(program, inputs, backward)[0].reshape(*x.shape[:-1], outs)


# Attention ----------------------------------------------------------------------------------------
# TODO ms


class AttentionSize(NamedTuple):
    """Sizes that are rounded up, so that tiles fit."""

    T: int
    D: int

    @property
    def group(self) -> int:
        return round_up(32, register_tile().rows)

    @property
    def rows(self) -> int:
        return round_up(self.T, self.group)

    @property
    def panels(self) -> int:
        return -(-self.rows // register_tile().columns)

    @property
    def width(self) -> int:
        return round_up(self.D, register_tile().columns)

    def row(self, t: UOp) -> UOp:
        return t.minimum(self.T - 1)


@functools.cache
def attention_kernel(B: int, T: int, H: int, D: int, dropout: float) -> Program:
    k = Kernel("attention", B, T, H, D, dropout > 0)
    size, (R, N) = AttentionSize(T, D), register_tile()
    y, stats = k.output(B, T, H, D), k.output(2, B, H, T)
    keys, values = k.output(size.panels, D, N), k.output(size.rows, size.width)
    weights = k.output(R, size.panels * N)
    qkv = k.input(B, T, 3, H, D)
    seed = k.input(1, dtype=dtypes.uint32) if dropout else None
    with k.loop(B) as b, k.loop(H) as h:
        with k.loop(size.panels) as p, k.loop(N) as n, k.loop(D) as d:
            keys[p, d, n] = qkv[b, size.row(p * N + n), 1, h, d]
        with k.loop(size.rows) as t, k.loop(size.width) as d:
            values[t, d] = qkv[b, size.row(t), 2, h, d.minimum(D - 1)]
        with k.loop(-(-T // R)) as r:

            def row(m: UOp) -> UOp:
                return size.row(r * R + m)

            panels = (r * R + R - 1) // N + 1
            with k.loop(panels) as p:
                scores = k.product(
                    Tile(R, N),
                    D,
                    lambda m, d: qkv[b, row(m), 0, h, d],
                    lambda d, n: keys[p, d, n],
                )
                with k.loop(R) as m, k.loop(N) as n:
                    j = p * N + n
                    score = scores[m, n] * (LOG2_E / math.sqrt(D))
                    weights[m, j] = (j <= row(m)).where(score, -math.inf)
            with k.loop(R) as m:
                top = k.max(panels * N, lambda j: weights[m, j])
                with k.loop(panels) as p, k.loop(N) as n:
                    weights[m, p * N + n] = exp2(weights[m, p * N + n] - top)
                total = k.sum(panels * N, lambda j: weights[m, j])
                stats[0, b, h, row(m)] = top
                stats[1, b, h, row(m)] = 1.0 / total
                if seed:
                    with k.loop(panels) as p, k.loop(N) as n:
                        place = (((b * H + h) * T + row(m)) * T + p * N + n).cast(dtypes.uint32)
                        weights[m, p * N + n] *= mask_at(place, seed[0], dropout)
            for first, count, own in segments(D, N):
                with k.loop(count) as p:
                    sums = k.product(
                        Tile(R, N),
                        r * R + R,
                        lambda m, t: weights[m, t],
                        lambda t, n: values[t, first + p * N + n],
                    )
                    with k.loop(R) as m, k.loop(own) as n:
                        y[b, row(m), h, first + p * N + n] = sums[m, n] * stats[1, b, h, row(m)]
    return k.finish(2 * B * H * T * T * D)


@functools.cache
def attention_gradient_kernel(B: int, T: int, H: int, D: int, dropout: float) -> Program:
    k = Kernel("attention_d", B, T, H, D, dropout > 0)
    size, (R, N) = AttentionSize(T, D), register_tile()
    G = size.group
    dqkv = k.output(B, T, 3, H, D)
    key_panels, value_panels = k.output(size.panels, D, N), k.output(size.panels, D, N)
    queries, keys, dys = (k.output(size.rows, size.width) for _ in range(3))
    weights, dscores = k.output(G, size.panels * N), k.output(G, size.panels * N)
    sums = k.output(3, size.rows, size.width)
    dy, y, stats, qkv = (
        k.input(B, T, H, D),
        k.input(B, T, H, D),
        k.input(2, B, H, T),
        k.input(B, T, 3, H, D),
    )
    seed = k.input(1, dtype=dtypes.uint32) if dropout else None
    with k.loop(B) as b, k.loop(H) as h:
        with k.loop(size.panels) as p, k.loop(N) as n, k.loop(D) as d:
            key_panels[p, d, n] = qkv[b, size.row(p * N + n), 1, h, d]
            value_panels[p, d, n] = qkv[b, size.row(p * N + n), 2, h, d]
        with k.loop(size.rows) as t, k.loop(size.width) as d:
            e = d.minimum(D - 1)
            queries[t, d] = qkv[b, size.row(t), 0, h, e]
            keys[t, d] = qkv[b, size.row(t), 1, h, e]
            dys[t, d] = dy[b, size.row(t), h, e]
        with k.loop(size.rows // G) as g:
            with k.loop(G // R) as r:

                def row(m):
                    return g * G + r * R + m

                delta = k.array(R)
                with k.loop(R) as m:
                    t = size.row(row(m))
                    delta[m] = k.sum(D, lambda d: dy[b, t, h, d] * y[b, t, h, d])
                with k.loop(((g + 1) * G - 1) // N + 1) as p:
                    score = k.product(
                        Tile(R, N),
                        D,
                        lambda m, d: queries[row(m), d],
                        lambda d, n: key_panels[p, d, n],
                    )
                    dweight = k.product(
                        Tile(R, N),
                        D,
                        lambda m, d: dys[row(m), d],
                        lambda d, n: value_panels[p, d, n],
                    )
                    with k.loop(R) as m, k.loop(N) as n:
                        i, j = row(m), p * N + n
                        t = size.row(i)
                        w = (
                            exp2(score[m, n] * (LOG2_E / math.sqrt(D)) - stats[0, b, h, t])
                            * stats[1, b, h, t]
                        )
                        w = ((j <= i) & (i < T)).where(w, 0.0)
                        keep = (
                            mask_at(
                                (((b * H + h) * T + t) * T + j).cast(dtypes.uint32),
                                seed[0],
                                dropout,
                            )
                            if seed
                            else 1.0
                        )
                        weights[r * R + m, j] = w * keep
                        dscores[r * R + m, j] = (
                            w * (dweight[m, n] * keep - delta[m]) * (1 / math.sqrt(D))
                        )
                with k.loop(size.width // N) as p:
                    acc = k.product(
                        Tile(R, N),
                        g * G + r * R + R,
                        lambda m, t: dscores[r * R + m, t],
                        lambda t, n: keys[t, p * N + n],
                    )
                    with k.loop(R) as m, k.loop(N) as n:
                        sums[0, row(m), p * N + n] = acc[m, n]
            with k.loop((g + 1) * (G // R)) as c, k.loop(size.width // N) as p:
                is_new = g * (G // R) <= c
                for which, weight, source in ((1, dscores, queries), (2, weights, dys)):
                    acc = k.product(
                        Tile(R, N),
                        G,
                        lambda m, t: weight[t, c * R + m],
                        lambda t, n: source[g * G + t, p * N + n],
                        lambda m, n: is_new.where(0.0, sums[which, c * R + m, p * N + n]),
                    )
                    with k.loop(R) as m, k.loop(N) as n:
                        sums[which, c * R + m, p * N + n] = acc[m, n]
        with k.loop(T) as t, k.loop(3) as which, k.loop(D) as d:
            dqkv[b, t, which, h, d] = sums[which, t, d]
    return k.finish(5 * B * H * T * T * D)


def attention(qkv: Tensor, n_head: int, dropout: Dropout | None = None) -> Tensor:
    """Causal self-attention: softmax(q k^T / sqrt(D)) v for each head, D = C / n_head.

    qkv (B, T, 3 C), with q, k, v side by side and in each of them the heads -> (B, T, C).
    """
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    size = (B, T, n_head, C // n_head, dropout.p if dropout else 0.0)
    seed = [dropout.seed] if dropout else []

    def backward(dy: Tensor, outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
        y, stats = outputs[:2]
        dqkv = call(attention_gradient_kernel(*size), [dy, y, stats, *inputs])[0]
        return [dqkv, *[None] * len(seed)]

    inputs = [qkv.reshape(B, T, 3, n_head, C // n_head), *seed]
    return call(attention_kernel(*size), inputs, backward)[0].reshape(B, T, C)


# The rest -----------------------------------------------------------------------------------------


@functools.cache
def layer_norm_kernel(rows: int, C: int, bias: bool, eps: float) -> Program:
    k = Kernel("layer_norm", rows, C, bias)
    y, stats = k.output(rows, C), k.output(2, rows)
    x, weight, biases = k.input(rows, C), k.input(C), k.input(C) if bias else None
    with k.loop(rows) as i:
        mean = k.sum(C, lambda c: x[i, c]) * (1 / C)
        stats[0, i] = mean
        variance = k.sum(C, lambda c: (x[i, c] - mean) * (x[i, c] - mean)) * (1 / C)
        stats[1, i] = 1.0 / (variance + eps).sqrt()
        with k.loop(C) as c:
            value = (x[i, c] - mean) * stats[1, i] * weight[c]
            y[i, c] = value + biases[c] if biases else value
    return k.finish(8 * rows * C)


@functools.cache
def layer_norm_gradient_kernel(rows: int, C: int) -> Program:
    k = Kernel("layer_norm_d", rows, C)
    dx, dweight, dbias = k.output(rows, C), k.output(C), k.output(C)
    dy, x, stats, weight = k.input(rows, C), k.input(rows, C), k.input(2, rows), k.input(C)
    normal, slope = k.array(C), k.array(C)
    with k.loop(C) as c:
        dweight[c] = 0.0
        dbias[c] = 0.0
    with k.loop(rows) as i:
        with k.loop(C) as c:
            normal[c] = (x[i, c] - stats[0, i]) * stats[1, i]
            slope[c] = dy[i, c] * weight[c]
            dweight[c] += dy[i, c] * normal[c]
            dbias[c] += dy[i, c]
        mean = k.sum(C, lambda c: slope[c]) * (1 / C)
        along = k.sum(C, lambda c: slope[c] * normal[c]) * (1 / C)
        with k.loop(C) as c:
            dx[i, c] = (slope[c] - mean - normal[c] * along) * stats[1, i]
    return k.finish(12 * rows * C)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis; x (..., C)."""
    C = x.shape[-1]
    rows = x.numel() // C

    def backward(dy: Tensor, outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
        given = [dy, inputs[0], outputs[1], inputs[1]]
        return [*call(layer_norm_gradient_kernel(rows, C), given)[: len(inputs)]]

    inputs = [x.reshape(rows, C), weight, *([] if bias is None else [bias])]
    program = layer_norm_kernel(rows, C, bias is not None, eps)
    return call(program, inputs, backward)[0].reshape(x.shape)


@functools.cache
def cross_entropy_kernel(rows: int, V: int) -> Program:
    k = Kernel("cross_entropy", rows, V)
    loss, losses, stats = k.output(1), k.output(rows), k.output(2, rows)
    logits, targets = k.input(rows, V), k.input(rows, dtype=dtypes.int)
    with k.loop(rows) as i:
        top = k.max(V, lambda v: logits[i, v])
        total = k.sum(V, lambda v: exp2((logits[i, v] - top) * LOG2_E))
        stats[0, i] = top
        stats[1, i] = 1.0 / total
        target, is_token = token(targets[i], V)
        losses[i] = is_token.where(total.log2() * math.log(2) + top - logits[i, target], 0.0)
    loss[0] = k.sum(rows, lambda i: losses[i]) * (1 / rows)
    return k.finish(12 * rows * V)


@functools.cache
def cross_entropy_gradient_kernel(rows: int, V: int) -> Program:
    k = Kernel("cross_entropy_d", rows, V)
    dlogits = k.output(rows, V)
    dloss, stats, logits = k.input(1), k.input(2, rows), k.input(rows, V)
    targets = k.input(rows, dtype=dtypes.int)
    with k.loop(rows) as i, k.loop(V) as v:
        target, is_token = token(targets[i], V)
        p = exp2((logits[i, v] - stats[0, i]) * LOG2_E) * stats[1, i]
        slope = (p - v.eq(target).where(1.0, 0.0)) * dloss[0] * (1 / rows)
        dlogits[i, v] = is_token.where(slope, 0.0)
    return k.finish(12 * rows * V)


def token(number: UOp, V: int) -> tuple[UOp, UOp]:
    """A token as an index that is inside the vocabulary, and whether it was."""
    number = number.cast(dtypes.weakint)
    return number.maximum(0).minimum(V - 1), (number >= 0) & (number < V)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[target], in nats; a target that is no token counts 0.

    logits (B, T, V), targets (B, T) int32 -> scalar.
    """
    V = logits.shape[-1]
    rows = logits.numel() // V

    def backward(dloss: Tensor, outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
        program = cross_entropy_gradient_kernel(rows, V)
        return [call(program, [dloss, outputs[2], *inputs])[0], None]

    inputs = [logits.reshape(rows, V), targets.reshape(rows).cast(dtypes.int)]
    return call(cross_entropy_kernel(rows, V), inputs, backward)[0].reshape(())


@functools.cache
def embedding_kernel(B: int, T: int, C: int, V: int, P: int) -> Program:
    k = Kernel("embedding", B, T, C, V, P)
    x, idx = k.output(B, T, C), k.input(B, T, dtype=dtypes.int)
    wte, wpe = k.input(V, C), k.input(P, C)
    with k.loop(B) as b, k.loop(T) as t, k.loop(C) as c:
        x[b, t, c] = wte[token(idx[b, t], V)[0], c] + wpe[t, c]
    return k.finish(B * T * C)


@functools.cache
def embedding_gradient_kernel(B: int, T: int, C: int, V: int, P: int) -> Program:
    k = Kernel("embedding_d", B, T, C, V, P)
    dwte, dwpe = k.output(V, C), k.output(P, C)
    dx, idx = k.input(B, T, C), k.input(B, T, dtype=dtypes.int)
    with k.loop(V) as v, k.loop(C) as c:
        dwte[v, c] = 0.0
    with k.loop(P) as t, k.loop(C) as c:
        dwpe[t, c] = 0.0
    with k.loop(B) as b, k.loop(T) as t, k.loop(C) as c:
        dwte[token(idx[b, t], V)[0], c] += dx[b, t, c]
        dwpe[t, c] += dx[b, t, c]
    return k.finish(2 * B * T * C)


def embedding(idx: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    """wte[idx] + wpe[:T]: idx (B, T) int32, wte (V, C), wpe (P, C) with P >= T -> (B, T, C)."""
    size = (*idx.shape, *reversed(wte.shape), wpe.shape[0])

    def backward(dx: Tensor, outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
        return [None, *call(embedding_gradient_kernel(*size), [dx, inputs[0]])]

    return call(embedding_kernel(*size), [idx.cast(dtypes.int), wte, wpe], backward)[0]


CHUNK = 4096  # floats summed up at a time: long float sums lose digits


@functools.cache
def sum_of_squares_kernel(n: int) -> Program:
    k = Kernel("sum_of_squares", n)
    total, flat = k.output(1), k.input(n)
    total[0] = 0.0
    for first, count, own in segments(n, CHUNK):
        with k.loop(count) as c:
            x = lambda i: flat[first + c * own + i]
            total[0] += k.sum(own, lambda i: x(i) * x(i))
    return k.finish(2 * n)


def sum_of_squares(flat: Tensor) -> Tensor:
    """flat (n,) -> (1,)."""
    return call(sum_of_squares_kernel(flat.shape[0]), [flat])[0]


@functools.cache
def adamw_kernel(
    n: int, n_decay: int, beta1: float, beta2: float, eps: float, decay: float
) -> Program:
    k = Kernel("adamw", n, n_decay)
    p, m, v = (k.output(n) for _ in range(3))
    g, rates, coefficient = k.input(n), k.input(3), k.input(1)
    for first, own, decay in ((0, n_decay, decay), (n_decay, n - n_decay, 0.0)):
        if own:
            with k.loop(own) as i:
                i = first + i
                gradient = g[i] * coefficient[0]
                m[i] = beta1 * m[i] + (1 - beta1) * gradient
                v[i] = beta2 * v[i] + (1 - beta2) * gradient * gradient
                step = m[i] * rates[1] / ((v[i] * rates[2]).sqrt() + eps)
                p[i] = p[i] * (1.0 - decay * rates[0]) - rates[0] * step
    return k.finish(14 * n)


def adamw(p, g, m, v, rates, coefficient, n_decay, beta1, beta2, eps, weight_decay) -> list[Tensor]:
    """One step of AdamW on flat arrays"""
    program = adamw_kernel(p.shape[0], n_decay, beta1, beta2, eps, weight_decay)
    return call(program, [g, rates, coefficient], into=[p, m, v])
