"""The kernels compute what the numpy reference computes, for every shape and every use.

Errors are as tests/parity defines them: the largest difference, relative to the largest value of
the reference, in units of float32's roundoff, 2^-24. A sum of n products carries about sqrt(n) of
those, a chain of operations a few more; the bounds below leave a factor of about three.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad import Tensor, TinyJit, dtypes

from tests import reference as ref
from tests.parity.compare import relative_error
from tests.reference import Array
from tinygpt import kernels
from tinygpt.config import Activation
from tinygpt.kernels import Dropout
from tinygpt.model import rotary_table
from tinygpt.optimizer import NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS

pytestmark = pytest.mark.skipif(
    not kernels.usable(Tensor.empty(1)), reason="the kernels are for a CPU and clang"
)

ROUNDOFF = 2.0**-24
SEED = Tensor(np.array([20250101], np.uint32))


def assert_close(name: str, actual: Tensor, expected: Array, roundings: float) -> None:
    values = actual.numpy()
    assert values.shape == expected.shape, name
    error = float(relative_error(values, expected).max())
    assert error <= roundings * ROUNDOFF, f"{name}: {error / ROUNDOFF:.0f} roundings"


def random(*shape: int, seed: int = 0) -> Array:
    """Normal numbers that float32 holds exactly."""
    rng = np.random.default_rng([seed, *shape])
    return rng.standard_normal(shape).astype(np.float32).astype(np.float64)


def tensor(values: Array) -> Tensor:
    return Tensor(values.astype(np.float32))


def integers(values: Any) -> Tensor:
    return Tensor(np.asarray(values, np.int32))


def assert_agrees(
    operation: Callable[..., Tensor],
    inputs: dict[str, Array],
    y: Array,
    gradients: dict[str, Array],
    roundings: float,
) -> None:
    """operation(**inputs) is y, and sum(y * upstream) has these gradients."""
    tensors = {name: tensor(value) for name, value in inputs.items()}
    out = operation(**tensors)
    computed = (out * tensor(upstream(*y.shape))).sum().gradient(*tensors.values())
    out.realize(*computed)
    assert_close("y", out, y, roundings)
    for name, gradient in zip(inputs, computed, strict=True):
        assert_close(f"gradient of {name}", gradient, gradients[name], roundings)


def upstream(*shape: int) -> Array:
    return random(*shape, seed=9)


# Linear -------------------------------------------------------------------------------------------

FORWARD: dict[Activation, Any] = {
    "gelu": ref.gelu,
    "gelu_tanh": ref.gelu_tanh,
    "relu": ref.relu,
    "relu2": ref.relu2,
}
BACKWARD: dict[Activation, Any] = {
    "gelu": ref.gelu_backward,
    "gelu_tanh": ref.gelu_tanh_backward,
    "relu": ref.relu_backward,
    "relu2": ref.relu2_backward,
}


def check_linear(
    rows: int,
    outs: int,
    ins: int,
    activation: Activation | None = None,
    bias: bool = False,
    dropout: Dropout | None = None,
) -> None:
    inputs = {"x": random(rows, ins), "weight": random(outs, ins, seed=1) / np.sqrt(ins)}
    inputs["weight"] = inputs["weight"].astype(np.float32).astype(np.float64)
    z = ref.linear(**inputs)
    if bias:
        inputs["bias"] = random(outs, seed=2)
        z = z + inputs["bias"]
    y = FORWARD[activation](z) if activation else z
    mask = np.asarray(dropout.mask(rows, outs).numpy(), np.float64) if dropout else 1.0
    y = y * mask
    dz = upstream(*y.shape) * mask
    if activation:
        dz = BACKWARD[activation](dz, z)
    dx, dweight, dbias = ref.linear_backward(dz, inputs["x"], inputs["weight"])
    gradients = {"x": dx, "weight": dweight, "bias": dbias}

    def operation(**tensors: Tensor) -> Tensor:
        return kernels.linear(activation=activation, dropout=dropout, **tensors)

    # sqrt(ins) or sqrt(rows) roundings of a sum; the slope of an activation amplifies those of z
    assert_agrees(operation, inputs, y, gradients, 12 + 3 * np.sqrt(max(rows, outs, ins)))


@pytest.mark.parametrize(
    "rows, outs, ins",
    [
        (1, 1, 1),
        (1, 65, 128),  # one token, as in generation
        (3, 5, 600),
        (4, 1, 1),
        (5, 33, 17),
        (64, 96, 64),  # nothing but whole tiles
        (137, 65, 300),  # a second block of rows, which is not full; the depth in equal steps
        (9, 40, 521),  # a prime number of steps: a last one is shorter
        (521, 7, 9),  # the same in the weight's gradient
        (4, 2100, 3),  # a second block of columns
    ],
)
def test_linear(rows: int, outs: int, ins: int) -> None:
    check_linear(rows, outs, ins)


@pytest.mark.parametrize("activation", [None, *FORWARD])
def test_linear_with_everything(activation: Activation | None) -> None:
    check_linear(6, 21, 34, activation, bias=True, dropout=Dropout(SEED, 0.3))


def test_linear_with_a_bias_and_few_rows() -> None:
    check_linear(2, 21, 34, "gelu", bias=True)


@settings(max_examples=5, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70))
def test_linear_of_any_shape(rows: int, outs: int, ins: int) -> None:
    check_linear(rows, outs, ins)


@pytest.mark.parametrize("rows, outs, ins", [(4, 5, 3), (9, 70, 40), (64, 96, 64), (6, 33, 521)])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_packed_weights(rows: int, outs: int, ins: int, activation: Activation | None) -> None:
    """The same result, bit for bit, of the weight as it was when it was packed."""
    x, weight, bias = (tensor(random(*shape)) for shape in ((rows, ins), (outs, ins), (outs,)))
    weight.realize()
    expected = kernels.linear(x, weight, bias, activation).numpy()
    panels = kernels.pack(weight).realize()
    weight.assign(weight + 1).realize()
    with kernels.inference({weight.uop: panels}):
        got = kernels.linear(x, weight, bias, activation).numpy()
        one_row = kernels.linear(x[:1], weight, bias, activation).numpy()  # takes the weight itself
    np.testing.assert_array_equal(got, expected)
    assert (kernels.linear(x, weight, bias, activation).numpy() != expected).any()
    np.testing.assert_array_equal(one_row, kernels.linear(x[:1], weight, bias, activation).numpy())


def test_gradients_into_memory() -> None:
    """A weight's gradient is where it was wanted, and is the gradient; the others are anywhere."""
    x, weight, other = (random(*shape) for shape in ((9, 7), (5, 7), (3, 5)))
    first, second, third = tensors = [tensor(a).realize() for a in (x, weight, other)]
    place = Tensor.full((5, 7), 9.0).contiguous().realize()
    with kernels.gradients_into({second.uop: place}):
        y = kernels.linear(kernels.linear(first, second), third)
        gradients = (y * tensor(upstream(9, 3))).sum().gradient(*tensors)
    Tensor.realize(*gradients)
    dh, dother, _ = ref.linear_backward(upstream(9, 3), ref.linear(x, weight), other)
    dx, dweight, _ = ref.linear_backward(dh, x, weight)
    for got, expected in zip([*gradients, place], [dx, dweight, dother, dweight], strict=True):
        assert_close("gradient", got, expected, 16 + np.sqrt(9))


