"""Training a bigram has an answer on paper: the table becomes the log of the smoothed counts.

The loss of a table is the mean of -log softmax(table[a])[b] over all pairs (a, b). Among all
distributions the counts' own share minimizes it, p(b | a) = n(a, b) / n(a), and the least loss is
the entropy of these counts. Every pair of the vocabulary is added once to the text's, which is
add-one smoothing: without, the log of a pair that never occurs is minus infinity.
"""

from __future__ import annotations

import numpy as np

from tinygpt.config import TrainConfig
from tinygpt.model import BigramLanguageModel
from tinygpt.optimizer import AdamW
from tinygpt.train import training_step

from .compare import assert_close
from .models import tokens

TEXT = "to be or not to be that is the question"
STEPS = 300


def test_trained_bigram() -> None:
    characters = sorted(set(TEXT))
    V = len(characters)
    ids = np.array([characters.index(c) for c in TEXT])
    counts = np.ones((V, V), int)
    np.add.at(counts, (ids[:-1], ids[1:]), 1)
    conditional = counts / counts.sum(axis=1, keepdims=True)
    entropy = -(counts * np.log(conditional)).sum() / counts.sum()

    pairs = np.repeat(np.argwhere(counts > 0), counts.reshape(-1), axis=0)  # (N, 2)
    idx, targets = tokens(pairs[None, :, 0]), tokens(pairs[None, :, 1])
    # The loss is convex; 300 steps with a falling rate end 2e-6 from the minimum in float64.
    config = TrainConfig(
        max_iters=STEPS, learning_rate=0.1, min_lr=0, warmup_iters=0, weight_decay=0, grad_clip=0
    )
    model = BigramLanguageModel(V)
    optimizer = AdamW(model.parameters(), config)
    step = training_step(model, optimizer, config.grad_clip)
    for i in range(STEPS):
        loss = step(idx, targets, optimizer.rates(i))

    table = model.parameters()["wte.weight"].numpy().astype(np.float64)
    learned = table - np.log(np.exp(table).sum(axis=1, keepdims=True))  # rows are free to shift
    table_error = np.abs(learned - np.log(conditional)).max()
    assert table_error < 1e-4, f"an entry of the table is off by {table_error:.1e}"
    assert_close("loss", {"loss": loss}, {"loss": np.array(entropy)})
