"""The schedule, the rates, who updates what; the updates are compared with the reference in
tests/parity."""

import math
from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Context, Tensor, nn

from tests.parity.compare import relative_error
from tinygpt.config import PRESETS, GPTConfig, TrainConfig
from tinygpt.model import GPT
from tinygpt.optimizer import (
    AdamW,
    Group,
    Muon,
    clip_coefficient,
    global_norm,
    group_of,
    groups_of,
    learning_rate,
    orthogonalize_cost,
    step_rates,
)
from tinygpt.parallel import ALIGNMENT, Memory, shares

RECIPE = TrainConfig(max_iters=1000, learning_rate=1.0, min_lr=0.1, warmup_iters=99)


def test_learning_rate_at_the_joints() -> None:
    assert learning_rate(0, RECIPE) == 0.01  # the first step already moves
    assert learning_rate(98, RECIPE) == pytest.approx(0.99)
    assert learning_rate(99, RECIPE) == 1.0
    middle = (99 + 1000) / 2
    assert learning_rate(math.floor(middle), RECIPE) == pytest.approx(0.55, abs=1e-3)
    assert learning_rate(1000, RECIPE) == learning_rate(5000, RECIPE) == 0.1


def test_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(i, RECIPE) for i in range(1001)]
    assert rates[:100] == sorted(rates[:100])
    assert rates[99:] == sorted(rates[99:], reverse=True)
    assert min(rates[99:]) == 0.1


def test_decay_ends_where_told() -> None:
    recipe = TrainConfig(learning_rate=1.0, lr_decay_iters=10, warmup_iters=0)
    assert learning_rate(10, recipe) == 0.1 == recipe.final_lr < learning_rate(9, recipe)
    warm_up_only = TrainConfig(max_iters=5, warmup_iters=10, learning_rate=1.1)
    assert learning_rate(4, warm_up_only) == pytest.approx(0.5)


def test_linear_decay_at_the_joints() -> None:
    recipe = TrainConfig(
        max_iters=1000, learning_rate=1.0, min_lr=0.1, warmup_iters=99, schedule="linear",
        warmdown_iters=400,
    )  # fmt: skip
    assert learning_rate(0, recipe) == 0.01
    assert learning_rate(99, recipe) == learning_rate(600, recipe) == 1.0
    assert learning_rate(800, recipe) == pytest.approx(0.55)
    assert learning_rate(1000, recipe) == learning_rate(5000, recipe) == 0.1
    by_default = TrainConfig(max_iters=100, schedule="linear", warmup_iters=0)
    assert learning_rate(25, by_default) == 1e-3 > learning_rate(26, by_default)
    one_step = TrainConfig(max_iters=1, schedule="linear", warmup_iters=0)
    assert learning_rate(0, one_step) == 1e-3 and learning_rate(1, one_step) == 1e-4


def test_norm_and_clipping() -> None:
    gradients = [Tensor([3.0, 0.0]), Tensor([[4.0]])]
    assert global_norm(gradients).item() == 5.0
    assert clip_coefficient(Tensor(5.0), 1.0).item() == pytest.approx(0.2, rel=1e-6)
    assert clip_coefficient(Tensor(0.5), 1.0).item() == 1.0
    assert clip_coefficient(Tensor(0.0), 1.0).item() == 1.0
    assert clip_coefficient(Tensor([9.0]), 0.0).item() == 1.0


def test_rates_hold_both_bias_corrections() -> None:
    rates = step_rates(4, RECIPE)
    expected = [learning_rate(4, RECIPE), 1 / (1 - 0.9**5), 1 / (1 - 0.99**5)]
    expected += expected[:1] * 2  # embedding and output layer, which have no rates of their own
    np.testing.assert_allclose(rates, expected, rtol=1e-7)  # one rounding to float32


@pytest.mark.parametrize("iteration", [4, 500, 2000])
def test_every_rate_follows_the_schedule(iteration: int) -> None:
    recipe = replace(RECIPE, embedding_lr=5.0, head_lr=0.25)
    rates, share = step_rates(iteration, recipe), learning_rate(iteration, RECIPE)
    np.testing.assert_allclose(rates[[0, 3, 4]], [share, 5 * share, share / 4], rtol=1e-6)
    nothing = step_rates(iteration, replace(recipe, learning_rate=0.0, min_lr=None))
    assert np.isfinite(nothing).all() and nothing[0] == 0


def test_only_matrices_decay() -> None:
    parameters = {"matrix": Tensor([[2.0]]).realize(), "vector": Tensor([2.0]).realize()}
    recipe = TrainConfig(learning_rate=0.5, warmup_iters=0, weight_decay=0.1)
    optimizer = AdamW(parameters, recipe)
    zero = {name: Tensor(np.zeros(p.shape, np.float32)) for name, p in parameters.items()}
    rates = Tensor(step_rates(0, recipe))
    Tensor.realize(*optimizer.schedule_step(zero, Tensor([1.0]), rates))
    assert parameters["matrix"].item() == pytest.approx(2 * (1 - 0.5 * 0.1))
    assert parameters["vector"].item() == 2.0