@pytest.mark.parametrize("activation", FORWARD)
def test_activations_over_their_whole_range(activation: Activation) -> None:
    """Value and slope, each to a few roundings of 1, or of the value where that is larger.

    Abramowitz & Stegun's erf adds 1.5e-7 / 2, about a rounding of 1, times x.
    """
    x = np.concatenate([np.linspace(-14, 14, 20001), [0.0, 1e-30, 1e4, -1e4, 1e9, -1e9]])
    x = x.astype(np.float32).astype(np.float64)[:, None]
    tensors: dict[str, Any] = {"x": tensor(x), "weight": tensor(np.ones((1, 1)))}
    y = kernels.linear(activation=activation, **tensors)
    slope = y.sum().gradient(tensors["x"])[0]
    with np.errstate(over="ignore"):
        expected = FORWARD[activation](x)
        expected_slope = BACKWARD[activation](np.ones_like(x), x)
    size, slope_size = np.maximum(1.0, np.abs(expected)), np.maximum(1.0, np.abs(expected_slope))
    assert (np.abs(y.numpy() - expected) / size).max() <= 8 * ROUNDOFF
    assert (np.abs(slope.numpy() - expected_slope) / slope_size).max() <= 8 * ROUNDOFF


# Attention ----------------------------------------------------------------------------------------


