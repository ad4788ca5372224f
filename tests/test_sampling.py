import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tinygpt.config import InputError
from tinygpt.sampling import draw, probabilities, sample_tokens

LOGITS = arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 12)),
                elements=st.floats(-80, 80, width=32))  # fmt: skip


@given(LOGITS, st.floats(1e-3, 100))
def test_plain_sampling_is_softmax(logits: np.ndarray, temperature: float) -> None:
    z = logits.astype(np.float64) / temperature
    expected = np.exp(z - z.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    # both in float64: dividing by the temperature before or after the shift differs by rounding,
    # 80 / 1e-3 x 2^-52 = 2e-11 in the exponent
    np.testing.assert_allclose(probabilities(logits, temperature), expected, atol=1e-10)


@given(LOGITS)
def test_greedy_takes_the_first_maximum(logits: np.ndarray) -> None:
    p = probabilities(logits, temperature=0)
    assert (p.argmax(-1) == logits.argmax(-1)).all() and (p.sum(-1) == 1).all()


@given(LOGITS, st.integers(1, 15))
def test_top_k_keeps_the_likeliest(logits: np.ndarray, k: int) -> None:
    p, full = probabilities(logits, top_k=k), probabilities(logits)
    for row, row_full, z in zip(p, full, logits, strict=True):
        z = z.astype(np.float64) - z.max()  # what differs by less than float64 can tell is a tie
        kept = z >= np.sort(z)[::-1][min(k, len(z)) - 1]
        expected = np.where(kept, row_full, 0)
        np.testing.assert_allclose(row, expected / expected.sum(), atol=1e-12)  # float64 rounding


@given(LOGITS, st.floats(0.01, 1))
def test_top_p_keeps_the_smallest_set_that_reaches_it(logits: np.ndarray, top_p: float) -> None:
    p, full = probabilities(logits, top_p=top_p), probabilities(logits)
    for row, row_full in zip(p, full, strict=True):
        kept = row > 0
        rounding = 1e-12  # of sums in float64
        assert row_full[kept].sum() >= top_p - rounding
        assert row_full[kept].sum() - row_full[kept].min() < top_p + rounding
        assert row_full[kept].min() >= row_full[~kept].max(initial=0)


def test_top_k_then_top_p() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    # of the best two, 0.5 / 0.8 = 0.625 reaches 0.6 alone
    np.testing.assert_allclose(probabilities(logits, top_k=2, top_p=0.6), [1, 0, 0, 0])
    np.testing.assert_allclose(probabilities(logits, top_k=2, top_p=0.7), [0.625, 0.375, 0, 0])


def test_draw_inverts_the_distribution() -> None:
    p = np.array([[0.0, 0.25, 0.0, 0.75, 0.0]])
    expected = {0.0: 1, 0.2499: 1, 0.25: 3, 0.5: 3, np.nextafter(1.0, 0): 3}
    for uniform, token in expected.items():
        assert draw(p, np.array([uniform])) == [token]


def test_draws_follow_the_distribution() -> None:
    p = np.array([0.1, 0.2, 0.7])
    uniform = np.random.default_rng(0).random(10000)
    counts = np.bincount(draw(np.tile(p, (10000, 1)), uniform), minlength=3)
    # the largest standard deviation is sqrt(10000 x 0.7 x 0.3) = 46; five of them
    assert (abs(counts - 10000 * p) < 230).all()


def test_extreme_logits() -> None:
    np.testing.assert_allclose(probabilities(np.array([1e38, -1e38])), [1, 0])
    np.testing.assert_allclose(probabilities(np.array([3.0, 3.0]), 1e-300), [0.5, 0.5])
    np.testing.assert_allclose(probabilities(np.array([-np.inf, 0.0])), [0, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": -1}, "temperature is -1"), ({"temperature": np.nan}, "temperature is nan"),
     ({"top_k": 0}, "top_k is 0"), ({"top_p": 0.0}, "top_p is 0"), ({"top_p": 1.1}, "top_p")],
)  # fmt: skip
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        probabilities(np.zeros(3), **options)  # type: ignore[arg-type]


def flat_logits(tokens: np.ndarray) -> np.ndarray:
    return np.zeros((len(tokens), 50), np.float32)


def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    def text(rows: int, seed: int | None, first_row: int = 0) -> np.ndarray:
        start = np.zeros((rows, 1), np.int32)
        columns = sample_tokens(flat_logits, start, 20, seed=seed, first_row=first_row)
        return np.stack(list(columns), axis=1)

    three = text(3, seed=1)
    assert (text(1, seed=1) == three[:1]).all()
    assert (text(1, seed=1, first_row=2) == three[2:]).all()
    assert len(np.unique(three, axis=0)) == 3
    assert (text(1, seed=2) != three[:1]).any()
    assert (text(1, seed=None) != text(1, seed=None)).any()  # 50^-20 to fail by chance


def test_prompt_errors() -> None:
    with pytest.raises(InputError, match="at least one token"):
        next(sample_tokens(flat_logits, np.zeros((1, 0), np.int32), 5))
    with pytest.raises(InputError, match="max_new_tokens is -1"):
        next(sample_tokens(flat_logits, np.zeros((1, 1), np.int32), -1))
    assert list(sample_tokens(flat_logits, np.zeros((1, 1), np.int32), 0)) == []
