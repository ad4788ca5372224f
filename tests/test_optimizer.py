"""The schedule and the rates; AdamW itself is compared with the reference in tests/parity."""

import math

import numpy as np
import pytest
from tinygrad import Tensor

from tinygpt.config import TrainConfig
from tinygpt.optimizer import AdamW, clip_coefficient, global_norm, learning_rate, step_rates

RECIPE = TrainConfig(max_iters=1000, learning_rate=1.0, min_lr=0.1, warmup_iters=99)


def test_learning_rate_at_the_joints() -> None:
    assert learning_rate(0, RECIPE) == 0.01  # the first step already moves
    assert learning_rate(98, RECIPE) == pytest.approx(0.99)
    assert learning_rate(99, RECIPE) == 1.0
    middle = (99 + 1000) / 2
    assert learning_rate(math.floor(middle), RECIPE) == pytest.approx(0.55, abs=1e-3)
    assert learning_rate(1000, RECIPE) == learning_rate(5000, RECIPE) == 0.1


def test_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(i, RECIPE) for i in range(1001)]
    assert rates[:100] == sorted(rates[:100])
    assert rates[99:] == sorted(rates[99:], reverse=True)
    assert min(rates[99:]) == 0.1


def test_decay_ends_where_told() -> None:
    recipe = TrainConfig(learning_rate=1.0, lr_decay_iters=10, warmup_iters=0)
    assert learning_rate(10, recipe) == 0.1 == recipe.final_lr < learning_rate(9, recipe)
    warm_up_only = TrainConfig(max_iters=5, warmup_iters=10, learning_rate=1.1)
    assert learning_rate(4, warm_up_only) == pytest.approx(0.5)


def test_norm_and_clipping() -> None:
    gradients = [Tensor([3.0, 0.0]), Tensor([[4.0]])]
    assert global_norm(gradients).item() == 5.0
    assert clip_coefficient(Tensor(5.0), 1.0).item() == pytest.approx(0.2, rel=1e-6)
    assert clip_coefficient(Tensor(0.5), 1.0).item() == 1.0
    assert clip_coefficient(Tensor(0.0), 1.0).item() == 1.0
    assert clip_coefficient(Tensor([9.0]), 0.0).item() == 1.0


def test_rates_hold_both_bias_corrections() -> None:
    rates = step_rates(4, RECIPE)
    expected = [learning_rate(4, RECIPE), 1 / (1 - 0.9**5), 1 / (1 - 0.99**5)]
    np.testing.assert_allclose(rates, expected, rtol=1e-7)  # one rounding to float32


def test_only_matrices_decay() -> None:
    parameters = {"matrix": Tensor([[2.0]]).realize(), "vector": Tensor([2.0]).realize()}
    recipe = TrainConfig(learning_rate=0.5, warmup_iters=0, weight_decay=0.1)
    optimizer = AdamW(parameters, recipe)
    zero = {name: Tensor(np.zeros(p.shape, np.float32)) for name, p in parameters.items()}
    rates = Tensor(step_rates(0, recipe))
    Tensor.realize(*optimizer.schedule_step(zero, Tensor([1.0]), rates))
    assert parameters["matrix"].item() == pytest.approx(2 * (1 - 0.5 * 0.1))
    assert parameters["vector"].item() == 2.0
