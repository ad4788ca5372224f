"""The models: a table of bigrams, and a GPT made of blocks of attention and MLP.

Dropout is given from outside as masks, under these names and in GPT-2's places:
    "drop" (B, T, C)                 on the sum of token and position embedding
    "h.{i}.attn.weights" (B,H,T,T)   on the attention weights, after the softmax
    "h.{i}.attn.residual" (B, T, C)  on what attention adds to the residual stream
    "h.{i}.mlp.residual" (B, T, C)   on what the MLP adds to it
A mask that is absent drops nothing.

What a model is made of shows in its parameters: without `wpe.weight` positions are rotary; without
layer norms' weights the norms are RMS norms, and one more follows the embedding; a model without
`lm_head.weight` is tied. What no parameter tells is given as arguments: activation and qk_norm
(RMS norm of queries and keys).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from .attention import attention, attention_backward
from .layers import (
    Array,
    Tokens,
    cross_entropy,
    cross_entropy_backward,
    dropout,
    dropout_backward,
    embedding,
    embedding_backward,
    gelu,
    gelu_backward,
    gelu_tanh,
    gelu_tanh_backward,
    layer_norm,
    layer_norm_backward,
    linear,
    linear_backward,
    relu,
    relu2,
    relu2_backward,
    relu_backward,
    rms_norm,
    rms_norm_backward,
)

Parameters = Mapping[str, Array]
Gradients = dict[str, Array]
NO_MASKS: Parameters = MappingProxyType({})

ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]] = {
    "relu": (relu, relu_backward),
    "relu2": (relu2, relu2_backward),
    "gelu": (gelu, gelu_backward),
    "gelu_tanh": (gelu_tanh, gelu_tanh_backward),
}


def _inside(named: Parameters, prefix: str) -> dict[str, Array]:
    """The entries under a prefix, without it: "h.0." turns h.0.ln_1.weight into ln_1.weight."""
    return {name[len(prefix) :]: a for name, a in named.items() if name.startswith(prefix)}


def _outside(named: Parameters, prefix: str) -> Gradients:
    """The inverse of _inside."""
    return {prefix + name: a for name, a in named.items()}


def _linear(x: Array, p: Parameters, name: str) -> Array:
    return linear(x, p[name + ".weight"], p.get(name + ".bias"))


def _linear_backward(dy: Array, x: Array, p: Parameters, name: str) -> tuple[Array, Gradients]:
    dx, dweight, dbias = linear_backward(dy, x, p[name + ".weight"])
    return dx, _only_existing(p, {name + ".weight": dweight, name + ".bias": dbias})


def _norm(x: Array, p: Parameters, name: str) -> Array:
    if name + ".weight" not in p:
        return rms_norm(x)
    return layer_norm(x, p[name + ".weight"], p.get(name + ".bias"))


def _norm_backward(dy: Array, x: Array, p: Parameters, name: str) -> tuple[Array, Gradients]:
    if name + ".weight" not in p:
        return rms_norm_backward(dy, x), {}
    dx, dweight, dbias = layer_norm_backward(dy, x, p[name + ".weight"])
    return dx, _only_existing(p, {name + ".weight": dweight, name + ".bias": dbias})


def _only_existing(p: Parameters, gradients: Gradients) -> Gradients:
    """A model without biases has no gradients for them."""
    return {name: g for name, g in gradients.items() if name in p}


def mlp(x: Array, p: Parameters, activation: str = "gelu_tanh") -> Array:
    """y = c_proj(f(c_fc(x))): C to 4 C channels, a nonlinearity f, back to C. x (..., C)."""
    f, _ = ACTIVATIONS[activation]
    return _linear(f(_linear(x, p, "c_fc")), p, "c_proj")


def mlp_backward(
    dy: Array, x: Array, p: Parameters, activation: str = "gelu_tanh"
) -> tuple[Array, Gradients]:
    """(dx, gradients): the chain rule from the last layer to the first."""
    f, f_backward = ACTIVATIONS[activation]
    hidden = _linear(x, p, "c_fc")
    dactive, dproj = _linear_backward(dy, f(hidden), p, "c_proj")
    dx, dfc = _linear_backward(f_backward(dactive, hidden), x, p, "c_fc")
    return dx, dproj | dfc


def attention_layer(
    x: Array,
    p: Parameters,
    n_head: int,
    weights_mask: Array | None = None,
    qk_norm: bool = False,
    rotary: bool = False,
) -> Array:
    """y = c_proj(attention(c_attn(x))): one matrix makes q, k and v. x (B, T, C) -> (B, T, C)."""
    mixed = attention(_linear(x, p, "c_attn"), n_head, weights_mask, qk_norm, rotary)
    return _linear(mixed, p, "c_proj")


def attention_layer_backward(
    dy: Array,
    x: Array,
    p: Parameters,
    n_head: int,
    weights_mask: Array | None = None,
    qk_norm: bool = False,
    rotary: bool = False,
) -> tuple[Array, Gradients]:
    """(dx, gradients): the chain rule from the last layer to the first."""
    qkv = _linear(x, p, "c_attn")
    mixed = attention(qkv, n_head, weights_mask, qk_norm, rotary)
    dmixed, dproj = _linear_backward(dy, mixed, p, "c_proj")
    dqkv = attention_backward(dmixed, qkv, n_head, weights_mask, qk_norm, rotary)
    dx, dattn = _linear_backward(dqkv, x, p, "c_attn")
    return dx, dproj | dattn


def block(
    x: Array,
    p: Parameters,
    n_head: int,
    activation: str = "gelu_tanh",
    masks: Parameters = NO_MASKS,
    qk_norm: bool = False,
    rotary: bool = False,
) -> Array:
    """Tokens talk, then each thinks: x (B, T, C) -> (B, T, C).

    a = x + attention(ln_1(x))
    y = a + mlp(ln_2(a))
    """
    attn, fc = _inside(p, "attn."), _inside(p, "mlp.")
    options = n_head, masks.get("attn.weights"), qk_norm, rotary
    mixed = attention_layer(_norm(x, p, "ln_1"), attn, *options)
    a = x + dropout(mixed, masks.get("attn.residual"))
    return a + dropout(mlp(_norm(a, p, "ln_2"), fc, activation), masks.get("mlp.residual"))


def block_backward(
    dy: Array,
    x: Array,
    p: Parameters,
    n_head: int,
    activation: str = "gelu_tanh",
    masks: Parameters = NO_MASKS,
    qk_norm: bool = False,
    rotary: bool = False,
) -> tuple[Array, Gradients]:
    """(dx, gradients). At each fork x + f(x) the gradient goes both ways, and the two add up:

    da = dy + (backward of ln_2, mlp)(dy)
    dx = da + (backward of ln_1, attention)(da)
    """
    attn, fc = _inside(p, "attn."), _inside(p, "mlp.")
    options = n_head, masks.get("attn.weights"), qk_norm, rotary
    normed_x = _norm(x, p, "ln_1")
    mixed = attention_layer(normed_x, attn, *options)
    a = x + dropout(mixed, masks.get("attn.residual"))
    normed_a = _norm(a, p, "ln_2")

    dfc_out = dropout_backward(dy, masks.get("mlp.residual"))
    dnormed_a, dfc = mlp_backward(dfc_out, normed_a, fc, activation)
    da_through_mlp, dln_2 = _norm_backward(dnormed_a, a, p, "ln_2")
    da = dy + da_through_mlp

    dmixed = dropout_backward(da, masks.get("attn.residual"))
    dnormed_x, dattn = attention_layer_backward(dmixed, normed_x, attn, *options)
    dx_through_attention, dln_1 = _norm_backward(dnormed_x, x, p, "ln_1")
    dx = da + dx_through_attention
    return dx, dln_1 | _outside(dattn, "attn.") | dln_2 | _outside(dfc, "mlp.")


def bigram(table: Array, idx: Tokens, targets: Tokens) -> tuple[Array, float]:
    """(logits (B, T, V), loss): row idx[b,t] of the table (V, V) scores what follows that token."""
    logits = embedding(idx, table)
    return logits, cross_entropy(logits, targets)


def bigram_backward(table: Array, idx: Tokens, targets: Tokens) -> Array:
    """d table: the loss' gradient, put back where the rows came from."""
    dlogits = cross_entropy_backward(embedding(idx, table), targets)
    return embedding_backward(dlogits, idx, table)


