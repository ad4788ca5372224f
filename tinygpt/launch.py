"""A function of tensors as the list of kernels that it runs, called one after the other.

TinyJit does this on every device. On a CPU it takes 30 us in Python to look up what a kernel reads
and writes, as long as many kernels of a small model run, and where all memory stays in its place
the answer never changes. So there the kernels are called with what was looked up once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

from tinygrad import Context, Tensor, TinyJit, UOp
from tinygrad.engine.realize import get_runtime, resolve_params
from tinygrad.helpers import DEV
from tinygrad.uop.ops import Ops


class Call(NamedTuple):
    """A kernel, ready to run as function(*arguments)."""

    name: str
    operations: int  # floating-point operations, as far as tinygrad knows
    function: Any
    arguments: list[ctypes.c_uint64]  # addresses of its arrays, then its variables


class Launcher:
    """Runs a function at the first call, and its kernels alone from then on.

    Args:
        function: takes the variables in their order, realizes what it computes, and reads and
            writes nothing but realized tensors that stay where they are.
        device: where its kernels run.
        variables: integers that change from call to call, such as a position.
    """

    def __init__(
        self, function: Callable[..., Tensor | None], device: str, variables: tuple[UOp, ...] = ()
    ):
        self.jit: Any = TinyJit(function)
        self.on_cpu = device.split(":")[0] == "CPU" and DEV.renderer != "LVP"
        self.variables = variables
        self.values = {v.expr: ctypes.c_uint64() for v in variables}
        self.calls: list[Call] = []

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
        with Context(PARALLEL=0):  # processes that compile take longer to start than these kernels
            self.result = self.jit(*bound)
        for call in self.jit.captured.linear.src:
            self.calls += self._prepared(call)
        return self.result

    def _prepared(self, call: UOp) -> list[Call]:
        program, device = call.src[0], call.src[1].device
        assert program.op is Ops.PROGRAM and isinstance(device, str), program.op
        runtime: Any = get_runtime(device, program)
        buffers: list[Any] = [b.buffer for b in resolve_params(call, ())]
        addresses = [
            ctypes.c_uint64(buffers[i].ensure_allocated().get_buf(device).va_addr)
            for i in program.arg.globals
        ]
        info = program.src[0].arg
        known = info.estimates and isinstance(info.estimates.ops, int)
        operations = info.estimates.ops if known else 0
        prepared = []
        for core in range(program.arg.global_size[0]):  # a kernel that tinygrad has cut in parts
            values = {**self.values, "core_id": ctypes.c_uint64(core)}
            arguments = [*addresses, *(values[v.expr] for v in program.arg.vars)]
            prepared.append(Call(info.name, operations, runtime.fxn, arguments))
        return prepared
