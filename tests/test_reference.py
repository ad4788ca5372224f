"""The reference proves itself: derivatives by finite differences, values by their definitions.

Nothing here touches tinygrad. Backward passes are compared with central differences of the forward
pass; forward passes with definitions written as plain loops, with known values, and with what must
hold whatever the numbers are.
"""

# numpy types many results as Any:
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests import reference as ref
from tests.reference import Array, Parameters

# float64 central differences of fourth order with this step: rounding costs about 1e-16 |L| / STEP,
# some 1e-12; truncation, STEP^4 / 30 times the fifth derivative, is below that at unit scale.
STEP = 1e-4
# The bound asked of every derivative: far above what differencing loses (1e-7 at worst, at a
# steep LayerNorm), far below what any mistake in a formula gives (1e-3 and more).
TOLERANCE = 1e-6
# A gradient that is truly zero (a softmax over one element) has no relative error; errors are
# taken relative to at least this, below which 1e-6 would ask for more digits than differences have.
SMALLEST_SCALE = 1e-4
# How far differences over one step and over two may lie apart, relative to the gradient: STEP^2 / 2
# times the third derivative, 1e-8 at unit scale, here up to a thousand times as steep.
SMOOTH = 1e-5

sizes = st.integers(1, 5)
seeds = st.integers(0, 2**32 - 1)
# The same examples every run: what is tested does not change from day to day.
few = settings(max_examples=25, derandomize=True)
fewest = settings(few, max_examples=8)


def differences(loss: Callable[[], float], array: Array) -> tuple[Array, Array]:
    """dL/d array, entry by entry, from the points at one step and from those at two.

    near = (L(+h) - L(-h)) / 2h and far = (L(+2h) - L(-2h)) / 4h. The array is changed in place and
    put back.
    """
    near, far = np.zeros_like(array), np.zeros_like(array)
    for index in np.ndindex(array.shape):
        value = array[index]
        at = {}
        for steps in (-2, -1, 1, 2):
            array[index] = value + steps * STEP
            at[steps] = loss()
        near[index] = (at[1] - at[-1]) / (2 * STEP)
        far[index] = (at[2] - at[-2]) / (4 * STEP)
        array[index] = value
    return near, far


def assert_gradients(loss: Callable[[], float], at: Parameters, claimed: Parameters) -> None:
    """Every claimed gradient agrees with the differences of the loss; none is missing.

    (4 near - far) / 3 is of fourth order. Where near and far differ by more than a smooth function
    allows, the loss has a bend (a ReLU's kink, a LayerNorm over almost equal channels) and
    differences mean nothing: hypothesis draws another example. What is claimed has no say in that.
    """
    assert set(claimed) == set(at)
    for name, array in at.items():
        assert claimed[name].shape == array.shape, name
        near, far = differences(loss, array)
        measured = (4 * near - far) / 3
        scale = max(float(np.abs(measured).max()), SMALLEST_SCALE)
        assume(float(np.abs(near - far).max()) < SMOOTH * scale)
        error = float(np.abs(claimed[name] - measured).max()) / scale
        assert error < TOLERANCE, f"gradient of {name}: relative error {error:.1e}"


def assert_same(a: npt.ArrayLike, b: npt.ArrayLike) -> None:
    """Equal up to the roundings of float64 on numbers near 1, reached along two ways."""
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-12, atol=1e-13)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape)


def dropout_mask(rng: np.random.Generator, *shape: int, p: float = 0.3) -> Array:
    return (rng.random(shape) >= p) / (1 - p)


# Layers ------------------------------------------------------------------------------------------