def test_muon_is_for_the_matrices_of_blocks() -> None:
    config = GPTConfig(8, 11, n_layer=1, n_head=2, n_embd=4, bias=True, tie_weights=False)
    recipe = TrainConfig(optimizer="muon", embedding_lr=0.3, head_lr=0.1)
    parameters = GPT(config).parameters()
    groups = groups_of(parameters, recipe)
    assert {n for n, g in groups.items() if g.orthogonalized} == {
        f"h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert groups["wte.weight"] == groups["wpe.weight"] == Group(False, "embedding_lr", True)
    assert groups["lm_head.weight"] == Group(False, "head_lr", True)
    assert groups["h.0.ln_1.weight"] == groups["ln_f.bias"] == Group(False, "learning_rate", False)
    alone = {group_of(name, p, TrainConfig()) for name, p in parameters.items()}
    assert alone == {Group(False, "learning_rate", decays) for decays in (True, False)}


def test_muon_is_tinygrads() -> None:
    """Its own has no factor for tall matrices: square and wide ones are the same in both."""
    rng = np.random.default_rng(0)
    recipe = TrainConfig(
        optimizer="muon", learning_rate=0.02, schedule="linear", warmup_iters=0, max_iters=100
    )
    starts = {str(s): rng.standard_normal(s).astype(np.float32) for s in [(6, 6), (4, 9)]}
    ours, theirs = ({n: Tensor(a).realize() for n, a in starts.items()} for _ in range(2))
    muon = Muon(ours, recipe)
    peer = nn.optim.Muon(list(theirs.values()), lr=0.02, momentum=0.95, weight_decay=0.1)
    for i in range(5):
        gradients = {n: rng.standard_normal(p.shape).astype(np.float32) for n, p in ours.items()}
        given = {n: Tensor(g) for n, g in gradients.items()}
        Tensor.realize(*muon.schedule_step(given, Tensor([1.0]), Tensor(step_rates(i, recipe))))
        with Context(TRAINING=1):
            for name, p in theirs.items():
                p.grad = Tensor(gradients[name])
            Tensor.realize(*peer.schedule_step())
    for name, p in ours.items():
        error = relative_error(p.numpy(), theirs[name].numpy().astype(np.float64)).max()
        assert error < 1e-5, name  # five steps' roundings, as tests/parity has them


def test_queries_keys_and_values_are_three_matrices() -> None:
    rng = np.random.default_rng(1)
    recipe = TrainConfig(optimizer="muon", warmup_iters=0, weight_decay=0.0)
    gradients = [rng.standard_normal((4, 4)).astype(np.float32) for _ in "qkv"]

    def updates(parts: dict[str, np.ndarray]) -> list[np.ndarray]:
        parameters = {name: Tensor.zeros(*g.shape).contiguous() for name, g in parts.items()}
        muon = Muon(parameters, recipe)
        given = {name: Tensor(g) for name, g in parts.items()}
        Tensor.realize(*muon.schedule_step(given, Tensor([1.0]), Tensor(step_rates(0, recipe))))
        return [p.numpy() for p in parameters.values()]

    together = updates({"h.0.attn.c_attn.weight": np.concatenate(gradients)})
    alone = updates({f"h.0.{i}.weight": g for i, g in enumerate(gradients)})
    np.testing.assert_allclose(together[0], np.concatenate(alone), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("cores", [1, 2, 3, 5])
@pytest.mark.parametrize("preset", ["micro", "record"])
def test_cores_share_everything_once(preset: str, cores: int) -> None:
    chosen = PRESETS[preset]
    config = GPTConfig(**{**chosen.model, "vocab_size": 65, "n_embd": 96})
    parameters = GPT(config, seed=None).parameters()
    groups = groups_of(parameters, chosen.train)
    order = sorted(parameters, key=lambda name: groups[name], reverse=True)
    memory = Memory({name: tuple(map(int, parameters[name].shape)) for name in order})
    found = shares(memory, groups, cores)

    matrices = [name for _, names in found for name in names]
    assert sorted(matrices) == sorted(n for n, g in groups.items() if g.orthogonalized)
    costs = [sum(orthogonalize_cost(n, memory.shapes[n]) for n in names) for _, names in found]
    assert max(costs) - min(costs) <= max(
        (orthogonalize_cost(n, memory.shapes[n]) for n in matrices), default=0
    )
    kinds = list(set(groups.values()))
    touched, owner = np.zeros((2, len(memory.array)), int)
    for spans, _ in found:
        for group, (start, end) in spans.items():
            touched[start:end] += 1
            owner[start:end] = kinds.index(group)
            assert start % ALIGNMENT == 0
    for name, offset in memory.offsets.items():
        own = slice(offset, offset + int(parameters[name].numel()))
        if name in matrices:
            assert (touched[own] == 0).all()
        else:
            assert (touched[own] == 1).all()
            assert (owner[own] == kinds.index(groups[name])).all()
