"""Clipping, AdamW and the schedule; one step, twenty steps, and a whole run on a real text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from string import ascii_letters
from typing import Literal

import numpy as np
import pytest
from tinygrad import Device, Tensor

from tests import reference as ref
from tests.reference import Array, Moments
from tests.text import SONNETS
from tinygpt import checkpoint, train
from tinygpt.batches import split_tokens
from tinygpt.config import GPTConfig, RunConfig, TrainConfig
from tinygpt.model import GPT
from tinygpt.optimizer import clip_coefficient, global_norm, learning_rate
from tinygpt.parallel import ParallelTrainer
from tinygpt.tokenizer import CharTokenizer
from tinygpt.trainer import OneDevice, Trainer

from .compare import assert_close
from .models import (
    FULL,
    MODERN,
    TINY,
    B,
    as_float32,
    beyond_the_emulator,
    build,
    load,
    options,
    random_batch,
)


def rate(iteration: int, c: TrainConfig) -> float:
    rates = c.learning_rate, c.final_lr
    if c.schedule == "linear":
        steps = c.warmup_iters, c.linear_iters, c.decay_iters
        return ref.linear_decay(iteration, *rates, *steps)
    return ref.learning_rate(iteration, *rates, c.warmup_iters, c.decay_iters)


def reference_step(
    p: dict[str, Array],
    moments: Moments,
    batch: tuple[np.ndarray, np.ndarray],
    iteration: int,
    model: GPTConfig,
    c: TrainConfig,
) -> tuple[dict[str, Array], Moments, float, float]:
    """(parameters, moments, loss, norm of the gradients) of one whole training step."""
    loss = ref.gpt(p, *batch, model.n_head, **options(model))[1]
    assert loss is not None
    gradients = ref.gpt_backward(p, *batch, model.n_head, **options(model))
    clipped, norm = ref.clip_by_global_norm(gradients, c.grad_clip)
    if c.optimizer == "muon":
        p, moments = reference_muon(p, clipped, moments, iteration, c)
    else:
        betas, decay = (c.beta1, c.beta2), c.weight_decay
        p, moments = ref.adamw(p, clipped, moments, rate(iteration, c), betas, weight_decay=decay)
    return p, moments, loss, norm


def reference_muon(
    p: dict[str, Array], g: dict[str, Array], moments: Moments, iteration: int, c: TrainConfig
) -> tuple[dict[str, Array], Moments]:
    """The blocks' matrices by Muon, queries, keys and values each on their own; all else by AdamW,
    with the learning rate of its kind."""
    first, second, lr = dict(moments.first), dict(moments.second), rate(iteration, c)
    new = {}
    for name in p:
        peak = {"wte": c.embedding_lr, "wpe": c.embedding_lr, "lm_head": c.head_lr}.get(
            name.split(".")[0]
        )
        own_rate = lr if peak is None else lr * peak / c.learning_rate
        if name.startswith("h.") and p[name].ndim == 2:
            parts = 3 if "c_attn" in name else 1
            rows = [np.split(x, parts) for x in (p[name], g[name], first[name])]
            moved = [
                ref.muon(*of_part, learning_rate=lr, beta=c.momentum, weight_decay=c.weight_decay)
                for of_part in zip(rows[0], rows[1], rows[2], strict=True)
            ]
            new[name], first[name] = (np.concatenate(x) for x in zip(*moved, strict=True))
            second.pop(name, None)  # Muon has none
        else:
            one = Moments(moments.step, {name: first[name]}, {name: second[name]})
            moved_one, after = ref.adamw(
                {name: p[name]}, g, one, own_rate, (c.beta1, c.beta2), weight_decay=c.weight_decay
            )
            new[name] = moved_one[name]
            first[name], second[name] = after.first[name], after.second[name]
    return new, Moments(moments.step + 1, first, second)


def comparable(named: Mapping[str, Tensor | Array]) -> dict[str, Array]:
    """As arrays, without what has no right value: the bias of the keys.

    A vector added to all keys adds one number to all scores of a query, which softmax ignores: the
    true gradient is 0. What is computed is rounding noise, and AdamW, which divides a gradient by
    its own size, makes steps of up to the learning rate of it. The loss does not notice.
    """
    arrays = {n: t.numpy() if isinstance(t, Tensor) else t for n, t in named.items()}
    for name, array in arrays.items():
        if name.endswith("c_attn.bias"):
            q, _, v = np.split(array, 3)
            arrays[name] = np.concatenate([q, v])
    return arrays


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping(max_norm: float) -> None:
    rng = np.random.default_rng(0)
    shapes = [(3, 5), (7,), (1, 1)]
    gradients = {str(s): as_float32(rng.standard_normal(s)) for s in shapes}
    tensors = {name: Tensor(g.astype(np.float32)) for name, g in gradients.items()}
    norm = global_norm(list(tensors.values()))
    coefficient = clip_coefficient(norm, max_norm)
    expected, expected_norm = ref.clip_by_global_norm(gradients, max_norm)
    assert_close("operation", {"norm": norm}, {"norm": np.array(expected_norm)})
    clipped = {name: t * coefficient for name, t in tensors.items()}
    assert_close("operation", clipped, expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate(schedule: Literal["cosine", "linear"]) -> None:
    """Every iteration, to the last digit: both are float64 arithmetic on the host."""
    for warmup, max_iters, decay in [(10, 100, None), (0, 20, 15), (5, 30, 5)]:
        c = TrainConfig(
            max_iters=max_iters, warmup_iters=warmup, lr_decay_iters=decay, schedule=schedule
        )
        got = [learning_rate(i, c) for i in range(max_iters + 5)]
        np.testing.assert_allclose(got, [rate(i, c) for i in range(max_iters + 5)], rtol=1e-14)


def one_device(config: RunConfig) -> Trainer:
    return OneDevice(config)


def two_cores(config: RunConfig) -> Trainer:
    return ParallelTrainer(config, 2)


ADAMW = TrainConfig(max_iters=20, warmup_iters=5, learning_rate=1e-3, grad_clip=2.5, batch_size=B)
MUON = replace(
    ADAMW, optimizer="muon", embedding_lr=2e-3, head_lr=5e-4, schedule="linear", warmdown_iters=8,
    grad_clip=4.2,
)  # fmt: skip
for_cores = pytest.mark.skipif(Device.DEFAULT != "CPU", reason="for the cores of a CPU")


@pytest.mark.parametrize(
    "config, c, trainer_on",
    [
        pytest.param(TINY, ADAMW, one_device, id="tied, plain"),
        pytest.param(FULL, ADAMW, one_device, id="untied, biases"),
        pytest.param(FULL, ADAMW, two_cores, id="untied, biases, two cores", marks=for_cores),
        pytest.param(MODERN, MUON, one_device, id="Muon"),
        pytest.param(MODERN, MUON, two_cores, id="Muon, two cores", marks=for_cores),
        pytest.param(FULL, MUON, two_cores, id="Muon, biases, two cores", marks=for_cores),
    ],
)
def test_steps(
    config: GPTConfig, c: TrainConfig, trainer_on: Callable[[RunConfig], Trainer]
) -> None:
    """Parameters and both moments after 1 and after 20 steps, with a new batch in every step."""
    trainer, p = trainer_on(RunConfig("micro", config, c)), build(config)[1]
    load(trainer.model, p)
    moments, norms = Moments.zero(p), []
    of_muon = " of Muon" if c.optimizer == "muon" else ""
    for i in range(20):
        idx, targets = random_batch(seed=i)
        trainer.step(idx.astype(np.int32), targets.astype(np.int32), i)
        loss = np.array(trainer.train_loss(), np.float32)
        p, moments, expected, norm = reference_step(p, moments, (idx, targets), i, config, c)
        norms.append(norm)
        assert_close("loss of a run", {f"loss {i}": loss}, {f"loss {i}": np.array(expected)})
        if i in (0, 19):
            kind = "after 20 steps" + of_muon if i else "after 1 step"
            assert_close(kind, comparable(trainer.state), comparable(p | named_moments(moments)))
    assert min(norms) < c.grad_clip < max(norms), "some steps must be clipped and some not"


def named_moments(moments: Moments) -> dict[str, Array]:
    """By the names of the trainer's state."""
    first = {f"optimizer.m.{name}": m for name, m in moments.first.items()}
    return first | {f"optimizer.v.{name}": v for name, v in moments.second.items()}


