"""Dropout at GPT-2's places, with masks that follow from a seed on every backend alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from tinygrad import Tensor

from tests import reference as ref
from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.optimizer import AdamW, step_rates
from tinygpt.trainer import training_step

from .compare import assert_close
from .models import MODERN, TINY, B, T, build, options, random_batch, tokens

P = 0.25
CONFIGS = {
    "GPT-2": replace(TINY, dropout=P),
    "modern": replace(MODERN, dropout=P, attn_dropout=0.0),
}
IDX, TARGETS = random_batch(seed=1)


def hashed(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """lowbias32, by Chris Wellons; numpy's uint32 arrays wrap around as the hash wants."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


GOLDEN = np.uint32(0x9E3779B9)  # 2^32 divided by the golden ratio


def masks_from(seed: int, config: GPTConfig) -> Iterator[ref.Array]:
    """The masks of one step, in the order of the data."""
    on_weights = [(B, config.n_head, T, T)] if config.attention_dropout else []
    shapes: list[tuple[int, ...]] = [(B, T, config.n_embd)]
    for _ in range(config.n_layer):
        shapes += [*on_weights, (B, T, config.n_embd), (B, T, config.n_embd)]
    state = np.array([seed], np.uint32)
    for shape in shapes:
        state = hashed(state + GOLDEN)
        places = np.arange(np.prod(shape), dtype=np.uint32) * GOLDEN
        keep = hashed(places ^ state) >= P * 2**32
        yield keep.reshape(shape) / (1 - P)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_training_step(kind: str) -> None:
    """The first moment is the gradient, times 1 - beta1, after one step."""
    seed, config = 12345, CONFIGS[kind]
    names = ref.random_masks(
        np.random.default_rng(0), P, config.n_layer, config.n_head, config.n_embd, B, T
    )
    if not config.attention_dropout:
        names = {name: mask for name, mask in names.items() if "weights" not in name}
    masks = dict(zip(names, masks_from(seed, config), strict=True))
    assert all(mask.shape == names[name].shape for name, mask in masks.items())
    gpt, p = build(config)
    recipe = TrainConfig(beta1=0.5, grad_clip=0)
    optimizer = AdamW(gpt.parameters(), recipe)
    step = training_step(gpt, optimizer, recipe.grad_clip)
    changing = Tensor(step_rates(0, recipe)), Tensor(np.array([seed], np.uint32))
    loss = step(tokens(IDX), tokens(TARGETS), *changing)

    given = p, IDX, TARGETS, config.n_head
    _, expected = ref.gpt(*given, masks=masks, **options(config))
    assert_close("loss", {"loss": loss}, {"loss": np.array(expected)})
    gradients = ref.gpt_backward(*given, masks=masks, **options(config))
    assert_close("gradient", {n: m.numpy() * 2 for n, m in optimizer.m.items()}, gradients)


def test_off_in_evaluation() -> None:
    config = CONFIGS["GPT-2"]
    gpt, p = build(config)
    logits, _ = gpt(tokens(IDX))
    expected, _ = ref.gpt(p, IDX, None, config.n_head)
    assert_close("logits", {"logits": logits}, {"logits": expected})
