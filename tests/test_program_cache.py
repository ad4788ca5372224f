"""Programs outlive the process that lowered them, and only where they are the right ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tinygrad.helpers import Target
from tinygrad.renderer.cstyle import ClangRenderer

from tinygpt import program_cache
from tinygpt.device import Compiler

COUNT = """
import numpy as np
import tinygpt
from tinygrad import Device, Tensor, codegen

Device[Device.DEFAULT].renderer  # a device lowers kernels of its own when it opens
lowered = []
lower = codegen.do_to_program
codegen.do_to_program = lambda *arguments: lowered.append(arguments) or lower(*arguments)
x = Tensor(np.arange(12, dtype=np.float32).reshape(3, 4)).realize()
print((x @ x.T).sum().item(), len(lowered))
"""


def run(folder: Path, **environment: str) -> tuple[str, int]:
    """The result of a computation in a process of its own, and how many kernels it lowered."""
    env = {**os.environ, "CACHEDB": str(folder / "cache.db"), **environment}
    command = [sys.executable, "-c", COUNT]
    output = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    result, lowered = output.split()
    return result, int(lowered)


def test_the_second_process_lowers_nothing(tmp_path: Path) -> None:
    first, lowered = run(tmp_path)
    assert lowered > 0
    assert run(tmp_path) == (first, 0)
    assert run(tmp_path, CACHELEVEL="0") == (first, lowered)
    assert run(tmp_path, NOOPT="1")[1] > 0, "without optimizations these are other programs"


KEY: tuple[Any, ...] = (b"kernel", ClangRenderer, Target("CPU", "CLANG", "x86_64,native"), 0, 1)


@pytest.mark.parametrize(
    "other",
    [
        (b"another", *KEY[1:]),
        (*KEY[:2], Target("CPU", "CLANG", "x86_64,znver3"), *KEY[3:]),
        (*KEY[:-1], 2),
    ],
    ids=["kernel", "architecture", "setting"],
)
def test_what_makes_another_program(other: tuple[Any, ...]) -> None:
    assert program_cache.name(KEY) == program_cache.name(tuple(KEY)) != program_cache.name(other)


def test_another_compiler_makes_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for version in ("14.0.6", "19.1.7"):
        compiler = Compiler("clang", version, avx512=True)
        monkeypatch.setattr(program_cache, "choose_compiler", lambda found=compiler: found)
        names.add(program_cache.name(KEY))
    assert len(names) == 2
