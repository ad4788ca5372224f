"""A minimal GPT in pure tinygrad: tokenizer, batches, bigram and attention models, training."""

from tinygpt.device import prepare as prepare_device

prepare_device()  # before anything else looks for a device

from tinygpt.programs import install  # noqa: E402

install()

from tinygpt.batches import get_batch, split_tokens  # noqa: E402
from tinygpt.config import PRESETS, BigramConfig, GPTConfig, InputError, TrainConfig  # noqa: E402
from tinygpt.corpus import load_corpus  # noqa: E402
from tinygpt.model import (  # noqa: E402
    GPT,
    MLP,
    BigramLanguageModel,
    Block,
    CausalSelfAttention,
    Head,
)
from tinygpt.tokenizer import CharTokenizer, GPT2Tokenizer  # noqa: E402

__all__ = [
    "GPT",
    "MLP",
    "PRESETS",
    "BigramConfig",
    "BigramLanguageModel",
    "Block",
    "CausalSelfAttention",
    "CharTokenizer",
    "GPT2Tokenizer",
    "GPTConfig",
    "Head",
    "InputError",
    "TrainConfig",
    "get_batch",
    "load_corpus",
    "split_tokens",
]
