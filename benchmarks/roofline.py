"""What a core can do at the most: multiplications and additions in vector registers, no memory.

The kernels' own inner loop, the tile of a matrix product, over operands that never leave the
first-level cache. One thread per core at the same time: two hardware threads may share one core's
arithmetic units.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tinygrad import Tensor

from tinygpt.kernels import Kernel, Program, call, register_tile
from tinygpt.launch import Launcher

DEPTH, REPEATS = 64, 20_000


def tile_kernel() -> Program:
    k, tile = Kernel("roofline"), register_tile()
    out, a, b = k.output(*tile), k.input(2, tile.rows, DEPTH), k.input(2, DEPTH, tile.columns)
    with k.loop(REPEATS) as r:
        sums = k.product(DEPTH, lambda m, d: a[r % 2, m, d], lambda d, n: b[r % 2, d, n])
        with k.loop(tile.rows) as m, k.loop(tile.columns) as n:
            out[m, n] = sums[m, n]
    return k.finish(2 * REPEATS * DEPTH * tile.rows * tile.columns)


def launcher() -> Launcher:
    tile, ones = register_tile(), np.ones(2 * DEPTH, np.float32)
    a, b = (Tensor(np.tile(ones, n), device="CPU").realize() for n in (tile.rows, tile.columns))
    return Launcher(lambda: call(tile_kernel(), [a, b])[0].realize(), "CPU")


def peak_gflops(cores: int, rounds: int = 7) -> float:
    """GFLOP/s of so many cores together, the median over rounds."""
    first = launcher()
    first()  # compiles
    launchers = [first, *(first.over({}) for _ in range(cores - 1))]
    operations = sum(launch.calls[0].operations for launch in launchers)
    seconds = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(lambda launch: launch(), launchers))
            seconds.append(time.perf_counter() - start)
    return operations / statistics.median(seconds) / 1e9


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    print(cpu_name())
    for cores in sorted({1, os.cpu_count() or 1}):
        print(f"{cores} cores: {peak_gflops(cores):.0f} GFLOP/s")