@beyond_the_emulator
def test_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` on a text, as the command does it: the loss of every iteration, the final weights.

    The text, the batches (from the seed and the iteration) and the first weights (from the seed)
    are the run's own; all arithmetic after that is done again by the reference.
    """
    monkeypatch.setattr(train, "SAMPLE_LENGTH", 2)  # the sample at the end is not looked at
    tokenizer = CharTokenizer.from_text(SONNETS + ascii_letters + "!$&',-.3:;?")
    ids = np.array(tokenizer.encode(SONNETS), np.int32)
    config = GPTConfig(16, tokenizer.vocab_size, 2, n_head=2, n_embd=16, activation="gelu")
    assert config.vocab_size == 65, "test_models has compiled the kernels of this shape"
    c = TrainConfig(
        out_dir=str(tmp_path / "run"), max_iters=50, batch_size=4, warmup_iters=10,
        learning_rate=5e-3, log_interval=1, eval_interval=50, eval_iters=1, seed=3,
    )  # fmt: skip
    data, val = split_tokens(ids)
    summary = train.train(RunConfig("micro", config, c), data, val, tokenizer)

    p = {n: t.numpy().astype(np.float64) for n, t in GPT(config, c.seed).parameters().items()}
    moments, losses = Moments.zero(p), []
    for i in range(c.max_iters):
        rng = np.random.default_rng([c.seed, i])
        starts = rng.integers(len(data) - config.block_size, size=c.batch_size)
        rows = data[starts[:, None] + np.arange(config.block_size + 1)]
        batch = rows[:, :-1], rows[:, 1:]
        p, moments, loss, _ = reference_step(p, moments, batch, i, config, c)
        losses.append(loss)

    metrics = (tmp_path / "run" / checkpoint.METRICS).read_text()
    lines = [json.loads(line) for line in metrics.splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 51))
    got = np.array([line["train_loss"] for line in lines], np.float32)
    assert_close("loss of a run", {"losses": got}, {"losses": np.array(losses)})
    assert losses[-1] < losses[0] - 0.5, "nothing was learned: the run proves little"
    saved, _ = checkpoint.load_tensors(tmp_path / "run" / checkpoint.LAST)
    assert_close("after 50 steps", {name: saved[name] for name in p}, p)

    val_loss = np.array(whole_split_loss(p, val, config))
    got = np.array(summary["val_loss"], np.float32)
    assert_close("loss of a run", {"val_loss": got}, {"val_loss": val_loss})


def whole_split_loss(p: dict[str, Array], data: np.ndarray, config: GPTConfig) -> float:
    """Mean loss over every token but the first, each after those before it in its block."""
    total = 0.0
    for start in range(0, len(data) - 1, config.block_size):
        block = data[start : start + config.block_size + 1]
        loss = ref.gpt(p, block[None, :-1], block[None, 1:], config.n_head, config.activation)[1]
        assert loss is not None
        total += loss * (len(block) - 1)
    return total / (len(data) - 1)
