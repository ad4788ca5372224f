"""Causal attention: one head, then many side by side (Vaswani et al. 2017)."""

from __future__ import annotations

import math

import numpy as np

from .layers import (
    Array,
    dropout,
    dropout_backward,
    rms_norm,
    rms_norm_backward,
    softmax,
    softmax_backward,
)

ROTARY_BASE = 1000.0


def attention_weights(q: Array, k: Array) -> Array:
    """P = softmax(S) by rows, S = q k^T / sqrt(D), and S = -inf where a token would look ahead.

    q, k (..., T, D) -> P (..., T, T), lower triangular, every row adds up to 1.
    """
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    past = np.tril(np.ones(scores.shape[-2:], dtype=bool))
    return softmax(np.where(past, scores, -np.inf))


def head(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """One head: y = (P * mask) v, each token a weighted mean of the values up to itself.

    q, k, v (..., T, D) -> (..., T, D); mask (..., T, T) is dropout on the weights.
    """
    return dropout(attention_weights(q, k), mask) @ v


def head_backward(
    dy: Array, q: Array, k: Array, v: Array, mask: Array | None = None
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv).

    y = A v with A = P * mask:     dv = A^T dy,   dA = dy v^T,   dP = dA * mask
    P = softmax(S):                dS = P * (dP - rowsum(dP * P))
    S = q k^T / sqrt(D):           dq = dS k / sqrt(D),   dk = dS^T q / sqrt(D)

    Where a token would look ahead P is 0, hence dS is 0: nothing flows through the mask.
    """
    weights = attention_weights(q, k)
    dv = dropout(weights, mask).swapaxes(-1, -2) @ dy
    dweights = dropout_backward(dy @ v.swapaxes(-1, -2), mask)
    dscores = softmax_backward(dweights, weights) / math.sqrt(q.shape[-1])
    return dscores @ k, dscores.swapaxes(-1, -2) @ q, dv


def rotate(x: Array, direction: int = 1) -> Array:
    """Rotary positions (Su et al. 2021): the token at t is turned by angles that grow with t.

    The channels i and i + D / 2 are the two coordinates of a point in a plane, for i < D / 2:
        y_i         = x_i cos a - x_(i + D/2) sin a
        y_(i + D/2) = x_i sin a + x_(i + D/2) cos a,      a = t base^(-2 i / D)
    A product of a turned query and a turned key depends only on how far apart they stand.

    x (..., T, D), D even -> (..., T, D). Turning is linear and keeps lengths: its backward pass is
    to turn the gradient the other way, direction = -1.
    """
    T, D = x.shape[-2:]
    angles = np.outer(np.arange(T), ROTARY_BASE ** (-2 * np.arange(D // 2) / D))
    cos, sin = np.cos(angles), direction * np.sin(angles)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def place(x: Array, qk_norm: bool, rotary: bool) -> Array:
    """What queries and keys go through before they meet: RMS norm, then rotation. (..., T, D)."""
    x = rms_norm(x) if qk_norm else x
    return rotate(x) if rotary else x


def place_backward(dy: Array, x: Array, qk_norm: bool, rotary: bool) -> Array:
    """dx: the same steps, the last one first."""
    dy = rotate(dy, -1) if rotary else dy
    return rms_norm_backward(dy, x) if qk_norm else dy


def split_heads(x: Array, n_head: int) -> Array:
    """(B, T, C) -> (B, H, T, D): head h owns the channels h D to (h + 1) D."""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)


def merge_heads(x: Array) -> Array:
    """(B, H, T, D) -> (B, T, C), the inverse of split_heads, and so its backward pass."""
    B, H, T, D = x.shape
    return x.swapaxes(1, 2).reshape(B, T, H * D)


def attention(
    qkv: Array,
    n_head: int,
    mask: Array | None = None,
    qk_norm: bool = False,
    rotary: bool = False,
) -> Array:
    """Many heads: each works on its own channels, the results stand side by side.

    qkv (B, T, 3 C) holds q, k, v in that order, each with its heads' channels in order
    -> (B, T, C). mask (B, H, T, T) is dropout on the weights.
    """
    q, k, v = (split_heads(part, n_head) for part in np.split(qkv, 3, axis=-1))
    q, k = (place(part, qk_norm, rotary) for part in (q, k))
    return merge_heads(head(q, k, v, mask))


def attention_backward(
    dy: Array,
    qkv: Array,
    n_head: int,
    mask: Array | None = None,
    qk_norm: bool = False,
    rotary: bool = False,
) -> Array:
    """dqkv (B, T, 3 C): every head's own backward pass; splitting and stacking only move values."""
    q, k, v = (split_heads(part, n_head) for part in np.split(qkv, 3, axis=-1))
    placed_q, placed_k = (place(part, qk_norm, rotary) for part in (q, k))
    dq, dk, dv = head_backward(split_heads(dy, n_head), placed_q, placed_k, v, mask)
    dq, dk = (place_backward(d, x, qk_norm, rotary) for d, x in ((dq, q), (dk, k)))
    return np.concatenate([merge_heads(g) for g in (dq, dk, dv)], axis=-1)