def check_attention(B: int, T: int, H: int, D: int, dropout: Dropout | None = None) -> None:
    qkv = random(B, T, 3 * H * D)
    mask = np.asarray(dropout.mask(B, H, T, T).numpy(), np.float64) if dropout else None
    y = ref.attention(qkv, H, mask)
    gradients = {"qkv": ref.attention_backward(upstream(*y.shape), qkv, H, mask)}

    def operation(qkv: Tensor) -> Tensor:
        return kernels.attention(qkv, H, dropout)

    # a score of size sqrt(D) has that many roundings, and exp makes them relative
    assert_agrees(operation, {"qkv": qkv}, y, gradients, 16 + 3 * np.sqrt(T + D))


@pytest.mark.parametrize(
    "B, T, H, D",
    [
        (1, 1, 1, 1),
        (2, 1, 3, 5),
        (1, 7, 5, 1),
        (2, 33, 2, 16),
        (1, 64, 2, 32),  # nothing but whole tiles
        (1, 100, 1, 70),
    ],
)
def test_attention(B: int, T: int, H: int, D: int) -> None:
    check_attention(B, T, H, D)


@pytest.mark.parametrize("B, T, H, D", [(2, 9, 3, 4), (1, 40, 1, 33)])
def test_attention_with_dropout(B: int, T: int, H: int, D: int) -> None:
    check_attention(B, T, H, D, Dropout(SEED, 0.2))


@settings(max_examples=3, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.integers(1, 40))
def test_attention_of_any_shape(B: int, T: int, H: int, D: int) -> None:
    check_attention(B, T, H, D)


@pytest.mark.parametrize(
    "B, T, H, D", [(2, 1, 1, 3), (1, 7, 2, 5), (2, 64, 2, 32), (1, 100, 1, 70)]
)
def test_attention_of_the_last_position(B: int, T: int, H: int, D: int) -> None:
    """What it is among all the others, bit for bit."""
    qkv = tensor(random(B, T, 3 * H * D))
    last = kernels.attention(qkv, H, only_last=True).numpy()
    np.testing.assert_array_equal(last, kernels.attention(qkv, H)[:, -1:].numpy())


def test_attention_never_looks_ahead() -> None:
    """What comes later changes no bit of what came before, and gets no gradient from it."""
    T, seen = 40, 17
    qkv = random(2, T, 18)
    changed = qkv.copy()
    changed[:, seen:] = 1e3 * random(2, T - seen, 18)
    before, after = (kernels.attention(tensor(x), 3)[:, :seen].numpy() for x in (qkv, changed))
    assert (before == after).all()

    x = tensor(qkv)
    gradient = kernels.attention(x, 3)[:, :seen].sum().gradient(x)[0].numpy()
    assert (gradient[:, seen:] == 0).all() and (gradient[:, :seen] != 0).any()


