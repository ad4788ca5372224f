"""What makes a step of training: its rates and seed, gradient clipping, AdamW."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from tinygrad import Tensor

from tinygpt import kernels
from tinygpt.config import TrainConfig

EPS = 1e-8  # AdamW's, inside float32's range after the square root


def learning_rate(iteration: int, config: TrainConfig) -> float:
    """The learning rate of step `iteration` (0 is the first), as nanoGPT's schedule gives it.

    Linear warm-up over warmup_iters steps, then half a cosine (Loshchilov & Hutter 2017) down to
    min_lr at lr_decay_iters, and min_lr from there on.
    """
    if iteration < config.warmup_iters:
        return config.learning_rate * (iteration + 1) / (config.warmup_iters + 1)
    if iteration >= config.decay_iters:
        return config.final_lr
    progress = (iteration - config.warmup_iters) / (config.decay_iters - config.warmup_iters)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr + cosine * (config.learning_rate - config.final_lr)


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean length of all gradients seen as one vector, a scalar."""
    squares = [
        kernels.sum_of_squares(g) if kernels.usable(g) else g.square().sum() for g in gradients
    ]
    return Tensor.stack(*squares).sum().sqrt()


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by, so that it is max_norm at the most.

    1 where max_norm is 0: nothing is clipped.
    """
    if max_norm == 0:
        return Tensor.ones_like(norm)
    return (max_norm / (norm + 1e-6)).minimum(1.0)


class AdamW:
    """Adam with decoupled weight decay (Kingma & Ba 2015; Loshchilov & Hutter 2019).

        m = beta1 m + (1 - beta1) g                 v = beta2 v + (1 - beta2) g^2
        p = p (1 - rate decay) - rate (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        decayed: names of the parameters that decay; by default the matrices, not the biases and
            layer norm weights, which have one axis.
        m, v: memory for the moments, zero; made here by default.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        config: TrainConfig,
        decayed: set[str] | None = None,
        m: dict[str, Tensor] | None = None,
        v: dict[str, Tensor] | None = None,
    ):
        self.parameters, self.config = parameters, config
        self.decayed = (
            {n for n, p in parameters.items() if p.ndim >= 2} if decayed is None else decayed
        )
        self.m = m or {name: _zeros_like(p) for name, p in parameters.items()}
        self.v = v or {name: _zeros_like(p) for name, p in parameters.items()}

    def schedule_step(
        self, gradients: dict[str, Tensor], scale: Tensor, rates: Tensor
    ) -> list[Tensor]:
        """Assigns new moments and parameters; returns the tensors to realize, all in one call.

        Args:
            gradients: by name; all are multiplied by scale, a scalar.
            rates: see `step_rates`.
        """
        changed = []
        for name, p in self.parameters.items():
            arrays = p, self.m[name], self.v[name], gradients[name]
            changed += self._update(*arrays, scale, rates, name in self.decayed)
        return changed

    def _update(
        self, p: Tensor, m: Tensor, v: Tensor, g: Tensor, scale: Tensor, rates: Tensor, decay: bool
    ) -> list[Tensor]:
        c = self.config
        weight_decay = c.weight_decay if decay else 0.0
        if kernels.usable(p):
            betas = c.beta1, c.beta2
            return kernels.adamw(p, m, v, g, scale, rates, betas, EPS, weight_decay)
        rate, correction1, correction2 = rates[0], rates[1], rates[2]
        g = g * scale
        m.assign(c.beta1 * m + (1 - c.beta1) * g)
        v.assign(c.beta2 * v + (1 - c.beta2) * g.square())
        step = rate * (m * correction1) / ((v * correction2).sqrt() + EPS)
        p.assign(p * (1 - rate * weight_decay) - step)
        return [m, v, p]


def step_rates(iteration: int, config: TrainConfig) -> NDArray[np.float32]:
    """What changes with the step (0 is the first): learning rate, and both bias corrections, (3,).

    They go into the compiled step as a tensor: a Python number would be frozen there.
    """
    t = iteration + 1
    corrections = [1 / (1 - config.beta1**t), 1 / (1 - config.beta2**t)]
    return np.array([learning_rate(iteration, config), *corrections], np.float32)


def step_seed(iteration: int, config: TrainConfig, core: int = 0) -> NDArray[np.uint32]:
    """What dropout's random choices of a step follow from on one of the cores, (1,)."""
    rng = np.random.default_rng([config.seed, iteration, core + 1])  # 0 would be as if not there
    return rng.integers(2**32, size=1, dtype=np.uint32)


def moments_by_name(m: dict[str, Tensor], v: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"m.{n}": t for n, t in m.items()} | {f"v.{n}": t for n, t in v.items()}


def _zeros_like(p: Tensor) -> Tensor:
    return Tensor(np.zeros(p.shape, np.float32), device=p.device).realize()
