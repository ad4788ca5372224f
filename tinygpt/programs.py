"""How kernels become programs: lowered while others compile, and kept between processes.

tinygrad keeps what a compiler made of a kernel's source between processes, but lowers every kernel
to that source anew, which takes most of the time until the first step. Here the whole program is
kept, in the same database, under the same conditions (CACHELEVEL=0 turns both off).

For what is not kept, tinygrad starts processes that lower and compile; importing tinygrad in each
takes longer than all kernels of a small model. On a CPU clang is a process of its own anyway: so
this process lowers one kernel after the other, while clang compiles those before.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from importlib import metadata
from typing import Any

from tinygrad import Context, UOp, codegen
from tinygrad.engine import realize, worker
from tinygrad.helpers import DEV, diskcache_get, diskcache_put
from tinygrad.renderer import Renderer
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.uop.ops import Ops

from tinygpt.device import choose_compiler

TABLE = "tinygpt_programs"
TINYGRAD = metadata.version("tinygrad")  # read once: every program is looked up


class ProgramCache(dict[Any, Any]):
    """tinygrad's table of programs in memory, backed by the disk."""

    def __contains__(self, key: object) -> bool:
        return self.get(key) is not None

    def get(self, key: Any, default: Any = None) -> Any:
        if not super().__contains__(key):
            program = diskcache_get(TABLE, name(key))
            if program is None:
                return default
            super().__setitem__(key, program)
        return super().__getitem__(key)

    def __setitem__(self, key: Any, program: Any) -> None:
        super().__setitem__(key, program)
        diskcache_put(TABLE, name(key), program)


def name(key: tuple[Any, ...]) -> str:
    """A program's name in the database: what it was lowered from and for, and by what."""
    kernel, renderer, target, *settings = key
    compiler = choose_compiler() if target.device == "CPU" else None
    versions = TINYGRAD, compiler and compiler.version
    parts = kernel.hex(), renderer.__name__, repr(target), settings, versions
    return sha256(repr(parts).encode()).hexdigest()


# As tinygrad hands it to a pool: number, kernel and renderer, settings to lower it under.
Task = tuple[int, tuple[UOp, Renderer], dict[str, int]]


class Pool:
    """What tinygrad hands kernels to that are to be lowered and compiled."""

    def imap_unordered(
        self, lower: Callable[[Task], tuple[int, UOp]], tasks: Iterable[Task]
    ) -> Iterator[tuple[int, UOp]]:
        """Pairs of a task's number and its program. Raises CalledProcessError if clang fails."""
        tasks = list(tasks)
        renderers = [renderer for _, (_, renderer), _ in tasks]
        if all(type(renderer) is ClangRenderer for renderer in renderers):
            yield from while_clang_compiles(tasks)
            return
        on_cpu = all(renderer.target.device == "CPU" for renderer in renderers)
        processes = None if on_cpu else worker.get_worker_pool()
        yield from (processes.imap_unordered if processes else map)(lower, tasks)


def while_clang_compiles(tasks: list[Task]) -> Iterator[tuple[int, UOp]]:
    """As `imap_unordered`: lowers every kernel here, then puts in what clang has made of it."""
    threads, binaries = ThreadPoolExecutor(os.cpu_count()), list[Future[bytes]]()

    class Ahead:
        """A compiler that begins; its results have to be put in later."""

        def __init__(self, compiler: Any):
            self.compiler = compiler

        def compile_cached(self, source: str) -> bytes:
            binaries.append(threads.submit(self.compiler.compile, source))
            return b""

    try:
        programs = []
        for _, (kernel, renderer), settings in tasks:
            begins: Any = copy.copy(renderer)
            begins.compiler = Ahead(renderer.compiler)
            with Context(**settings):
                programs.append(codegen.do_to_program(kernel, begins))
        for (number, _, _), program, binary in zip(tasks, programs, binaries, strict=True):
            made = UOp(Ops.BINARY, arg=binary.result())
            yield number, program.replace(src=(*program.src[:-1], made))
    finally:
        threads.shutdown(cancel_futures=True)


def install() -> None:
    codegen.to_program_cache = realize.to_program_cache = ProgramCache()
    if DEV.device == "CPU":  # to open it, tinygrad lowers four programs
        ops_cpu = importlib.import_module("tinygrad.runtime.ops_cpu")
        ops_cpu.do_to_program = codegen.to_program  # type: ignore[attr-defined]
    realize.get_worker_pool = Pool
