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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import NamedTuple, TypeVar, cast

from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.dtype import AddrSpace, DType
from tinygrad.renderer import Estimates
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.uop.ops import KernelInfo

from tinygpt.config import Activation

Value = UOp | float
Index = UOp | int
Indices = Index | tuple[Index, ...]
Binary = Callable[[UOp, UOp], UOp]
Setting = TypeVar("Setting")

# The switch ---------------------------------------------------------------------------------------

_allowed = ContextVar("tinygpt_kernels", default=True)


@contextmanager
def setting(variable: ContextVar[Setting], value: Setting) -> Iterator[None]:
    """Inside, the variable has this value, in this thread."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def off() -> AbstractContextManager[None]:
    """Inside, `usable` is False and the plain code runs, in this thread."""
    return setting(_allowed, False)


def usable(x: Tensor) -> bool:
    """Whether kernels may compute with x: float32, on one CPU device, compiled by clang."""
    if os.environ.get("TINYGPT_KERNELS") == "0" or not _allowed.get():
        return False
    if not isinstance(x.device, str) or x.device.split(":")[0] != "CPU":
        return False
    known = x.dtype == dtypes.float and all(isinstance(n, int) and n > 0 for n in x.shape)
    return known and type(Device[x.device].renderer) is ClangRenderer


# Vocabulary ---------------------------------------------------------------------------------------


class Array:
    """Memory that a kernel reads and writes: an argument, or an array on the stack.

    `a[i, j]` is the value at that point of the program. Use it before the next store to it.
    """

    def __init__(self, kernel: Kernel, memory: UOp, shape: tuple[int, ...], constant: bool = False):
        self.kernel, self.memory, self.shape, self.constant = kernel, memory, shape, constant

    def __getitem__(self, index: Indices) -> UOp:
        offset, *others = index if isinstance(index, tuple) else (index,)
        for size, i in zip(self.shape[1:], others, strict=True):
            offset = offset * size + i
        place: UOp = (self.memory if self.constant else self.kernel.now(self.memory))[offset]
        return place

    def __setitem__(self, index: Indices, value: Value) -> None:
        self.kernel.then(self[index].store(value))


class Program(NamedTuple):
    kernel: UOp
    arguments: list[tuple[int, ...] | None]  # the shape of an output, or None for an input


class Kernel:
    """A kernel in the making: its loops, loads and stores are written in the order they run in.

    tinygrad's UOps are a graph, without order but for what a node names as its sources. So each
    load and store names the store before it, `last`, and the loops entered since.

    Indices are int, or long where an array or `largest` is too long for it. tinygrad could find
    that out by itself, but a kernel would take a quarter longer to lower.
    """

    def __init__(self, name: str, *sizes: int, largest: int = 0):
        self.name = "_".join([name, *map(str, map(int, sizes))])
        self.largest = largest  # number that an index is computed from
        self.last: UOp | None = None
        self.entered: list[UOp] = []
        self.arguments: list[tuple[int, ...] | None] = []
        self.ids = 0

    def now(self, memory: UOp) -> UOp:
        before = [] if self.last is None else [self.last]
        return cast(UOp, memory.after(*before, *self.entered))

    def then(self, effect: UOp) -> None:
        self.last, self.entered = effect, []

    def input(self, *shape: int, dtype: DType = dtypes.float) -> Array:
        return Array(self, self._argument(shape, dtype, None), shape, constant=True)

    def output(self, *shape: int) -> Array:
        """What the kernel writes, scratch memory too: the C stack is small in threads."""
        return Array(self, self._argument(shape, dtypes.float, shape), shape)

    def _argument(
        self, shape: tuple[int, ...], dtype: DType, output: tuple[int, ...] | None
    ) -> UOp:
        size, number = math.prod(shape), len(self.arguments)
        self.largest = max(self.largest, size)
        self.arguments.append(output)
        memory: UOp = UOp.placeholder((size,), dtype, number)
        return memory

    def array(self, *shape: int, dtype: DType = dtypes.float) -> Array:
        """On the C stack; what is small enough ends up in registers."""
        memory = UOp.placeholder((math.prod(shape),), dtype, self._id(), addrspace=AddrSpace.REG)
        return Array(self, memory, shape)

    @property
    def index_type(self) -> DType:
        return dtypes.int if self.largest < 2**31 else dtypes.long

    @contextmanager
    def loop(self, count: Index) -> Iterator[UOp]:
        """Runs its body for 0 to count - 1. A count that is computed must be below 65536."""
        count, dtype = simplified(count), self.index_type
        if isinstance(count, UOp):
            # tinygrad cannot end a loop whose bound depends on an outer loop. So the bound passes
            # through memory, by a load that names no store: as long as it is loaded nowhere else,
            # tinygrad writes the load where it is used, into the loop's head.
            bound = self.array(1, dtype=dtypes.uint16)
            bound[0] = count.cast(dtypes.uint16)
            count = bound.memory[UOp.const(0)].cast(dtype)
        index = UOp.range(count, self._id(), dtype=dtype)
        self.entered.append(index)
        yield index
        assert self.last is not None
        self.then(self.last.end(index))

    def sum(self, count: Index, value: Callable[[UOp], UOp]) -> UOp:
        return self._fold(count, value, lambda a, b: a + b, 0.0)

    def max(self, count: Index, value: Callable[[UOp], UOp]) -> UOp:
        return self._fold(count, value, UOp.maximum, -math.inf)

    def _fold(
        self, count: Index, value: Callable[[UOp], UOp], combine: Binary, start: float
    ) -> UOp:
        """value(0) to value(count - 1), combined in as many lanes as a tile has columns.

        Clang may not change the order of a float sum by itself, and so would not vectorize it. A
        count that is computed must be a multiple of the lanes.
        """
        width = register_tile().columns
        lanes = self.array(width)
        with self.loop(width) as lane:
            lanes[lane] = start
        whole, rest = (count // width, 0) if isinstance(count, UOp) else divmod(count, width)
        if isinstance(whole, UOp) or whole:
            with self.loop(whole) as chunk, self.loop(width) as lane:
                lanes[lane] = combine(lanes[lane], value(chunk * width + lane))
        if rest:
            with self.loop(rest) as lane:
                lanes[lane] = combine(lanes[lane], value(count - rest + lane))
        while width > 1:
            width //= 2
            with self.loop(width) as lane:
                lanes[lane] = combine(lanes[lane], lanes[lane + width])
        return lanes[0]

    def product(self, depth: Index, left: Binary, right: Binary) -> Array:
        """A tile of a matrix product: the sum over d of left(m, d) right(d, n).

        The one loop that everything is about: the tile stays in vector registers.
        """
        tile, zero, depth = register_tile(), UOp.const(0), simplified(depth)
        sums = self.array(*tile)
        with self.loop(tile.rows) as m, self.loop(tile.columns) as n:
            # Starting from 0 is slower: memset, then loads.
            sums[m, n] = left(m, zero) * right(zero, n)
        if isinstance(depth, UOp) or depth > 1:
            with self.loop(depth - 1) as d, self.loop(tile.rows) as m, self.loop(tile.columns) as n:
                sums[m, n] += left(m, d + 1) * right(d + 1, n)
        return sums

    @contextmanager
    def tile(
        self, sums: Array, row: UOp, rows: int, column: UOp, columns: int
    ) -> Iterator[tuple[UOp, UOp, UOp]]:
        """Runs its body for each value of a tile that lies within rows and columns of a matrix.

        (row, column) is where the tile begins; yields a row, a column and the value for them.
        """
        tile = register_tile()
        height = simplified((rows - row).minimum(tile.rows))
        width = simplified((columns - column).minimum(tile.columns))
        if isinstance(height, UOp) or isinstance(width, UOp):
            copy = self.array(*tile)  # clang keeps in registers only what is read at fixed places
            with self.loop(tile.rows) as m, self.loop(tile.columns) as n:
                copy[m, n] = sums[m, n]
            sums = copy
        with self.loop(height) as m, self.loop(width) as n:
            yield row + m, column + n, sums[m, n]

    def finish(self, operations: int) -> Program:
        """operations: how many floating-point operations, for profiles."""
        assert self.last is not None
        # opts_to_apply=() and the tag keep tinygrad's optimizer, which breaks such loops, away.
        info = KernelInfo(self.name, opts_to_apply=(), estimates=Estimates(operations))
        return Program(self.last.sink(arg=info, tag=1), self.arguments)

    def _id(self) -> int:
        self.ids += 1
        return self.ids - 1


def simplified(n: Index) -> Index:
    """A number that is computed, but always the same, as that number."""
    return cast(Index, n.ssimplify()) if isinstance(n, UOp) else n


class Tile(NamedTuple):
    """What a product keeps in registers."""

    rows: int
    columns: int


AVX512_PROBE = "#ifdef __AVX512F__\nint has_avx512;\n#else\nint has_less;\n#endif\n"


@functools.cache
def register_tile() -> Tile:
    """The largest tile that clang keeps in registers; TINYGPT_TILE=4x16 sets another, for tests.

    AVX-512 has 32 registers of 16 floats. On Intel's CPUs clang uses half of each unless told
    `prefer-vector-width=512`. 6 x 16 suits the 16 registers of 8 of AVX2 and the 32 of 4 of NEON.
    """
    if wanted := os.environ.get("TINYGPT_TILE"):
        rows, columns = map(int, wanted.split("x"))
        return Tile(rows, columns)
    cpu = Device["CPU"]
    if b"has_avx512" not in cpu.compiler.compile_cached(AVX512_PROBE):
        return Tile(6, 16)
    return Tile(8 if "prefer-vector-width=512" in cpu.renderer.target.arch else 6, 32)


Backward = Callable[[Tensor, list[Tensor], list[Tensor]], list[Tensor | None]]


def call(
    program: Program,
    inputs: Sequence[Tensor],
    backward: Backward | None = None,
    into: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Runs a kernel; its outputs are `into`, which it changes in place, and then new tensors.

    backward(gradient of the first output, outputs, inputs) -> the gradients of the inputs.
    """
    takes = [shape is None for shape in program.arguments]
    given, targets = iter(inputs), iter(into)

    def argument(shape: tuple[int, ...] | None) -> Tensor:
        if shape is None:
            return next(given)
        target = next(targets, None)
        return Tensor.empty(*shape, device=inputs[0].device) if target is None else target

    arguments = [argument(shape) for shape in program.arguments]

    def gradients(gradient: UOp, call: UOp) -> tuple[UOp | None, ...]:
        assert backward is not None
        outputs = [
            Tensor(u.after(call))
            for u, is_input in zip(call.src[1:], takes, strict=True)
            if not is_input
        ]
        ins = [Tensor(u) for u, is_input in zip(call.src[1:], takes, strict=True) if is_input]
        found = iter(backward(Tensor(gradient), outputs, ins))
        wanted = [next(found) if is_input else None for is_input in takes]
        return tuple(None if t is None else t.uop for t in wanted)

    fxn = gradients if backward else None
    after = Tensor.custom_kernel(*arguments, fxn=lambda *_: program.kernel, grad_fxn=fxn)
    return [t for t, is_input in zip(after, takes, strict=True) if not is_input]


