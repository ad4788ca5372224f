"""Generation, with and without the cache: the same logits, the same choices, the same text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference as ref
from tests.reference import Array
from tinygpt import sampling
from tinygpt.config import GPTConfig
from tinygpt.model import BigramLanguageModel

from .compare import assert_close
from .models import FULL, MODERN, B, T, as_float32, build, load, options, tokens

PROMPT, NEW = 2, 6  # past block_size: the window slides over the last four tokens
START = np.random.default_rng(0).integers(FULL.vocab_size, size=(B, PROMPT))


def last_logits(p: dict[str, Array], idx: np.ndarray, config: GPTConfig = FULL) -> Array:
    context = idx[:, -config.block_size :]
    return ref.gpt(p, context, None, config.n_head, **options(config))[0][:, -1]


def reference_text(p: dict[str, Array], uniforms: Array, **options: float | int) -> np.ndarray:
    def next_logits(idx: np.ndarray) -> Array:
        return ref.gpt(p, idx, None, FULL.n_head)[0]

    return ref.generate(next_logits, START, uniforms, FULL.block_size, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [FULL, MODERN], ids=["GPT-2", "modern"])
def test_cached_logits(config: GPTConfig) -> None:
    """Token by token the cache gives what the whole context gives, and so does the window that
    slides past block_size; then other texts begin, the last one after the weights have changed."""
    model, p = build(config)
    decoder = model.decoder(B)
    for seed, longest in [(1, T + 3), (2, 2), (3, T + 2)]:
        if seed == 3:
            p = build(config, seed)[1]
            load(model, p)
        text = np.random.default_rng(seed).integers(
            config.vocab_size, size=(B, longest), dtype=np.int32
        )
        for end in range(1, longest + 1):
            got, expected = decoder(text[:, :end]), last_logits(p, text[:, :end], config)
            assert_close("logits", {f"logits {end}": got}, {f"logits {end}": expected})


def test_greedy() -> None:
    """Every token, and a margin in the logits that rounding cannot bridge."""
    model, p = build(FULL)
    text = reference_text(p, np.zeros((B, NEW)), temperature=0)
    for end in range(PROMPT, PROMPT + NEW):
        second, first = np.sort(last_logits(p, text[:, :end]), axis=-1)[:, -2:].T
        assert (first - second).min() > 1e-3, "choose another seed: the two best are too close"
    got = model.generate(tokens(START), NEW, temperature=0).numpy()
    assert got.tolist() == text.tolist()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 4}, {"top_p": 0.8}])
def test_sampled(options: dict[str, float | int]) -> None:
    """The model draws from its own generators; the reference gets the same numbers from them."""
    model, p = build(FULL)
    rows = np.random.SeedSequence(5).spawn(B)
    uniforms = np.stack([np.random.default_rng(row).random(NEW) for row in rows])
    got = model.generate(tokens(START), NEW, seed=5, **options).numpy()  # type: ignore[arg-type]
    assert got.tolist() == reference_text(p, uniforms, **options).tolist()


def test_bigram_generates() -> None:
    table = as_float32(np.random.default_rng(2).standard_normal((7, 7)))
    model = BigramLanguageModel(7)
    load(model, {"wte.weight": table})
    text = ref.generate(lambda idx: table[idx], START, np.zeros((B, NEW)), 8, temperature=0)
    assert model.generate(tokens(START), NEW, temperature=0).numpy().tolist() == text.tolist()


# Eighths: different logits, however close, have different probabilities.
logit_rows = st.lists(
    st.integers(-40, 40).map(lambda n: n / 8), min_size=2, max_size=9, unique=True
)


@given(
    logits=logit_rows,
    temperature=st.sampled_from([0, 0.3, 1, 2.5]),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.01, 1),
    u=st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=200)
def test_choosing(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None, u: float
) -> None:
    """Both in float64 on the host: equal but for the last digits."""
    row = np.array([logits])
    got = sampling.probabilities(row, temperature, top_k, top_p)
    expected = ref.probabilities(row, temperature, top_k, top_p)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)
    uniform = np.array([u])
    assert sampling.draw(got, uniform).tolist() == ref.sample(got, uniform).tolist()
