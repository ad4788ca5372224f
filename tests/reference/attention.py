"""Causal attention: one head, then many side by side (Vaswani et al. 2017)."""

from __future__ import annotations

import math

import numpy as np

from .layers import Array, dropout, dropout_backward, softmax, softmax_backward


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


def split_heads(x: Array, n_head: int) -> Array:
    """(B, T, C) -> (B, H, T, D): head h owns the channels h D to (h + 1) D."""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)


def merge_heads(x: Array) -> Array:
    """(B, H, T, D) -> (B, T, C), the inverse of split_heads, and so its backward pass."""
    B, H, T, D = x.shape
    return x.swapaxes(1, 2).reshape(B, T, H * D)


def attention(qkv: Array, n_head: int, mask: Array | None = None) -> Array:
    """Many heads: each works on its own channels, the results stand side by side.

    qkv (B, T, 3 C) holds q, k, v in that order, each with its heads' channels in order
    -> (B, T, C). mask (B, H, T, T) is dropout on the weights.
    """
    q, k, v = (split_heads(part, n_head) for part in np.split(qkv, 3, axis=-1))
    return merge_heads(head(q, k, v, mask))


def attention_backward(dy: Array, qkv: Array, n_head: int, mask: Array | None = None) -> Array:
    """dqkv (B, T, 3 C): every head's own backward pass; splitting and stacking only move values."""
    q, k, v = (split_heads(part, n_head) for part in np.split(qkv, 3, axis=-1))
    gradients = head_backward(split_heads(dy, n_head), q, k, v, mask)
    return np.concatenate([merge_heads(g) for g in gradients], axis=-1)