def ceil_div(n: int, d: int) -> int:
    return -(-n // d)


def round_up(n: int, multiple: int) -> int:
    return ceil_div(n, multiple) * multiple


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


def relu2(x: UOp) -> tuple[UOp, UOp]:
    positive = x.maximum(0.0)
    return positive * positive, 2.0 * positive


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu, "relu2": relu2}


# Dropout ------------------------------------------------------------------------------------------

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
    return (hashed((place * 0x9E3779B9) ^ seed) < int(p * 2**32)).where(0.0, 1 / (1 - p))


def hashed(x: Numbers) -> Numbers:
    """A hash of uint32 numbers, one to one (lowbias32, Wellons 2018)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


def seeds_from(seed: Tensor) -> Iterator[Tensor]:
    """Any number of seeds that follow from this one."""
    while True:
        seed = hashed(seed + 0x9E3779B9).contiguous()
        yield seed


def masked(k: Kernel, dropout: float) -> Callable[[UOp, UOp], UOp]:
    """value, its place in the array -> the value after dropout; reads the seed if there is one."""
    if not dropout:
        return lambda value, place: value
    seed = k.input(1, dtype=dtypes.uint32)
    return lambda value, place: value * mask_at(place.cast(dtypes.uint32), seed[0], dropout)


# Linear layers ------------------------------------------------------------------------------------

# A panel of this depth stays in the first-level cache, with most of a block of so many rows. More
# rows would read panels less often, and wait for the memory of wide results: 0.67 instead of 0.72
# of the roofline with 1536 columns. A copied left matrix is read from the second-level cache.
DEPTH, ROWS, COPIED_ROWS = 256, 32, 128
FEW_ROWS = 4  # with fewer, a token at a time as in generation, copying weights would take longest


class Left(NamedTuple):
    """The left side of a product: its values, and whether neighbours in depth are so in memory."""

    at: Binary  # (row, d) -> a value
    along_depth: bool

    def copied(self, k: Kernel, rows: int, depth: int) -> Left:
        """A block of it in an array of its own, laid out alike."""
        outer, inner = (rows, depth) if self.along_depth else (depth, rows)
        copy = k.array(outer, inner)
        with k.loop(outer) as x, k.loop(inner) as y:
            copy[x, y] = self.at(x, y) if self.along_depth else self.at(y, x)
        return Left(lambda m, d: copy[(m, d) if self.along_depth else (d, m)], self.along_depth)


def panels_of(columns: int, depth: int) -> tuple[int, int, int, int]:
    """The shape of the right side of a product: steps of the depth, panels as wide as a tile."""
    steps, width = ceil_div(depth, DEPTH), register_tile().columns
    return steps, ceil_div(columns, width), ceil_div(depth, steps), width


def copy_panels(
    k: Kernel, right: Binary, columns: int, depth: int, s: UOp, to: Array, place: Index
) -> None:
    """Step s of the depth of right(n, d), into to[place]."""
    _, count, step, width = panels_of(columns, depth)
    with k.loop(count) as p, k.loop(step) as d, k.loop(width) as n:
        column, at = (p * width + n).minimum(columns - 1), s * step + d
        value = right(column, at.minimum(depth - 1))
        to[place, p, d, n] = (at < depth).where(value, 0.0)


def matmul(
    k: Kernel,
    size: tuple[int, int, int],
    left: Left,
    right: Binary | Array,
    out: Array,
    finish: Callable[[UOp, UOp, UOp], UOp] | None = None,
    copy_left: bool = False,
    symmetric: bool = False,
) -> None:
    """Writes out[m, n] = finish(m, n, the sum over d of left(m, d) right(n, d)).

    In blocks that stay in the caches (Goto & van de Geijn 2008). One step of the depth after the
    other, `right` is copied into panels, unless it is an array of them, and tile after tile is
    added to out. Of a symmetric product only the tiles are computed that hold a part of the upper
    triangle.
    """
    tile, (rows, columns, depth) = register_tile(), size
    steps, n_panels, step, _ = panels_of(columns, depth)
    tiles, copied = ceil_div(rows, tile.rows), copy_left or not left.along_depth
    tiles_per_block = min(tiles, (COPIED_ROWS if copied else ROWS) // tile.rows)
    block = tiles_per_block * tile.rows
    panels = right if isinstance(right, Array) else k.output(1, n_panels, step, tile.columns)

    with k.loop(steps) as s:
        place = s if isinstance(right, Array) else 0
        if not isinstance(right, Array):
            copy_panels(k, right, columns, depth, s, panels, place)
        with k.loop(ceil_div(tiles, tiles_per_block)) as b:

            def at_left(m: UOp, d: UOp) -> UOp:
                return left.at((b * block + m).minimum(rows - 1), (s * step + d).minimum(depth - 1))

            rows_of_block = Left(at_left, left.along_depth)
            if copied:
                rows_of_block = rows_of_block.copied(k, block, step)
            tiles_here = (tiles - b * tiles_per_block).minimum(tiles_per_block)

            def count(p: UOp) -> UOp:
                if not symmetric:
                    return tiles_here
                reached = (p * tile.columns + tile.columns - 1) // tile.rows + 1
                return (reached - b * tiles_per_block).maximum(0).minimum(tiles_here)

            with k.loop(n_panels) as p, k.loop(count(p)) as t:
                sums = k.product(
                    step,
                    lambda m, d: rows_of_block.at(t * tile.rows + m, d),
                    lambda d, n: panels[place, p, d, n],
                )
                row, column = b * block + t * tile.rows, p * tile.columns
                with k.tile(sums, row, rows, column, columns) as (m, n, value):
                    value = value + s.eq(0).where(0.0, out[m, n])
                    if finish:
                        value = s.eq(steps - 1).where(finish(m, n, value), value)
                    out[m, n] = value
    if symmetric and rows > 1:
        with k.loop(rows) as m, k.loop(columns) as n:
            out[m, n] = out[m.minimum(n), m.maximum(n)]


@functools.cache
def linear_kernel(
    rows: int,
    outs: int,
    ins: int,
    bias: bool,
    activation: Activation | None,
    dropout: float,
    packed: bool,
    with_slopes: bool,
) -> Program:
    """Slopes of the activation are what gradients need."""
    k = Kernel(f"linear_{activation}", rows, outs, ins, bias, dropout > 0, packed, with_slopes)
    y, x = k.output(rows, outs), k.input(rows, ins)
    weight = k.input(*panels_of(outs, ins)) if packed else k.input(outs, ins)
    biases = k.input(outs) if bias else None
    slopes = k.output(rows, outs) if with_slopes else None
    mask = masked(k, dropout)

    def finish(m: UOp, n: UOp, value: UOp) -> UOp:
        if biases:
            value = value + biases[n]
        if activation:
            value, slope = ACTIVATIONS[activation](value)
            if slopes:
                slopes[m, n] = slope
        return mask(value, m * outs + n)

    if rows < FEW_ROWS:
        with k.loop(rows) as m, k.loop(outs) as n:
            y[m, n] = finish(m, n, k.sum(ins, lambda d: x[m, d] * weight[n, d]))
    else:
        left = Left(lambda m, d: x[m, d], along_depth=True)
        right = weight if packed else lambda n, d: weight[n, d]
        matmul(k, (rows, outs, ins), left, right, y, finish)
    return k.finish(2 * rows * outs * ins)


@functools.cache
def linear_gradient_kernel(
    rows: int, outs: int, ins: int, of_weight: bool, activation: bool, dropout: float
) -> Program:
    """dx (rows, ins) = dz weight, or dweight (outs, ins) = dz^T x.

    dz is dy on the other side of dropout and activation, made while it is copied.
    """
    k = Kernel(f"linear_d{'wx'[of_weight]}", rows, outs, ins, activation, dropout > 0)
    size = (outs, ins, rows) if of_weight else (rows, ins, outs)
    out, dy = k.output(*size[:2]), k.input(rows, outs)
    other = k.input(rows, ins) if of_weight else k.input(outs, ins)
    slopes = k.input(rows, outs) if activation else None
    mask = masked(k, dropout)

    def dz(m: UOp, n: UOp) -> UOp:
        value = mask(dy[m, n], m * outs + n)
        return value * slopes[m, n] if slopes else value

    left = Left(lambda n, m: dz(m, n), False) if of_weight else Left(dz, True)
    copied = activation or dropout > 0
    matmul(k, size, left, lambda n, d: other[d, n], out, copy_left=copied)
    return k.finish(2 * rows * outs * ins)


@functools.cache
def pack_kernel(outs: int, ins: int) -> Program:
    k = Kernel("pack", outs, ins)
    panels, weight = k.output(*panels_of(outs, ins)), k.input(outs, ins)
    with k.loop(panels.shape[0]) as s:
        copy_panels(k, lambda n, d: weight[n, d], outs, ins, s, panels, s)
    return k.finish(0)


def pack(weight: Tensor) -> Tensor:
    """A weight (out, in) in the order in which products read it, for `inference`."""
    outs, ins = (int(n) for n in weight.shape)
    return call(pack_kernel(outs, ins), [weight])[0]


_packed: ContextVar[Mapping[UOp, Tensor] | None] = ContextVar("packed", default=None)


def inference(packed: Mapping[UOp, Tensor]) -> AbstractContextManager[None]:
    """Inside, `linear` has no gradient, and takes packed[weight.uop] in place of a weight, if it is
    there. To copy weights at each use takes a quarter of the time of a product of 64 rows, to store
    an activation's slopes a sixth of one of 1024 rows and 1536 columns.
    """
    return setting(_packed, packed)


_places: ContextVar[Mapping[UOp, Tensor]] = ContextVar("places", default=MappingProxyType({}))


def gradients_into(places: Mapping[UOp, Tensor]) -> AbstractContextManager[None]:
    """Inside, `linear` writes the gradient of a weight into places[weight.uop], which is then the
    gradient itself. For weights that are used once. To copy them all takes 2% of a step.
    """
    return setting(_places, places)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """dropout(activation(x weight^T + bias)), without those that are not given.

    x (..., in), weight (out, in), bias (out,) -> (..., out).
    """
    outs, ins = (int(n) for n in weight.shape)
    rows, p = int(x.numel()) // ins, dropout.p if dropout else 0.0
    seed = [dropout.seed] if dropout else []
    packed = _packed.get()
    panels = None if packed is None or rows < FEW_ROWS else packed.get(weight.uop)
    place = _places.get().get(weight.uop)

    def backward(dy: Tensor, outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
        slopes = [outputs[1]] if activation else []
        gradients: list[Tensor | None] = []
        for of_weight, other in ((False, inputs[1]), (True, inputs[0])):
            program = linear_gradient_kernel(rows, outs, ins, of_weight, bool(activation), p)
            into = [place] if of_weight and place is not None else []
            gradients.append(call(program, [dy, other, *slopes, *seed], into=into)[0])
        if bias is not None:
            dz = dy * dropout.mask(rows, outs) if dropout else dy
            gradients.append((dz * slopes[0] if slopes else dz).sum(axis=0))
        return [*gradients, *([None] * len(seed))]

    with_slopes = packed is None and activation is not None
    options = bias is not None, activation, p, panels is not None, with_slopes
    inputs = [x.reshape(rows, ins), weight if panels is None else panels]
    if bias is not None:
        inputs.append(bias)
    program = linear_kernel(rows, outs, ins, *options)
    y = call(program, [*inputs, *seed], backward if packed is None else None)[0]
    return y.reshape(*x.shape[:-1], outs)


# Attention ----------------------------------------------------------------------------------------


class Heads(NamedTuple):
    """Reads (B, T, parts, H, D) by part, time and channel of one head; repeats what it has last."""

    array: Array
    b: UOp
    h: UOp

    def __call__(self, part: int, t: UOp, d: UOp) -> UOp:
        _, T, _, _, D = self.array.shape
        return self.array[self.b, t.minimum(T - 1), part, self.h, d.minimum(D - 1)]

    def panels(self, k: Kernel, part: int, to: Array) -> None:
        """Copies a part into panels (panels, D, columns), the right side of a product with it."""
        count, D, columns = to.shape
        with k.loop(count) as p, k.loop(D) as d, k.loop(columns) as n:
            to[p, d, n] = self(part, p * columns + n, d)

    def rows(self, k: Kernel, part: int, padded: Array | None) -> Binary:
        """A part as the right side of a product over time, whose last panel may reach too far."""
        if padded is None:
            return lambda t, d: self(part, t, d)
        with k.loop(self.array.shape[1]) as t, k.loop(self.array.shape[4]) as d:
            padded[t, d] = self(part, t, d)
        return lambda t, d: padded[t, d]


def padding(k: Kernel, T: int, D: int) -> Array | None:
    """Memory for rows of whole panels, if D is not one; zeros, as denormal numbers are slow."""
    if D % register_tile().columns == 0:
        return None
    padded = k.output(T, round_up(D, register_tile().columns))
    with k.loop(T) as t, k.loop(padded.shape[1]) as d:
        padded[t, d] = 0.0
    return padded


@functools.cache
def attention_kernel(B: int, T: int, H: int, D: int, dropout: float, first: int = 0) -> Program:
    """A block of queries after the other, as many as a tile has rows, from `first` on."""
    k = Kernel("attention", B, T, H, D, dropout > 0, first, largest=B * H * T * T)
    R, N = register_tile()
    y, stats, qkv = k.output(B, T - first, H, D), k.output(2, B, H, T), k.input(B, T, 3, H, D)
    mask, blocks = masked(k, dropout), ceil_div(T - first, R)
    keys = k.output(ceil_div(first + blocks * R, N), D, N)
    weights, padded = k.output(R, keys.shape[0] * N), padding(k, T, D)
    with k.loop(B) as b, k.loop(H) as h:
        at = Heads(qkv, b, h)
        at.panels(k, 1, keys)
        values = at.rows(k, 2, padded)
        with k.loop(blocks) as r:
            row = first + r * R

            def query(m: UOp) -> UOp:
                return (row + m).minimum(T - 1)

            panels = (row + R - 1) // N + 1  # of keys, up to the one for the last query
            with k.loop(panels) as p:
                scores = k.product(D, lambda m, d: at(0, query(m), d), lambda d, n: keys[p, d, n])
                with k.loop(R) as m, k.loop(N) as n:
                    score = scores[m, n] * (LOG2_E / math.sqrt(D))
                    weights[m, p * N + n] = (p * N + n <= query(m)).where(score, -math.inf)
            with k.loop(R) as m:
                top = k.max(panels * N, lambda j: weights[m, j])
                with k.loop(panels) as p, k.loop(N) as n:
                    weights[m, p * N + n] = exp2(weights[m, p * N + n] - top)
                total = k.sum(panels * N, lambda j: weights[m, j])
                stats[0, b, h, query(m)] = top
                stats[1, b, h, query(m)] = 1.0 / total
                if dropout:
                    with k.loop(panels) as p, k.loop(N) as n:
                        place = ((b * H + h) * T + query(m)) * T + p * N + n
                        weights[m, p * N + n] = mask(weights[m, p * N + n], place)
            with k.loop(ceil_div(D, N)) as p:
                sums = k.product(
                    (row + R).minimum(T),
                    lambda m, t: weights[m, t],
                    lambda t, n: values(t, p * N + n),
                )
                with k.tile(sums, r * R, T - first, p * N, D) as (i, d, value):
                    y[b, i, h, d] = value * stats[1, b, h, first + i]
    return k.finish(2 * B * H * (T * T - first * first) * D)


@functools.cache
def attention_gradient_kernel(B: int, T: int, H: int, D: int, dropout: float) -> Program:
    """With P the weights, computed again: dP = dy v^T, dS = P (dP - rowsum(dy y)) / sqrt(D),

    dq = dS k, dk = dS^T q, dv = P^T dy.
    """
    k = Kernel("attention_d", B, T, H, D, dropout > 0, largest=B * H * T * T)
    R, N = register_tile()
    dqkv, dys, y = k.output(B, T, 3, H, D), k.input(B, T, 1, H, D), k.input(B, T, 1, H, D)
    stats, qkv = k.input(2, B, H, T), k.input(B, T, 3, H, D)
    mask, blocks = masked(k, dropout), ceil_div(T, R)
    panels = ceil_div(blocks * R, N)
    keys, values = (k.output(panels, D, N) for _ in range(2))
    # Longer than needed: lines a power of 2 apart would share too few places in the caches.
    weights, dscores = (k.output(blocks * R, panels * N + N) for _ in range(2))
    padded = [padding(k, T, D) for _ in range(3)]
    with k.loop(B) as b, k.loop(H) as h:
        at, dy = Heads(qkv, b, h), Heads(dys, b, h)
        at.panels(k, 1, keys)
        at.panels(k, 2, values)
        queries, key_rows = (at.rows(k, part, padded[part]) for part in range(2))
        dy_rows = dy.rows(k, 0, padded[2])

        def store(part: int, r: UOp, depth: Index, left: Binary, right: Binary) -> None:
            with k.loop(ceil_div(D, N)) as p:
                sums = k.product(depth, left, lambda t, n: right(t, p * N + n))
                with k.tile(sums, r * R, T, p * N, D) as (t, d, value):
                    dqkv[b, t, part, h, d] = value

        with k.loop(blocks) as r:

            def query(m: UOp) -> UOp:
                return (r * R + m).minimum(T - 1)

            deltas = k.array(R)
            with k.loop(R) as m:
                deltas[m] = k.sum(D, lambda d: dy(0, query(m), d) * y[b, query(m), 0, h, d])
            with k.loop((r * R + R - 1) // N + 1) as p:
                scores = k.product(D, lambda m, d: at(0, query(m), d), lambda d, n: keys[p, d, n])
                slopes = k.product(D, lambda m, d: dy(0, query(m), d), lambda d, n: values[p, d, n])
                with k.loop(R) as m, k.loop(N) as n:
                    i, j = query(m), p * N + n
                    power = scores[m, n] * (LOG2_E / math.sqrt(D)) - stats[0, b, h, i]
                    weight = (j <= i).where(exp2(power) * stats[1, b, h, i], 0.0)
                    place = ((b * H + h) * T + i) * T + j
                    weights[r * R + m, j] = mask(weight, place)
                    slope = mask(slopes[m, n], place) - deltas[m]
                    dscores[r * R + m, j] = weight * slope * (1 / math.sqrt(D))
            seen = (r * R + R).minimum(T)
            store(0, r, seen, lambda m, t: dscores[r * R + m, t], key_rows)
        with k.loop(blocks) as r:

            def key(m: UOp) -> UOp:
                return (r * R + m).minimum(T - 1)

            left = T - r * R
            store(
                1,
                r,
                left,
                lambda m, t: dscores[r * R + t, key(m)],
                lambda t, d: queries(r * R + t, d),
            )
            store(
                2,
                r,
                left,
                lambda m, t: weights[r * R + t, key(m)],
                lambda t, d: dy_rows(r * R + t, d),
            )
    return k.finish(5 * B * H * T * T * D)


def attention(
    qkv: Tensor, n_head: int, dropout: Dropout | None = None, only_last: bool = False
) -> Tensor:
    """Causal self-attention: softmax(q k^T / sqrt(D)) v for each head, D = C / n_head.

    qkv (B, T, 3 C), with q, k, v side by side and in each of them the heads -> (B, T, C), or
    (B, 1, C) of the last position, then without a gradient.
    """
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    size = (B, T, n_head, C // n_head, dropout.p if dropout else 0.0)
    seed = [dropout.seed] if dropout else []

    def backward(dy: Tensor, outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
        y, stats = outputs[:2]
        dqkv = call(attention_gradient_kernel(*size), [dy, y, stats, *inputs])[0]
        return [dqkv, *[None] * len(seed)]

    inputs = [qkv.reshape(B, T, 3, n_head, C // n_head), *seed]
    if only_last:
        return call(attention_kernel(*size, first=T - 1), inputs)[0].reshape(B, 1, C)
    return call(attention_kernel(*size), inputs, backward)[0].reshape(B, T, C)


@functools.cache
def norm_and_rotate_kernel(
    B: int, T: int, H: int, D: int, positions: int, norm: bool, eps: float, backward: bool
) -> Program:
    """Queries and keys by r = 1 / sqrt(mean(x^2) + eps), if wanted, and turned, if there are
    positions; values as they are.

    Backward: dy is turned the other way, and then dx = r (dy - x r mean(dy x r)).
    """
    k = Kernel("norm_and_rotate" + "_d" * backward, B, T, H, D, positions, norm)
    out, x = k.output(B, T, 3, H, D), k.input(B, T, 3, H, D)
    source = k.input(B, T, 3, H, D) if backward else x
    table = k.input(2, positions, D // 2) if positions else None
    turned, half = k.array(D), D // 2
    with k.loop(B) as b, k.loop(T) as t:
        with k.loop(2) as part, k.loop(H) as h:
            if table:
                with k.loop(half) as d:
                    first, second = (source[b, t, part, h, i] for i in (d, d + half))
                    cos, sin = table[0, t, d], table[1, t, d]
                    sin = -sin if backward else sin
                    turned[d] = first * cos - second * sin
                    turned[d + half] = first * sin + second * cos
            else:
                with k.loop(D) as d:
                    turned[d] = source[b, t, part, h, d]
            scale, along = UOp.const(1.0), UOp.const(0.0)
            if norm:
                squares = k.sum(D, lambda d: x[b, t, part, h, d] * x[b, t, part, h, d])
                scale = 1.0 / (squares * (1 / D) + eps).sqrt()
            if norm and backward:
                along = k.sum(D, lambda d: turned[d] * x[b, t, part, h, d]) * (1 / D)
            with k.loop(D) as d:
                value = turned[d]
                if norm and backward:
                    value = value - x[b, t, part, h, d] * (scale * scale * along)
                out[b, t, part, h, d] = value * scale
        with k.loop(H) as h, k.loop(D) as d:
            out[b, t, 2, h, d] = source[b, t, 2, h, d]
    return k.finish(10 * B * T * H * D)


def norm_and_rotate(
    qkv: Tensor, n_head: int, norm: bool, table: Tensor | None, eps: float = 1e-6
) -> Tensor:
    """RMS norm of each query and key, if wanted, then rotation, if there is a table.

    qkv (B, T, 3 C); table (2, P, D / 2) holds cosines and sines of P >= T positions.
    """
    B, T, D = qkv.shape[0], qkv.shape[1], qkv.shape[2] // (3 * n_head)
    size = (B, T, n_head, D, 0 if table is None else table.shape[1], norm, eps)
    tables = [] if table is None else [table]

    def backward(dy: Tensor, outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
        given = [inputs[0], dy, *inputs[1:]]
        dqkv = call(norm_and_rotate_kernel(*size, backward=True), given)[0]
        return [dqkv, *[None] * len(tables)]

    inputs = [qkv.reshape(B, T, 3, n_head, D), *tables]
    program = norm_and_rotate_kernel(*size, backward=False)
    return call(program, inputs, backward)[0].reshape(qkv.shape)


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
def rms_norm_kernel(rows: int, C: int, eps: float) -> Program:
    k = Kernel("rms_norm", rows, C)
    y, stats, x = k.output(rows, C), k.output(rows), k.input(rows, C)
    with k.loop(rows) as i:
        squares = k.sum(C, lambda c: x[i, c] * x[i, c])
        stats[i] = 1.0 / (squares * (1 / C) + eps).sqrt()
        with k.loop(C) as c:
            y[i, c] = x[i, c] * stats[i]
    return k.finish(4 * rows * C)


@functools.cache
def rms_norm_gradient_kernel(rows: int, C: int) -> Program:
    """With y = x r: dx = r (dy - y mean(dy y))."""
    k = Kernel("rms_norm_d", rows, C)
    dx, dy, x, stats = k.output(rows, C), k.input(rows, C), k.input(rows, C), k.input(rows)
    with k.loop(rows) as i:
        along = k.sum(C, lambda c: dy[i, c] * x[i, c]) * (1 / C) * stats[i] * stats[i]
        with k.loop(C) as c:
            dx[i, c] = (dy[i, c] - x[i, c] * along) * stats[i]
    return k.finish(6 * rows * C)


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis; x (..., C)."""
    C = x.shape[-1]
    rows = x.numel() // C

    def backward(dy: Tensor, outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
        return [call(rms_norm_gradient_kernel(rows, C), [dy, inputs[0], outputs[1]])[0]]

    return call(rms_norm_kernel(rows, C, eps), [x.reshape(rows, C)], backward)[0].reshape(x.shape)


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
        target, is_token = token(k, targets[i], V)
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
        target, is_token = token(k, targets[i], V)
        p = exp2((logits[i, v] - stats[0, i]) * LOG2_E) * stats[1, i]
        slope = (p - v.eq(target).where(1.0, 0.0)) * dloss[0] * (1 / rows)
        dlogits[i, v] = is_token.where(slope, 0.0)
    return k.finish(12 * rows * V)


def token(k: Kernel, number: UOp, V: int) -> tuple[UOp, UOp]:
    """A token as an index that is inside the vocabulary, and whether it was."""
    number = number.cast(k.index_type)
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
def embedding_kernel(B: int, T: int, C: int, V: int, positions: int) -> Program:
    k = Kernel("embedding", B, T, C, V, positions)
    x, idx = k.output(B, T, C), k.input(B, T, dtype=dtypes.int)
    wte, wpe = k.input(V, C), k.input(positions, C) if positions else None
    with k.loop(B) as b, k.loop(T) as t, k.loop(C) as c:
        row = wte[token(k, idx[b, t], V)[0], c]
        x[b, t, c] = row + wpe[t, c] if wpe else row
    return k.finish(B * T * C)


@functools.cache
def embedding_gradient_kernel(B: int, T: int, C: int, V: int, positions: int) -> Program:
    k = Kernel("embedding_d", B, T, C, V, positions)
    dwte, dwpe = k.output(V, C), k.output(positions, C) if positions else None
    dx, idx = k.input(B, T, C), k.input(B, T, dtype=dtypes.int)
    with k.loop(V) as v, k.loop(C) as c:
        dwte[v, c] = 0.0
    if dwpe:
        with k.loop(positions) as t, k.loop(C) as c:
            dwpe[t, c] = 0.0
    with k.loop(B) as b, k.loop(T) as t, k.loop(C) as c:
        dwte[token(k, idx[b, t], V)[0], c] += dx[b, t, c]
        if dwpe:
            dwpe[t, c] += dx[b, t, c]
    return k.finish(2 * B * T * C)


def embedding(idx: Tensor, wte: Tensor, wpe: Tensor | None = None) -> Tensor:
    """wte[idx] + wpe[:T]: idx (B, T) int32, wte (V, C), wpe (P, C) with P >= T -> (B, T, C)."""
    size = (*idx.shape, *reversed(wte.shape), 0 if wpe is None else wpe.shape[0])

    def backward(dx: Tensor, outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
        return [None, *call(embedding_gradient_kernel(*size), [dx, inputs[0]])]

    inputs = [idx.cast(dtypes.int), wte, *([] if wpe is None else [wpe])]
    return call(embedding_kernel(*size), inputs, backward)[0]


# The optimizer ------------------------------------------------------------------------------------
# One pass each over what tinygrad passes over several times: on each of two cores 0.11 instead of
# 0.37 ms for the norm, 0.41 instead of 1.1 for AdamW.

CHUNK = 4096  # floats added up at a time: long float sums lose digits


@functools.cache
def sum_of_squares_kernel(n: int) -> Program:
    k, chunk = Kernel("sum_of_squares", n), min(n, CHUNK)
    total, x = k.output(1), k.input(n)
    total[0] = 0.0
    with k.loop(ceil_div(n, chunk)) as c:

        def square(i: UOp) -> UOp:
            value = x[(c * chunk + i).minimum(n - 1)]
            return (c * chunk + i < n).where(value * value, 0.0)

        total[0] += k.sum(chunk, square)
    return k.finish(2 * n)


def sum_of_squares(x: Tensor) -> Tensor:
    """A scalar."""
    n = int(x.numel())
    return call(sum_of_squares_kernel(n), [x.reshape(n)])[0].reshape(())


@functools.cache
def adamw_kernel(
    n: int,
    n_rates: int,
    rate: int,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> Program:
    k = Kernel("adamw", n, rate, weight_decay > 0)
    p, m, v = (k.output(n) for _ in range(3))
    gradient, scale, rates = k.input(n), k.input(1), k.input(n_rates)
    with k.loop(n) as i:
        g = gradient[i] * scale[0]
        m[i] = beta1 * m[i] + (1 - beta1) * g
        v[i] = beta2 * v[i] + (1 - beta2) * g * g
        step = m[i] * rates[1] / ((v[i] * rates[2]).sqrt() + eps)
        p[i] = p[i] * (1.0 - rates[rate] * weight_decay) - rates[rate] * step
    return k.finish(14 * n)


def adamw(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    gradient: Tensor,
    scale: Tensor,
    rates: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    rate: int = 0,
) -> list[Tensor]:
    """A step of AdamW in place; returns p, m and v, to be realized together.

    The gradient is multiplied by scale, a scalar, first. rates are a learning rate, both bias
    corrections, 1 / (1 - beta^t), and perhaps more learning rates; `rate` is the place of this one.
    """
    n = int(p.numel())
    inputs = [gradient.reshape(n), scale.reshape(1), rates]
    program = adamw_kernel(n, int(rates.numel()), rate, *betas, eps, weight_decay)
    return call(program, inputs, into=[t.reshape(n) for t in (p, m, v)])


@functools.cache
def orthogonalize_kernel(
    rows: int, columns: int, steps: int, polynomial: tuple[float, float, float], eps: float
) -> Program:
    """All steps in one kernel: x = (a + b S + c S^2) x with S = x x^T, x lying rather than tall."""
    k, (size, length) = Kernel("orthogonalize", rows, columns), sorted((rows, columns))
    out, g = k.output(rows, columns), k.input(rows * columns)
    x, new = k.output(size, length), k.output(size, length)
    square, factor = k.output(size, size), k.output(size, size)
    a, b, c = polynomial

    def rows_of(array: Array) -> Left:
        return Left(lambda m, d: array[m, d], along_depth=True)

    def finish(m: UOp, n: UOp, value: UOp) -> UOp:
        return m.eq(n).where(a, 0.0) + b * square[m, n] + c * value

    norm = k.sum(rows * columns, lambda i: g[i] * g[i]).sqrt()
    with k.loop(size) as i, k.loop(length) as j:
        x[i, j] = g[j * columns + i if rows > columns else i * columns + j] / (norm + eps)
    with k.loop(steps):
        matmul(k, (size, size, length), rows_of(x), lambda n, d: x[n, d], square, symmetric=True)
        matmul(
            k, (size,) * 3, rows_of(square), lambda n, d: square[n, d], factor, finish,
            symmetric=True,
        )  # fmt: skip
        matmul(k, (size, length, size), rows_of(factor), lambda n, d: x[d, n], new)
        with k.loop(size) as i, k.loop(length) as j:
            x[i, j] = new[i, j]
    with k.loop(rows) as i, k.loop(columns) as j:
        out[i, j] = x[j, i] if rows > columns else x[i, j]
    return k.finish(2 * steps * size * size * (2 * length + size))


def orthogonalize(
    g: Tensor, steps: int, polynomial: tuple[float, float, float], eps: float = 1e-7
) -> Tensor:
    """See `optimizer.orthogonalize`. g (rows, columns)."""
    rows, columns = (int(n) for n in g.shape)
    return call(orthogonalize_kernel(rows, columns, steps, polynomial, eps), [g])[0]
