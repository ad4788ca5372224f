"""The models: the lecture's bigram table, and GPT-2, in the order in which the data passes.

Shapes in comments: B batch, T time (tokens), C channels (n_embd), V vocabulary, H heads, D = C / H.

The file has three parts. First the operations a GPT is made of, as functions of tensors. Then the
layers that hold the weights and call them. Last the two models, BigramLanguageModel and GPT.

`.contiguous()` never changes a value. It tells tinygrad's scheduler to store a result instead of
computing it again inside every kernel that reads it; `.contiguous_backward()` does the same for
the gradient on its way back. On a CPU a training step is several times faster for it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from tinygrad import Tensor, UOp, dtypes, nn
from tinygrad.engine.realize import capturing
from tinygrad.helpers import TRAINING

from tinygpt import kernels
from tinygpt.config import Activation, BigramConfig, GPTConfig, InputError, ModelConfig
from tinygpt.launch import Launcher
from tinygpt.sampling import Decoder, Tokens, sample_tokens

INIT_STD = 0.02  # GPT-2's standard deviation for weight matrices
ROTARY_BASE = 1000.0  # the paper's is 10,000; contexts here are short

# Operations ---------------------------------------------------------------------------------------


def embedding(idx: Tensor, wte: Tensor, wpe: Tensor | None = None) -> Tensor:
    """Row idx of wte (V, C), plus the position's row of wpe (P, C); idx (B, T) -> (B, T, C)."""
    if kernels.usable(wte):
        return kernels.embedding(idx, wte, wpe)
    return wte[idx] if wpe is None else wte[idx] + wpe[: idx.shape[1]]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """x (..., in) @ weight (out, in) transposed + bias (out,) -> (..., out); then the activation,
    then dropout."""
    if kernels.usable(x):
        return kernels.linear(x, weight, bias, activation, seeded_dropout(dropout, x.device))
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    y = y.contiguous().contiguous_backward()
    return drop(y if activation is None else activate(y, activation), dropout)


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout (Srivastava et al. 2014): in training, zeroes with probability p."""
    dropout = seeded_dropout(p, x.device)
    return x if dropout is None else (x * dropout.mask(*map(int, x.shape))).contiguous()


_dropout_seeds: ContextVar[Iterator[Tensor]] = ContextVar("dropout_seeds")


def dropout_seed(seed: Tensor) -> AbstractContextManager[None]:
    """Inside, what dropout drops follows from the seed, (1,) uint32, on every backend alike."""
    return kernels.setting(_dropout_seeds, kernels.seeds_from(seed))


def seeded_dropout(p: float, device: Any) -> kernels.Dropout | None:
    """Dropout with the next seed, outside of `dropout_seed` one of tinygrad's random numbers.

    None outside of training, `Context(TRAINING=1)`.
    """
    if not TRAINING or p == 0:
        return None
    seeds = _dropout_seeds.get(None)
    seed = next(seeds) if seeds else Tensor.rand(1, device=device).bitcast(dtypes.uint32)
    return kernels.Dropout(seed, p)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """GELU (Hendrycks & Gimpel 2016), exact or through tanh; ReLU; its square (So et al. 2021)."""
    if activation == "relu":
        y = x.relu()
    elif activation == "relu2":
        y = x.relu().square()
    else:
        y = x.gelu("tanh" if activation == "gelu_tanh" else "none")
    return y.contiguous().contiguous_backward()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (Ba et al. 2016)."""
    if kernels.usable(x):
        return kernels.layer_norm(x, weight, bias, eps)
    centred = x - x.mean(axis=-1, keepdim=True)
    variance = centred.square().mean(axis=-1, keepdim=True)
    y = centred * (variance + eps).rsqrt() * weight
    if bias is not None:
        y = y + bias
    return y.contiguous().contiguous_backward()


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, without weights (Zhang & Sennrich 2019)."""
    if kernels.usable(x):
        return kernels.rms_norm(x, eps)
    y = x * (x.square().mean(axis=-1, keepdim=True) + eps).rsqrt()
    return y.contiguous().contiguous_backward()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns each pair of channels i, i + D / 2 of x (..., T, D) by its position's angle, whose
    cosine and sine are in table (2, T, D / 2) (Su et al. 2021).

    The product of a turned query and a turned key depends on their distance, not their places.
    """
    cos, sin = table[0], table[1]  # (T, D / 2) each
    a, b = x.chunk(2, dim=-1)
    return (a * cos - b * sin).cat(a * sin + b * cos, dim=-1)


