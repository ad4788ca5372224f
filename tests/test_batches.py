import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygpt import InputError, get_batch, split_tokens
from tinygpt.batches import NO_TARGET, check_lengths, evaluation_batches


@given(st.lists(st.integers(0, 300)), st.floats(0, 1))
def test_split_loses_nothing(ids: list[int], fraction: float) -> None:
    train, val = split_tokens(ids, fraction)
    assert len(train) == int(fraction * len(ids))
    assert [*train, *val] == ids
    assert train.dtype == val.dtype == np.int32


def test_split_of_the_lecture() -> None:
    train, val = split_tokens(np.zeros(1_115_394, np.int32))
    assert (len(train), len(val)) == (1_003_854, 111_540)
    for wrong in (-0.1, 1.1):
        with pytest.raises(InputError, match="must be in 0 .. 1"):
            split_tokens([1, 2], wrong)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 20), st.integers(0, 2**32))
def test_targets_are_the_tokens_that_follow(
    batch_size: int, block_size: int, extra: int, seed: int
) -> None:
    data = np.arange(block_size + 1 + extra, dtype=np.int32) * 7
    x, y = get_batch(data, batch_size, block_size, np.random.default_rng(seed))
    assert x.shape == y.shape == (batch_size, block_size)
    assert x.dtype.name == y.dtype.name == "int"
    assert (y.numpy() == x.numpy() + 7).all()
    assert (np.diff(x.numpy(), axis=1) == 7).all()


def test_every_start_is_equally_likely_the_last_one_included() -> None:
    data, block_size, draws = np.arange(12, dtype=np.int32), 4, 8000
    x, _ = get_batch(data, draws, block_size, np.random.default_rng(0))
    counts = np.bincount(x.numpy()[:, 0], minlength=12)
    assert (counts[8:] == 0).all()  # 7 is the last start with a target for each token
    # Binomial(8000, 1/8): mean 1000, standard deviation 30; five of them for eight counts
    assert (abs(counts[:8] - 1000) < 150).all()


def test_same_generator_same_batch() -> None:
    data = np.arange(100, dtype=np.int32)
    batches = [get_batch(data, 4, 8, np.random.default_rng(5))[0].numpy() for _ in range(2)]
    assert (batches[0] == batches[1]).all()
    other = get_batch(data, 4, 8, np.random.default_rng(6))[0].numpy()
    assert (batches[0] != other).any()


def test_small_integer_types_and_memory_maps(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("map") / "tokens.bin"
    np.arange(60000, 60020).astype(np.uint16).tofile(path)
    data = np.memmap(path, dtype=np.uint16, mode="r")
    x, y = get_batch(data, 2, 8, np.random.default_rng(0))
    assert (y.numpy() - x.numpy() == 1).all() and x.numpy().min() >= 60000


def test_too_short() -> None:
    data = np.arange(8, dtype=np.int32)
    x, _ = get_batch(data, 2, 7, np.random.default_rng(0))
    assert (x.numpy() == np.arange(7)).all()
    with pytest.raises(InputError, match="8 tokens are too few for blocks of 8: at least 9"):
        get_batch(data, 2, 8, np.random.default_rng(0))
    for sizes in ((0, 4), (4, 0), (-1, 4)):
        with pytest.raises(InputError, match="must be 1 or more"):
            get_batch(data, *sizes, np.random.default_rng(0))


def test_check_lengths() -> None:
    check_lengths(np.zeros(10, int), np.zeros(10, int), 8)
    with pytest.raises(InputError, match="train split has 9 tokens, blocks of 8 need at least 10"):
        check_lengths(np.zeros(9, int), np.zeros(10, int), 8)
    with pytest.raises(InputError, match="val split has 0 tokens"):
        check_lengths(np.zeros(10, int), np.zeros(0, int), 8)


@given(st.integers(2, 200), st.integers(1, 5), st.integers(1, 9))
def test_evaluation_covers_every_target_once(length: int, batch_size: int, block_size: int) -> None:
    data = np.arange(length, dtype=np.int32)
    batches = list(evaluation_batches(data, batch_size, block_size))
    assert all(x.shape == y.shape == (batch_size, block_size) for x, y in batches)
    x, y = (np.concatenate([b[i].ravel() for b in batches]) for i in range(2))
    assert (y[: length - 1] == data[1:]).all()
    assert (x[: length - 1] == data[:-1]).all()
    assert (y[length - 1 :] == NO_TARGET).all()
    assert len(y) - (length - 1) < batch_size * block_size