def test_long_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for arrays of 2^31 numbers, here with sizes that no other test has."""
    kernel = kernels.Kernel
    monkeypatch.setattr(kernels, "Kernel", lambda *sizes, largest=0: kernel(*sizes, largest=2**31))
    program = kernels.linear_kernel(11, 37, 19, False, None, 0.0, False, False)
    assert any(u.dtype == dtypes.long for u in program.kernel.toposort())
    check_linear(11, 37, 19)
    check_attention(2, 13, 2, 3, Dropout(SEED, 0.2))
    table, idx = random(11, 13), [[3, 10], [0, 3]]  # numbers that become indices
    assert_close("rows", kernels.embedding(integers(idx), tensor(table)), table[np.array(idx)], 0)


def test_attention_with_extreme_scores() -> None:
    """exp must not overflow: the largest score of a row takes all the weight."""
    qkv = 300 * random(1, 20, 24)
    y = ref.attention(qkv, 2)
    assert_close("y", kernels.attention(tensor(qkv), 2), y, 64)


@pytest.mark.parametrize("norm, rotary", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("B, T, H, D", [(1, 1, 1, 2), (2, 7, 3, 6), (1, 33, 2, 64), (3, 5, 1, 70)])
def test_norm_and_rotate(B: int, T: int, H: int, D: int, norm: bool, rotary: bool) -> None:
    qkv = random(B, T, 3 * H * D)
    table = rotary_table(T + 2, D) if rotary else None  # positions beyond T are not looked at

    def each(function: Callable[..., Array], *arrays: Array) -> Array:
        """For every head of queries and keys; values pass."""
        heads = [a.reshape(B, T, 3, H, D).transpose(2, 0, 3, 1, 4) for a in arrays]
        q_and_k = function(*(a[:2] for a in heads), norm, rotary)
        parts = np.concatenate([q_and_k, heads[0][2:]])
        return parts.transpose(1, 3, 0, 2, 4).reshape(qkv.shape)

    y, gradient = each(ref.place, qkv), each(ref.place_backward, upstream(*qkv.shape), qkv)

    def operation(qkv: Tensor) -> Tensor:
        return kernels.norm_and_rotate(qkv, H, norm, table)

    # the norm's sum of D values, forward and backward; a rotation is three operations
    assert_agrees(operation, {"qkv": qkv}, y, {"qkv": gradient}, 8 + 3 * np.sqrt(D))


# The other operations -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows, C", [(1, 1), (3, 7), (5, 64), (2, 1000)])
def test_rms_norm(rows: int, C: int) -> None:
    x = random(rows, C)
    x[0] *= 1e-3  # where eps matters
    x = x.astype(np.float32).astype(np.float64)
    gradients = {"x": ref.rms_norm_backward(upstream(rows, C), x)}
    assert_agrees(kernels.rms_norm, {"x": x}, ref.rms_norm(x), gradients, 16 + np.sqrt(C))


@pytest.mark.parametrize(
    "rows, C, bias", [(1, 1, True), (3, 7, False), (5, 64, True), (2, 1000, True)]
)
def test_layer_norm(rows: int, C: int, bias: bool) -> None:
    """Channels far from 0: the mean must be taken off before anything is squared."""
    x = (random(rows, C) + 5).astype(np.float32).astype(np.float64)
    inputs: dict[str, Any] = {"x": x, "weight": random(C, seed=1)}
    if bias:
        inputs["bias"] = random(C, seed=2)
    y = ref.layer_norm(**inputs)
    computed = ref.layer_norm_backward(upstream(*y.shape), x, inputs["weight"])
    gradients = dict(zip(("x", "weight", "bias"), computed, strict=True))
    # subtracting 5 from numbers around it costs a few roundings of 5
    assert_agrees(kernels.layer_norm, inputs, y, gradients, 40 + 2 * np.sqrt(rows))


@pytest.mark.parametrize("B, T, V", [(1, 1, 1), (2, 5, 3), (3, 8, 65), (1, 2, 257)])
def test_cross_entropy(B: int, T: int, V: int) -> None:
    logits = 3 * random(B, T, V)
    logits[0, 0] += 1e3  # exp must not overflow
    targets = np.random.default_rng(V).integers(V, size=(B, T))
    x = tensor(logits)
    logits = x.numpy().astype(np.float64)
    loss = kernels.cross_entropy(x, integers(targets))
    gradient = (loss * 3).gradient(x)[0]  # a loss that is only a part of another
    assert_close("loss", loss, np.array(ref.cross_entropy(logits, targets)), 200 if V > 1 else 0)
    assert_close("gradient", gradient, 3 * ref.cross_entropy_backward(logits, targets), 2000)


def test_cross_entropy_without_a_target() -> None:
    """A target of -1 adds 0 to the sum, and counts in the mean."""
    logits, targets = random(1, 4, 5), np.array([[2, -1, 0, 4]])
    known = targets[0] >= 0
    x = tensor(logits)
    loss = kernels.cross_entropy(x, integers(targets))
    gradient = loss.gradient(x)[0]
    expected = ref.cross_entropy_backward(logits[:, known], targets[:, known]) * 3 / 4
    assert_close(
        "loss", loss, np.array(ref.cross_entropy(logits[:, known], targets[:, known]) * 3 / 4), 16
    )
    assert_close("gradient", gradient[:, np.flatnonzero(known).tolist()], expected, 16)
    assert (gradient.numpy()[:, 1] == 0).all()


@pytest.mark.parametrize("B, T, C, V, P", [(1, 1, 1, 1, 1), (3, 5, 4, 3, 7), (2, 8, 33, 65, 8)])
def test_embedding(B: int, T: int, C: int, V: int, P: int) -> None:
    idx = np.random.default_rng(V).integers(V, size=(B, T))
    inputs = {"wte": random(V, C), "wpe": random(P, C, seed=1)}
    y = inputs["wte"][idx] + inputs["wpe"][:T]
    positions = np.broadcast_to(np.arange(T), (B, T))
    gradients = {
        "wte": ref.embedding_backward(upstream(B, T, C), idx, inputs["wte"]),
        "wpe": ref.embedding_backward(upstream(B, T, C), positions, inputs["wpe"]),
    }
    assert_agrees(
        lambda **tables: kernels.embedding(integers(idx), **tables), inputs, y, gradients, 8
    )


def test_embedding_without_positions() -> None:
    idx = np.random.default_rng(0).integers(5, size=(3, 4))
    table = random(5, 7)
    gradient = {"wte": ref.embedding_backward(upstream(3, 4, 7), idx, table)}
    assert_agrees(
        lambda wte: kernels.embedding(integers(idx), wte), {"wte": table}, table[idx], gradient, 8
    )


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 7), (7, 3), (50, 33), (20, 300)])
def test_orthogonalize(rows: int, columns: int) -> None:
    """Five steps, of which each may triple an error: 3.4^5 is 480, but where it grows so fast the
    numbers are small, and it shrinks again near 1. Ninety roundings were the most that was seen."""
    g = random(rows, columns)
    got = kernels.orthogonalize(tensor(g), NEWTON_SCHULZ_STEPS, NEWTON_SCHULZ)
    assert_close("orthogonalized", got, ref.orthogonalized(g), 250)


def test_tokens_outside_the_vocabulary_stay_inside_memory() -> None:
    table = tensor(random(3, 4))
    x = kernels.embedding(integers([[10**9, -(10**9)]]), table, table)
    assert np.isfinite(x.numpy()).all()
    loss = kernels.cross_entropy(tensor(random(1, 2, 3)), integers([[10**9, -(10**9)]]))
    assert loss.item() == 0


# The optimizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (4095,), (64, 64), (10_001,)])
def test_sum_of_squares(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    assert_close("sum", kernels.sum_of_squares(tensor(x)), (x**2).sum(), 8)


@pytest.mark.parametrize("shape", [(1,), (100,), (50, 20)])
def test_adamw(shape: tuple[int, ...]) -> None:
    """Four steps, each at another rate, of one compiled function; in place, as in the reference."""
    start = random(*shape, seed=1)
    p, m, v = (tensor(x).realize() for x in (start, np.zeros(shape), np.zeros(shape)))
    decay = 0.1 if len(shape) == 2 else 0.0  # the reference decays what has two axes

    @TinyJit
    def step(g: Tensor, scale: Tensor, rates: Tensor) -> None:
        Tensor.realize(*kernels.adamw(p, m, v, g, scale, rates, (0.9, 0.99), 1e-8, decay))

    expected = {"p": start}
    moments = ref.Moments.zero(expected)
    for t in range(1, 5):
        g, rate, scale = random(*shape, seed=t), 0.1 / t, 0.5 * t
        rates = np.array([rate, 1 / (1 - 0.9**t), 1 / (1 - 0.99**t)])
        step(tensor(g), tensor(np.array([scale])), tensor(rates))
        expected, moments = ref.adamw(
            expected, {"p": scale * g}, moments, rate, (0.9, 0.99), 1e-8, 0.1
        )
    # a few roundings in each of four steps
    assert_close("p", p, expected["p"], 64)
    assert_close("m", m, moments.first["p"], 64)
    assert_close("v", v, moments.second["p"], 64)


# Every use ----------------------------------------------------------------------------------------


class Net:
    """A GPT of one block, made of kernels only; the token table is the output's weight too."""

    def __init__(self, device: str = "CPU") -> None:
        rng = np.random.default_rng(0)
        parameters = ref.random_parameters(rng, 1, 12, vocab_size=7, block_size=9, bias=True)
        self.parameters = {
            name: p.astype(np.float32).astype(np.float64) for name, p in parameters.items()
        }
        self.weights = {
            name: Tensor(p.astype(np.float32), device=device).realize()
            for name, p in self.parameters.items()
        }

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        def pair(name: str) -> dict[str, Any]:
            w = self.weights
            return {"weight": w[f"{name}.weight"], "bias": w.get(f"{name}.bias")}

        k, wte, layer = kernels, self.weights["wte.weight"], "h.0."
        x = k.embedding(idx, wte, self.weights["wpe.weight"])
        qkv = k.linear(k.layer_norm(x, **pair(layer + "ln_1")), **pair(layer + "attn.c_attn"))
        x = x + k.linear(k.attention(qkv, 3), **pair(layer + "attn.c_proj"))
        norm = k.layer_norm(x, **pair(layer + "ln_2"))
        hidden = k.linear(norm, **pair(layer + "mlp.c_fc"), activation="gelu_tanh")
        x = x + k.linear(hidden, **pair(layer + "mlp.c_proj"))
        return k.cross_entropy(k.linear(k.layer_norm(x, **pair("ln_f")), wte), targets)

    def step(self, idx: Tensor, targets: Tensor) -> list[Tensor]:
        loss = self.loss(idx, targets)
        return [loss, *loss.gradient(*self.weights.values())]


