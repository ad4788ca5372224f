"""Shapes, errors, initialization, generation; the values are compared in tests/parity."""

import math
from dataclasses import replace

import numpy as np
import pytest
from tinygrad import Context, Tensor

from tinygpt import GPT, BigramLanguageModel, CharTokenizer, GPTConfig, Head, InputError
from tinygpt.config import MODERN, TrainConfig
from tinygpt.model import LanguageModel, attention, causal_mask
from tinygpt.optimizer import AdamW, step_rates, step_seed
from tinygpt.sampling import sample_tokens
from tinygpt.trainer import training_step

TINY = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)
MODERN_TINY = replace(TINY, **MODERN)


def random_tokens(batch: int, time: int, vocab_size: int = 11, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng(seed).integers(0, vocab_size, (batch, time), np.int32))


@pytest.fixture(scope="module")
def model() -> GPT:
    return GPT(TINY, seed=1)


@pytest.fixture(scope="module", params=["GPT-2", "modern"])
def any_gpt(request: pytest.FixtureRequest, model: GPT) -> GPT:
    """With weights large enough that tokens are told apart."""
    if request.param == "GPT-2":
        return model
    modern, rng = GPT(MODERN_TINY), np.random.default_rng(2)
    for p in modern.parameters().values():
        p.assign(Tensor(rng.standard_normal(p.shape).astype(np.float32))).realize()
    return modern


@pytest.fixture(scope="module", params=["gpt", "bigram"])
def any_model(request: pytest.FixtureRequest, model: GPT) -> LanguageModel:
    return model if request.param == "gpt" else BigramLanguageModel(11, 8, seed=1)


def test_logits_and_loss(any_model: LanguageModel) -> None:
    idx = random_tokens(2, 5)
    logits, loss = any_model(idx)
    assert logits.shape == (2, 5, 11) and loss is None
    logits, loss = any_model(idx, random_tokens(2, 5))
    assert logits.shape == (2, 5, 11)
    assert loss is not None and loss.shape == ()


def test_parameter_names_are_gpt2s() -> None:
    config = GPTConfig(8, 11, n_layer=1, n_head=2, n_embd=4, bias=True, tie_weights=False)
    names = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    expected = [f"h.0.{n}.{kind}" for n in names for kind in ("weight", "bias")]
    expected = ["wte.weight", "wpe.weight", *expected, "ln_f.weight", "ln_f.bias", "lm_head.weight"]
    shapes = {name: p.shape for name, p in GPT(config).parameters().items()}
    assert list(shapes) == expected
    assert shapes["h.0.attn.c_attn.weight"] == (12, 4)  # (out, in)
    assert shapes["h.0.mlp.c_fc.weight"] == (16, 4)
    assert shapes["h.0.mlp.c_proj.weight"] == (4, 16)
    assert "lm_head.weight" not in GPT(TINY).parameters()


def test_parameters_of_a_modern_model() -> None:
    """No positions, no norms' weights; the rotation's table is not trained."""
    model = GPT(replace(MODERN_TINY, n_layer=1))
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    expected = ["wte.weight", *(f"h.0.{n}.weight" for n in names), "lm_head.weight"]
    assert list(model.parameters()) == expected
    assert model.num_parameters() == 2 * 11 * 8 + 12 * 8 * 8


def test_number_of_parameters() -> None:
    c, config = 128, GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128)
    assert GPT(config).num_parameters() == 65 * c + 4 * 12 * c * c + 9 * c  # norms: 2 a layer + 1
    assert BigramLanguageModel(65).num_parameters() == 65 * 65


def test_initialization() -> None:
    model = GPT(GPTConfig(64, 65, n_layer=8, n_head=4, n_embd=64, bias=True))
    for name, p in model.parameters().items():
        values = p.numpy()
        if name.endswith(".bias"):
            assert (values == 0).all()
        elif ".ln_" in f".{name}":
            assert (values == 1).all()
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            # 4096 values or more: the estimate of a deviation is within 5 / sqrt(2 x 4096) of it
            assert values.std() == pytest.approx(std, rel=0.06)
            assert abs(values.mean()) < 5 * std / 64


def test_same_seed_same_weights() -> None:
    a, b, c = (GPT(TINY, seed).wte.weight.numpy() for seed in (3, 3, 4))
    assert (a == b).all() and (a != c).any()


def test_untrained_losses() -> None:
    idx, targets = random_tokens(4, 8, 65), random_tokens(4, 8, 65, seed=1)
    logits, loss = BigramLanguageModel(65)(idx, targets)
    assert logits.reshape(-1, 65).shape == (32, 65)
    # ln 65 + 1/2 is 4.67 on average; a batch of 32 targets strays by 1 / sqrt(32)
    assert loss is not None and abs(loss.item() - 4.67) < 5 / math.sqrt(32)
    gpt = GPT(GPTConfig(8, 65, n_layer=2, n_head=2, n_embd=16))
    _, loss = gpt(idx, targets)
    # logits of an untrained GPT are near 0: products of 16 normal values and weights of 0.02
    assert loss is not None and abs(loss.item() - math.log(65)) < 0.1


