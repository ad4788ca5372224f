"""Logits, loss and the gradient of every parameter, for shapes and values that hurt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests import reference as ref
from tinygpt.config import GPTConfig
from tinygpt.model import BigramLanguageModel

from .compare import assert_close
from .models import (
    FULL,
    MODERN,
    TINY,
    B,
    T,
    as_float32,
    beyond_the_emulator,
    build,
    load,
    options,
    tokens,
)


def assert_gpt_agrees(
    config: GPTConfig, idx: np.ndarray, targets: np.ndarray, scale: float = 1.0
) -> None:
    model, p = build(config, scale=scale)
    logits, loss = model(tokens(idx), tokens(targets))
    assert loss is not None
    gradients = loss.gradient(*model.parameters().values())
    logits.realize(loss, *gradients)

    ref_logits, ref_loss = ref.gpt(p, idx, targets, config.n_head, **options(config))
    assert_close("logits", {"logits": logits}, {"logits": ref_logits})
    assert_close("loss", {"loss": loss}, {"loss": np.array(ref_loss)})
    assert_close(
        "gradient",
        dict(zip(model.parameters(), gradients, strict=True)),
        ref.gpt_backward(p, idx, targets, config.n_head, **options(config)),
    )


@pytest.mark.parametrize(
    "config, batch, time",
    [
        pytest.param(TINY, B, T, id="tiny"),
        pytest.param(FULL, B, T, id="tiny with biases, untied"),
        pytest.param(MODERN, B, T, id="all that came after GPT-2"),
        pytest.param(replace(TINY, position="rotary"), B, T, id="rotary"),
        pytest.param(replace(TINY, norm="rms"), B, T, id="RMS norm"),
        pytest.param(replace(FULL, qk_norm=True), B, T, id="QK norm"),
        pytest.param(
            GPTConfig(6, 257, n_layer=1, n_head=1, n_embd=9, bias=True), 1, 1,
            id="one token of 257, odd width, one head",
        ),
        pytest.param(
            GPTConfig(7, 5, n_layer=1, n_head=3, n_embd=3, activation="relu"), 3, 5,
            id="head size 1, odd everything, relu",
        ),
        pytest.param(
            GPTConfig(16, 65, n_layer=2, n_head=2, n_embd=16, activation="gelu"), 4, 16,
            id="65 characters, whole blocks, exact gelu", marks=beyond_the_emulator,
        ),
        pytest.param(
            GPTConfig(40, 257, n_layer=1, n_head=2, n_embd=80, bias=True), 2, 33,
            id="wide, no size a multiple of a vector", marks=beyond_the_emulator,
        ),
        pytest.param(
            replace(MODERN, block_size=40, vocab_size=257, n_head=3, n_embd=66), 2, 33,
            id="modern and wide", marks=beyond_the_emulator,
        ),
    ],
)  # fmt: skip
def test_gpt(config: GPTConfig, batch: int, time: int) -> None:
    rng = np.random.default_rng(1)
    idx, targets = rng.integers(config.vocab_size, size=(2, batch, time))
    assert_gpt_agrees(config, idx, targets)


def test_repeated_tokens() -> None:
    """One token everywhere: every place adds to the same row of the table's gradient."""
    idx = np.full((B, T), 3)
    assert_gpt_agrees(TINY, idx, np.full_like(idx, 5))


def test_large_logits() -> None:
    """Logits of some hundreds: exp overflows where the largest is not taken off first."""
    idx, targets = np.random.default_rng(2).integers(TINY.vocab_size, size=(2, B, T))
    assert_gpt_agrees(TINY, idx, targets, scale=100)


def test_uniform_model() -> None:
    """A table of zeros knows nothing: logits 0, loss ln V, and a gradient all the same."""
    model, p = build(TINY)
    p["wte.weight"] *= 0
    load(model, p)
    idx, targets = np.random.default_rng(3).integers(TINY.vocab_size, size=(2, B, T))
    logits, loss = model(tokens(idx), tokens(targets))
    assert loss is not None
    gradient = loss.gradient(model.parameters()["wte.weight"])[0]
    logits.realize(loss, gradient)
    assert_close("exact", {"logits": logits}, {"logits": np.zeros((B, T, TINY.vocab_size))})
    assert_close("loss", {"loss": loss}, {"loss": np.array(np.log(TINY.vocab_size))})
    expected = ref.gpt_backward(p, idx, targets, TINY.n_head)["wte.weight"]
    assert_close("gradient", {"wte.weight": gradient}, {"wte.weight": expected})


@pytest.mark.parametrize(
    "vocab_size, batch, time", [pytest.param(65, 4, 8, marks=beyond_the_emulator), (7, 1, 1)]
)
def test_bigram(vocab_size: int, batch: int, time: int) -> None:
    rng = np.random.default_rng(4)
    table = as_float32(rng.standard_normal((vocab_size, vocab_size)))
    idx, targets = rng.integers(vocab_size, size=(2, batch, time))
    model = BigramLanguageModel(vocab_size)
    load(model, {"wte.weight": table})
    logits, loss = model(tokens(idx), tokens(targets))
    assert loss is not None
    gradient = loss.gradient(model.parameters()["wte.weight"])[0]
    logits.realize(loss, gradient)
    ref_logits, ref_loss = ref.bigram(table, idx, targets)
    assert_close("exact", {"logits": logits}, {"logits": ref_logits})
    assert_close("loss", {"loss": loss}, {"loss": np.array(ref_loss)})
    expected = ref.bigram_backward(table, idx, targets)
    assert_close("gradient", {"table": gradient}, {"table": expected})