@few
@given(B=sizes, T=sizes, V=sizes, C=sizes, seed=seeds)
def test_embedding(B: int, T: int, V: int, C: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    idx, table, dy = rng.integers(V, size=(B, T)), normal(rng, V, C), normal(rng, B, T, C)
    assert np.array_equal(ref.embedding(idx, table)[B - 1, T - 1], table[idx[B - 1, T - 1]])
    assert_gradients(
        lambda: float((ref.embedding(idx, table) * dy).sum()),
        {"table": table},
        {"table": ref.embedding_backward(dy, idx, table)},
    )


@few
@given(lead=st.lists(sizes, min_size=1, max_size=2), n_in=sizes, n_out=sizes, seed=seeds)
def test_linear(lead: list[int], n_in: int, n_out: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, dy = normal(rng, *lead, n_in), normal(rng, *lead, n_out)
    w, b = normal(rng, n_out, n_in), normal(rng, n_out)
    y = ref.linear(x, w, b).reshape(-1, n_out)
    for row, x_row in zip(y, x.reshape(-1, n_in), strict=True):
        for o in range(n_out):
            assert_same(row[o], sum(w[o, i] * x_row[i] for i in range(n_in)) + b[o])
    assert_same(ref.linear(x, w), ref.linear(x, w, 0 * b))
    dx, dw, db = ref.linear_backward(dy, x, w)
    assert_gradients(
        lambda: float((ref.linear(x, w, b) * dy).sum()),
        {"x": x, "w": w, "b": b},
        {"x": dx, "w": dw, "b": db},
    )


@few
@given(lead=st.lists(sizes, min_size=1, max_size=2), C=sizes, seed=seeds)
def test_layer_norm(lead: list[int], C: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, dy = normal(rng, *lead, C), normal(rng, *lead, C)
    w, b = normal(rng, C), normal(rng, C)
    normalized = ref.layer_norm(x, np.ones(C))
    variance = x.var(axis=-1)
    np.testing.assert_allclose(normalized.mean(axis=-1), 0, atol=1e-12)
    assert_same(normalized.var(axis=-1), variance / (variance + 1e-5))
    assert_same(ref.layer_norm(x, w, b), normalized * w + b)
    dx, dw, db = ref.layer_norm_backward(dy, x, w)
    assert_gradients(
        lambda: float((ref.layer_norm(x, w, b) * dy).sum()),
        {"x": x, "w": w, "b": b},
        {"x": dx, "w": dw, "b": db},
    )


def test_layer_norm_uses_its_eps() -> None:
    """A constant row has variance 0; with x = (-1e-3, 1e-3) variance is 1e-6, a tenth of eps."""
    x = np.array([[-1e-3, 1e-3], [5.0, 5.0]])
    expected = 1e-3 / math.sqrt(1e-6 + 1e-5)
    assert_same(ref.layer_norm(x, np.ones(2)), [[-expected, expected], [0.0, 0.0]])


@few
@given(lead=st.lists(sizes, min_size=1, max_size=2), C=sizes, scale=st.floats(0.1, 10), seed=seeds)
def test_rms_norm(lead: list[int], C: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, dy = scale * normal(rng, *lead, C), normal(rng, *lead, C)
    mean_square = (x**2).mean(axis=-1)
    y = ref.rms_norm(x)
    assert_same((y**2).mean(axis=-1), mean_square / (mean_square + 1e-6))
    assert_same(y * np.sqrt(mean_square + 1e-6)[..., None], x)
    assert_gradients(
        lambda: float((ref.rms_norm(x) * dy).sum()), {"x": x}, {"x": ref.rms_norm_backward(dy, x)}
    )


@few
@given(size=st.integers(1, 12), seed=seeds)
@pytest.mark.parametrize("name", ["relu", "relu2", "gelu", "gelu_tanh"])
def test_activations(name: str, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, dy = 2 * normal(rng, size), normal(rng, size)
    f, f_backward = getattr(ref, name), getattr(ref, name + "_backward")
    assert_gradients(lambda: float((f(x) * dy).sum()), {"x": x}, {"x": f_backward(dy, x)})


def test_activation_values() -> None:
    """P(1), P(-2), P(-8) of the normal distribution from its tables; tanh's form close to it."""
    x = np.array([0.0, 1.0, -2.0, -8.0])
    distribution = [0.5, 0.8413447460685429, 0.022750131948179195, 6.220960574271785e-16]
    np.testing.assert_allclose(ref.gelu(x), x * distribution, rtol=1e-13)
    fine = np.linspace(-6, 6, 1001)
    assert 1e-4 < np.abs(ref.gelu_tanh(fine) - ref.gelu(fine)).max() < 5e-4
    assert ref.gelu_tanh(np.array(1.0)) == pytest.approx(0.8411919906082768, rel=1e-14)
    assert ref.relu(np.array([-1.0, 0.0, 2.0])).tolist() == [0, 0, 2]
    assert ref.relu_backward(np.ones(3), np.array([-1.0, 0.0, 2.0])).tolist() == [0, 0, 1]
    assert ref.relu2(np.array([-1.0, 0.0, 3.0])).tolist() == [0, 0, 9]


@few
@given(rows=sizes, V=sizes, seed=seeds)
def test_softmax(rows: int, V: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, dy = 3 * normal(rng, rows, V), normal(rng, rows, V)
    y = ref.softmax(x)
    assert_same(y.sum(axis=-1), 1)
    assert_same(np.log(y) - x, (np.log(y) - x)[:, :1] + 0 * x)
    np.testing.assert_allclose(ref.softmax(x + 1000), y, rtol=1e-10)
    assert_gradients(
        lambda: float((ref.softmax(x) * dy).sum()), {"x": x}, {"x": ref.softmax_backward(dy, y)}
    )


@few
@given(B=sizes, T=sizes, V=sizes, seed=seeds)
def test_cross_entropy(B: int, T: int, V: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, targets = 3 * normal(rng, B, T, V), rng.integers(V, size=(B, T))
    p = ref.softmax(logits)
    nats = [-math.log(p[b, t, targets[b, t]]) for b in range(B) for t in range(T)]
    assert_same(ref.cross_entropy(logits, targets), sum(nats) / (B * T))
    assert ref.cross_entropy(np.full((B, T, V), 7.0), targets) == pytest.approx(math.log(V))
    assert_gradients(
        lambda: ref.cross_entropy(logits, targets),
        {"logits": logits},
        {"logits": ref.cross_entropy_backward(logits, targets)},
    )


def test_cross_entropy_of_large_logits() -> None:
    """No overflow: being wrong by 2000 costs 2000 nats, being right by 2000 costs nothing."""
    logits = np.array([[1000.0, -1000.0], [1000.0, -1000.0]])
    assert ref.cross_entropy(logits, np.array([1, 1])) == 2000
    assert ref.cross_entropy(logits, np.array([0, 0])) == 0


@few
@given(size=st.integers(1, 12), seed=seeds)
def test_dropout(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, dy, mask = normal(rng, size), normal(rng, size), dropout_mask(rng, size)
    assert ref.dropout(x, None) is x
    assert_gradients(
        lambda: float((ref.dropout(x, mask) * dy).sum()),
        {"x": x},
        {"x": ref.dropout_backward(dy, mask)},
    )


# Attention ---------------------------------------------------------------------------------------


def attention_by_loops(qkv: Array, n_head: int) -> Array:
    """The definition: for each token and head, a mean of values weighted by exp(q.k / sqrt(D))."""
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    D = C // n_head
    y = np.zeros((B, T, C))
    for b in range(B):
        for t in range(T):
            for h in range(n_head):
                own = slice(h * D, (h + 1) * D)
                q = qkv[b, t, :C][own]
                weights = [
                    math.exp(sum(q * qkv[b, s, C : 2 * C][own]) / math.sqrt(D))
                    for s in range(t + 1)
                ]
                for s in range(t + 1):
                    y[b, t, own] += weights[s] / sum(weights) * qkv[b, s, 2 * C :][own]
    return y


def test_rotation_worked_by_hand() -> None:
    """Four channels: the first and third turn by t, the second and fourth by t / sqrt(1000)."""
    x = np.array([[1.0, 2.0, 3.0, 4.0]] * 3)
    y = ref.rotate(x)
    assert np.array_equal(y[0], x[0])
    for t in (1, 2):
        fast, slow = (1 + 3j) * np.exp(1j * t), (2 + 4j) * np.exp(1j * t / math.sqrt(1000))
        assert_same(y[t], [fast.real, slow.real, fast.imag, slow.imag])


@few
@given(T=sizes, pairs=st.integers(1, 3), shift=st.integers(0, 4), seed=seeds)
def test_rotated_products_know_only_the_distance(T: int, pairs: int, shift: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, k = normal(rng, 2 * pairs), normal(rng, 2 * pairs)
    turned_q, turned_k = (ref.rotate(np.tile(x, (T + shift, 1))) for x in (q, k))
    products = turned_q @ turned_k.T
    for s in range(T):
        for t in range(T):
            assert_same(products[s, t], products[s + shift, t + shift])


@few
@given(
    lead=sizes, T=sizes, pairs=st.integers(1, 3), qk_norm=st.booleans(), rotary=st.booleans(),
    seed=seeds,
)  # fmt: skip
def test_placing(lead: int, T: int, pairs: int, qk_norm: bool, rotary: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, dy = normal(rng, lead, T, 2 * pairs), normal(rng, lead, T, 2 * pairs)
    assert_gradients(
        lambda: float((ref.place(x, qk_norm, rotary) * dy).sum()),
        {"x": x},
        {"x": ref.place_backward(dy, x, qk_norm, rotary)},
    )
    if qk_norm:  # the norm comes first: rotation keeps lengths
        lengths = (ref.place(x, True, rotary) ** 2).mean(axis=-1)
        assert_same(lengths, (ref.rms_norm(x) ** 2).mean(axis=-1))


@few
@given(B=sizes, T=sizes, H=st.integers(1, 3), D=st.integers(1, 3), masked=st.booleans(), seed=seeds)
def test_attention(B: int, T: int, H: int, D: int, masked: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    C = H * D
    qkv, dy = normal(rng, B, T, 3 * C), normal(rng, B, T, C)
    mask = dropout_mask(rng, B, H, T, T) if masked else None
    assert_same(ref.attention(qkv, H), attention_by_loops(qkv, H))
    assert_gradients(
        lambda: float((ref.attention(qkv, H, mask) * dy).sum()),
        {"qkv": qkv},
        {"qkv": ref.attention_backward(dy, qkv, H, mask)},
    )


@few
@given(B=sizes, T=sizes, D=sizes, seed=seeds)
def test_one_head(B: int, T: int, D: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, k, v, dy = (normal(rng, B, T, D) for _ in range(4))
    dq, dk, dv = ref.head_backward(dy, q, k, v)
    assert_gradients(
        lambda: float((ref.head(q, k, v) * dy).sum()),
        {"q": q, "k": k, "v": v},
        {"q": dq, "k": dk, "v": dv},
    )
    # Queries of zero like every past token alike: the mean of the values so far.
    means = np.cumsum(v, axis=1) / np.arange(1, T + 1)[:, None]
    assert_same(ref.head(0 * q, k, v), means)


# Models ------------------------------------------------------------------------------------------


activations = st.sampled_from(["gelu_tanh", "gelu", "relu"])


@fewest
@given(rows=sizes, C=sizes, bias=st.booleans(), activation=activations, seed=seeds)
def test_mlp(rows: int, C: int, bias: bool, activation: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p: dict[str, Array] = {"c_fc.weight": normal(rng, 4 * C, C)}
    p["c_proj.weight"] = normal(rng, C, 4 * C)
    if bias:
        p |= {"c_fc.bias": normal(rng, 4 * C), "c_proj.bias": normal(rng, C)}
    x, dy = normal(rng, rows, C), normal(rng, rows, C)
    dx, gradients = ref.mlp_backward(dy, x, p, activation)
    assert_gradients(
        lambda: float((ref.mlp(x, p, activation) * dy).sum()),
        p | {"x": x},
        gradients | {"x": dx},
    )


@few
@given(seed=st.just(6))
def test_mlp_with_squared_relu(seed: int) -> None:
    """Far enough from its bend, where the second derivative jumps and differences lose digits."""
    rng = np.random.default_rng(seed)
    p = {"c_fc.weight": normal(rng, 12, 3), "c_proj.weight": normal(rng, 3, 12)}
    x, dy = normal(rng, 2, 3), normal(rng, 2, 3)
    hidden = x @ p["c_fc.weight"].T
    assert np.abs(hidden).min() > 1e-2, "choose another seed"
    assert_same(ref.mlp(x, p, "relu2"), np.where(hidden > 0, hidden, 0) ** 2 @ p["c_proj.weight"].T)
    dx, gradients = ref.mlp_backward(dy, x, p, "relu2")
    assert_gradients(
        lambda: float((ref.mlp(x, p, "relu2") * dy).sum()), p | {"x": x}, gradients | {"x": dx}
    )


@fewest
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 4),
    H=st.integers(1, 2),
    D=st.integers(1, 2),
    bias=st.booleans(),
    activation=activations,
    masked=st.booleans(),
    seed=seeds,
)
def test_block(
    B: int, T: int, H: int, D: int, bias: bool, activation: str, masked: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    C = H * D
    p = inside(ref.random_parameters(rng, 1, C, 2, 2, bias), "h.0.")
    masks = inside(ref.random_masks(rng, 0.3, 1, H, C, B, T), "h.0.") if masked else {}
    x, dy = normal(rng, B, T, C), normal(rng, B, T, C)
    dx, gradients = ref.block_backward(dy, x, p, H, activation, masks)
    assert_gradients(
        lambda: float((ref.block(x, p, H, activation, masks) * dy).sum()),
        p | {"x": x},
        gradients | {"x": dx},
    )


def inside(named: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name[len(prefix) :]: a for name, a in named.items() if name.startswith(prefix)}


@few
@given(B=sizes, T=sizes, V=sizes, seed=seeds)
def test_bigram(B: int, T: int, V: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = normal(rng, V, V)
    idx, targets = rng.integers(V, size=(2, B, T))
    logits, _ = ref.bigram(table, idx, targets)
    assert np.array_equal(logits, table[idx])
    assert_gradients(
        lambda: ref.bigram(table, idx, targets)[1],
        {"table": table},
        {"table": ref.bigram_backward(table, idx, targets)},
    )


@fewest
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 3),
    V=st.integers(2, 5),
    H=st.integers(1, 2),
    D=st.integers(1, 2),
    L=st.integers(1, 2),
    activation=activations,
    seed=seeds,
)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "dropout"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gpt(
    tied: bool,
    bias: bool,
    masked: bool,
    B: int,
    T: int,
    V: int,
    H: int,
    D: int,
    L: int,
    activation: str,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    p = ref.random_parameters(rng, L, H * D, V, 3, bias, tied)
    masks = ref.random_masks(rng, 0.3, L, H, H * D, B, T) if masked else {}
    idx, targets = rng.integers(V, size=(2, B, T))

    def loss() -> float:
        value = ref.gpt(p, idx, targets, H, activation, masks)[1]
        assert value is not None
        return value

    assert_gradients(loss, p, ref.gpt_backward(p, idx, targets, H, activation, masks))


@fewest
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 3),
    V=st.integers(2, 5),
    qk_norm=st.booleans(),
    bias=st.booleans(),
    masked=st.booleans(),
    seed=seeds,
)
@pytest.mark.parametrize("rotary", [False, True], ids=["learned", "rotary"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_modern_gpt(
    rms: bool,
    rotary: bool,
    B: int,
    T: int,
    V: int,
    qk_norm: bool,
    bias: bool,
    masked: bool,
    seed: int,
) -> None:
    """What came after GPT-2, each thing with and without the others."""
    rng = np.random.default_rng(seed)
    H, D, L = 2, 2, 1
    p = ref.random_parameters(rng, L, H * D, V, 3, bias, False, rotary, rms)
    masks = ref.random_masks(rng, 0.3, L, H, H * D, B, T) if masked else {}
    idx, targets = rng.integers(V, size=(2, B, T))
    options = H, "gelu_tanh", masks, qk_norm

    def loss() -> float:
        value = ref.gpt(p, idx, targets, *options)[1]
        assert value is not None
        return value

    assert_gradients(loss, p, ref.gpt_backward(p, idx, targets, *options))


def test_where_the_modern_parts_stand() -> None:
    """Zero output projections leave norm(norm(embedding)) to the output layer."""
    rng = np.random.default_rng(4)
    p = ref.random_parameters(rng, 2, 4, 5, 6, tied=False, rotary=True, rms=True)
    p |= {name: 0 * a for name, a in p.items() if "c_proj" in name}
    idx = rng.integers(5, size=(2, 6))
    x = ref.rms_norm(ref.rms_norm(p["wte.weight"][idx]))
    assert_same(ref.gpt(p, idx, None, 2)[0], x @ p["lm_head.weight"].T)


def test_gpt_does_not_look_ahead() -> None:
    rng = np.random.default_rng(1)
    p = ref.random_parameters(rng, 2, 4, 5, 6, bias=True)
    idx = rng.integers(5, size=(2, 6))
    changed = idx.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 5
    before, _ = ref.gpt(p, idx, None, n_head=2)
    after, loss = ref.gpt(p, changed, None, n_head=2)
    assert loss is None
    assert np.array_equal(before[:, :4], after[:, :4])
    assert not np.isclose(before[:, 4:], after[:, 4:]).any()


def test_tied_gradient_is_the_sum_of_the_untied_ones() -> None:
    rng = np.random.default_rng(2)
    tied = ref.random_parameters(rng, 2, 4, 5, 6, bias=True)
    untied = tied | {"lm_head.weight": tied["wte.weight"].copy()}
    idx, targets = rng.integers(5, size=(2, 2, 6))
    assert ref.gpt(tied, idx, targets, 2)[1] == ref.gpt(untied, idx, targets, 2)[1]
    together = ref.gpt_backward(tied, idx, targets, 2)
    apart = ref.gpt_backward(untied, idx, targets, 2)
    total = apart["wte.weight"] + apart["lm_head.weight"]
    assert_same(together["wte.weight"], total)


def test_dropout_stands_where_gpt_2_has_it() -> None:
    """Masks of zeros, one at a time, show what each of them cuts off."""
    rng = np.random.default_rng(3)
    B, T, C, H, V = 2, 3, 4, 2, 5
    p = ref.random_parameters(rng, 1, C, V, T, bias=True, tied=False)
    layer = inside(p, "h.0.")
    x, idx = normal(rng, B, T, C), rng.integers(V, size=(B, T))
    nothing = np.zeros((B, T, C))

    both = {"attn.residual": nothing, "mlp.residual": nothing}
    assert np.array_equal(ref.block(x, layer, H, masks=both), x)
    normed = ref.layer_norm(x, layer["ln_2.weight"], layer["ln_2.bias"])
    only_mlp = x + ref.mlp(normed, inside(layer, "mlp."))
    without_attention = ref.block(x, layer, H, masks={"attn.residual": nothing})
    assert_same(without_attention, only_mlp)

    attn = inside(layer, "attn.")
    deaf = ref.attention_layer(x, attn, H, np.zeros((B, H, T, T)))
    assert_same(deaf, np.broadcast_to(attn["c_proj.bias"], deaf.shape))

    logits, _ = ref.gpt(p, idx, None, H, masks={"drop": nothing})
    assert_same(logits, np.broadcast_to(logits[0, 0], logits.shape))


# Training ----------------------------------------------------------------------------------------


@few
@given(scale=st.floats(1e-3, 1e3), max_norm=st.floats(1e-2, 1e2), seed=seeds)
def test_clipping(scale: float, max_norm: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gradients = {"a": scale * normal(rng, 3, 2), "b": scale * normal(rng, 4)}
    everything = np.concatenate([g.reshape(-1) for g in gradients.values()])
    clipped, norm = ref.clip_by_global_norm(gradients, max_norm)
    assert norm == pytest.approx(float(np.linalg.norm(everything)), rel=1e-12)
    after = np.concatenate([g.reshape(-1) for g in clipped.values()])
    if norm + 1e-6 <= max_norm:
        assert np.array_equal(after, everything)
    else:
        expected = everything * (max_norm / (norm + 1e-6))
        assert_same(after, expected)
        assert np.linalg.norm(after) <= max_norm


def test_clipping_of_nothing() -> None:
    clipped, norm = ref.clip_by_global_norm({"a": np.zeros(3)}, 1.0)
    assert norm == 0 and np.array_equal(clipped["a"], np.zeros(3))


def test_adamw_worked_by_hand() -> None:
    """Two steps on one matrix and one bias, the arithmetic written out.

    lr 0.1, betas (0.5, 0.75), eps 1, decay 0.2, gradients 2 and then 4, everything else 1 or 0:
    step 1: m = 1, v = 1;   m^ = 1 / 0.5 = 2;          v^ = 1 / 0.25 = 4;      m^ / (2 + 1) = 2/3
    step 2: m = 2.5, v = 4.75;  m^ = 2.5 / 0.75 = 10/3;  v^ = 4.75 / 0.4375 = 76/7
    """
    p = {"matrix": np.array([[1.0]]), "bias": np.array([1.0])}
    step = partial(ref.adamw, learning_rate=0.1, betas=(0.5, 0.75), eps=1.0, weight_decay=0.2)
    moments = ref.Moments.zero(p)

    p, moments = step(p, {name: np.full_like(a, 2) for name, a in p.items()}, moments)
    bias = 1 - 0.1 * 2 / 3
    matrix = 1 - 0.1 * (0.2 + 2 / 3)
    assert_same([p["bias"].item(), p["matrix"].item()], [bias, matrix])

    p, moments = step(p, {name: np.full_like(a, 4) for name, a in p.items()}, moments)
    move = (10 / 3) / (math.sqrt(76 / 7) + 1)
    bias, matrix = bias - 0.1 * move, matrix - 0.1 * (0.2 * matrix + move)
    assert_same([p["bias"].item(), p["matrix"].item()], [bias, matrix])
    assert moments.step == 2
    assert (moments.first["bias"].item(), moments.second["bias"].item()) == (2.5, 4.75)


@few
@given(scale=st.floats(1e-4, 1e4), seed=seeds)
def test_first_adamw_step_moves_by_the_learning_rate(scale: float, seed: int) -> None:
    """With the bias corrected, step 1 is lr times the sign of g, however large g is."""
    rng = np.random.default_rng(seed)
    p, g = {"bias": normal(rng, 5)}, {"bias": scale * (normal(rng, 5) + 3)}
    new, _ = ref.adamw(p, g, ref.Moments.zero(p), learning_rate=0.01)
    np.testing.assert_allclose(p["bias"] - new["bias"], 0.01 * np.sign(g["bias"]), rtol=2e-3)


def test_adamw_leaves_its_inputs_alone() -> None:
    p, g = {"w": np.ones((2, 2))}, {"w": np.ones((2, 2))}
    moments = ref.Moments.zero(p)
    ref.adamw(p, g, moments, 0.1)
    assert np.array_equal(p["w"], np.ones((2, 2))) and not moments.first["w"].any()


@few
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=seeds)
def test_orthogonalized(rows: int, columns: int, seed: int) -> None:
    """Singular vectors stay, singular values become what the polynomial makes of them."""
    g = normal(np.random.default_rng(seed), rows, columns)
    u, s, v = np.linalg.svd(g, full_matrices=False)
    expected = s / (np.linalg.norm(s) + 1e-7)
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    assert_same(ref.orthogonalized(g), u * expected @ v)
    assert_same(ref.orthogonalized(g.T), ref.orthogonalized(g).T)
    assert_same(
        ref.orthogonalized(np.stack([g, -g])), np.stack([u * expected @ v] * 2) * [[[1]], [[-1]]]
    )


def test_orthogonalized_singular_values_end_near_one() -> None:
    values = np.linspace(0.01, 1, 1001)
    spread = [ref.orthogonalized(np.diag([s, math.sqrt(1 - s * s)]))[0, 0] for s in values]
    assert min(spread) > 0.66 and max(spread) < 1.21


def test_muon_worked_by_hand() -> None:
    """Two steps on a column of 4: orthogonalized, that is g / |g| times what a number 1 becomes.

    lr 0.1, beta 0.5, decay 0.2; gradients g and then 2 g, so that m = g, then 2.5 g.
    """
    p, g = np.ones((4, 1)), np.array([[3.0], [0.0], [4.0], [0.0]])
    one = float(ref.orthogonalized(np.array([[7.0]]))[0, 0])
    step = 0.1 * 2 * one * g / 5  # the root of 4 rows by 1 column is 2
    first, m = ref.muon(p, g, np.zeros_like(g), 0.1, 0.5, 0.2)
    np.testing.assert_allclose(first, 0.98 * p - step, rtol=1e-6)  # 1e-7 in the norm
    second, m = ref.muon(first, 2 * g, m, 0.1, 0.5, 0.2)
    np.testing.assert_allclose(second, 0.98 * first - step, rtol=1e-6)
    assert np.array_equal(m, 2.5 * g)


@given(
    warmup=st.integers(0, 20),
    flat=st.integers(0, 20),
    warmdown=st.integers(1, 50),
    peak=st.floats(1e-5, 1),
    share=st.floats(0, 1),
)
@settings(few, max_examples=50)
def test_linear_decay(warmup: int, flat: int, warmdown: int, peak: float, share: float) -> None:
    last, lowest = warmup + flat + warmdown, peak * share

    def at(iteration: int) -> float:
        return ref.linear_decay(iteration, peak, lowest, warmup, warmdown, last)

    ramp = [at(i) for i in range(warmup)]
    np.testing.assert_allclose(np.diff([0.0, *ramp, peak]), peak / (warmup + 1), rtol=1e-9)
    assert {at(i) for i in range(warmup, last - warmdown + 1)} == {lowest + (peak - lowest)}
    line = np.diff([at(i) for i in range(last - warmdown, last + 1)])
    np.testing.assert_allclose(line, (lowest - peak) / warmdown, rtol=1e-9, atol=1e-15 * peak)
    assert at(last) == at(last + 1) == at(10 * last) == lowest
    assert ref.linear_decay(2, 1.0, 0.0, 9, 4, 4) == pytest.approx(0.3)  # the ramp is lower
    assert ref.linear_decay(3, 1.0, 0.0, 9, 4, 4) == pytest.approx(0.25)  # the line is


@given(
    warmup=st.integers(0, 50),
    decay=st.integers(1, 200),
    peak=st.floats(1e-5, 1),
    share=st.floats(0, 1),
)
@settings(few, max_examples=50)
def test_learning_rate(warmup: int, decay: int, peak: float, share: float) -> None:
    last, lowest = warmup + decay, peak * share

    def at(iteration: int) -> float:
        return ref.learning_rate(iteration, peak, lowest, warmup, last)

    ramp = [at(i) for i in range(warmup)]
    np.testing.assert_allclose(np.diff([0.0, *ramp, at(warmup)]), peak / (warmup + 1), rtol=1e-9)
    assert at(warmup) == peak
    half = warmup + decay / 2
    if half.is_integer():
        assert at(int(half)) == pytest.approx((peak + lowest) / 2)
    falling = [at(i) for i in range(warmup, last + 1)]
    assert np.all(np.diff(falling) <= 0)
    assert at(last) == at(last + 1) == at(10 * last) == lowest


# Sampling ----------------------------------------------------------------------------------------

# Eighths: different logits, however close, have different probabilities.
logit_lists = st.lists(
    st.integers(-40, 40).map(lambda n: n / 8), min_size=2, max_size=8, unique=True
)


@few
@given(logits=logit_lists, temperature=st.floats(0.1, 4))
def test_sampling_meets_the_distribution(logits: list[float], temperature: float) -> None:
    """Evenly spaced u: each token comes up for its share of them, to within one of the N."""
    p = ref.probabilities(np.array([logits]), temperature)
    assert_same(p[0], ref.softmax(np.array(logits) / temperature))
    n = 1000
    u = (np.arange(n) + 0.5) / n
    counts = np.bincount(ref.sample(np.repeat(p, n, axis=0), u), minlength=len(logits))
    assert np.abs(counts / n - p[0]).max() <= 1 / n + 1e-12


@few
@given(logits=logit_lists, k=st.integers(1, 10), u=st.floats(0, 1, exclude_max=True))
def test_top_k(logits: list[float], k: int, u: float) -> None:
    p = ref.probabilities(np.array([logits]), top_k=k)
    assert p.sum() == pytest.approx(1)
    kept = set(np.argsort(logits)[-k:].tolist())
    assert set(np.flatnonzero(p[0]).tolist()) == kept
    assert int(ref.sample(p, np.array([u]))[0]) in kept
    whole = ref.probabilities(np.array([logits]))[0]
    for i in kept:
        assert p[0, i] == pytest.approx(whole[i] / sum(whole[j] for j in kept))


@few
@given(logits=logit_lists, top_p=st.floats(0.01, 1), u=st.floats(0, 1, exclude_max=True))
def test_top_p(logits: list[float], top_p: float, u: float) -> None:
    """The kept tokens are the likeliest ones, reach top_p, and would not without the last."""
    whole = ref.probabilities(np.array([logits]))[0]
    p = ref.probabilities(np.array([logits]), top_p=top_p)
    kept = np.flatnonzero(p[0])
    assert set(kept.tolist()) == set(np.argsort(logits)[-len(kept) :].tolist())
    assert whole[kept].sum() >= top_p - 1e-12
    assert whole[kept].sum() - whole[kept].min() < top_p
    assert_same(p[0, kept], whole[kept] / whole[kept].sum())
    assert int(ref.sample(p, np.array([u]))[0]) in kept


def test_top_p_counts_what_top_k_left() -> None:
    """0.4 0.3 0.2 0.1: top_k = 2 leaves 4/7 and 3/7, of which top_p = 0.5 needs only the first."""
    logits = np.log([[0.1, 0.4, 0.2, 0.3]])
    assert ref.probabilities(logits, top_k=2, top_p=0.5).tolist() == [[0, 1, 0, 0]]
    assert np.count_nonzero(ref.probabilities(logits, top_p=0.5)) == 2


def test_temperature_zero_is_greedy_and_takes_the_first_of_equals() -> None:
    logits = np.array([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])
    p = ref.probabilities(logits, temperature=0)
    assert ref.sample(p, np.array([0.999, 0.0])).tolist() == [1, 0]


def test_sample_never_draws_the_impossible() -> None:
    p = np.array([[0.0, 0.5, 0.0, 0.5, 0.0]])
    ends = [0.0, 0.25, 0.5, np.nextafter(1, 0)]
    drawn = [int(ref.sample(p, np.array([u]))[0]) for u in ends]
    assert drawn == [1, 1, 3, 3]


def test_generate_slides_its_window() -> None:
    """The next token is the sum of the window, mod 7: only the last three tokens can matter."""

    def next_logits(idx: np.ndarray) -> Array:
        return np.eye(7)[np.cumsum(idx, axis=1) % 7]

    start = np.array([[1, 2, 3, 4], [0, 0, 1, 0]])
    grown = ref.generate(next_logits, start, np.zeros((2, 3)), block_size=3, temperature=0)
    assert grown.tolist() == [[1, 2, 3, 4, 2, 2, 1], [0, 0, 1, 0, 1, 2, 3]]
