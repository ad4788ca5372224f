"""Dropout at GPT-2's places. The masks are given, in place of the random ones a backend draws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Tensor
from tinygrad.helpers import TRAINING

from tests import reference as ref
from tinygpt.config import TrainConfig
from tinygpt.optimizer import AdamW, step_rates
from tinygpt.train import training_step

from .compare import assert_close
from .models import TINY, B, T, as_float32, build, random_batch, tokens

P = 0.25
CONFIG = replace(TINY, dropout=P)
IDX, TARGETS = random_batch(seed=1)


def test_given_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training step in which each Tensor.dropout takes the next mask, in the order of the data.

    The first moment after the first step is the gradient, times 1 - beta1.
    """
    model, p = build(CONFIG)
    drawn = ref.random_masks(
        np.random.default_rng(2), P, CONFIG.n_layer, CONFIG.n_head, CONFIG.n_embd, B, T
    )
    masks = {name: as_float32(mask) for name, mask in drawn.items()}
    waiting = iter(masks.items())

    def given_dropout(x: Tensor, p: float = 0.5) -> Tensor:
        name, mask = next(waiting)
        assert (x.shape, p, TRAINING.value) == (mask.shape, P, 1), name
        return x * Tensor(mask.astype(np.float32))

    monkeypatch.setattr(Tensor, "dropout", given_dropout)
    recipe = TrainConfig(beta1=0.5, grad_clip=0)
    optimizer = AdamW(model.parameters(), recipe)
    step = training_step(model, optimizer, recipe.grad_clip)
    loss = step(tokens(IDX), tokens(TARGETS), Tensor(step_rates(0, recipe)))
    assert next(waiting, None) is None, "a mask was not asked for"

    _, expected = ref.gpt(p, IDX, TARGETS, CONFIG.n_head, masks=masks)
    assert_close("loss", {"loss": loss}, {"loss": np.array(expected)})
    gradients = ref.gpt_backward(p, IDX, TARGETS, CONFIG.n_head, masks=masks)
    assert_close("gradient", {n: m.numpy() * 2 for n, m in optimizer.m.items()}, gradients)


def test_off_in_evaluation() -> None:
    model, p = build(CONFIG)
    logits, _ = model(tokens(IDX))
    expected, _ = ref.gpt(p, IDX, None, CONFIG.n_head)
    assert_close("logits", {"logits": logits}, {"logits": expected})
