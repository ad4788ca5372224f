"""Where the time of a training step goes, kernel by kernel: `python -m tinygpt.train --profile`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from tinygrad.helpers import ansistrip

from tinygpt.config import InputError, RunConfig
from tinygpt.parallel import ParallelTrainer
from tinygpt.trainer import Trainer

STEPS = 20
WORDS = {  # what a kernel's name begins with, the longer first
    "linear_dx": "linear layers, gradient of the input",
    "linear_dw": "linear layers, gradient of the weights",
    "linear": "linear layers",
    "attention_d": "attention, gradient",
    "attention": "attention",
    "norm_and_rotate_d": "norm and rotation of queries and keys, gradient",
    "norm_and_rotate": "norm and rotation of queries and keys",
    "layer_norm_d": "layer norm, gradient",
    "layer_norm": "layer norm",
    "rms_norm_d": "RMS norm, gradient",
    "rms_norm": "RMS norm",
    "cross_entropy_d": "loss, gradient",
    "cross_entropy": "loss",
    "embedding_d": "embedding, gradient",
    "embedding": "embedding",
    "sum_of_squares": "length of the gradient, for clipping",
    "adamw": "AdamW",
    "orthogonalize": "Muon's orthogonal steps",
    "E(_|$)": "tinygrad's own: element by element",
    "r_": "tinygrad's own: sums",
}


class Row(NamedTuple):
    """One kind of work in one step."""

    name: str
    calls: int
    seconds: float
    operations: int


def profile(trainer: Trainer, config: RunConfig) -> str:
    """A table of the first core's kernels, the slowest work first; runs a few steps on random data.

    Raises:
        InputError: the device is not a CPU.
    """
    if not isinstance(trainer, ParallelTrainer):
        raise InputError(
            f"--profile times the kernels of a CPU, not of {trainer.devices[0]}; "
            "DEBUG=2 makes tinygrad print its own times for every kernel of any device"
        )
    shape = config.train.batch_size, config.model.block_size
    tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)
    trainer.step(tokens, tokens, 0)  # compiles
    trainer.step(tokens, tokens, 1)
    start = time.perf_counter()
    for i in range(STEPS):
        trainer.step(tokens, tokens, i)
    wall = (time.perf_counter() - start) / STEPS
    rows = sorted(kernel_times(trainer), key=lambda row: -row.seconds)
    return "\n".join(table(rows, wall, len(trainer.devices)))


def kernel_times(trainer: ParallelTrainer) -> Iterable[Row]:
    """The first core's kernels, alone and in their order, medians over the steps."""
    calls = [call for name in trainer.PHASES for call in trainer.launchers[name][0].calls]
    times = np.zeros((STEPS, len(calls)))
    for i in range(STEPS):
        for j, call in enumerate(calls):
            start = time.perf_counter()
            call.function(*call.arguments)
            times[i, j] = time.perf_counter() - start
    rows: dict[str, Row] = {}
    for call, seconds in zip(calls, np.median(times, axis=0), strict=True):
        words = in_words(call.name)
        _, n, so_far, operations = rows.get(words, Row(words, 0, 0.0, 0))
        rows[words] = Row(words, n + 1, so_far + seconds, operations + call.operations)
    return rows.values()


def in_words(name: str) -> str:
    plain = ansistrip(name)
    return next((words for start, words in WORDS.items() if re.match(start, plain)), plain)


def table(rows: list[Row], wall: float, cores: int) -> Iterable[str]:
    total = sum(row.seconds for row in rows)
    operations = sum(row.operations for row in rows)
    yield f"{'one core, its part of a step':48} {'calls':>6} {'ms':>8} {'share':>6} {'GFLOP/s':>8}"
    for name, calls, seconds, count in rows:
        rate = f"{count / seconds / 1e9:8.1f}" if count else ""
        yield f"{name:48} {calls:>6} {seconds * 1e3:>8.2f} {seconds / total:>6.1%} {rate}"
    yield f"{'all':48} {'':>6} {total * 1e3:>8.2f} {1:>6.1%} {operations / total / 1e9:8.1f}"
    yield (
        f"A step on {cores} cores together takes {wall * 1e3:.2f} ms, "
        f"{cores * operations / wall / 1e9:.0f} GFLOP/s. What is above the kernels' time is "
        "waiting for memory, for the other cores, and Python."
    )
