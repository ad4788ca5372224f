"""What makes a step of training: its rates and seed, gradient clipping, AdamW, Muon."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tinygrad import Tensor

from tinygpt import kernels
from tinygpt.config import TrainConfig
from tinygpt.model import is_inner

EPS = 1e-8  # AdamW's, inside float32's range after the square root
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # Jordan's polynomial, made to reach 1 fast, not exactly
NEWTON_SCHULZ_STEPS = 5
RATES = {"learning_rate": 0, "embedding_lr": 3, "head_lr": 4}  # their places in `step_rates`


def learning_rate(iteration: int, config: TrainConfig, peak: float | None = None) -> float:
    """The learning rate of step `iteration` (0 is the first), or that of another peak.

    Linear warm-up over warmup_iters steps; then, as in nanoGPT, half a cosine (Loshchilov & Hutter
    2017) down to min_lr at lr_decay_iters, or else the peak and, over the last warmdown_iters
    steps, a straight line down to there; min_lr from there on.
    """
    c = config
    peak = c.learning_rate if peak is None else peak
    lowest = peak * c.final_share
    warmup = peak * (iteration + 1) / (c.warmup_iters + 1)
    left = c.decay_iters - iteration
    if c.schedule == "linear":
        share = min(1.0, max(0.0, left / c.linear_iters))
        return min(warmup, peak, lowest + share * (peak - lowest))
    if iteration < c.warmup_iters:
        return warmup
    if left <= 0:
        return lowest
    progress = (iteration - c.warmup_iters) / (c.decay_iters - c.warmup_iters)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return lowest + cosine * (peak - lowest)


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


class Group(NamedTuple):
    """What parameters have in common that are updated alike."""

    orthogonalized: bool  # by Muon, not by AdamW
    rate: str  # which of RATES
    decays: bool


def groups_of(parameters: dict[str, Tensor], config: TrainConfig) -> dict[str, Group]:
    """What the names and shapes of parameters say."""
    return {name: group_of(name, p, config) for name, p in parameters.items()}


def group_of(name: str, parameter: Tensor, config: TrainConfig) -> Group:
    """Matrices decay; biases and norms, which have one axis, do not."""
    is_matrix = parameter.ndim >= 2
    own_rates = {"wte": "embedding_lr", "wpe": "embedding_lr", "lm_head": "head_lr"}
    rate = own_rates.get(name.split(".")[0], "learning_rate")
    if getattr(config, rate) is None:
        rate = "learning_rate"
    return Group(config.optimizer == "muon" and is_inner(name, parameter), rate, is_matrix)


Moments = dict[str, Tensor]


class AdamW:
    """Adam with decoupled weight decay (Kingma & Ba 2015; Loshchilov & Hutter 2019).

        m = beta1 m + (1 - beta1) g                 v = beta2 v + (1 - beta2) g^2
        p = p (1 - rate decay) - rate (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        groups: of each parameter, by default `groups_of` them.
        m, v: memory for the moments, zero; made here by default.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        config: TrainConfig,
        groups: dict[str, Group] | None = None,
        m: Moments | None = None,
        v: Moments | None = None,
    ):
        self.parameters, self.config = parameters, config
        self.groups = groups or groups_of(parameters, config)
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
            changed += self._update(*arrays, scale, rates, self.groups[name])
        return changed

    def _update(
        self, p: Tensor, m: Tensor, v: Tensor, g: Tensor, scale: Tensor, rates: Tensor, group: Group
    ) -> list[Tensor]:
        c, index = self.config, RATES[group.rate]
        weight_decay = c.weight_decay if group.decays else 0.0
        if kernels.usable(p):
            betas = c.beta1, c.beta2
            return kernels.adamw(p, m, v, g, scale, rates, betas, EPS, weight_decay, index)
        rate, correction1, correction2 = rates[index], rates[1], rates[2]
        g = g * scale
        m.assign(c.beta1 * m + (1 - c.beta1) * g)
        v.assign(c.beta2 * v + (1 - c.beta2) * g.square())
        step = rate * (m * correction1) / ((v * correction2).sqrt() + EPS)
        p.assign(p * (1 - rate * weight_decay) - step)
        return [m, v, p]