def rotary_table(size: int, head_size: int) -> Tensor:
    """Cosines and sines for `rotate`, (2, size, head_size / 2): angles t * base^(-2 i / D)."""
    frequencies = ROTARY_BASE ** (-2 * np.arange(head_size // 2) / head_size)
    angles = np.outer(np.arange(size), frequencies)
    return Tensor(np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)).realize()


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017).

    q (..., T, D), k and v (..., S, D); mask (T, S) is True where a query may look -> (..., T, D).
    """
    weights = attention_weights(q, k, mask)
    return (drop(weights, dropout) @ v).contiguous().contiguous_backward()


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """How much of each value a query takes: (..., T, S), every row adds up to 1."""
    scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).contiguous().contiguous_backward()
    if mask is not None:
        scores = mask.where(scores, -math.inf)
    return scores.softmax(axis=-1).contiguous().contiguous_backward()


def causal_attention(
    qkv: Tensor,
    n_head: int,
    dropout: float = 0.0,
    qk_norm: bool = False,
    rotary: Tensor | None = None,
    only_last: bool = False,
) -> Tensor:
    """Self-attention of all heads at once, each position seeing itself and the past.

    qkv (B, T, 3 C): q, k and v side by side, in each of them the heads -> (B, T, C), or (B, 1, C)
    of the last position alone. Queries and keys may be normalized first, then rotated by the angles
    in rotary (2, P >= T, D / 2).
    """
    B, T, C3 = qkv.shape
    if kernels.usable(qkv):
        if qk_norm or rotary is not None:
            qkv = kernels.norm_and_rotate(qkv, n_head, qk_norm, rotary)
        return kernels.attention(qkv, n_head, seeded_dropout(dropout, qkv.device), only_last)
    q, k, v = split_heads(qkv, n_head)  # (B, H, T, D) each
    q, k = (norm_and_rotate(x, qk_norm, rotary) for x in (q, k))
    mask = causal_mask(T, qkv.device)
    if only_last:
        q, mask = q[:, :, -1:], mask[-1:]
    y = attention(q, k, v, mask, dropout)
    return y.transpose(1, 2).reshape(B, q.shape[2], C3 // 3)  # the heads side by side again


def norm_and_rotate(x: Tensor, qk_norm: bool, rotary: Tensor | None) -> Tensor:
    """What queries and keys (..., T, D) go through before they meet."""
    x = rms_norm(x) if qk_norm else x
    if rotary is None:
        return x
    return rotate(x, rotary[:, : x.shape[-2]]).contiguous().contiguous_backward()


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3 C) -> q, k, v, each (B, H, T, D)."""
    B, T, C3 = qkv.shape
    parts = qkv.reshape(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4)
    q, k, v = (parts[i].contiguous_backward() for i in range(3))
    return q, k, v


def causal_mask(size: int | UOp, device: str | tuple[str, ...] | None = None) -> Tensor:
    """(size, size), True where position t may look at position s: itself and the past, s <= t."""
    return Tensor.ones(size, size, dtype=dtypes.bool, device=device, buffer=False).tril()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all positions of -log softmax(logits)[target], in nats.

    logits (B, T, V), targets (B, T) -> scalar; a position whose target is -1 adds 0 to the sum.
    """
    if kernels.usable(logits):
        return kernels.cross_entropy(logits, targets)
    classes = Tensor.arange(logits.shape[-1])
    is_target = targets.unsqueeze(-1) == classes  # (B, T, V)
    return -is_target.where(logits.log_softmax(axis=-1), 0.0).sum(axis=-1).mean()


# Layers -------------------------------------------------------------------------------------------


def normal(rng: Generator | None, shape: tuple[int, ...], std: float) -> Tensor:
    """Drawn by numpy, so that a seed gives the same weights on every backend.

    Without a generator the values are yet to come, from a file, and take no memory until then.
    """
    if rng is None:
        return Tensor.empty(*shape)
    return stored((std * rng.standard_normal(shape)).astype(np.float32))


def constant(value: float, size: int) -> Tensor:
    return stored(np.full(size, value, np.float32))


class Embedding:
    """weight (rows, C), normal(0, std): one row per token or position."""

    def __init__(self, rows: int, n_embd: int, rng: Generator | None, std: float = INIT_STD):
        self.weight = normal(rng, (rows, n_embd), std)


class Linear:
    """weight (out, in), normal(0, std); bias (out,), zero, or None."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        rng: Generator | None,
        bias: bool = False,
        std: float = INIT_STD,
    ):
        self.weight = normal(rng, (n_out, n_in), std)
        self.bias = constant(0.0, n_out) if bias else None

    def __call__(
        self, x: Tensor, activation: Activation | None = None, dropout: float = 0.0
    ) -> Tensor:
        return linear(x, self.weight, self.bias, activation, dropout)