def test_the_future_is_not_seen(any_gpt: GPT) -> None:
    a, b = random_tokens(1, 8).numpy(), random_tokens(1, 8).numpy().copy()
    b[0, 5:] = (b[0, 5:] + 1) % 11
    before, after = (any_gpt(Tensor(idx))[0].numpy() for idx in (a, b))
    assert (before[:, :5] == after[:, :5]).all()
    assert (before[:, 5:] != after[:, 5:]).any()


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (np.zeros((1, 9), np.int32), "9 tokens per row; this model's block_size is 8"),
        (np.array([[0, 11]], np.int32), "holds token 11; this model's vocabulary is 0 .. 10"),
        (np.array([[-1]], np.int32), "holds token -1"),
        (np.zeros(3, np.int32), r"must be \(batch, time\)"),
        (np.zeros((1, 2), np.float32), "of integers"),
        (np.zeros((1, 0), np.int32), "at least one token"),
    ],
)
def test_wrong_tokens(model: GPT, idx: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model(Tensor(idx))


def test_wrong_targets(model: GPT) -> None:
    with pytest.raises(InputError, match="targets have shape"):
        model(random_tokens(1, 4), random_tokens(1, 3))
    with pytest.raises(InputError, match="targets holds token 11"):
        model(random_tokens(1, 1), Tensor(np.array([[11]], np.int32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 3}, "n_embd 8 is not divisible by n_head 3"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"block_size": 2.5}, "block_size is 2.5"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"position": "none"}, "position is 'none'; it must be one of learned, rotary"),
        ({"position": "rotary", "n_embd": 6}, "n_embd / n_head is 3"),
        ({"attn_dropout": 1.0}, "attention_dropout is 1.0"),
    ],
)
def test_wrong_shapes(change: dict[str, int], message: str) -> None:
    settings = {"block_size": 8, "vocab_size": 11, "n_layer": 1, "n_head": 2, "n_embd": 8}
    with pytest.raises(InputError, match=message):
        GPTConfig(**(settings | change))  # type: ignore[arg-type]


def test_dropout_is_for_training_only() -> None:
    Tensor.manual_seed(0)
    model = GPT(GPTConfig(8, 11, n_layer=1, n_head=2, n_embd=8, dropout=0.5))
    idx = random_tokens(2, 8)
    quiet = [model(idx)[0].numpy() for _ in range(2)]
    assert (quiet[0] == quiet[1]).all()
    with Context(TRAINING=1):
        noisy = [model(idx)[0].numpy() for _ in range(2)]
    assert (noisy[0] != quiet[0]).any() and (noisy[0] != noisy[1]).any()


def test_dropout_keeps_the_mean() -> None:
    Tensor.manual_seed(0)
    q = k = Tensor.zeros(1, 400, 4)
    v = Tensor.ones(1, 400, 4)
    with Context(TRAINING=1):
        y = attention(q, k, v, causal_mask(400), dropout=0.3).numpy()
    # an average of 400 weights, each kept with 0.7 and scaled by 1 / 0.7: deviation 0.033
    assert abs(y[0, -1].mean() - 1) < 0.17


def test_head_is_causal_unless_told() -> None:
    x = Tensor(np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32))
    changed = x.numpy().copy()
    changed[:, 5] += 1
    for causal in (True, False):
        head = Head(8, 4, causal=causal, seed=0)
        a, b = head(x).numpy(), head(Tensor(changed)).numpy()
        assert a.shape == (2, 6, 4)
        assert (a[:, :5] == b[:, :5]).all() == causal


def test_generate_returns_the_prompt_and_the_rest(any_model: LanguageModel) -> None:
    idx = random_tokens(2, 3)
    out = any_model.generate(idx, 4, seed=0)
    assert out.shape == (2, 7) and out.dtype.name == "int"
    assert (out.numpy()[:, :3] == idx.numpy()).all()
    assert (any_model.generate(idx, 4, seed=0).numpy() == out.numpy()).all()
    assert any_model.generate(idx, 0).numpy().tolist() == idx.numpy().tolist()
    with pytest.raises(InputError, match="temperature"):
        any_model.generate(idx, 1, temperature=-1)
    with pytest.raises(InputError, match="holds token 11"):
        any_model.generate(Tensor(np.array([[11]], np.int32)), 1)


@pytest.mark.parametrize("prompt", [1, 7, 8, 12])  # the last two fill and exceed the block
def test_cached_generation_is_uncached_generation(any_gpt: GPT, prompt: int) -> None:
    tokens = random_tokens(2, prompt).numpy()

    def uncached(context: np.ndarray) -> np.ndarray:
        return any_gpt(Tensor(context[:, -8:].copy()))[0].numpy()[:, -1]

    expected = np.stack(list(sample_tokens(uncached, tokens, 12, seed=5)), axis=1)
    assert (any_gpt.generate(Tensor(tokens), 12, seed=5).numpy()[:, prompt:] == expected).all()


def test_a_decoder_can_start_another_text(model: GPT) -> None:
    decoder = model.decoder(1)
    first = [decoder(np.full((1, n), 3, np.int32)) for n in (1, 2, 3)]
    decoder(np.full((1, 9), 4, np.int32))  # longer than the block: the window
    again = [decoder(np.full((1, n), 3, np.int32)) for n in (1, 2, 3)]
    for a, b in zip(first, again, strict=True):
        assert (a == b).all()


def test_one_batch_can_be_learned_by_heart() -> None:
    text = "To be, or not to be, that is the question:"
    tokenizer = CharTokenizer.from_text(text)
    ids = np.array(tokenizer.encode(text), np.int32)
    model = GPT(GPTConfig(40, tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=32), seed=0)
    recipe = TrainConfig(max_iters=150, learning_rate=1e-2, warmup_iters=5, weight_decay=0.0)
    optimizer = AdamW(model.parameters(), recipe)
    step = training_step(model, optimizer, recipe.grad_clip)
    for i in range(recipe.max_iters):
        changing = step_rates(i, recipe), step_seed(i, recipe)
        loss = step(Tensor(ids[None, :40]), Tensor(ids[None, 1:41]), *map(Tensor, changing))
    assert loss.item() < 0.05
    start = Tensor(np.array([tokenizer.encode("To be, or")], np.int32))
    assert tokenizer.decode(model.generate(start, 31, temperature=0).numpy()[0]) == text[:40]