def _embedded(p: Parameters, idx: Tokens) -> Array:
    """The token's row, and the position's where the model has learned positions."""
    x = embedding(idx, p["wte.weight"])
    if "wpe.weight" in p:
        x = x + embedding(np.arange(idx.shape[1]), p["wpe.weight"])
    return x


def _residual_stream(
    p: Parameters, idx: Tokens, n_head: int, activation: str, masks: Parameters, qk_norm: bool
) -> list[Array]:
    """What enters each block, and last what leaves the last one: n_layer + 1 arrays (B, T, C)."""
    x = _embedded(p, idx)
    if _is_rms(p):
        x = rms_norm(x)
    stream = [dropout(x, masks.get("drop"))]
    for i in range(_n_layer(p)):
        stream.append(block(stream[-1], *_block(p, i, n_head, activation, masks, qk_norm)))
    return stream


def _block(
    p: Parameters, i: int, n_head: int, activation: str, masks: Parameters, qk_norm: bool
) -> tuple[Parameters, int, str, Parameters, bool, bool]:
    """The arguments of block i after x."""
    inside = _inside(p, f"h.{i}."), _inside(masks, f"h.{i}.")
    return inside[0], n_head, activation, inside[1], qk_norm, "wpe.weight" not in p


def _is_rms(p: Parameters) -> bool:
    return "ln_f.weight" not in p