def batches(n: int, device: str = "CPU") -> Iterator[tuple[Tensor, Tensor]]:
    rng = np.random.default_rng(0)
    for _ in range(n):
        idx, targets = rng.integers(7, size=(2, 2, 9), dtype=np.int32)
        yield Tensor(idx, device=device), Tensor(targets, device=device)


def test_a_whole_model() -> None:
    """Gradients pass from kernel to kernel, and add up where a weight is used twice."""
    net, (idx, targets) = Net(), next(batches(1))
    loss, *gradients = net.step(idx, targets)
    given = (net.parameters, idx.numpy(), targets.numpy(), 3)
    assert_close("loss", loss, np.array(ref.gpt(*given)[1]), 16)
    expected = ref.gpt_backward(*given)
    for name, gradient in zip(net.weights, gradients, strict=True):
        # some 50 operations deep, each a few roundings
        assert_close(name, gradient, expected[name], 160)


def test_under_tinyjit_inputs_and_weights_may_change() -> None:
    net = Net()
    compiled = TinyJit(lambda idx, targets: [t.realize() for t in net.step(idx, targets)])
    for idx, targets in batches(5):
        fast = [t.numpy().copy() for t in compiled(idx, targets)]
        eager = [t.numpy() for t in net.step(idx, targets)]
        assert all((a == b).all() for a, b in zip(fast, eager, strict=True))
        weight = net.weights["h.0.mlp.c_fc.weight"]
        weight.assign(weight * 1.5).realize()


