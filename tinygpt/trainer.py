"""What makes the steps: one device as it comes, or all cores of a CPU; and the exact loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tinygrad import Context, Device, Tensor, TinyJit
from tinygrad.helpers import tqdm

from tinygpt.batches import evaluation_batches, sample_blocks
from tinygpt.checkpoint import training_state
from tinygpt.config import InputError, RunConfig
from tinygpt.launch import called_directly
from tinygpt.model import LanguageModel, build_model, cross_entropy, dropout_seed
from tinygpt.optimizer import (
    AdamW,
    Optimizer,
    clip_coefficient,
    global_norm,
    moments_by_name,
    step_rates,
    step_seed,
)
from tinygpt.parallel import ParallelTrainer
from tinygpt.sampling import Tokens


class Trainer(Protocol):
    """A model and its optimizer, on whatever devices."""

    model: LanguageModel
    devices: list[str]
    state: dict[str, Tensor]  # all that a step changes, by name

    def step(self, x: Tokens, y: Tokens, iteration: int) -> None: ...
    def train_loss(self) -> float: ...  # of the last step, in nats; waits for it
    def evaluate(self, x: Tokens, y: Tokens) -> float: ...  # mean loss over (B, T), no dropout


class OneDevice:
    """The `Trainer` for any device: a step is one compiled function."""

    def __init__(self, config: RunConfig):
        self.config, self.devices = config.train, [Device.DEFAULT]
        self.model = build_model(config.model, config.train.seed)
        self.optimizer = Optimizer(self.model.parameters(), config.train)
        moments = moments_by_name(self.optimizer.m, self.optimizer.v)
        self.state = training_state(self.model.parameters(), moments)
        self.compiled_step = training_step(self.model, self.optimizer, config.train.grad_clip)
        self.compiled_loss = TinyJit(lambda x, y: cross_entropy(self.model.logits(x), y).realize())

    def step(self, x: Tokens, y: Tokens, iteration: int) -> None:
        changing = step_rates(iteration, self.config), step_seed(iteration, self.config)
        self.loss = self.compiled_step(Tensor(x), Tensor(y), *map(Tensor, changing))

    def train_loss(self) -> float:
        return self.loss.item()

    def evaluate(self, x: Tokens, y: Tokens) -> float:
        return self.compiled_loss(Tensor(x), Tensor(y)).item()


def training_step(
    model: LanguageModel, optimizer: Optimizer | AdamW, grad_clip: float
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A step of training as a compiled function to the loss.

    Its arguments are x and y (B, T), `step_rates` (5,) and `step_seed` (1,).
    """
    names, parameters = zip(*model.parameters().items(), strict=True)

    @TinyJit
    @Context(TRAINING=1)  # dropout is on
    def step(x: Tensor, y: Tensor, rates: Tensor, seed: Tensor) -> Tensor:
        with dropout_seed(seed):
            _, loss = model(x, y)
        assert loss is not None
        gradients = [g.contiguous() for g in loss.gradient(*parameters)]
        scale = clip_coefficient(global_norm(gradients), grad_clip).contiguous()
        updated = optimizer.schedule_step(dict(zip(names, gradients, strict=True)), scale, rates)
        return loss.realize(*updated)

    return step


def choose_trainer(config: RunConfig) -> Trainer:
    """On a CPU all cores that can share the batches equally, or as many as wanted; else one device.

    Raises:
        InputError: `devices` does not divide batch_size.
    """
    wanted, batch_size = config.train.devices, config.train.batch_size
    if wanted and batch_size % wanted:
        raise InputError(f"devices {wanted} do not divide batch_size {batch_size}; they must")
    if not called_directly(Device.DEFAULT):
        return OneDevice(config)
    cores = range(1, (os.cpu_count() or 1) + 1)
    return ParallelTrainer(config, wanted or max(n for n in cores if batch_size % n == 0))


def exact_loss(
    trainer: Trainer, data: NDArray[np.integer], batch_size: int, block_size: int
) -> float:
    """Mean loss over every target of `data`, in non-overlapping blocks, in nats per token."""
    batches = evaluation_batches(data, batch_size, block_size)
    count = -(-(len(data) - 1) // (batch_size * block_size))
    total = 0.0
    for x, y in tqdm(batches, desc="evaluating", total=count, disable=None):
        total += trainer.evaluate(x, y) * y.size  # it is the mean over y.size positions
    return total / (len(data) - 1)


def estimated_loss(trainer: Trainer, data: NDArray[np.integer], config: RunConfig) -> float:
    """Mean loss over eval_iters random batches, the same ones at every evaluation of a run."""
    c, rng = config.train, np.random.default_rng(config.train.seed)
    sizes = c.batch_size, config.model.block_size
    losses = [trainer.evaluate(*sample_blocks(data, *sizes, rng)) for _ in range(c.eval_iters)]
    return float(np.mean(losses))
