"""Training on several CPU cores: the same kernels on each, over memory of its own.

tinygrad runs the kernels of a CPU one after the other, but a kernel call releases Python's lock: so
Python threads, one per core, run them side by side. Every core gets an equal part of each batch.
The weights exist once, in one flat piece of memory that all cores read; each core writes its own
flat gradients, and after that updates its own part of the weights from the mean of all gradients
(data parallelism with a sharded optimizer, as in ZeRO, Rajbhandari et al. 2020): whole matrices
where Muon does it, else an equal stretch of memory. Sums are always taken in the same order: the
result depends on the number of cores, but not on their timing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tinygrad import Context, Tensor, dtypes

from tinygpt import kernels
from tinygpt.checkpoint import training_state
from tinygpt.config import RunConfig, TrainConfig
from tinygpt.launch import Launcher
from tinygpt.model import build_model, cross_entropy, dropout_seed, is_inner
from tinygpt.optimizer import (
    Group,
    Optimizer,
    clip_coefficient,
    global_norm,
    groups_of,
    moments_by_name,
    orthogonalize_cost,
    step_rates,
    step_seed,
)
from tinygpt.sampling import Tokens

ALIGNMENT = 16  # floats, a cache line: tinygrad's vectorized kernels want aligned arrays


class Memory:
    """Named float32 arrays side by side in one, seen by numpy and by tensors."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.shapes, self.offsets, end = shapes, dict[str, int](), 0
        for name, shape in shapes.items():
            self.offsets[name] = end
            end += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
        owner = np.zeros(end + ALIGNMENT, np.float32)
        skip = -(owner.ctypes.data // owner.itemsize) % ALIGNMENT
        self.array = owner[skip : skip + end]

    def view(self, name: str) -> NDArray[np.float32]:
        start, shape = self.offsets[name], self.shapes[name]
        return self.array[start : start + math.prod(shape)].reshape(shape)

    def tensor(self, name: str) -> Tensor:
        return as_tensor(self.view(name))

    def tensors(self) -> dict[str, Tensor]:
        return {name: self.tensor(name) for name in self.shapes}

    def part(self, start: int, end: int) -> Tensor:
        """The floats from `start` to `end`, whatever they are of."""
        return as_tensor(self.array[start:end])


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A tensor on the CPU over the memory of `array`, which must outlive it."""
    known = {"float32": dtypes.float, "int32": dtypes.int, "uint32": dtypes.uint32}
    dtype = known[str(array.dtype)]
    return Tensor.from_blob(array.ctypes.data, array.shape, dtype=dtype, device="CPU")


class Core:
    """What one core reads and writes for itself, but for intermediate results."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], batch: tuple[int, int]):
        self.gradients = Memory(shapes)
        self.x, self.y = np.zeros(batch, np.int32), np.zeros(batch, np.int32)
        self.loss, self.seed = np.zeros(1, np.float32), np.zeros(1, np.uint32)

    def addresses(self) -> list[int]:
        arrays = [self.x, self.y, self.loss, self.seed]
        arrays += [self.gradients.view(name) for name in self.gradients.shapes]
        return [array.ctypes.data for array in arrays]


class ParallelTrainer:
    """A `trainer.Trainer` on `cores` CPU cores, which get equal parts of every batch."""

    PHASES = "gradients", "average", "update"  # of a step; each needs what all cores did before

    def __init__(self, config: RunConfig, cores: int):
        c, self.model = config.train, build_model(config.model, config.train.seed)
        initial = self.model.parameters()
        self.groups = groups_of(initial, c)
        by_group = sorted(initial, key=lambda name: self.groups[name], reverse=True)
        shapes = {name: tuple(map(int, initial[name].shape)) for name in by_group}
        self.weights, self.m, self.v = (Memory(shapes) for _ in range(3))
        for name, tensor in initial.items():
            self.weights.view(name)[:] = tensor.numpy()
        self.model.use(self.weights.tensors())
        batch = c.batch_size // cores, config.model.block_size
        self.cores = [Core(shapes, batch) for _ in range(cores)]
        self.rates, self.norms = step_rates(0, c), np.zeros(cores, np.float32)
        # One launcher for each core, or at first for the first core alone.
        self.launchers: dict[str, list[Launcher]] = {}
        self._add_model_phases()
        for core in range(cores):
            self._add_update_phases(c, core)
        self.config, self.devices = c, ["CPU"] * cores
        inner = {name for name, group in self.groups.items() if group.orthogonalized}
        v = {name: v for name, v in self.v.tensors().items() if name not in inner}
        moments = moments_by_name(self.m.tensors(), v)
        self.state = training_state(self.model.parameters(), moments)
        self.pool = ThreadPoolExecutor(cores)

    def step(self, x: Tokens, y: Tokens, iteration: int) -> None:
        self._feed(x, y)
        self.rates[:] = step_rates(iteration, self.config)
        for number, core in enumerate(self.cores):
            core.seed[:] = step_seed(iteration, self.config, number)
        for phase in self.PHASES:
            self._run(phase)

    def train_loss(self) -> float:
        return float(np.mean([core.loss for core in self.cores]))

    def evaluate(self, x: Tokens, y: Tokens) -> float:
        self._feed(x, y)
        self._run("evaluation")
        return float(np.mean([core.loss for core in self.cores]))

    def _feed(self, x: Tokens, y: Tokens) -> None:
        parts = zip(np.split(x, len(self.cores)), np.split(y, len(self.cores)), strict=True)
        for core, (x_part, y_part) in zip(self.cores, parts, strict=True):
            core.x[:], core.y[:] = x_part, y_part

    def _run(self, phase: str) -> None:
        """Runs a phase on every core and waits; the first time compiles it, core after core."""
        launchers = self.launchers[phase]
        if not launchers[0].calls:
            for launcher in launchers:
                launcher()
            here, others = self.cores[0].addresses(), self.cores[len(launchers) :]
            for core in others:
                moved = dict(zip(here, core.addresses(), strict=True))
                launchers.append(launchers[0].over(moved))
                launchers[-1]()
            return
        waiting = [self.pool.submit(launcher) for launcher in launchers[1:]]
        launchers[0]()
        for future in waiting:
            future.result()

    def _add(self, *phases: Callable[[], None]) -> None:
        for phase in phases:
            self.launchers.setdefault(phase.__name__, []).append(Launcher(phase, "CPU"))

    def _add_model_phases(self) -> None:
        """Of the first core: the others run the same kernels over their memory."""
        first, parameters = self.cores[0], self.model.parameters()
        x, y, loss, seed = map(as_tensor, (first.x, first.y, first.loss, first.seed))
        stored = first.gradients.tensors()

        @Context(TRAINING=1)
        def gradients() -> None:
            places = {p.uop: stored[n] for n, p in parameters.items() if is_inner(n, p)}
            with dropout_seed(seed), kernels.gradients_into(places):
                value = self.model(x, y)[1]
                assert value is not None
                new = value.gradient(*parameters.values())
            stores = [
                g if stored[n].uop in g.uop.src[:1] else stored[n].assign(g)  # some are in place
                for n, g in zip(parameters, new, strict=True)
            ]
            Tensor.realize(loss.assign(value.reshape(1)), *stores)

        def evaluation() -> None:
            with kernels.inference({}):
                value = cross_entropy(self.model.logits(x), y)
            loss.assign(value.reshape(1)).realize()

        self._add(gradients, evaluation)

    def _add_update_phases(self, c: TrainConfig, core: int) -> None:
        spans, matrices = shares(self.weights, self.groups, len(self.cores))[core]

        def parts(memory: Memory) -> dict[str, Tensor]:
            stretches = {str(g): memory.part(*span) for g, span in spans.items()}
            return stretches | {name: memory.tensor(name) for name in matrices}

        mean, *others = (parts(core.gradients) for core in self.cores)  # the first becomes the mean
        groups = {str(g): g for g in spans} | {name: self.groups[name] for name in matrices}
        own = parts(self.weights)
        optimizer = Optimizer(own, c, groups, parts(self.m), parts(self.v))
        norms, rates = as_tensor(self.norms), as_tensor(self.rates)
        norm = as_tensor(self.norms[core : core + 1])

        def average() -> None:
            if others:
                count = len(self.cores)
                Tensor.realize(
                    *(mean[n].assign((mean[n] + sum(g[n] for g in others)) / count) for n in own)
                )
            norm.assign(global_norm(list(mean.values())).reshape(1)).realize()

        def update() -> None:
            scale = clip_coefficient(global_norm([norms]), c.grad_clip).contiguous()
            Tensor.realize(*optimizer.schedule_step(mean, scale, rates))

        self._add(average, update)


Spans = dict[Group, tuple[int, int]]


def shares(memory: Memory, groups: dict[str, Group], cores: int) -> list[tuple[Spans, list[str]]]:
    """What each core updates: an equal stretch of every group that AdamW updates, and the names of
    Muon's matrices, which go, the costliest first, to the core that has least to do.

    Stretches are as long on every core, as far as that goes: they share the kernels.
    """
    costs = {
        n: orthogonalize_cost(n, memory.shapes[n]) for n, g in groups.items() if g.orthogonalized
    }
    names: list[list[str]] = [[] for _ in range(cores)]
    for name in sorted(costs, key=lambda n: -costs[n]):
        min(names, key=lambda own: sum(costs[n] for n in own)).append(name)

    starts: dict[Group, int] = {}
    for name, offset in memory.offsets.items():
        if name not in costs:
            starts.setdefault(groups[name], offset)
    ends = [*list(starts.values())[1:], len(memory.array)]
    spans: list[Spans] = [{} for _ in range(cores)]
    for (group, start), end in zip(starts.items(), ends, strict=True):
        bounds = [start + (end - start) * i // cores // ALIGNMENT * ALIGNMENT for i in range(cores)]
        for core, span in enumerate(pairwise([*bounds, end])):
            if span[0] < span[1]:
                spans[core][group] = span
    return list(zip(spans, names, strict=True))
