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


NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315


def orthogonalized(g: Array, steps: int = 5) -> Array:
    """Nearly the orthogonal matrix closest to g, by Newton and Schulz's iteration.

    X = g / |g|, so that no singular value is above 1; then, five times,
        X <- a X + b (X X^T) X + c (X X^T)^2 X
    which does to each singular value s what a s + b s^3 + c s^5 does to a number, and leaves the
    singular vectors alone. With Jordan's coefficients numbers between 0.01 and 1 end between 0.68
    and 1.14. A tall matrix is done as its transpose: X X^T is smaller then. (..., rows, columns).
    """
    tall = g.shape[-2] > g.shape[-1]
    x = g.swapaxes(-1, -2) if tall else g
    x = x / (np.sqrt((x**2).sum(axis=(-2, -1), keepdims=True)) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        square = x @ x.swapaxes(-1, -2)
        x = a * x + (b * square + c * square @ square) @ x
    return np.asarray(x.swapaxes(-1, -2) if tall else x)


def muon(
    p: Array, g: Array, momentum: Array, learning_rate: float, beta: float, weight_decay: float
) -> tuple[Array, Array]:
    """(new p, new momentum) of a matrix p (rows, columns) after one step (Jordan et al. 2024).

        m <- beta m + g                                 the momentum
        u  = g + beta m                                 Nesterov: one step ahead
        p <- p - lr decay p - lr sqrt(max(1, rows / columns)) orthogonalized(u)
    The root makes an update of a tall matrix as large, channel by channel, as that of a square one.
    """
    m = beta * momentum + g
    u = orthogonalized(g + beta * m)
    scale = math.sqrt(max(1.0, p.shape[-2] / p.shape[-1]))
    return p - learning_rate * (weight_decay * p + scale * u), m


def linear_decay(
    iteration: int,
    peak: float,
    lowest: float,
    warmup_iters: int,
    warmdown_iters: int,
    decay_iters: int,
) -> float:
    """The learning rate of an iteration, counted from 0: a ramp, flat, a straight line, flat.

    The ramp is that of `learning_rate`; the line falls from the peak to the lowest over the
    warmdown_iters iterations before decay_iters. Where ramp and line meet, the smaller one holds.
    """
    ramp = peak * min(1.0, (iteration + 1) / (warmup_iters + 1))
    left = min(1.0, max(0.0, (decay_iters - iteration) / warmdown_iters))
    return min(ramp, lowest + (peak - lowest) * left)


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