class LayerNorm:
    """weight (C,), one; bias (C,), zero, or None."""

    def __init__(self, n_embd: int, bias: bool):
        self.weight = constant(1.0, n_embd)
        self.bias = constant(0.0, n_embd) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias)


class RMSNorm:
    """No weights."""

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x)


def make_norm(config: GPTConfig) -> LayerNorm | RMSNorm:
    return RMSNorm() if config.norm == "rms" else LayerNorm(config.n_embd, config.bias)


class Head:
    """One head of self-attention as the lecture writes it: (B, T, C) -> (B, T, head_size)."""

    def __init__(
        self, n_embd: int, head_size: int, dropout: float = 0.0, causal: bool = True, seed: int = 0
    ):
        rng = np.random.default_rng(seed)
        self.key = Linear(n_embd, head_size, rng)
        self.query = Linear(n_embd, head_size, rng)
        self.value = Linear(n_embd, head_size, rng)
        self.dropout, self.causal = dropout, causal

    def __call__(self, x: Tensor) -> Tensor:
        mask = causal_mask(x.shape[1], x.device) if self.causal else None  # (T, T)
        return attention(self.query(x), self.key(x), self.value(x), mask, self.dropout)


class CausalSelfAttention:
    """All heads at once, and the projection of their outputs back to the residual stream."""

    def __init__(self, config: GPTConfig, rng: Generator | None):
        C = config.n_embd
        self.c_attn = Linear(C, 3 * C, rng, config.bias)
        self.c_proj = Linear(C, C, rng, config.bias, std=residual_std(config))
        self.config = config

    def __call__(
        self,
        x: Tensor,
        rotary: Tensor | None = None,
        cache: Tensor | None = None,
        position: int | UOp = 0,
        only_last: bool = False,
    ) -> Tensor:
        (B, T, C), c = x.shape, self.config
        if cache is None:
            qkv = self.c_attn(x)  # (B, T, 3 C)
            y = causal_attention(qkv, c.n_head, c.attention_dropout, c.qk_norm, rotary, only_last)
        else:  # T is 1: the token at `position` looks at everything that the cache holds
            q, k, v = self.heads(x, rotary)  # (B, H, 1, D) each
            cache[:, :, :, position : position + 1].assign(Tensor.stack(k, v)).realize()
            y = attention(q, cache[0, :, :, : position + 1], cache[1, :, :, : position + 1])
            y = y.transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y, dropout=c.dropout)

    def heads(self, x: Tensor, rotary: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, T, C), as they meet: (B, H, T, D) each."""
        c = self.config
        q, k, v = split_heads(self.c_attn(x), c.n_head)
        return norm_and_rotate(q, c.qk_norm, rotary), norm_and_rotate(k, c.qk_norm, rotary), v


class MLP:
    """Linear to 4 C, nonlinearity, linear back to C."""

    def __init__(self, config: GPTConfig, rng: Generator | None):
        C = config.n_embd
        self.c_fc = Linear(C, 4 * C, rng, config.bias)
        self.c_proj = Linear(4 * C, C, rng, config.bias, std=residual_std(config))
        self.activation, self.dropout = config.activation, config.dropout

    def __call__(self, x: Tensor) -> Tensor:
        hidden = self.c_fc(x, self.activation)  # (B, T, 4 C)
        return self.c_proj(hidden, dropout=self.dropout)


class Block:
    """Communication, then computation, each added to the residual stream (B, T, C)."""

    def __init__(self, config: GPTConfig, rng: Generator | None):
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, rng)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config, rng)

    def __call__(
        self,
        x: Tensor,
        rotary: Tensor | None = None,
        cache: Tensor | None = None,
        position: int | UOp = 0,
        only_last: bool = False,
    ) -> Tensor:
        y = self.attn(self.ln_1(x), rotary, cache, position, only_last)  # (B, T or 1, C)
        x = (x[:, -1:] if only_last else x) + y
        return x + self.mlp(self.ln_2(x))


def residual_std(config: GPTConfig) -> float:
    """GPT-2 shrinks the layers that add to the residual stream, two per block, to keep its size."""
    return INIT_STD / math.sqrt(2 * config.n_layer)


# Models -------------------------------------------------------------------------------------------


class LanguageModel:
    """What both models share: the loss, the parameters by name, and writing text."""

    config: ModelConfig

    def logits(self, idx: Tensor) -> Tensor:
        """idx (B, T) int -> (B, T, V): the logits of each position's next token."""
        raise NotImplementedError

    def decoder(self, batch_size: int) -> Decoder:
        """A function from tokens (B, T) to the logits (B, V) of the token that follows them."""
        raise NotImplementedError

    def __call__(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits and loss.

        Args:
            idx: (B, T) int tokens, T <= block_size.
            targets: (B, T) int, the token that follows each; -1 where there is none.

        Returns:
            logits (B, T, V), and the mean cross-entropy in nats (scalar), None without targets.

        Raises:
            InputError: a wrong shape or dtype, a context that is too long, or a token outside the
                vocabulary (while a TinyJit captures there are no values yet, and none are checked).
        """
        self._check_tokens("idx", idx, 0)
        if targets is not None:
            if targets.shape != idx.shape:
                raise InputError(
                    f"targets have shape {targets.shape}; they must have idx's, {idx.shape}"
                )
            self._check_tokens("targets", targets, -1)
        logits = self.logits(idx)
        return logits, None if targets is None else cross_entropy(logits, targets)

    def parameters(self) -> dict[str, Tensor]:
        """Every trainable tensor by GPT-2's name for it, in the order of the data."""
        return nn.state.get_state_dict(self)

    def use(self, tensors: dict[str, Tensor]) -> None:
        """Puts these tensors in the place of the parameters of the same names."""
        for name, tensor in tensors.items():
            owner: Any = self
            *path, attribute = name.split(".")
            for key in path:
                owner = owner[int(key)] if key.isdigit() else getattr(owner, key)
            setattr(owner, attribute, tensor)

    def num_parameters(self) -> int:
        """Number of trainable values without the position table, as papers count them."""
        return sum(int(p.numel()) for n, p in self.parameters().items() if n != "wpe.weight")

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continues each row of idx (B, T), by sampling; temperature 0 takes the likeliest token.

        Contexts longer than block_size are cut to their last block_size tokens. The same seed gives
        the same text; without one every call gives another.

        Returns:
            (B, T + max_new_tokens) int32, idx included.

        Raises:
            InputError: an empty prompt, a token outside the vocabulary, an option out of range.
        """
        self._check_tokens("idx", idx, 0, any_length=True)
        tokens = idx.numpy().astype(np.int32)
        new = sample_tokens(
            self.decoder(len(tokens)), tokens, max_new_tokens, temperature, top_k, top_p, seed
        )
        return Tensor(np.concatenate([tokens, *(column[:, None] for column in new)], axis=1))

    def _check_tokens(
        self, name: str, tokens: Tensor, minimum: int, any_length: bool = False
    ) -> None:
        config = self.config
        if tokens.ndim != 2 or not dtypes.is_int(tokens.dtype) or 0 in tokens.shape:
            raise InputError(
                f"{name} has shape {tokens.shape} and dtype {tokens.dtype}; "
                "it must be (batch, time) of integers, with at least one token"
            )
        if isinstance(config, GPTConfig) and not any_length and tokens.shape[1] > config.block_size:
            raise InputError(
                f"{name} has {tokens.shape[1]} tokens per row; "
                f"this model's block_size is {config.block_size}"
            )
        if capturing:
            return
        values = tokens.numpy()
        wrong = values[(values < minimum) | (values >= config.vocab_size)]
        if wrong.size:
            raise InputError(
                f"{name} holds token {wrong.flat[0]}; "
                f"this model's vocabulary is 0 .. {config.vocab_size - 1}"
            )


class BigramLanguageModel(LanguageModel):
    """The lecture's first model: the next token's logits are a row of a V x V table.

    The table starts as unit normal, as the lecture's does: the loss is ln V plus about one half.
    """

    config: BigramConfig

    def __init__(self, vocab_size: int, block_size: int = 8, seed: int | None = 0):
        self.config = BigramConfig(block_size, vocab_size)
        self.wte = Embedding(vocab_size, vocab_size, np.random.default_rng(seed), std=1.0)

    def logits(self, idx: Tensor) -> Tensor:
        return self.wte.weight[idx]

    def decoder(self, batch_size: int) -> Decoder:
        return lambda tokens: np.asarray(self.wte.weight.numpy()[tokens[:, -1]])


class GPT(LanguageModel):
    """GPT-2 (Radford et al. 2019): embeddings, n_layer blocks, a last layer norm, logits."""

    config: GPTConfig

    def __init__(self, config: GPTConfig, seed: int | None = 0):
        """Draws the weights; with seed None they have no values until they are assigned."""
        rng = None if seed is None else np.random.default_rng(seed)
        c = self.config = config
        self.wte = Embedding(c.vocab_size, c.n_embd, rng)
        self.rotary = None
        if c.position == "rotary":
            self.rotary = rotary_table(c.block_size, c.n_embd // c.n_head)
        else:
            self.wpe = Embedding(c.block_size, c.n_embd, rng)
        self.h = [Block(c, rng) for _ in range(c.n_layer)]
        self.ln_f = make_norm(c)
        if not c.tie_weights:
            self.lm_head = Linear(c.n_embd, c.vocab_size, rng)

    def parameters(self) -> dict[str, Tensor]:
        found = super().parameters()
        found.pop("rotary", None)  # it is not trained
        return found

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str]) -> GPT:
        """The model that others, or a run, have trained.

        Args:
            source: `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl` (downloaded once); the folder of
                a run, of Hugging Face's GPT-2 or of nanoGPT; a .safetensors or .pt file.

        Raises:
            InputError: there is no such model, or it is damaged or not a GPT-2; it says why.
        """
        from tinygpt.interop import load_pretrained  # which needs this module

        return load_pretrained(source)[0]

    def logits(self, idx: Tensor) -> Tensor:
        return self._head(self._stream(idx))

    def last_logits(self, idx: Tensor) -> Tensor:
        """Those of the token that follows idx (B, T), (B, V): the others are not computed."""
        return self._head(self._stream(idx, only_last=True))[:, 0]

    def _stream(self, idx: Tensor, only_last: bool = False) -> Tensor:
        """The residual stream behind the last block: (B, T, C), or (B, 1, C) of the last token."""
        x = self.embed(idx)
        for block in self.h:
            x = block(x, self.rotary, only_last=only_last and block is self.h[-1])
        return x

    def embed(self, idx: Tensor) -> Tensor:
        """What enters the first block: idx (B, T) -> (B, T, C)."""
        wpe = self.wpe.weight if self.rotary is None else None
        return self._enter(embedding(idx, self.wte.weight, wpe))

    def _enter(self, x: Tensor) -> Tensor:
        x = rms_norm(x) if self.config.norm == "rms" else x
        return drop(x, self.config.dropout)

    def _head(self, x: Tensor) -> Tensor:
        weight = self.wte.weight if self.config.tie_weights else self.lm_head.weight
        return linear(self.ln_f(x), weight)

    def decode(self, idx: Tensor, caches: list[Tensor], position: int | UOp) -> Tensor:
        """One step of cached generation: idx (B, 1), the token at `position` -> logits (B, V).

        Each block's keys and values of all tokens before are in its cache, those of this one are
        added; see `empty_caches`.
        """
        x, rotary = self.wte.weight[idx], None  # (B, 1, C)
        if self.rotary is None:
            x = x + self.wpe.weight[position : position + 1]
        else:
            rotary = self.rotary[:, position : position + 1]
        x = self._enter(x)
        for block, cache in zip(self.h, caches, strict=True):
            x = block(x, rotary, cache, position)
        return self._head(x)[:, 0]

    def empty_caches(self, batch_size: int) -> list[Tensor]:
        """Per block (2, B, H, block_size, D): room for every position's key and value."""
        c = self.config
        shape = (2, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)
        return [Tensor.zeros(*shape).contiguous().realize() for _ in self.h]

    def decoder(self, batch_size: int) -> Decoder:
        return CachedDecoder(self, batch_size)


def is_inner(name: str, parameter: Tensor) -> bool:
    """Whether it is the weight of a linear layer in a block, which is used once."""
    return name.startswith("h.") and parameter.ndim >= 2


def build_model(config: ModelConfig, seed: int | None = 0) -> LanguageModel:
    """The untrained model of this configuration; without a seed its weights have no meaning."""
    if isinstance(config, BigramConfig):
        return BigramLanguageModel(config.vocab_size, config.block_size, seed)
    return GPT(config, seed)


class CachedDecoder:
    """Logits of the next token, for a text that grows by a token at a time.

    Up to block_size tokens the keys and values of the past are cached and a step costs one token;
    the position is a variable of one compiled step. Beyond, the context slides: every token's
    position changes, so nothing cached holds and the last block_size tokens are read again, in
    another compiled step. Both give what the model gives for the same context.
    """

    PACKED = 256  # with longer blocks the time that packed weights save is not worth their memory

    def __init__(self, model: GPT, batch_size: int):
        self.block_size = model.config.block_size
        self.caches = model.empty_caches(batch_size)
        self.cached = 0  # so many leading tokens are in the caches
        self.last, self.context = (
            Tensor(np.zeros((batch_size, length), np.int32)).realize()
            for length in (1, self.block_size)
        )
        device = str(self.last.device)
        position = UOp.variable("position", 0, self.block_size - 1)
        self.step = Launcher(
            lambda at: model.decode(self.last, self.caches, at).realize(), device, (position,)
        )
        fast = kernels.usable(self.caches[0]) and self.block_size <= self.PACKED
        self.weights = [w for n, w in model.parameters().items() if fast and is_inner(n, w)]
        self.pack = Launcher(lambda: [kernels.pack(w).realize() for w in self.weights], device)
        self.packed: dict[UOp, Tensor] = {}
        self.sliding = False

        def read_context() -> Tensor:
            with kernels.inference(self.packed):
                return model.last_logits(self.context).contiguous().realize()

        self.window = Launcher(read_context, device)

    def __call__(self, tokens: Tokens) -> NDArray[np.float32]:
        n_tokens = tokens.shape[1]
        if n_tokens > self.block_size:
            if self.weights and not self.sliding:  # since another text they may have changed
                self.packed = dict(zip((w.uop for w in self.weights), self.pack(), strict=True))
            self.sliding = True
            write(self.context, tokens[:, -self.block_size :])
            return read(self.window())
        self.sliding = False
        if n_tokens <= self.cached:  # another text has begun
            self.cached = 0
        for i in range(self.cached, n_tokens):
            write(self.last, tokens[:, i : i + 1])
            logits = self.step(i)
        self.cached = n_tokens
        return read(logits)


def stored(values: NDArray[np.float32]) -> Tensor:
    """A realized tensor of these values; an eighth of the time of `Tensor(values).realize()`."""
    tensor = Tensor.empty(*values.shape, dtype=dtypes.float).realize()
    buffer: Any = tensor.uop.base.buffer
    buffer.ensure_allocated()
    write(tensor, values)
    return tensor


def write(tensor: Tensor, values: NDArray[Any]) -> None:
    """Copies values into a realized tensor's buffer; an `assign` would build a graph to do so."""
    buffer: Any = tensor.uop.base.buffer
    buffer.allocator._copyin(buffer._buf, np.ascontiguousarray(values).data.cast("B"))


def read(tensor: Tensor) -> NDArray[np.float32]:
    """The values of a realized float32 tensor that fills its buffer, as quickly."""
    buffer: Any = tensor.uop.base.buffer
    values = np.frombuffer(buffer.as_memoryview(allow_zero_copy=True), np.float32)
    return values.reshape(tensor.shape).copy()
