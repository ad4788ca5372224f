"""Training on several CPU cores: a copy of the model on each, all over the same memory.

tinygrad runs the kernels of a CPU device on one core, but two devices, `CPU` and `CPU:1`, each
driven by a Python thread of its own, run side by side: a kernel call releases Python's lock. So
every core gets a device, a model and an equal part of each batch. The weights exist once, in one
flat piece of memory that all models read; each core writes its own flat gradients, and after that
updates its own part of the weights from the mean of all gradients (data parallelism with a sharded
optimizer, as in ZeRO, Rajbhandari et al. 2020): whole matrices where Muon does it, else an equal
stretch of memory. Sums are always taken in the same order: the result depends on the number of
cores, but not on their timing.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tinygrad import Context, Tensor, dtypes

from tinygpt.checkpoint import training_state
from tinygpt.config import RunConfig
from tinygpt.launch import Launcher
from tinygpt.model import build_model, cross_entropy, dropout_seed
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
    """Named float32 arrays side by side in one, seen by numpy and by tensors on any CPU device."""

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

    def tensor(self, name: str, device: str) -> Tensor:
        return on_device(self.view(name), device)

    def tensors(self, device: str) -> dict[str, Tensor]:
        return {name: self.tensor(name, device) for name in self.shapes}

    def part(self, start: int, end: int, device: str) -> Tensor:
        """The floats from `start` to `end`, whatever they are of."""
        return on_device(self.array[start:end], device)


def on_device(array: NDArray[Any], device: str) -> Tensor:
    """A tensor on a CPU device over the memory of `array`, which must outlive it."""
    known = {"float32": dtypes.float, "int32": dtypes.int, "uint32": dtypes.uint32}
    dtype = known[str(array.dtype)]
    return Tensor.from_blob(array.ctypes.data, array.shape, dtype=dtype, device=device)


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
        self.gradients = [Memory(shapes) for _ in range(cores)]
        self.rates, self.norms = step_rates(0, c), np.zeros(cores, np.float32)
        self.replicas = [Replica(self, config, core) for core in range(cores)]
        self.model.use(self.weights.tensors("CPU"))
        self.config, self.devices = c, [replica.device for replica in self.replicas]
        inner = {name for name, group in self.groups.items() if group.orthogonalized}
        v = {name: v for name, v in self.v.tensors("CPU").items() if name not in inner}
        moments = moments_by_name(self.m.tensors("CPU"), v)
        self.state = training_state(self.model.parameters(), moments)
        self.pool = ThreadPoolExecutor(cores)

    def step(self, x: Tokens, y: Tokens, iteration: int) -> None:
        self._feed(x, y)
        self.rates[:] = step_rates(iteration, self.config)
        for core, replica in enumerate(self.replicas):
            replica.seed[:] = step_seed(iteration, self.config, core)
        for phase in self.PHASES:
            self._run(phase)

    def train_loss(self) -> float:
        return float(np.mean([replica.loss for replica in self.replicas]))

    def evaluate(self, x: Tokens, y: Tokens) -> float:
        self._feed(x, y)
        self._run("evaluation")
        return float(np.mean([replica.loss for replica in self.replicas]))

    def _feed(self, x: Tokens, y: Tokens) -> None:
        parts = zip(np.split(x, len(self.replicas)), np.split(y, len(self.replicas)), strict=True)
        for replica, (x_part, y_part) in zip(self.replicas, parts, strict=True):
            replica.x[:], replica.y[:] = x_part, y_part

    def _run(self, phase: str) -> None:
        """Runs a phase on every core and waits; compiles it first, for one core after the other."""
        launchers = [replica.phases[phase] for replica in self.replicas]
        if not all(launcher.calls for launcher in launchers):
            for launcher in launchers:
                launcher()
            return
        waiting = [self.pool.submit(launcher) for launcher in launchers[1:]]
        launchers[0]()
        for future in waiting:
            future.result()


class Replica:
    """One core's model and its phases of a step; all it reads and writes is shared memory."""

    def __init__(self, trainer: ParallelTrainer, config: RunConfig, core: int):
        c, self.device = config.train, f"CPU:{core}" if core else "CPU"
        cores = len(trainer.gradients)
        self.model = build_model(config.model, None)
        self.model.use(trainer.weights.tensors(self.device))
        shape = (c.batch_size // cores, config.model.block_size)
        self.x, self.y = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        self.loss, self.seed = np.zeros(1, np.float32), np.zeros(1, np.uint32)
        x, y = on_device(self.x, self.device), on_device(self.y, self.device)
        loss, seed = on_device(self.loss, self.device), on_device(self.seed, self.device)
        parameters = self.model.parameters()
        gradients = trainer.gradients[core].tensors(self.device)

        @Context(TRAINING=1)
        def compute_gradients() -> None:
            with dropout_seed(seed):
                value = self.model(x, y)[1]
            assert value is not None
            new = value.gradient(*parameters.values())
            stores = [gradients[n].assign(g) for n, g in zip(parameters, new, strict=True)]
            Tensor.realize(loss.assign(value.reshape(1)), *stores)

        def evaluate() -> None:
            value = cross_entropy(self.model.logits(x), y)
            loss.assign(value.reshape(1)).realize()

        spans, matrices = shares(trainer.weights, trainer.groups, cores)[core]

        def parts(memory: Memory) -> dict[str, Tensor]:
            stretches = {str(g): memory.part(*span, self.device) for g, span in spans.items()}
            return stretches | {name: memory.tensor(name, self.device) for name in matrices}

        all_gradients = [parts(memory) for memory in trainer.gradients]
        groups = {str(g): g for g in spans} | {name: trainer.groups[name] for name in matrices}
        own = parts(trainer.weights)
        optimizer = Optimizer(own, c, groups, parts(trainer.m), parts(trainer.v))
        norms, rates = on_device(trainer.norms, self.device), on_device(trainer.rates, self.device)
        norm = on_device(trainer.norms[core : core + 1], self.device)

        def average() -> None:
            mean, *others = all_gradients  # the first core's becomes the mean
            if others:
                Tensor.realize(
                    *(mean[n].assign((mean[n] + sum(g[n] for g in others)) / cores) for n in own)
                )
            norm.assign(global_norm(list(mean.values())).reshape(1)).realize()

        def update() -> None:
            scale = clip_coefficient(global_norm([norms]), c.grad_clip).contiguous()
            Tensor.realize(*optimizer.schedule_step(all_gradients[0], scale, rates))

        phases = {
            "gradients": compute_gradients,
            "average": average,
            "update": update,
            "evaluation": evaluate,
        }
        self.phases = {name: Launcher(phase, self.device) for name, phase in phases.items()}


Spans = dict[Group, tuple[int, int]]


def shares(memory: Memory, groups: dict[str, Group], cores: int) -> list[tuple[Spans, list[str]]]:
    """What each core updates: an equal stretch of the memory that AdamW updates, cut where one
    group of parameters ends, and the names of Muon's matrices.

    The matrices go, the costliest first, to the core that has least to do.
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
    size = len(memory.array)
    ends = [*list(starts.values())[1:], size]
    first = min(starts.values(), default=size)
    bounds = [first + (size - first) * i // cores // ALIGNMENT * ALIGNMENT for i in range(cores)]
    found = []
    for start, end, own in zip(bounds, [*bounds[1:], size], names, strict=True):
        spans = {
            group: (max(start, group_start), min(end, group_end))
            for (group, group_start), group_end in zip(starts.items(), ends, strict=True)
        }
        found.append(({g: s for g, s in spans.items() if s[0] < s[1]}, own))
    return found
