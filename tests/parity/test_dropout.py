"""Dropout at GPT-2's places, with masks that follow from a seed on every backend alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from tinygrad import Tensor

from tests import reference as ref
from tinygpt.config import TrainConfig
from tinygpt.optimizer import AdamW, step_rates
from tinygpt.trainer import training_step

from .compare import assert_close
from .models import TINY, B, T, build, random_batch, tokens

P = 0.25
CONFIG = replace(TINY, dropout=P)
IDX, TARGETS = random_batch(seed=1)


def hashed(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """lowbias32, by Chris Wellons; numpy's uint32 arrays wrap around as the hash wants."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


GOLDEN = np.uint32(0x9E3779B9)  # 2^32 divided by the golden ratio


def masks_from(seed: int) -> Iterator[ref.Array]:
    """The masks of one step, in the order of the data."""
    shapes: list[tuple[int, ...]] = [(B, T, CONFIG.n_embd)]
    for _ in range(CONFIG.n_layer):
        shapes += [(B, CONFIG.n_head, T, T), (B, T, CONFIG.n_embd), (B, T, CONFIG.n_embd)]
    state = np.array([seed], np.uint32)
    for shape in shapes:
        state = hashed(state + GOLDEN)
        places = np.arange(np.prod(shape), dtype=np.uint32) * GOLDEN
        keep = hashed(places ^ state) >= P * 2**32
        yield keep.reshape(shape) / (1 - P)


def test_a_training_step() -> None:
    """The first moment is the gradient, times 1 - beta1, after one step."""
    seed = 12345
    names = ref.random_masks(
        np.random.default_rng(0), P, CONFIG.n_layer, CONFIG.n_head, CONFIG.n_embd, B, T
    )
    masks = dict(zip(names, masks_from(seed), strict=True))
    assert all(mask.shape == names[name].shape for name, mask in masks.items())
    gpt, p = build(CONFIG)
    recipe = TrainConfig(beta1=0.5, grad_clip=0)
    optimizer = AdamW(gpt.parameters(), recipe)
    step = training_step(gpt, optimizer, recipe.grad_clip)
    given = np.array([seed], np.uint32)
    loss = step(tokens(IDX), tokens(TARGETS), Tensor(step_rates(0, recipe)), Tensor(given))

    _, expected = ref.gpt(p, IDX, TARGETS, CONFIG.n_head, masks=masks)
    assert_close("loss", {"loss": loss}, {"loss": np.array(expected)})
    gradients = ref.gpt_backward(p, IDX, TARGETS, CONFIG.n_head, masks=masks)
    assert_close("gradient", {n: m.numpy() * 2 for n, m in optimizer.m.items()}, gradients)


def test_off_in_evaluation() -> None:
    gpt, p = build(CONFIG)
    logits, _ = gpt(tokens(IDX))
    expected, _ = ref.gpt(p, IDX, None, CONFIG.n_head)
    assert_close("logits", {"logits": logits}, {"logits": expected})
