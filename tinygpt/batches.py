"""From one long row of tokens to the batches that a model is trained and evaluated on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from tinygrad import Tensor

from tinygpt.config import InputError

NO_TARGET = -1  # marks positions that add nothing to the loss


def split_tokens(
    ids: Sequence[int] | NDArray[np.integer], train_fraction: float = 0.9
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The first int(train_fraction * len) tokens, to train on, and the rest, to validate on.

    Raises:
        InputError: train_fraction is not in 0 .. 1.
    """
    if not 0 <= train_fraction <= 1:
        raise InputError(f"train_fraction is {train_fraction}; it must be in 0 .. 1")
    tokens = np.asarray(ids, dtype=np.int32)
    n_train = int(train_fraction * len(tokens))
    return tokens[:n_train], tokens[n_train:]


def check_lengths(train: NDArray[np.integer], val: NDArray[np.integer], block_size: int) -> None:
    """Raises InputError where a split is too short to train on or to validate on."""
    for name, data in (("train", train), ("val", val)):
        if len(data) < block_size + 2:
            raise InputError(
                f"the text is too short: its {name} split has {len(data)} tokens, blocks of "
                f"{block_size} need at least {block_size + 2}; "
                "take a longer text or a smaller block_size"
            )


def sample_blocks(
    data: NDArray[np.integer], batch_size: int, block_size: int, rng: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """`get_batch`, before it goes to the device."""
    if batch_size < 1 or block_size < 1:
        raise InputError(f"batch_size {batch_size} and block_size {block_size} must be 1 or more")
    if len(data) <= block_size:
        raise InputError(
            f"{len(data)} tokens are too few for blocks of {block_size}: "
            f"at least {block_size + 1} are needed, or a smaller block_size"
        )
    starts = rng.integers(0, len(data) - block_size, size=batch_size)  # (B,), last one included
    rows = data[starts[:, None] + np.arange(block_size + 1)].astype(np.int32)  # (B, T + 1)
    return rows[:, :-1].copy(), rows[:, 1:].copy()


def get_batch(
    data: NDArray[np.integer], batch_size: int, block_size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A random batch: every place in `data` where a block and its target fit is equally likely.

    Returns:
        x, y: (batch_size, block_size) int32 on the default device; y is x shifted by one token.

    Raises:
        InputError: `data` has fewer than block_size + 1 tokens, or a size is below 1.
    """
    x, y = sample_blocks(data, batch_size, block_size, rng)
    return Tensor(x), Tensor(y)


def evaluation_batches(
    data: NDArray[np.integer], batch_size: int, block_size: int
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Every token of `data` but the first is a target exactly once, in order.

    Blocks do not overlap. The last block and the last batch are filled up to full size, so that
    every batch has one shape; what is filled in has NO_TARGET as its target.

    Yields:
        x, y: (batch_size, block_size) int32.
    """
    n_targets = len(data) - 1
    per_batch = batch_size * block_size
    for start in range(0, n_targets, per_batch):
        count = min(per_batch, n_targets - start)
        x, y = np.zeros(per_batch, np.int32), np.full(per_batch, NO_TARGET, np.int32)
        x[:count] = data[start : start + count]
        y[:count] = data[start + 1 : start + count + 1]
        yield x.reshape(batch_size, block_size), y.reshape(batch_size, block_size)