def _n_layer(p: Parameters) -> int:
    return len({name.split(".")[1] for name in p if name.startswith("h.")})


def _head_name(p: Parameters) -> str:
    """The output layer's weight: its own, or the token embedding's where the two are tied."""
    return "lm_head.weight" if "lm_head.weight" in p else "wte.weight"


def gpt(
    p: Parameters,
    idx: Tokens,
    targets: Tokens | None,
    n_head: int,
    activation: str = "gelu_tanh",
    masks: Parameters = NO_MASKS,
    qk_norm: bool = False,
) -> tuple[Array, float | None]:
    """GPT-2 (Radford et al. 2019): (logits (B, T, V), loss); without targets the loss is None.

    x = wte[idx] + wpe[0 .. T-1];  x = block_i(x) for every i;  logits = ln_f(x) W^T
    with W = lm_head.weight, or wte.weight where the two are tied.
    """
    x = _residual_stream(p, idx, n_head, activation, masks, qk_norm)[-1]
    logits = linear(_norm(x, p, "ln_f"), p[_head_name(p)])
    return logits, None if targets is None else cross_entropy(logits, targets)


def gpt_backward(
    p: Parameters,
    idx: Tokens,
    targets: Tokens,
    n_head: int,
    activation: str = "gelu_tanh",
    masks: Parameters = NO_MASKS,
    qk_norm: bool = False,
) -> Gradients:
    """The gradient of the loss for every parameter, by name.

    From the loss backwards through ln_f and the blocks, last block first. The sum at the bottom
    gives its gradient to both tables; position t is used once in every row of the batch, so
    d wpe[t] = sum over b. A tied table is used twice, and its two gradients add up.
    """
    stream = _residual_stream(p, idx, n_head, activation, masks, qk_norm)
    normed = _norm(stream[-1], p, "ln_f")
    head_weight = p[_head_name(p)]

    dlogits = cross_entropy_backward(linear(normed, head_weight), targets)
    dnormed, dhead, _ = linear_backward(dlogits, normed, head_weight)
    dx, gradients = _norm_backward(dnormed, stream[-1], p, "ln_f")
    for i in reversed(range(_n_layer(p))):
        inside = _block(p, i, n_head, activation, masks, qk_norm)
        dx, dblock = block_backward(dx, stream[i], *inside)
        gradients |= _outside(dblock, f"h.{i}.")

    dx = dropout_backward(dx, masks.get("drop"))
    if _is_rms(p):
        dx = rms_norm_backward(dx, _embedded(p, idx))
    if "wpe.weight" in p:
        positions = np.broadcast_to(np.arange(idx.shape[1]), idx.shape)
        gradients["wpe.weight"] = embedding_backward(dx, positions, p["wpe.weight"])
    gradients["wte.weight"] = embedding_backward(dx, idx, p["wte.weight"])
    if _head_name(p) == "wte.weight":
        gradients["wte.weight"] += dhead
    else:
        gradients["lm_head.weight"] = dhead
    return gradients
