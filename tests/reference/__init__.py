"""A GPT, its gradients and its training, in numpy and float64, derived by hand.

This is the yardstick: `tests/parity` compares the tinygrad model with it, value by value, on every
backend. It is written to be read beside a textbook, not to be fast, and uses nothing of tinygpt, of
tinygrad, or of any automatic differentiation. `tests/test_reference.py` proves every backward pass
here with central finite differences.

Conventions
    B batch, T time, C channels, V vocabulary, H heads, D = C / H channels of one head.
    Every operation is a pair: `name(inputs)` gives the output y, and `name_backward(dy, inputs)`
    gives the gradients of the inputs, where dz stands for dL/dz, L being the scalar loss.
    A backward pass computes again whatever it needs of the forward pass: nothing is cached, so
    each formula stands alone.
    Parameters are a dict from GPT-2's names ("h.0.attn.c_attn.weight", ...) to arrays; linear
    weights are (out, in). Biases, and with tied weights `lm_head.weight`, are simply absent.

Modules, in the order of reading: `layers`, `attention`, `models`, `training`, `sampling`;
`examples` makes random weights for tests.
"""

from .attention import (
    attention,
    attention_backward,
    head,
    head_backward,
    place,
    place_backward,
    rotate,
)
from .examples import random_masks, random_parameters
from .layers import (
    Array,
    cross_entropy,
    cross_entropy_backward,
    dropout,
    dropout_backward,
    embedding,
    embedding_backward,
    gelu,
    gelu_backward,
    gelu_tanh,
    gelu_tanh_backward,
    layer_norm,
    layer_norm_backward,
    linear,
    linear_backward,
    relu,
    relu2,
    relu2_backward,
    relu_backward,
    rms_norm,
    rms_norm_backward,
    softmax,
    softmax_backward,
)
from .models import (
    Parameters,
    attention_layer,
    attention_layer_backward,
    bigram,
    bigram_backward,
    block,
    block_backward,
    gpt,
    gpt_backward,
    mlp,
    mlp_backward,
)
from .sampling import generate, probabilities, sample
from .training import (
    Moments,
    adamw,
    clip_by_global_norm,
    learning_rate,
    linear_decay,
    muon,
    orthogonalized,
)

__all__ = [
    "Array",
    "Moments",
    "Parameters",
    "adamw",
    "attention",
    "attention_backward",
    "attention_layer",
    "attention_layer_backward",
    "bigram",
    "bigram_backward",
    "block",
    "block_backward",
    "clip_by_global_norm",
    "cross_entropy",
    "cross_entropy_backward",
    "dropout",
    "dropout_backward",
    "embedding",
    "embedding_backward",
    "gelu",
    "gelu_backward",
    "gelu_tanh",
    "gelu_tanh_backward",
    "generate",
    "gpt",
    "gpt_backward",
    "head",
    "head_backward",
    "layer_norm",
    "layer_norm_backward",
    "learning_rate",
    "linear",
    "linear_backward",
    "linear_decay",
    "mlp",
    "mlp_backward",
    "muon",
    "orthogonalized",
    "place",
    "place_backward",
    "probabilities",
    "random_masks",
    "random_parameters",
    "relu",
    "relu2",
    "relu2_backward",
    "relu_backward",
    "rms_norm",
    "rms_norm_backward",
    "rotate",
    "sample",
    "softmax",
    "softmax_backward",
]
