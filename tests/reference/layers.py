"""The pieces without heads: embedding, linear, LayerNorm, activations, softmax, dropout, loss."""

# numpy types many results as Any:
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.integer]

_erfc = np.vectorize(math.erfc, otypes=[np.float64])  # numpy has none; this is the C library's
_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def embedding(idx: Tokens, table: Array) -> Array:
    """Row look-up, y[b,t] = table[idx[b,t]].  idx (B, T), table (V, C) -> (B, T, C)."""
    return table[idx]


def embedding_backward(dy: Array, idx: Tokens, table: Array) -> Array:
    """d table[r] = sum of dy[b,t] over all places (b,t) where idx[b,t] = r; a row not used gets 0.

    The look-up is one_hot(idx) @ table, so this is one_hot(idx)^T @ dy: repeated tokens add up.
    """
    dtable = np.zeros_like(table)
    np.add.at(dtable, idx, dy)
    return dtable


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """y = x W^T + b.  x (..., I), weight W (O, I), bias b (O,) -> (..., O)."""
    y = x @ weight.T
    return y if bias is None else y + bias


def linear_backward(dy: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """(dx, dW, db), from y[n,o] = sum_i x[n,i] W[o,i] + b[o], n running over all leading places.

    dx[n,i] = sum_o dy[n,o] W[o,i]      so dx = dy W
    dW[o,i] = sum_n dy[n,o] x[n,i]      so dW = dy^T x
    db[o]   = sum_n dy[n,o]
    """
    dy_rows = dy.reshape(-1, dy.shape[-1])
    x_rows = x.reshape(-1, x.shape[-1])
    return dy @ weight, dy_rows.T @ x_rows, dy_rows.sum(axis=0)


def _normalize(x: Array, eps: float) -> tuple[Array, Array]:
    """x^ = (x - mean) r and r = 1 / sqrt(variance + eps), over the last axis."""
    centered = x - x.mean(axis=-1, keepdims=True)
    variance = (centered**2).mean(axis=-1, keepdims=True)
    r = 1 / np.sqrt(variance + eps)
    return centered * r, r


def layer_norm(x: Array, weight: Array, bias: Array | None = None, eps: float = 1e-5) -> Array:
    """y = x^ w + b with x^ = (x - mean(x)) / sqrt(var(x) + eps).  x (..., C) -> (..., C).

    Mean and variance are over the channels; the variance is the biased one, a sum over C divided
    by C (Ba et al. 2016). eps stands inside the square root.
    """
    normalized, _ = _normalize(x, eps)
    y = normalized * weight
    return y if bias is None else y + bias


def layer_norm_backward(
    dy: Array, x: Array, weight: Array, eps: float = 1e-5
) -> tuple[Array, Array, Array]:
    """(dx, dw, db) of layer_norm.

    Over all rows: dw = sum dy x^ and db = sum dy. Within one row write g = dL/dx^ = dy w,
    c = x - mean(x), r = 1 / sqrt(mean(c^2) + eps), so that x^ = c r. Then
        dr/dc_j = -r^3 c_j / C
        dL/dc_j = r g_j + (sum_i g_i c_i) dr/dc_j = r (g_j - x^_j mean(g x^))
    and, as c_i = x_i - mean(x), the gradient of x is that of c less its mean. The mean of x^ is
    zero, so that the second term has no mean to lose:
        dx = r (g - mean(g) - x^ mean(g x^))
    """
    normalized, r = _normalize(x, eps)
    rows = tuple(range(x.ndim - 1))
    g = dy * weight
    mean_g = g.mean(axis=-1, keepdims=True)
    mean_gx = (g * normalized).mean(axis=-1, keepdims=True)
    dx = r * (g - mean_g - normalized * mean_gx)
    return dx, (dy * normalized).sum(axis=rows), dy.sum(axis=rows)


def rms_norm(x: Array, eps: float = 1e-6) -> Array:
    """y = x / sqrt(mean(x^2) + eps), the mean over the channels.  x (..., C) -> (..., C).

    Layer norm without mean, weight and bias (Zhang & Sennrich 2019).
    """
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def rms_norm_backward(dy: Array, x: Array, eps: float = 1e-6) -> Array:
    """dx = r (dy - y mean(dy y)), with r = 1 / sqrt(mean(x^2) + eps), so that y = x r.

    From dr/dx_j = -r^3 x_j / C:  dL/dx_j = r dy_j - (sum_i dy_i x_i) r^3 x_j / C.
    """
    r = 1 / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    return r * (dy - x * r * (dy * x * r).mean(axis=-1, keepdims=True))


def relu2(x: Array) -> Array:
    """y = max(x, 0)^2 (So et al. 2021)."""
    return np.maximum(x, 0) ** 2


def relu2_backward(dy: Array, x: Array) -> Array:
    """dx = 2 dy max(x, 0)."""
    return 2 * dy * np.maximum(x, 0)


def relu(x: Array) -> Array:
    """y = max(x, 0)."""
    return np.maximum(x, 0)


def relu_backward(dy: Array, x: Array) -> Array:
    """dx = dy where x > 0, else 0 (also at the kink, as everyone does)."""
    return dy * (x > 0)


def gelu(x: Array) -> Array:
    """y = x P(x), P(x) = (1 + erf(x / sqrt 2)) / 2 the normal distribution (Hendrycks 2016).

    P(x) is computed as erfc(-x / sqrt 2) / 2: the same, without losing digits where 1 + erf is
    nearly 0. erfc comes from the C library through `math.erfc`, one number at a time: good to the
    last digit or two of float64, and slow, which is all right here.
    """
    return x * _erfc(-x / math.sqrt(2)) / 2


def gelu_backward(dy: Array, x: Array) -> Array:
    """dx = dy (P(x) + x p(x)), with p(x) = P'(x) = exp(-x^2 / 2) / sqrt(2 pi)."""
    distribution = _erfc(-x / math.sqrt(2)) / 2
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return dy * (distribution + x * density)


def gelu_tanh(x: Array) -> Array:
    """GPT-2's approximation: y = x (1 + tanh u) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    u = _GELU_SCALE * (x + _GELU_CUBIC * x**3)
    return x * (1 + np.tanh(u)) / 2


def gelu_tanh_backward(dy: Array, x: Array) -> Array:
    """dx = dy ((1 + t) / 2 + x (1 - t^2) u' / 2), t = tanh u, u' = sqrt(2/pi)(1 + 3*0.044715 x^2).

    The product rule, with tanh' = 1 - tanh^2.
    """
    t = np.tanh(_GELU_SCALE * (x + _GELU_CUBIC * x**3))
    du = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * x**2)
    return dy * ((1 + t) / 2 + x * (1 - t**2) * du / 2)


def softmax(x: Array) -> Array:
    """y_i = exp(x_i) / sum_j exp(x_j) over the last axis.

    The largest x is taken off first, which changes nothing but keeps exp from overflowing. An x of
    -inf gives exactly 0, as long as one x in the row is finite.
    """
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def softmax_backward(dy: Array, y: Array) -> Array:
    """dx from dy and the output y.

    dy_i/dx_j = y_i (1[i = j] - y_j), hence dx_j = y_j (dy_j - sum_i dy_i y_i).
    """
    return y * (dy - (dy * y).sum(axis=-1, keepdims=True))


def dropout(x: Array, mask: Array | None) -> Array:
    """y = x mask; the mask holds 0 with probability p, else 1 / (1 - p). None drops nothing."""
    return x if mask is None else x * mask


def dropout_backward(dy: Array, mask: Array | None) -> Array:
    """dx = dy mask: what was dropped gets no gradient, what was scaled is scaled."""
    return dy if mask is None else dy * mask


def cross_entropy(logits: Array, targets: Tokens) -> float:
    """Mean over the N = B T places of -log softmax(logits)[target], in nats.

    -log softmax(l)[t] = log sum_j exp(l_j) - l_t, again with the largest l taken off first.
    logits (..., V), targets (...) -> scalar.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    shifted = rows - rows.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=-1))
    picked = shifted[np.arange(len(rows)), targets.reshape(-1)]
    return float((log_sum - picked).mean())


def cross_entropy_backward(logits: Array, targets: Tokens) -> Array:
    """dlogits = (softmax(logits) - one_hot(targets)) / N.

    The derivative of log sum_j exp(l_j) by l_i is softmax(l)_i; that of l_t is 1[i = t].
    """
    rows = softmax(logits.reshape(-1, logits.shape[-1]))
    rows[np.arange(len(rows)), targets.reshape(-1)] -= 1
    return (rows / len(rows)).reshape(logits.shape)
