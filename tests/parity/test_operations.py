"""Each operation alone, forward and backward: where a model differs, this says which part does."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from tinygrad import Tensor

from tests import reference as ref
from tests.reference import Array
from tinygpt.config import Activation, GPTConfig
from tinygpt.model import (
    Head,
    attention,
    causal_attention,
    causal_mask,
    cross_entropy,
    embedding,
    layer_norm,
    linear,
    rms_norm,
    rotary_table,
)
from tinygpt.optimizer import orthogonalize

from .compare import assert_close
from .models import as_float32, beyond_the_emulator, build, tokens

Inputs = dict[str, Array]


def assert_operation_agrees(
    kind: str, operation: Callable[..., Tensor], inputs: Inputs, y: Array, gradients: Inputs
) -> None:
    """`operation(**inputs)` gives y, and the gradients of sum(y * dy), dy being upstream(y)."""
    tensors = {name: Tensor(value.astype(np.float32)) for name, value in inputs.items()}
    out = operation(**tensors)
    dy = Tensor(upstream(y.shape).astype(np.float32))
    computed = (out * dy).sum().gradient(*tensors.values())
    out.realize(*computed)
    assert_close(kind, {"y": out}, {"y": y})
    named = {f"d{name}": g for name, g in zip(inputs, computed, strict=True)}
    assert_close(f"{kind} gradient", named, {f"d{name}": g for name, g in gradients.items()})


def random(*shape: int, seed: int = 0) -> Array:
    return as_float32(np.random.default_rng([seed, *shape]).standard_normal(shape))


def upstream(shape: tuple[int, ...]) -> Array:
    """dL/dy: anything but ones, whose sums would hide which value belongs where."""
    return random(*shape, seed=9)


@pytest.mark.parametrize("B, T, C, V", [(1, 1, 1, 2), (2, 3, 5, 4)])
def test_embedding(B: int, T: int, C: int, V: int) -> None:
    """Six tokens of four: at least two places add to one row's gradient. Some positions are
    beyond T: their gradient is 0."""
    idx = np.random.default_rng(T).integers(V, size=(B, T))
    inputs = {"wte": random(V, C), "wpe": random(T + 2, C)}
    y = ref.embedding(idx, inputs["wte"]) + inputs["wpe"][:T]
    dy, positions = upstream(y.shape), np.broadcast_to(np.arange(T), (B, T))
    gradients = {
        "wte": ref.embedding_backward(dy, idx, inputs["wte"]),
        "wpe": ref.embedding_backward(dy, positions, inputs["wpe"]),
    }
    operation = partial(embedding, tokens(idx))
    assert_operation_agrees("embedding", operation, inputs, y, gradients)


@pytest.mark.parametrize(
    "lead, n_in, n_out, bias",
    [((1, 1), 1, 1, True), ((3, 5), 7, 3, False), ((2, 9), 33, 65, True)],
)
def test_linear(lead: tuple[int, ...], n_in: int, n_out: int, bias: bool) -> None:
    inputs = {"x": random(*lead, n_in), "weight": random(n_out, n_in)}
    if bias:
        inputs["bias"] = random(n_out)
    y = ref.linear(**inputs)
    computed = ref.linear_backward(upstream(y.shape), inputs["x"], inputs["weight"])
    gradients = dict(zip(inputs, computed, strict=False))
    assert_operation_agrees("linear", linear, inputs, y, gradients)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (1, 4, 80)])
def test_layer_norm(shape: tuple[int, ...]) -> None:
    """Channels far from 0: the mean must be taken off before anything is squared."""
    x = as_float32(random(*shape) + 5)
    weight, bias = random(shape[-1]), random(shape[-1], seed=1)
    y = ref.layer_norm(x, weight, bias)
    dx, dw, db = ref.layer_norm_backward(upstream(y.shape), x, weight)
    inputs = {"x": x, "weight": weight, "bias": bias}
    gradients = {"x": dx, "weight": dw, "bias": db}
    assert_operation_agrees("layer_norm", layer_norm, inputs, y, gradients)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (1, 4, 80)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    """Small numbers too, of whose mean square eps is a part."""
    x = as_float32(random(*shape) * np.geomspace(1e-3, 1, shape[1])[:, None])
    y, dx = ref.rms_norm(x), ref.rms_norm_backward(upstream(shape), x)
    assert_operation_agrees("layer_norm", rms_norm, {"x": x}, y, {"x": dx})


@pytest.mark.parametrize("name", ["relu", "relu2", "gelu", "gelu_tanh"])
def test_activation(name: Activation) -> None:
    """After a matrix product, here by 1: from far left, where nothing passes, to far right."""
    x = as_float32(np.linspace(-9, 9, 181))[:, None]
    y = getattr(ref, name)(x)
    gradients = {"x": getattr(ref, name + "_backward")(upstream(y.shape), x)}
    operation = partial(linear, weight=Tensor([[1.0]]), activation=name)
    assert_operation_agrees("activation", operation, {"x": x}, y, gradients)


@pytest.mark.parametrize("qk_norm, rotary", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("B, T, H, D", [(1, 1, 1, 2), (2, 5, 3, 2), (1, 17, 1, 10)])
def test_causal_attention(B: int, T: int, H: int, D: int, qk_norm: bool, rotary: bool) -> None:
    """The norm of queries and keys and their rotation, with a table for more positions."""
    qkv = random(B, T, 3 * H * D)
    table = rotary_table(T + 3, D) if rotary else None
    y = ref.attention(qkv, H, None, qk_norm, rotary)
    dqkv = ref.attention_backward(upstream(y.shape), qkv, H, None, qk_norm, rotary)
    operation = partial(causal_attention, n_head=H, qk_norm=qk_norm, rotary=table)
    assert_operation_agrees("attention", operation, {"qkv": qkv}, y, {"qkv": dqkv})


@pytest.mark.parametrize(
    "rows, columns", [(1, 1), (3, 5), (6, 2), pytest.param(40, 70, marks=beyond_the_emulator)]
)
def test_orthogonalize(rows: int, columns: int) -> None:
    g = random(rows, columns)
    got = orthogonalize(Tensor(g.astype(np.float32)))
    assert_close("orthogonalized", {"update": got}, {"update": ref.orthogonalized(g)})


@pytest.mark.parametrize("B, T, H, D", [(1, 1, 1, 1), (2, 5, 3, 1), (1, 17, 1, 9)])
def test_attention(B: int, T: int, H: int, D: int) -> None:
    q, k, v = (random(B, H, T, D, seed=seed) for seed in range(3))
    y = ref.head(q, k, v)
    dq, dk, dv = ref.head_backward(upstream(y.shape), q, k, v)
    assert_operation_agrees(
        "attention",
        lambda q, k, v: attention(q, k, v, causal_mask(T)),
        {"q": q, "k": k, "v": v},
        y,
        {"q": dq, "k": dk, "v": dv},
    )


def test_head() -> None:
    """The lecture's single head, with projections that make 5 channels into 3."""
    B, T, C, D = 2, 5, 5, 3
    x, projections = random(B, T, C), {n: random(D, C, seed=i) for i, n in enumerate("qkv")}
    y = ref.head(*(ref.linear(x, w) for w in projections.values()))
    head = Head(C, D)
    for layer, w in zip((head.query, head.key, head.value), projections.values(), strict=True):
        layer.weight = Tensor(w.astype(np.float32))
    assert_close("attention", {"y": head(Tensor(x.astype(np.float32)))}, {"y": y})