def test_on_a_second_device_in_a_thread_with_a_small_stack() -> None:
    """Kernels keep no large arrays on the stack: half a megabyte holds Python and them."""
    net, big = Net("CPU:1"), tensor(random(1, 1024, 3 * 64)).to("CPU:1").realize()
    weight = tensor(random(64, 3000)).to("CPU:1").realize()
    wide = tensor(random(128, 3000)).to("CPU:1").realize()

    @TinyJit
    def run(idx: Tensor, targets: Tensor) -> list[Tensor]:
        product = kernels.linear(wide, weight)
        y = kernels.attention(big, 1)
        return [
            t.realize()
            for t in [*net.step(idx, targets), *(y + product.sum()).sum().gradient(big, weight)]
        ]

    results: list[list[Array]] = []

    def replay(idx: Tensor, targets: Tensor) -> None:
        results.append([t.numpy().copy() for t in run(idx, targets)])

    given = list(batches(3, "CPU:1"))
    for idx, targets in given[:2]:
        run(idx, targets)
    size = threading.stack_size(512 * 1024)
    try:
        thread = threading.Thread(target=replay, args=given[2])
        thread.start()
        thread.join()
    finally:
        threading.stack_size(size)
    replay(*given[2])
    assert len(results) == 2
    assert all((a == b).all() and np.isfinite(a).all() for a, b in zip(*results, strict=True))


