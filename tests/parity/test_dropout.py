"""Dropout at GPT-2's places, with masks that are known: given, or made from a given seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Tensor, dtypes
from tinygrad.helpers import TRAINING

from tests import reference as ref
from tinygpt import kernels, model
from tinygpt.config import TrainConfig
from tinygpt.optimizer import AdamW, step_rates
from tinygpt.trainer import training_step

from .compare import assert_close
from .models import MODERN, TINY, B, T, as_float32, build, options, random_batch, tokens

P = 0.25
CONFIGS = {
    "GPT-2": replace(TINY, dropout=P),
    "modern": replace(MODERN, dropout=P, attn_dropout=0.0),
}
IDX, TARGETS = random_batch(seed=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_known_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training step in which each use of dropout, in the order of the data, has the next mask.

    Plain Tensor code asks `Tensor.dropout` and gets the mask; a kernel gets a seed, and the mask
    is what this seed means. The first moment is the gradient, times 1 - beta1, after one step.
    """
    config = CONFIGS[name]
    drawn = ref.random_masks(
        np.random.default_rng(2), P, config.n_layer, config.n_head, config.n_embd, B, T
    )
    masks = {name: as_float32(mask) for name, mask in drawn.items()}
    if config.attention_dropout == 0:
        masks = {name: mask for name, mask in masks.items() if "weights" not in name}
    waiting = iter(masks)

    def given_dropout(x: Tensor, p: float = 0.5) -> Tensor:
        if p == 0:
            return x
        name = next(waiting)
        assert (x.shape, p, TRAINING.value) == (masks[name].shape, P, 1), name
        return x * Tensor(masks[name].astype(np.float32))

    def given_seed(p: float, device: str) -> kernels.Dropout | None:
        if p == 0:
            return None
        name = next(waiting)
        assert (p, TRAINING.value) == (P, 1), name
        dropout = kernels.Dropout(Tensor([len(name)], dtype=dtypes.uint32), p)
        masks[name] = dropout.mask(*masks[name].shape).numpy().astype(np.float64)
        return dropout

    monkeypatch.setattr(Tensor, "dropout", given_dropout)
    monkeypatch.setattr(model, "seeded_dropout", given_seed)
    gpt, p = build(config)
    recipe = TrainConfig(beta1=0.5, grad_clip=0)
    optimizer = AdamW(gpt.parameters(), recipe)
    step = training_step(gpt, optimizer, recipe.grad_clip)
    loss = step(tokens(IDX), tokens(TARGETS), Tensor(step_rates(0, recipe)))
    assert next(waiting, None) is None, "a mask was not asked for"

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