@pytest.mark.parametrize("B, T, H, D", [(1, 1, 1, 1), (2, 5, 3, 1), (1, 17, 1, 9)])
def test_attention_layer(B: int, T: int, H: int, D: int) -> None:
    """All heads at once, between the matrices that make q, k and v and that mix the heads."""
    config = GPTConfig(T, 2, n_layer=1, n_head=H, n_embd=H * D, bias=True)
    model, p = build(config)
    layer = model.h[0].attn
    named = {n.removeprefix("h.0.attn."): a for n, a in p.items() if ".attn." in n}
    x = random(B, T, H * D)
    y = ref.attention_layer(x, named, H)
    dx, gradients = ref.attention_layer_backward(upstream(y.shape), x, named, H)

    def operation(x: Tensor, **weights: Tensor) -> Tensor:
        model.use({f"h.0.attn.{name}": weight for name, weight in weights.items()})
        return layer(x)

    inputs = {"x": x, **named}
    assert_operation_agrees("attention", operation, inputs, y, {"x": dx, **gradients})


@pytest.mark.parametrize("B, T, V, scale", [(1, 1, 2, 200), (2, 3, 7, 1), (1, 5, 257, 200)])
def test_cross_entropy(B: int, T: int, V: int, scale: float) -> None:
    """Also where the logits differ by hundreds, and exp of them would overflow."""
    logits = as_float32(scale * random(B, T, V))
    targets = np.random.default_rng(V).integers(V, size=(B, T))
    loss = np.array(ref.cross_entropy(logits, targets))
    gradient = upstream(()) * ref.cross_entropy_backward(logits, targets)
    assert_operation_agrees(
        "cross_entropy",
        lambda logits: cross_entropy(logits, tokens(targets)),
        {"logits": logits},
        loss,
        {"logits": gradient},
    )


def test_cross_entropy_skips_what_has_no_target() -> None:
    """A target of -1 adds 0 to the sum; the mean is over all places all the same."""
    logits, targets = random(1, 4, 5), np.array([[2, -1, 0, -1]])
    counted = targets[0] >= 0
    half = ref.cross_entropy(logits[:, counted], targets[:, counted]) / 2
    loss = cross_entropy(Tensor(logits.astype(np.float32)), tokens(targets))
    assert_close("cross_entropy", {"loss": loss}, {"loss": np.array(half)})


def test_the_mathematical_trick() -> None:
    """The lecture's four ways to average the past agree: loop, matrix, softmax, attention."""
    B, T, C = 2, 4, 3
    x = random(B, T, C)
    expected = np.stack([x[:, : t + 1].mean(axis=1) for t in range(T)], axis=1)
    xs = Tensor(x.astype(np.float32))

    loop = Tensor.stack(*[xs[:, : t + 1].mean(axis=1) for t in range(T)], dim=1)
    ones = Tensor.ones(T, T).tril()
    matrix = (ones / ones.sum(axis=1, keepdim=True)) @ xs
    softmax = (ones == 0).where(-math.inf, Tensor.zeros(T, T)).softmax(axis=-1) @ xs
    zero_queries = attention(xs * 0, xs, xs, causal_mask(T))
    ways = {"loop": loop, "matrix": matrix, "softmax": softmax, "attention": zero_queries}
    assert_close("operation", ways, dict.fromkeys(ways, expected))