def test_inputs_need_not_be_contiguous() -> None:
    """Views of other arrays: transposed, a part."""
    x = tensor(random(8, 6, 10)).transpose(0, 1)  # (6, 8, 10)
    weight = tensor(random(10, 14))[:, 3:11].T  # (8, 10)
    expected = x.numpy().astype(np.float64) @ weight.numpy().T
    assert_close("linear", kernels.linear(x, weight), expected, 24)

    qkv = tensor(random(12, 3, 5)).permute(1, 2, 0)  # (3, 5, 12)
    expected = ref.attention(qkv.numpy().astype(np.float64), 2)
    assert_close("attention", kernels.attention(qkv, 2), expected, 32)
    norm = kernels.layer_norm(qkv, tensor(np.ones(1)).expand(12))
    assert_close("norm", norm, ref.layer_norm(qkv.numpy().astype(np.float64), np.ones(12)), 32)


def clear_caches() -> None:
    for function in vars(kernels).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.mark.parametrize("tile", ["8x32", "6x32", "6x16", "1x64"])
def test_any_tile_gives_the_same(tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other CPUs than this one have other tiles."""
    monkeypatch.setenv("TINYGPT_TILE", tile)
    clear_caches()
    try:
        check_linear(37, 70, 90)
        check_attention(1, 40, 1, 20)
    finally:
        clear_caches()


# Dropout ------------------------------------------------------------------------------------------


def test_dropout_masks() -> None:
    """The right share is dropped, and neighbours, seeds and rows know nothing of each other.

    Means of a million independent draws lie within 5 standard deviations of 1e-3 each.
    """
    p = 0.3
    first, other = (Dropout(SEED + i, p).mask(1000, 1000).numpy() for i in range(2))
    assert set(np.unique(first)) == {0.0, np.float32(1 / (1 - p))}
    a, b = ((mask == 0) - p for mask in (first, other))
    a, b = (x / np.sqrt(p * (1 - p)) for x in (a, b))
    for correlation in [a, a[:, 1:] * a[:, :-1], a[1:] * a[:-1], a * b, a[:, 1:] * b[:, :-1]]:
        assert abs(correlation.mean()) < 5e-3


def test_dropout_depends_on_the_seed_under_tinyjit() -> None:
    x, weight = tensor(random(8, 8)), tensor(random(8, 8))

    @TinyJit
    def run(seed: Tensor) -> Tensor:
        return kernels.linear(x, weight, dropout=Dropout(seed, 0.5)).realize()

    outputs = [run(Tensor(np.array([s], np.uint32))).numpy().copy() for s in (1, 2, 3, 4, 3)]
    assert (outputs[2] == outputs[4]).all()
    zeros = {(out == 0).tobytes() for out in outputs}
    assert len(zeros) == 4


# The switch ---------------------------------------------------------------------------------------


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    x = Tensor.empty(2, 3)
    assert kernels.usable(x)
    with kernels.off():
        assert not kernels.usable(x)
        with kernels.off():
            pass
        assert not kernels.usable(x)
    assert kernels.usable(x)
    monkeypatch.setenv("TINYGPT_KERNELS", "0")
    assert not kernels.usable(x)


@pytest.mark.parametrize(
    "x",
    [
        Tensor.empty(2, dtype=dtypes.half),
        Tensor.empty(2, dtype=dtypes.int),
        Tensor.empty(2, device="NULL"),
        Tensor.empty(2, device=("CPU", "CPU:1")),
        Tensor.empty(0),
    ],
)
def test_not_for_everything(x: Tensor) -> None:
    assert not kernels.usable(x)
