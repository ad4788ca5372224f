"""From logits to the next token, with chance given from outside as uniform numbers in [0, 1)."""

# numpy types many results as Any:
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .layers import Array, Tokens, softmax


def probabilities(
    logits: Array, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Array:
    """The distribution that the next token is drawn from.  logits (B, V) -> (B, V), rows add to 1.

    1. logits / temperature; below 1 sharpens, above 1 flattens, 0 puts everything on the largest
       (the first of equals).
    2. top_k: logits below the k-th largest become -inf; what equals it stays.
    3. top_p (Holtzman et al. 2020): of the tokens in falling order of probability, the shortest
       beginning whose sum reaches top_p stays, hence at least one.
    4. What stays is normalized.
    """
    if temperature == 0:
        return np.eye(logits.shape[-1])[logits.argmax(axis=-1)]
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth_largest = np.sort(logits, axis=-1)[:, -top_k, None]
        logits = np.where(logits < kth_largest, -np.inf, logits)
    p = softmax(logits)
    if top_p is not None:
        order = np.argsort(-p, axis=-1, kind="stable")
        falling = np.take_along_axis(p, order, axis=-1)
        mass_before = falling.cumsum(axis=-1) - falling
        np.put_along_axis(p, order, np.where(mass_before < top_p, falling, 0), axis=-1)
    return p / p.sum(axis=-1, keepdims=True)


def sample(p: Array, uniform: Array) -> Tokens:
    """Inverse distribution function: the first token at which the running sum of p exceeds u.

    p (B, V), uniform (B,) in [0, 1) -> (B,). Token i is drawn for a share p_i of all u; a token of
    probability 0 never is, since the running sum does not move there.
    """
    running = p.cumsum(axis=-1)
    u = uniform[:, None] * running[:, -1:]  # rounding may leave the last sum a little off 1
    return (running <= u).sum(axis=-1)


def generate(
    next_logits: Callable[[Tokens], Array],
    idx: Tokens,
    uniforms: Array,
    block_size: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tokens:
    """Append a token for each column of uniforms (B, N): idx (B, T) -> (B, T + N).

    next_logits gives logits (B, T, V) for a context, of which the last position counts. The model
    sees at most the last block_size tokens: past that the window slides.
    """
    for uniform in uniforms.T:
        logits = next_logits(idx[:, -block_size:])[:, -1]
        chosen = sample(probabilities(logits, temperature, top_k, top_p), uniform)
        idx = np.concatenate([idx, chosen[:, None]], axis=1)
    return idx
