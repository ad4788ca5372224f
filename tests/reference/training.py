"""One optimizer step: clip the gradients, look up the learning rate, move the parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .layers import Array


def clip_by_global_norm(
    gradients: Mapping[str, Array], max_norm: float
) -> tuple[dict[str, Array], float]:
    """(clipped gradients, norm before clipping): one norm over all gradients, all scaled alike.

    norm = sqrt(sum of all squares);  g <- g min(1, max_norm / (norm + 1e-6))
    The 1e-6 keeps a norm of zero harmless (Pascanu et al. 2013; the constant is torch's).
    """
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    coefficient = min(1.0, max_norm / (norm + 1e-6))
    return {name: g * coefficient for name, g in gradients.items()}, norm


class Moments(NamedTuple):
    """AdamW's memory: how many steps were made, and running means of g and g^2 by parameter."""

    step: int
    first: dict[str, Array]
    second: dict[str, Array]

    @classmethod
    def zero(cls, parameters: Mapping[str, Array]) -> Moments:
        """Before the first step."""
        zeros = {name: np.zeros_like(p) for name, p in parameters.items()}
        return cls(0, zeros, zeros)


def adamw(
    parameters: Mapping[str, Array],
    gradients: Mapping[str, Array],
    moments: Moments,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> tuple[dict[str, Array], Moments]:
    """(new parameters, new moments) after one step of AdamW (Loshchilov and Hutter 2019).

    s counts steps from 1.
        m <- b1 m + (1 - b1) g          m^ = m / (1 - b1^s)
        v <- b2 v + (1 - b2) g^2        v^ = v / (1 - b2^s)
        p <- p - lr decay p - lr m^ / (sqrt(v^) + eps)
    m and v begin at zero and so begin too small: dividing by 1 - b^s corrects that bias. The decay
    is decoupled: it never enters the moments. It acts on matrices (two dimensions) only; biases and
    LayerNorm's parameters are free.
    """
    b1, b2 = betas
    step = moments.step + 1
    new: dict[str, Array] = {}
    first: dict[str, Array] = {}
    second: dict[str, Array] = {}
    for name, p in parameters.items():
        g = gradients[name]
        first[name] = b1 * moments.first[name] + (1 - b1) * g
        second[name] = b2 * moments.second[name] + (1 - b2) * g**2
        m_hat = first[name] / (1 - b1**step)
        v_hat = second[name] / (1 - b2**step)
        decay = weight_decay if p.ndim == 2 else 0.0
        new[name] = p - learning_rate * (decay * p + m_hat / (np.sqrt(v_hat) + eps))
    return new, Moments(step, first, second)


def learning_rate(
    iteration: int, peak: float, lowest: float, warmup_iters: int, decay_iters: int
) -> float:
    """The learning rate of an iteration, counted from 0: a ramp, half a cosine, then flat.

    before warmup_iters:     peak (iteration + 1) / (warmup_iters + 1)
    before decay_iters:      lowest + (peak - lowest) (1 + cos(pi r)) / 2,
                             r = (iteration - warmup_iters) / (decay_iters - warmup_iters)
    from decay_iters on:     lowest
    (Loshchilov and Hutter 2017, without restarts; the ramp is nanoGPT's, never quite 0.)
    """
    if iteration < warmup_iters:
        return peak * (iteration + 1) / (warmup_iters + 1)
    if iteration >= decay_iters:
        return lowest
    r = (iteration - warmup_iters) / (decay_iters - warmup_iters)
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * r)) / 2
