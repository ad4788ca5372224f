"""Backends that this machine need not have: training and generation are lowered and compiled.

A target whose compiler is not installed is skipped, with the name of what to install.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SITE_PACKAGES = Path(importlib.util.find_spec("tinygrad").origin).parents[1]  # type: ignore[union-attr, arg-type]


def nvidia(library: str) -> dict[str, str]:
    """NVIDIA's compiler from a Python package: the variable that tells tinygrad where it is."""
    found = sorted(SITE_PACKAGES.glob(f"nvidia/*/lib/lib{library}.so.*"))
    return {f"{library.upper()}_PATH": str(found[0])} if found else {}


def llvm() -> dict[str, str]:
    """LLVM 19 or newer: older ones want typed pointers."""
    found = sorted(Path("/usr/lib").glob("*/libLLVM.so.*"))
    return {"LLVM_PATH": str(found[0])} if found else {}


TARGETS = {
    "NULL:CUDA:sm_90": (nvidia("nvrtc"), "pip install nvidia-cuda-nvrtc"),
    "NULL:PTX:sm_90": (nvidia("nvJitLink"), "pip install nvidia-nvjitlink"),
    "NULL:AMDLLVM:gfx942": (llvm(), "apt-get install libllvm19"),
    "NULL:AMDLLVM:gfx1100": (llvm(), "apt-get install libllvm19"),
    "NULL:METAL:Apple7": ({"PARALLEL": "0"}, ""),
    "NULL:OPENCL": ({"PARALLEL": "1"}, ""),
    "NULL:WGSL": ({"PARALLEL": "1"}, ""),
}


@pytest.mark.parametrize("target", TARGETS)
def test_training_and_generation_compile(target: str) -> None:
    variables, how = TARGETS[target]
    if not variables:
        pytest.skip(f"no compiler for {target}: {how}")
    environment = {**os.environ, **variables, "DEV": target, "NULL_ALLOW_COPYOUT": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.lowering"], env=environment, capture_output=True, text=True,
        cwd=Path(__file__).parents[1], timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["devices"] == ["NULL"]  # nothing falls back to the host
    # One layer: 146 kernels for a training step (3 for each of 16 tensors in AdamW) and 23 for a
    # token, where a kernel may have any number of arguments; some targets split those with many.
    assert 100 < result["kernels"]["training"] < 220
    assert 15 < result["kernels"]["generation"] < 40
