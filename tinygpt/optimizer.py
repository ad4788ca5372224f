"""What turns gradients into better parameters: schedule, clipping, AdamW."""

from __future__ import annotations

import math

import numpy as np
from tinygrad import Tensor

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
    squares = [g.square().sum() for g in gradients]
    return Tensor.stack(*squares).sum().sqrt()


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by, so that it is max_norm at the most."""
    return (max_norm / (norm + 1e-6)).minimum(1.0)


class AdamW:
    """Adam with decoupled weight decay (Kingma & Ba 2015; Loshchilov & Hutter 2019).

        m = beta1 m + (1 - beta1) g                 v = beta2 v + (1 - beta2) g^2
        p = p (1 - rate decay) - rate (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Matrices decay; biases and layer norm weights, which have one axis, do not.
    """

    def __init__(self, parameters: dict[str, Tensor], config: TrainConfig):
        self.parameters, self.config = parameters, config
        self.m = {name: _zeros_like(p) for name, p in parameters.items()}
        self.v = {name: _zeros_like(p) for name, p in parameters.items()}

    def rates(self, iteration: int) -> Tensor:
        """What changes with the step (0 is the first): learning rate, and both bias corrections.

        They go into the compiled step as a tensor (3,): a Python number would be frozen there.
        """
        t, c = iteration + 1, self.config
        rates = [learning_rate(iteration, c), 1 / (1 - c.beta1**t), 1 / (1 - c.beta2**t)]
        return Tensor(np.array(rates, np.float32))

    def schedule_step(self, gradients: dict[str, Tensor], rates: Tensor) -> list[Tensor]:
        """Assigns new moments and parameters; returns the tensors to realize, all in one call."""
        c = self.config
        rate, correction1, correction2 = rates[0], rates[1], rates[2]
        for name, p in self.parameters.items():
            g, m, v = gradients[name], self.m[name], self.v[name]
            m.assign(c.beta1 * m + (1 - c.beta1) * g)
            v.assign(c.beta2 * v + (1 - c.beta2) * g.square())
            step = rate * (m * correction1) / ((v * correction2).sqrt() + EPS)
            decayed = p * (1 - rate * c.weight_decay) if p.ndim >= 2 else p
            p.assign(decayed - step)
        return [*self.m.values(), *self.v.values(), *self.parameters.values()]

    def state(self) -> dict[str, Tensor]:
        """Both moments by parameter name: `m.{name}` and `v.{name}`."""
        return {f"m.{n}": t for n, t in self.m.items()} | {f"v.{n}": t for n, t in self.v.items()}


def _zeros_like(p: Tensor) -> Tensor:
    return Tensor(np.zeros(p.shape, np.float32), device=p.device).realize()
