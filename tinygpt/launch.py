"""A function of tensors as the list of kernels that it runs, called one after the other.

TinyJit does this on every device. On a CPU it takes 30 us in Python to look up what a kernel reads
and writes, as long as many kernels of a small model run, and where all memory stays in its place
the answer never changes. So there the kernels are called with what was looked up once.
"""

from __future__ import annotations

import copy
import ctypes
import mmap
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from tinygrad import TinyJit, UOp
from tinygrad.engine.realize import get_runtime, resolve_params
from tinygrad.helpers import DEV
from tinygrad.uop.ops import Ops


class Call(NamedTuple):
    """A kernel, ready to run as function(*arguments)."""

    name: str
    operations: int  # floating-point operations, as far as tinygrad knows
    function: Any
    arguments: list[ctypes.c_uint64]  # addresses of its arrays, then its variables


def called_directly(device: str) -> bool:
    """Whether kernels of this device are functions that Python can call; Mesa's are not."""
    return device.split(":")[0] == "CPU" and DEV.renderer != "LVP"


class Launcher:
    """Runs a function at the first call, and its kernels alone from then on.

    Args:
        function: takes the variables in their order, realizes what it computes, and reads and
            writes nothing but realized tensors that stay where they are.
        device: where its kernels run.
        variables: integers that change from call to call, such as a position.
    """

    def __init__(self, function: Callable[..., Any], device: str, variables: tuple[UOp, ...] = ()):
        self.jit: Any = TinyJit(function)
        self.on_cpu = called_directly(device)
        self.variables = variables
        self.values = {v.expr: ctypes.c_uint64() for v in variables}
        self.calls: list[Call] = []
        self.places: dict[int, tuple[int, int]] = {}  # address -> start and size of its memory
        self.written: set[int] = set()  # the starts of what some kernel writes
        self.memory: dict[int, mmap.mmap] = {}  # see `over`

    def __call__(self, *values: int) -> Any:
        """What the function returns; its memory holds the last call's result."""
        if not self.calls:
            return self._run(values)
        for place, value in zip(self.values.values(), values, strict=True):
            place.value = value
        for call in self.calls:
            call.function(*call.arguments)
        return self.result

    def _run(self, values: tuple[int, ...]) -> Any:
        bound = [v.bind(n) for v, n in zip(self.variables, values, strict=True)]
        if not self.on_cpu:
            return self.jit(*bound)
        self.jit.cnt = 1  # capture now: all memory is in its place, a run before adds nothing
        self.result = self.jit(*bound)
        for call in self.jit.captured.linear.src:
            self.calls += self._prepared(call)
        return self.result

    def over(self, moved: dict[int, int]) -> Launcher:
        """The same kernels over other memory, to run at the same time; after the first call.

        What they write gets new memory, what they only read is shared, but for arrays in `moved`:
        it maps the address of an array here to the address of its counterpart there. Calls of it
        return None.
        """
        assert self.calls and not self.variables
        other = copy.copy(self)
        other.result = None
        sizes = {start: size for start, size in self.places.values() if start in self.written}
        other.memory = {a: mmap.mmap(-1, n) for a, n in sizes.items() if a not in moved}
        new = {a: np.frombuffer(m, np.uint8).ctypes.data for a, m in other.memory.items()}
        starts = moved | new

        def there(argument: ctypes.c_uint64) -> ctypes.c_uint64:
            start, _ = self.places.get(argument.value, (0, 0))
            return ctypes.c_uint64(argument.value + starts.get(start, start) - start)

        other.calls = [
            call._replace(arguments=[*map(there, call.arguments)]) for call in self.calls
        ]
        return other

    def _prepared(self, call: UOp) -> list[Call]:
        program, device = call.src[0], call.src[1].device
        assert program.op is Ops.PROGRAM and isinstance(device, str), program.op
        runtime: Any = get_runtime(device, program)
        buffers: list[Any] = [b.buffer for b in resolve_params(call, ())]
        addresses = []
        for i in program.arg.globals:
            buffer = buffers[i].ensure_allocated()
            addresses.append(ctypes.c_uint64(buffer.get_buf(device).va_addr))
            start = buffer.base.get_buf(device).va_addr
            self.places[addresses[-1].value] = start, buffer.base.nbytes
            if i in program.arg.outs:
                self.written.add(start)
        info = program.src[0].arg
        known = info.estimates and isinstance(info.estimates.ops, int)
        operations = info.estimates.ops if known else 0
        prepared = []
        for core in range(program.arg.global_size[0]):  # a kernel that tinygrad has cut in parts
            values = {**self.values, "core_id": ctypes.c_uint64(core)}
            arguments = [*addresses, *(values[v.expr] for v in program.arg.vars)]
            prepared.append(Call(info.name, operations, runtime.fxn, arguments))
        return prepared
