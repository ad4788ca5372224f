"""The same weights in tinygpt's model and in the reference's parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tinygrad import Device, Tensor

from tests import reference as ref
from tests.reference import Array
from tinygpt.config import GPTConfig
from tinygpt.model import GPT, LanguageModel

# Most tests share these shapes: a kernel is compiled once a run, and compiling is what takes time.
B, T = 2, 4
TINY = GPTConfig(block_size=T, vocab_size=7, n_layer=2, n_head=2, n_embd=4)
FULL = replace(TINY, bias=True, tie_weights=False)
MODERN = replace(  # all that came after GPT-2
    TINY, tie_weights=False, activation="relu2", position="rotary", norm="rms", qk_norm=True,
)  # fmt: skip

beyond_the_emulator = pytest.mark.skipif(
    Device.DEFAULT == "PYTHON", reason="takes too long on the PYTHON emulator; run on all others"
)


def as_float32(array: Array) -> Array:
    """float64 numbers that float32 can hold: rounding the weights is no error of the model."""
    return array.astype(np.float32).astype(np.float64)


def load(model: LanguageModel, parameters: dict[str, Array]) -> None:
    """Put the values in place, whatever the device; the names and shapes must be the model's."""
    tensors = model.parameters()
    assert set(tensors) == set(parameters)
    for name, tensor in tensors.items():
        assert tensor.shape == parameters[name].shape, name
        tensor.assign(Tensor(parameters[name].astype(np.float32), device=tensor.device)).realize()


def build(config: GPTConfig, seed: int = 0, scale: float = 1.0) -> tuple[GPT, dict[str, Array]]:
    """A model with random weights, and these weights; `scale` makes the last layer norm larger."""
    drawn = ref.random_parameters(
        np.random.default_rng(seed),
        config.n_layer,
        config.n_embd,
        config.vocab_size,
        config.block_size,
        config.bias,
        config.tie_weights,
        config.position == "rotary",
        config.norm == "rms",
    )
    if scale != 1:
        drawn["ln_f.weight"] *= scale
    parameters = {name: as_float32(array) for name, array in drawn.items()}
    model = GPT(config)
    load(model, parameters)
    return model, parameters


def options(config: GPTConfig) -> dict[str, Any]:
    """What the reference cannot tell from the parameters."""
    return {
        "activation": config.activation,
        "qk_norm": config.qk_norm,
    }


def random_batch(seed: int, config: GPTConfig = TINY) -> tuple[np.ndarray, np.ndarray]:
    """idx and targets, (B, T)."""
    idx, targets = np.random.default_rng(seed).integers(config.vocab_size, size=(2, B, T))
    return idx, targets


def tokens(array: np.ndarray) -> Tensor:
    return Tensor(array.astype(np.int32))
