"""Choosing the next token, and the loop that writes a text token by token.

The choice is made on the host by numpy in float64: one uniform number per token picks from the
cumulative distribution, so the same logits and the same seed give the same text on every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from tinygpt.config import InputError

Tokens = NDArray[np.int32]


# A function from the text so far (B, T) to the logits (B, V) of the token that follows it.
Decoder = Callable[[Tokens], NDArray[np.float32]]


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises InputError where a sampling option is outside its range."""
    if not 0 <= temperature < np.inf:
        raise InputError(f"temperature is {temperature}; it must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {top_k}; it must be at least 1 token")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; it must be above 0 and at most 1")


def probabilities(
    logits: NDArray[np.floating],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> NDArray[np.float64]:
    """The distribution the next token is drawn from.

    softmax(logits / temperature), cut to the `top_k` likeliest tokens (Fan et al. 2018), then to
    the fewest likeliest tokens that hold `top_p` of the probability (Holtzman et al. 2020). Tokens
    tied with the last one of the top k stay. Temperature 0 puts everything on the first maximum.

    Args:
        logits: (..., V), any float type.

    Returns:
        (..., V) float64, summing to 1 over the last axis.

    Raises:
        InputError: an option is outside its range.
    """
    check_sampling(temperature, top_k, top_p)
    scores = np.asarray(logits, dtype=np.float64)
    vocab_size = scores.shape[-1]
    if temperature == 0:
        p = np.zeros(scores.shape)
        np.put_along_axis(p, scores.argmax(axis=-1, keepdims=True), 1.0, axis=-1)
        return p
    scores = scores - scores.max(axis=-1, keepdims=True)  # before dividing: no overflow
    with np.errstate(over="ignore"):  # a tiny temperature may still reach -inf, which exp takes
        scores = scores / temperature
    if top_k is not None and top_k < vocab_size:
        kth = np.partition(scores, -top_k, axis=-1)[..., -top_k, None]
        scores = np.where(scores < kth, -np.inf, scores)
    weights = np.exp(scores)
    p = weights / weights.sum(axis=-1, keepdims=True)
    if top_p is not None and top_p < 1:
        order = np.argsort(-p, axis=-1, kind="stable")
        ranked = np.take_along_axis(p, order, axis=-1)
        before = np.cumsum(ranked, axis=-1) - ranked  # probability of everything likelier
        keep = np.empty(p.shape, dtype=bool)
        np.put_along_axis(keep, order, before < top_p, axis=-1)
        p = np.where(keep, p, 0.0)
        p = p / p.sum(axis=-1, keepdims=True)
    return np.asarray(p)


def draw(p: NDArray[np.float64], uniform: NDArray[np.float64]) -> Tokens:
    """Inverse-CDF sampling: p (B, V), uniform (B,) in [0, 1) -> tokens (B,)."""
    cumulative = np.cumsum(p, axis=-1)
    target = uniform[:, None] * cumulative[:, -1:]  # the sum is 1 but for rounding
    chosen = (cumulative <= target).sum(axis=-1)
    last = p.shape[-1] - 1 - np.argmax(p[:, ::-1] > 0, axis=-1)  # never a token of probability 0
    return np.asarray(np.minimum(chosen, last), np.int32)


def sample_tokens(
    decoder: Decoder,
    tokens: Tokens,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    first_row: int = 0,
) -> Iterator[Tokens]:
    """Yields max_new_tokens times the next token (B,) of each row of tokens (B, T).

    Row i draws from its own generator, seeded with (seed, first_row + i): a row's text does not
    depend on how many rows are written at once. Without a seed every call gives another text.

    Raises:
        InputError: an option is outside its range, or there is no token to start from.
    """
    check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise InputError(
            f"the prompt has shape {tokens.shape}; it must be (batch, time) with at least one token"
        )
    generators = [
        np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(first_row + i,)))
        for i in range(len(tokens))
    ]
    text = np.empty((len(tokens), tokens.shape[1] + max_new_tokens), np.int32)
    text[:, : tokens.shape[1]] = tokens
    for end in range(tokens.shape[1], text.shape[1]):
        p = probabilities(decoder(text[:, :end]), temperature, top_k, top_p)
        text[:, end] = draw(p, np.array([g.random() for g in generators]))
        yield text[:, end].copy()