class Muon:
    """Momentum, orthogonalized: every direction of a matrix moves as far (Jordan et al. 2024).

        m = momentum m + g                          u = g + momentum m (Nesterov's step ahead)
        p = p (1 - rate decay) - rate sqrt(max(1, rows / columns)) orthogonalize(u)

    The rows of attention's c_attn make queries, keys and values; each kind is orthogonalized alone,
    as Jordan et al. found better: stacked, the three would share one frame.

    Args:
        parameters: matrices (rows, columns).
        m: memory for the momentum, zero; made here by default.
    """

    def __init__(
        self, parameters: dict[str, Tensor], config: TrainConfig, m: Moments | None = None
    ):
        self.parameters, self.config = parameters, config
        self.m = m or {name: _zeros_like(p) for name, p in parameters.items()}

    def schedule_step(
        self, gradients: dict[str, Tensor], scale: Tensor, rates: Tensor
    ) -> list[Tensor]:
        """As AdamW's."""
        c, rate = self.config, rates[RATES["learning_rate"]]
        for name, p in self.parameters.items():
            g, m = gradients[name] * scale, self.m[name]
            m.assign(c.momentum * m + g)
            ahead = g + c.momentum * m
            parts = ahead.chunk(parts_of(name), dim=0)
            length = math.sqrt(max(1.0, parts[0].shape[0] / parts[0].shape[1]))
            step = Tensor.cat(*(orthogonalize(part.contiguous()) for part in parts), dim=0)
            p.assign(p * (1 - rate * c.weight_decay) - rate * length * step)
        return [*self.m.values(), *self.parameters.values()]


def parts_of(name: str) -> int:
    """How many matrices lie on top of each other in this one."""
    return 3 if name.endswith("c_attn.weight") else 1


def orthogonalize_cost(name: str, shape: tuple[int, ...]) -> int:
    """How long that takes for this parameter, in proportion."""
    parts = parts_of(name)
    small, large = sorted((shape[0] // parts, shape[1]))
    return parts * small * small * (2 * large + small)


def orthogonalize(g: Tensor) -> Tensor:
    """Nearly the orthogonal matrix closest to g (rows, columns): its singular values become 1.

    Newton and Schulz's iteration: an odd polynomial of a matrix does to each singular value what it
    does to a number, and this one draws 0 to 1 to between 0.68 and 1.13.
    """
    if kernels.usable(g):
        return kernels.orthogonalize(g, NEWTON_SCHULZ_STEPS, NEWTON_SCHULZ)
    tall = g.shape[0] > g.shape[1]
    x = (g.T if tall else g) / (g.square().sum().sqrt() + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        x = x.contiguous()
        square = (x @ x.T).contiguous()
        x = a * x + (b * square + c * (square @ square)).contiguous() @ x
    return (x.T if tall else x).contiguous()


class Optimizer:
    """Muon or AdamW for each parameter, as its group says; arguments as AdamW's."""

    def __init__(
        self,
        parameters: dict[str, Tensor],
        config: TrainConfig,
        groups: dict[str, Group] | None = None,
        m: Moments | None = None,
        v: Moments | None = None,
    ):
        groups = groups or groups_of(parameters, config)
        inner = {n: p for n, p in parameters.items() if groups[n].orthogonalized}
        others = {n: p for n, p in parameters.items() if n not in inner}
        self.muon = Muon(inner, config, m and {n: m[n] for n in inner})
        self.adamw = AdamW(
            others, config, groups, m and {n: m[n] for n in others}, v and {n: v[n] for n in others}
        )
        self.m, self.v = self.adamw.m | self.muon.m, self.adamw.v

    def schedule_step(
        self, gradients: dict[str, Tensor], scale: Tensor, rates: Tensor
    ) -> list[Tensor]:
        """As AdamW's."""
        given = gradients, scale, rates
        return [*self.muon.schedule_step(*given), *self.adamw.schedule_step(*given)]


def step_rates(iteration: int, config: TrainConfig) -> NDArray[np.float32]:
    """What changes with the step (0 is the first): learning rate, both of AdamW's bias corrections,
    and the learning rates of embedding and output layer, (5,).

    They go into the compiled step as a tensor: a Python number would be frozen there.
    """
    t, c = iteration + 1, config
    corrections = [1 / (1 - c.beta1**t), 1 / (1 - c.beta2**t)]
    first, *others = (learning_rate(iteration, c, getattr(c, name)) for name in RATES)
    return np.array([first, *corrections, *others], np.float32)


def step_seed(iteration: int, config: TrainConfig, core: int = 0) -> NDArray[np.uint32]:
    """What dropout's random choices of a step follow from on one of the cores, (1,)."""
    rng = np.random.default_rng([config.seed, iteration, core + 1])  # 0 would be as if not there
    return rng.integers(2**32, size=1, dtype=np.uint32)


def moments_by_name(m: dict[str, Tensor], v: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"m.{n}": t for n, t in m.items()} | {f"v.{n}": t for n, t in v.items()}


def _zeros_like(p: Tensor) -> Tensor:
    return Tensor(np.zeros(p.shape, np.float32), device=p.device).realize()
