"""Programs are what tinygrad makes, and outlive their process where they are the right ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinygrad import Context, Device, Tensor
from tinygrad.codegen import do_to_program
from tinygrad.helpers import Target
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.uop.ops import Ops

from tinygpt import programs
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
    cache = {"CACHEDB": str(folder / "cache.db"), "CACHELEVEL": "2"}
    env = {**os.environ, **cache, **environment}
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
    assert programs.name(KEY) == programs.name(tuple(KEY)) != programs.name(other)


def test_another_compiler_makes_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for version in ("14.0.6", "19.1.7"):
        compiler = Compiler("clang", version, avx512=True)
        monkeypatch.setattr(programs, "choose_compiler", lambda found=compiler: found)
        names.add(programs.name(KEY))
    assert len(names) == 2


by_clang = pytest.mark.skipif(
    type(Device[Device.DEFAULT].renderer) is not ClangRenderer, reason="a device without clang"
)


def tasks() -> list[programs.Task]:
    """Three kernels as tinygrad would hand them to its pool of processes."""
    x = Tensor.empty(5, 7)
    linear = Tensor.schedule_linear(x + 1, (x * 2).sum(axis=1), x.exp())
    renderer = Device[Device.DEFAULT].renderer
    kernels = [call.src[0] for call in linear.src]
    assert [kernel.op for kernel in kernels] == [Ops.SINK] * 3
    return [(i, (kernel, renderer), {}) for i, kernel in enumerate(kernels)]


def refuse(lowered: programs.Task) -> Any:
    raise AssertionError("lowered by tinygrad's own function")


@by_clang
def test_programs_made_while_clang_compiles_are_tinygrads_own() -> None:
    kernels = tasks()
    made = dict(programs.Pool().imap_unordered(refuse, kernels))
    assert made == {i: do_to_program(*kernel) for i, kernel, _ in kernels}


@by_clang
def test_what_clang_cannot_compile_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.arange(6, dtype=np.float32)

    def result() -> list[float]:  # kernels that nothing else here has
        x = Tensor(array).realize()
        answers = [x * 1.2345 + 3.5, x.sqrt() * 1.2345]
        Tensor.realize(*answers)
        return [t.sum().item() for t in answers]

    def fail(compiler: object, source: str) -> bytes:
        raise subprocess.CalledProcessError(1, ["clang"])

    with monkeypatch.context() as patch, Context(CACHELEVEL=0):
        patch.setattr(type(Device[Device.DEFAULT].renderer.compiler), "compile", fail)
        with pytest.raises(subprocess.CalledProcessError):
            result()
    expected = [(array * 1.2345 + 3.5).sum(), (np.sqrt(array) * 1.2345).sum()]
    np.testing.assert_allclose(result(), expected, rtol=1e-6)  # float32, six summands
