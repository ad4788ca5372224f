"""The same GPT in torch's own layers, and Hugging Face's GPT-2: logits and every gradient.

Optional: skipped without torch, or without transformers. The reference is what the model is judged
by; peers guard against a misunderstanding that the model and the reference have in common.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tinygrad import Tensor

from tests.reference import Array
from tinygpt.config import GPTConfig

from .compare import assert_close
from .models import FULL, TINY, B, T, build, random_batch, tokens

torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[bench]'")


def tinygpt_results(
    config: GPTConfig, idx: np.ndarray, targets: np.ndarray
) -> tuple[dict[str, Array], Tensor, dict[str, Tensor]]:
    """(weights, logits, gradients)."""
    model, p = build(config)
    logits, loss = model(tokens(idx), tokens(targets))
    assert loss is not None
    gradients = loss.gradient(*model.parameters().values())
    logits.realize(*gradients)
    return p, logits, dict(zip(model.parameters(), gradients, strict=True))


def torch_gpt(w: dict[str, Any], idx: Any, config: GPTConfig) -> Any:
    """GPT-2 from torch's own layers and fused attention; w maps names to torch tensors."""
    F, C = torch.nn.functional, config.n_embd

    def linear(x: Any, name: str) -> Any:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x: Any, name: str) -> Any:
        return F.layer_norm(x, (C,), w[f"{name}.weight"], w.get(f"{name}.bias"))

    def heads(x: Any) -> Any:
        return x.view(*idx.shape, config.n_head, -1).transpose(1, 2)

    x = F.embedding(idx, w["wte.weight"]) + w["wpe.weight"][: idx.shape[1]]
    for i in range(config.n_layer):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(C, dim=-1)
        y = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True)
        x = x + linear(y.transpose(1, 2).reshape(x.shape), f"h.{i}.attn.c_proj")
        hidden = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        x = x + linear(F.gelu(hidden, approximate="tanh"), f"h.{i}.mlp.c_proj")
    return F.linear(norm(x, "ln_f"), w.get("lm_head.weight", w["wte.weight"]))


@pytest.mark.parametrize("config", [TINY, FULL], ids=["tied, plain", "untied, biases"])
def test_torch(config: GPTConfig) -> None:
    idx, targets = random_batch(seed=6)
    p, logits, gradients = tinygpt_results(config, idx, targets)
    w = {name: torch.tensor(a, dtype=torch.float64, requires_grad=True) for name, a in p.items()}
    peer_logits = torch_gpt(w, torch.tensor(idx), config)
    loss = torch.nn.functional.cross_entropy(
        peer_logits.view(B * T, -1), torch.tensor(targets).view(-1)
    )
    loss.backward()
    assert_close("logits", {"logits": logits}, {"logits": peer_logits.detach().numpy()})
    assert_close("gradient", gradients, {name: t.grad.numpy() for name, t in w.items()})


def test_hugging_face() -> None:
    """Their linear weights in attention and MLP are (in, out), and must be turned over."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install '.[interop]'"
    )
    config = replace(TINY, bias=True)
    idx, targets = random_batch(seed=7)
    p, logits, gradients = tinygpt_results(config, idx, targets)
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
            n_layer=config.n_layer, n_head=config.n_head,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )
    ).double()  # fmt: skip
    theirs = dict(peer.transformer.named_parameters())
    with torch.no_grad():
        for name, tensor in theirs.items():
            tensor.copy_(torch.tensor(turned(name, p[name])))
    peer_logits = peer(torch.tensor(idx)).logits
    loss = torch.nn.functional.cross_entropy(
        peer_logits.view(B * T, -1), torch.tensor(targets).view(-1)
    )
    loss.backward()
    assert_close("logits", {"logits": logits}, {"logits": peer_logits.detach().numpy()})
    expected = {name: turned(name, t.grad.numpy()) for name, t in theirs.items()}
    assert_close("gradient", gradients, expected)


def turned(name: str, array: Array) -> Array:
    return array.T if array.ndim == 2 and name.startswith("h.") else array
