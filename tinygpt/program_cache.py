"""Kernels that an earlier process has lowered and compiled, from tinygrad's own cache.

tinygrad keeps what a compiler made of a kernel's source between processes, but lowers every kernel
to that source anew, which takes most of the time until the first step. Here the whole program is
kept, in the same database, under the same conditions (CACHELEVEL=0 turns both off).
"""

from __future__ import annotations

from hashlib import sha256
from importlib import metadata
from typing import Any

from tinygrad import codegen
from tinygrad.engine import realize
from tinygrad.helpers import diskcache_get, diskcache_put

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


def install() -> None:
    codegen.to_program_cache = realize.to_program_cache = ProgramCache()
