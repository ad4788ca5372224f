"""Random weights and dropout masks: something to compute with, of any shape, without a model."""

from __future__ import annotations

import math

import numpy as np

from .layers import Array


def random_parameters(
    rng: np.random.Generator,
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    block_size: int,
    bias: bool = False,
    tied: bool = True,
    rotary: bool = False,
    rms: bool = False,
) -> dict[str, Array]:
    """A GPT's parameters by name, large enough that every part of the model matters to the loss.

    GPT-2's own initialization (0.02) would hide mistakes: attention scores near 0, biases at 0.
    """
    C = n_embd
    p = {"wte.weight": rng.standard_normal((vocab_size, C))}
    if not rotary:
        p["wpe.weight"] = rng.standard_normal((block_size, C))

    def linear(name: str, n_out: int, n_in: int) -> None:
        p[name + ".weight"] = rng.standard_normal((n_out, n_in)) / math.sqrt(n_in)
        if bias:
            p[name + ".bias"] = rng.standard_normal(n_out) / 4

    def norm(name: str) -> None:
        if rms:
            return
        p[name + ".weight"] = 1 + rng.standard_normal(C) / 4
        if bias:
            p[name + ".bias"] = rng.standard_normal(C) / 4

    for i in range(n_layer):
        norm(f"h.{i}.ln_1")
        linear(f"h.{i}.attn.c_attn", 3 * C, C)
        linear(f"h.{i}.attn.c_proj", C, C)
        norm(f"h.{i}.ln_2")
        linear(f"h.{i}.mlp.c_fc", 4 * C, C)
        linear(f"h.{i}.mlp.c_proj", C, 4 * C)
    norm("ln_f")
    if not tied:
        p["lm_head.weight"] = rng.standard_normal((vocab_size, C))
    return p


def random_masks(
    rng: np.random.Generator, p: float, n_layer: int, n_head: int, n_embd: int, B: int, T: int
) -> dict[str, Array]:
    """Dropout masks for a whole GPT: 0 with probability p, else 1 / (1 - p)."""

    def mask(*shape: int) -> Array:
        return (rng.random(shape) >= p) / (1 - p)

    masks = {"drop": mask(B, T, n_embd)}
    for i in range(n_layer):
        masks[f"h.{i}.attn.weights"] = mask(B, n_head, T, T)
        masks[f"h.{i}.attn.residual"] = mask(B, T, n_embd)
        masks[f"h.{i}.mlp.residual"] = mask(B, T, n_embd)
    return masks
