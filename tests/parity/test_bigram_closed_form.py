"""Training a bigram has an answer on paper: the table becomes the log of the smoothed counts.

The loss of a table is the mean of -log softmax(table[a])[b] over all pairs (a, b). Among all
distributions the counts' own share minimizes it, p(b | a) = n(a, b) / n(a), and the least loss is
the entropy of these counts. Every pair of the vocabulary is added once to the text's, which is
add-one smoothing: without, the log of a pair that never occurs is minus infinity.
"""

from __future__ import annotations

import numpy as np

from tinygpt.config import BigramConfig, RunConfig, TrainConfig
from tinygpt.trainer import OneDevice

from .compare import assert_close

TEXT = "abracadabra"


def test_trained_bigram() -> None:
    characters = sorted(set(TEXT))
    V = len(characters)
    ids = np.array([characters.index(c) for c in TEXT])
    counts = np.ones((V, V), int)
    np.add.at(counts, (ids[:-1], ids[1:]), 1)
    conditional = counts / counts.sum(axis=1, keepdims=True)
    entropy = -(counts * np.log(conditional)).sum() / counts.sum()

    pairs = np.repeat(np.argwhere(counts > 0), counts.reshape(-1), axis=0).astype(np.int32)
    idx, targets = pairs[None, :, 0], pairs[None, :, 1]  # one batch that holds everything
    # The loss is convex; with these rates float64 ends within 1e-5 of the logs of the counts.
    recipe = TrainConfig(
        max_iters=250, learning_rate=0.1, min_lr=0, warmup_iters=0, weight_decay=0, grad_clip=0
    )
    trainer = OneDevice(RunConfig("bigram", BigramConfig(len(pairs), V), recipe))
    for i in range(recipe.max_iters):
        trainer.step(idx, targets, i)

    table = trainer.model.parameters()["wte.weight"].numpy().astype(np.float64)
    learned = table - np.log(np.exp(table).sum(axis=1, keepdims=True))  # rows are free to shift
    table_error = np.abs(learned - np.log(conditional)).max()
    assert table_error < 1e-4, f"an entry of the table is off by {table_error:.1e}"
    loss = np.array(trainer.train_loss(), np.float32)
    assert_close("loss", {"loss": loss}, {"loss": np.array(entropy)})
